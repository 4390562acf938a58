"""Units that heal: the recipes of examples/ and of `create`, through all that can happen."""

import re
from pathlib import Path

from e2e import healing
from e2e.harness import scenario
from e2e.healing import BACKEND, GATE, PROGRAM, Subject, datagrams, heals
from e2e.machine import TOOLS, Machine
from e2e.scenarios.user_manager import UserManager

EXAMPLES = Path(__file__).parents[3] / "examples"

QUADLETS = "/etc/containers/systemd"

NO_DATAGRAMS = "forwards no datagrams"

SHORT = "--exit-idle-time=2s --idle-timeout=2s"


def example(folder: str, **backends: str) -> dict[str, str]:
    """The units of an example, resting sooner, whose backends run our own for ExecStart=."""
    units = {}
    for path in sorted((EXAMPLES / folder).rglob("*")):
        if path.suffix in (".service", ".socket", ".conf") and path.name != "nginx.conf":
            units[str(path.relative_to(EXAMPLES / folder))] = path.read_text()
        elif path.suffix == ".container":
            units[f"{QUADLETS}/{path.name}"] = path.read_text()
    return adapted(units, **backends)


def adapted(units: dict[str, str], **backends: str) -> dict[str, str]:
    """Put our program, short spans and, by NAME=ADDRESS, our backends into units."""
    return {name: _adapted(text, backends.get(_plain(name), "")) for name, text in units.items()}


def _plain(name: str) -> str:
    """The name of a unit as that of an argument."""
    return (
        re.sub(r"\.(service|container)$", "", name.rpartition("/")[2]).replace("-", "_").rstrip("@")
    )


def _adapted(text: str, address: str) -> str:
    ours = text.replace("/usr/bin/systemd-socket-proxyd", PROGRAM)
    ours = re.sub(r"--exit-idle-time=\S+( --idle-timeout=\S+)?", SHORT, ours)
    if not address:
        return ours
    gated = f"{GATE}ExecStart={BACKEND} {address}"
    ours = re.sub(r"^ExecStart=.*", lambda _: gated, ours, flags=re.MULTILINE)
    ours = re.sub(r"^ExecStop=.*\n", "", ours, flags=re.MULTILINE)
    return ours.replace("[Unit]", "[Unit]\nConditionPathExists=!/run/e2e-heal/refuse", 1)


def app(m: Machine, folder: str, address: str = "127.0.0.1 8001", **more: str) -> Subject:
    names = {"sockets": "app-proxy.socket", "proxy": "app-proxy.service", "backend": "app.service"}
    return Subject(
        m, example(folder, app=address), **(names | {"address": "TCP:127.0.0.1:8000"} | more)
    )


@scenario(needs="--connect-timeout", original="has no --connect-timeout=")
def heals_on_demand(m: Machine) -> str:
    """examples/on-demand, through everything that can happen"""
    return heals(app(m, "on-demand"))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_before_249(m: Machine) -> str:
    """examples/before-249, through all but a start that a condition refuses"""
    # Nothing has failed then, so Restart= does nothing: the next start is after the next rest.
    return heals(app(m, "before-249"), without=(healing.refused_start,))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=")
def heals_always_on(m: Machine) -> str:
    """examples/always-on, through everything that can happen; it never rests"""
    return heals(app(m, "always-on"), without=(healing.idle_stop, healing.slow_stop))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_template(m: Machine) -> str:
    """examples/template, through everything that can happen"""
    return heals(
        app(
            m,
            "template",
            "127.0.0.2 %i",
            sockets="app-proxy@8000.socket",
            proxy="app-proxy@8000.service",
            backend="app@8000.service",
        )
    )


@scenario(needs="unix-dgram", original=NO_DATAGRAMS, slow=True)
def heals_game_server(m: Machine) -> str:
    """examples/game-server, with our backend for the game, through everything that can happen"""
    return heals(
        Subject(
            m,
            example("game-server", game="udp 127.0.0.1 30001"),
            sockets="game-proxy.socket",
            proxy="game-proxy.service",
            backend="game.service",
            address=datagrams(30000),
        )
    )


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_accept(m: Machine) -> str:
    """examples/accept, a proxy for each connection: what can happen to the backend"""
    return heals_per_connection(app(m, "accept", proxy="app-proxy@*.service"))


def heals_per_connection(s: Subject) -> str:
    not_of_it = (  # a connection is all that keeps the backend up, and no proxy is the next one's
        healing.crash,
        healing.crash_with_clients,
        healing.reload,
        healing.proxy_killed,
        healing.proxy_killed_often,
        healing.proxy_cannot_start,
        healing.restarts_by_hand,
        healing.idle_stop,
        healing.slow_stop,
        healing.stop_all,
    )
    s.machine.client(f"exec socat -u {s.address} -")
    s.wait("the backend runs", lambda: s.machine.is_active(s.backend))
    s.kill(s.backend)
    s.served("after a crash")
    return heals(s, without=not_of_it)


def nginx(m: Machine, folder: str, address: str, proxy: str = "proxy-to-nginx") -> Subject:
    """The example, with our backend under the name of nginx."""
    service = f"[Service]\n{GATE}ExecStart={BACKEND} {address}\n"
    condition = "[Unit]\nConditionPathExists=!/run/e2e-heal/refuse\n"
    units = example(folder) | {"nginx.service": condition + service}
    return Subject(
        m,
        units,
        sockets=f"{proxy}.socket",
        proxy=f"{proxy}.service",
        backend="nginx.service",
        address="TCP:127.0.0.1:80",
    )


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_unix_target(m: Machine) -> str:
    """examples/nginx, a UNIX target, through everything that can happen"""
    return heals(nginx(m, "nginx", "/run/nginx/socket"))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_namespace(m: Machine) -> str:
    """examples/nginx-namespace, one private network, through everything that can happen"""
    return heals(nginx(m, "nginx-namespace", "127.0.0.1 8080"))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_proxy_protocol(m: Machine) -> str:
    """examples/proxy-protocol, whose target gets a header, through everything that can happen"""
    return heals(nginx(m, "proxy-protocol", "/run/nginx/socket", "web-proxy"))


WEB = {"sockets": "web-proxy.socket", "proxy": "web-proxy.service", "address": "TCP:127.0.0.1:8080"}


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_container(m: Machine) -> str:
    """examples/container, with our backend for podman, through everything that can happen"""
    units = example("container", web_container="127.0.0.1 8081")
    return heals(Subject(m, units, backend="web-container.service", **WEB))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_quadlet(m: Machine) -> str:
    """examples/quadlet, with our backend for podman, through everything that can happen"""
    install_quadlet(m)
    return heals(Subject(m, example("quadlet", web="127.0.0.1 8081"), backend="web.service", **WEB))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_compose(m: Machine) -> str:
    """examples/compose, with our backend for docker, through everything that can happen"""
    units = example("compose")
    units["web-compose.service"] = REFUSED + units["web-compose.service"]
    return heals(compose(m, units, "web-compose.service", **WEB))


REFUSED = "[Unit]\nConditionPathExists=!/run/e2e-heal/refuse\n"


def compose(m: Machine, units: dict[str, str], backend: str, **names: str) -> Subject:
    """A set whose backend is a project: what crashes is its container, a unit of its own here."""
    m.replace("/usr/bin/docker", DOCKER)
    m.uses("e2e-container.service")
    return Subject(m, units, backend=backend, crashes="e2e-container.service", **names)


# As dockerd does with "restart: unless-stopped", the container comes back until it is stopped.
DOCKER = f"""#!/bin/sh
case " $* " in
*" up "*)
    test ! -e /run/e2e-heal/fail || exit 1
    systemctl is-active --quiet e2e-container.service || exec systemd-run --quiet --collect \\
        --unit=e2e-container.service --property=Restart=always --property=RestartSec=200ms \\
        --property=StartLimitIntervalSec=0 {BACKEND} 127.0.0.1 8081 ;;
*" stop "*) exec systemctl stop e2e-container.service ;;
esac
"""


def install_quadlet(m: Machine) -> None:
    """What Podman's generator makes of a .container, and a podman that runs our backend."""
    m.replace("/usr/bin/podman", PODMAN)
    # It has the name of Podman's own, and comes before it.
    generator = m.write("/etc/systemd/system-generators/podman-system-generator", "", mode="755")
    m.sh(f"cp {TOOLS}/quadlet.py {generator}")


PODMAN = f"""#!/bin/sh
test "$1" = run || exit 0
test ! -e /run/e2e-heal/fail || exit 125
systemd-notify --ready
exec {BACKEND} 127.0.0.1 8081
"""


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_user(m: Machine) -> str:
    """examples/user, in a user's service manager, through everything that can happen"""
    return heals_for_user(m, example("user", app="%t/app/socket"), "app.service", "app-proxy", 8000)


def heals_for_user(m: Machine, units: dict[str, str], backend: str, proxy: str, port: int) -> str:
    user = UserManager(m)
    try:
        return heals(
            UserSubject(
                user,
                units,
                sockets=f"{proxy}.socket",
                proxy=f"{proxy}.service",
                backend=backend,
                address=f"TCP:127.0.0.1:{port}",
            )
        )
    finally:
        user.end()


class UserSubject(Subject):
    """A set of units of a user's service manager."""

    def __init__(self, user: UserManager, units: dict[str, str], **names: str):
        self.user = user
        self.folder = user.folder
        self.systemctl = user.systemctl
        super().__init__(user.m, units, **names)

    def register(self, written: list[str]) -> None:
        """They end with their manager."""

    def restart_all(self) -> None:
        """Start the manager anew, as a reboot does for a user who lingers."""
        self.user.restart()


# What `create` writes: (its arguments, where the backend listens, what it is not put through).

NEVER_RESTS = (healing.idle_stop, healing.slow_stop)
SEVERAL = (
    "--listen=a=127.0.0.1:9000 --listen=b=127.0.0.1:9001 "
    "--target=a=127.0.0.1:8000 --target=b=127.0.0.1:8000"
)
LISTEN, TARGET = "--listen=127.0.0.1:9000", "--target=127.0.0.1:8000"

CREATED = {
    "on demand": (f"{LISTEN} {TARGET} --on-demand", "127.0.0.1 8000", ()),
    "always on": (f"{LISTEN} {TARGET}", "127.0.0.1 8000", NEVER_RESTS),
    "namespace": (f"{LISTEN} {TARGET} --on-demand --namespace", "127.0.0.1 8000", ()),
    "namespace always on": (f"{LISTEN} {TARGET} --namespace", "127.0.0.1 8000", NEVER_RESTS),
    "unix": (f"{LISTEN} --target=/run/back/socket --on-demand", "/run/back/socket", ()),
    "before 249": (
        f"{LISTEN} {TARGET} --on-demand --systemd=248",
        "127.0.0.1 8000",
        (healing.refused_start,),
    ),
    "before 249 always on": (
        f"{LISTEN} {TARGET} --systemd=248",
        "127.0.0.1 8000",
        (*NEVER_RESTS, healing.refused_start),
    ),
    "several sockets": (
        f"{SEVERAL} --on-demand",
        "127.0.0.1 8000",
        (),
    ),
    "datagrams": (f"--listen=udp:127.0.0.1:9000 {TARGET} --on-demand", "udp 127.0.0.1 8000", ()),
    "datagrams always on": (
        f"--listen=udp:127.0.0.1:9000 {TARGET}",
        "udp 127.0.0.1 8000",
        NEVER_RESTS,
    ),
    "both kinds": (
        f"{LISTEN} --listen=udp:127.0.0.1:9000 {TARGET} --on-demand",
        "both 127.0.0.1 8000",
        (),
    ),
    "template": (
        "--listen=127.0.0.1:%i --target=127.0.0.2:%i --on-demand",
        "127.0.0.2 %i",
        (),
    ),
}

BACK = """\
[Unit]
ConditionPathExists=!/run/e2e-heal/refuse
[Service]
{gate}ExecStart={backend} {address}
RuntimeDirectory=back
"""


def add_create(name: str) -> None:
    arguments, address, without = CREATED[name]

    def body(m: Machine) -> str:
        return heals(created(m, arguments, address), without=without)

    add(name, body, slow=name != "on demand")


def add(name: str, body, slow: bool = True) -> None:
    body.__name__ = f"create_{name.replace(' ', '_')}"
    body.__doc__ = f"what `create` writes ({name}), through everything that can happen"
    scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=slow)(body)


def created(m: Machine, arguments: str, address: str) -> Subject:
    backend = "back@.service" if "%i" in address else "back.service"
    units = create(m, f"{arguments} --backend={backend}")
    units[backend] = BACK.format(gate=GATE, backend=BACKEND, address=address)
    names = {}
    if "%i" in address:
        names = {
            "sockets": "heal@9000.socket",
            "proxy": "heal@9000.service",
            "backend": "back@9000.service",
        }
    elif "heal-b.socket" in units:
        both = "TCP:127.0.0.1:9000 TCP:127.0.0.1:9001"
        names = {"sockets": "heal-a.socket heal-b.socket", "address": both}
    elif address.startswith("udp "):
        names = {"address": datagrams(9000)}
    elif address.startswith("both "):
        names = {"address": f"TCP:127.0.0.1:9000 {datagrams(9000)}"}
    return Subject(m, units, **names)


def create(m: Machine, arguments: str) -> dict[str, str]:
    """The units that `create` writes."""
    text = m.sh(f"{m.program}-units create --name=heal {arguments}")
    pieces = re.split(r"^---(.*)---\n", text, flags=re.MULTILINE)[1:]
    return adapted(dict(zip(pieces[::2], pieces[1::2], strict=True)))


for one in CREATED:
    add_create(one)


def create_accept(m: Machine) -> str:
    units = create(m, f"{LISTEN} {TARGET} --on-demand --accept --backend=back.service")
    units["back.service"] = BACK.format(gate=GATE, backend=BACKEND, address="127.0.0.1 8000")
    return heals_per_connection(Subject(m, units, proxy="heal@*.service"))


def create_user(m: Machine) -> str:
    units = create(m, f"{LISTEN} {TARGET} --on-demand --user --backend=back.service")
    units["back.service"] = BACK.format(gate=GATE, backend=BACKEND, address="127.0.0.1 8000")
    return heals_for_user(m, units, "back.service", "heal", 9000)


CONTAINER = """\
[Unit]
ConditionPathExists=!/run/e2e-heal/refuse
[Container]
Image=localhost/web
PublishPort=127.0.0.1:8081:80
"""


def create_quadlet(m: Machine) -> str:
    install_quadlet(m)
    file = m.write(f"{QUADLETS}/web.container", CONTAINER)
    units = create(m, f"{LISTEN} --on-demand --backend={file}")
    return heals(Subject(m, units, backend="web.service"))


def create_compose(m: Machine) -> str:
    return heals(created_project(m, "--on-demand"))


def create_compose_always_on(m: Machine) -> str:
    return heals(created_project(m, ""), without=NEVER_RESTS)


def created_project(m: Machine, options: str) -> Subject:
    file = m.write(f"{m.folder}/web.yaml", "services: {}\n")
    units = create(m, f"{LISTEN} --target=127.0.0.1:8081 --backend={file} {options}")
    units["web-compose.service"] = REFUSED + units["web-compose.service"]
    return compose(m, units, "web-compose.service")


for one, function in {
    "accept": create_accept,
    "user": create_user,
    "quadlet": create_quadlet,
    "compose": create_compose,
    "compose always on": create_compose_always_on,
}.items():
    add(one, function)
