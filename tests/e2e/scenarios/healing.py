"""Units that heal: the recipes of examples/ and of `create`, through all that can happen."""

import re
from pathlib import Path

from e2e import healing
from e2e.harness import scenario
from e2e.healing import BACKEND, GATE, PROGRAM, Subject, heals
from e2e.machine import Machine

EXAMPLES = Path(__file__).parents[3] / "examples"

SHORT = "--exit-idle-time=2s --idle-timeout=2s"


def example(folder: str, **backends: str) -> dict[str, str]:
    """The units of an example, resting sooner, whose backends run our own for ExecStart=."""
    units = {}
    for path in sorted((EXAMPLES / folder).rglob("*")):
        if path.suffix in (".service", ".socket", ".conf") and path.name != "nginx.conf":
            units[str(path.relative_to(EXAMPLES / folder))] = path.read_text()
    return adapted(units, **backends)


def adapted(units: dict[str, str], **backends: str) -> dict[str, str]:
    """Put our program, short spans and, by NAME=ADDRESS, our backends into units."""
    return {name: _adapted(text, backends.get(_plain(name), "")) for name, text in units.items()}


def _plain(name: str) -> str:
    """The name of a unit as that of an argument."""
    return name.removesuffix(".service").replace("-", "_").rstrip("@")


def _adapted(text: str, address: str) -> str:
    ours = text.replace("/usr/bin/systemd-socket-proxyd", PROGRAM)
    ours = re.sub(r"--exit-idle-time=\S+ --idle-timeout=\S+", SHORT, ours)
    if not address:
        return ours
    gated = f"{GATE}ExecStart={BACKEND} {address}"
    ours = re.sub(r"^ExecStart=.*", lambda _: gated, ours, flags=re.MULTILINE)
    ours = re.sub(r"^ExecStop=.*\n", "", ours, flags=re.MULTILINE)
    return ours.replace("[Unit]", "[Unit]\nConditionPathExists=!/run/heal/refuse", 1)


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


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_accept(m: Machine) -> str:
    """examples/accept, a proxy for each connection: what can happen to the backend"""
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
    subject = app(m, "accept", proxy="app-proxy@*.service")
    m.client(f"exec socat -u {subject.address} -")
    subject.wait("the backend runs", lambda: m.is_active("app.service"))
    subject.kill("app.service")
    subject.served("after a crash")
    return heals(subject, without=not_of_it)


NGINX = {"sockets": "proxy-to-nginx.socket", "proxy": "proxy-to-nginx.service"}


def nginx(m: Machine, folder: str, address: str) -> Subject:
    """The example, with our backend under the name of nginx."""
    service = f"[Service]\n{GATE}ExecStart={BACKEND} {address}\n"
    condition = "[Unit]\nConditionPathExists=!/run/heal/refuse\n"
    units = example(folder) | {"nginx.service": condition + service}
    return Subject(m, units, backend="nginx.service", address="TCP:127.0.0.1:80", **NGINX)


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_unix_target(m: Machine) -> str:
    """examples/nginx, a UNIX target, through everything that can happen"""
    return heals(nginx(m, "nginx", "/run/nginx/socket"))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_namespace(m: Machine) -> str:
    """examples/nginx-namespace, one private network, through everything that can happen"""
    return heals(nginx(m, "nginx-namespace", "127.0.0.1 8080"))


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_container(m: Machine) -> str:
    """examples/container, with our backend for podman, through everything that can happen"""
    units = example("container", web_container="127.0.0.1 8081")
    return heals(
        Subject(
            m,
            units,
            sockets="web-proxy.socket",
            proxy="web-proxy.service",
            backend="web-container.service",
            address="TCP:127.0.0.1:8080",
        )
    )


# What `create` writes.

CREATED = {
    "on demand": "--listen=127.0.0.1:9000 --target=127.0.0.1:8000 --on-demand",
    "namespace": "--listen=127.0.0.1:9000 --target=127.0.0.1:8000 --on-demand --namespace",
    "unix": "--listen=127.0.0.1:9000 --target=/run/back/socket --on-demand",
    "always on": "--listen=127.0.0.1:9000 --target=127.0.0.1:8000",
}

BACK = """\
[Unit]
ConditionPathExists=!/run/heal/refuse
[Service]
{gate}ExecStart={backend} {address}
RuntimeDirectory=back
"""


def created(m: Machine, arguments: str, address: str) -> Subject:
    text = m.sh(f"{m.program}-units create --name=heal --backend=back.service {arguments}")
    pieces = re.split(r"^---(.*)---\n", text, flags=re.MULTILINE)[1:]
    units = adapted(dict(zip(pieces[::2], pieces[1::2], strict=True)))
    back = BACK.format(gate=GATE, backend=BACKEND, address=address)
    return Subject(m, units | {"back.service": back})


def create_scenario(name: str, arguments: str) -> None:
    address = "/run/back/socket" if name == "unix" else "127.0.0.1 8000"
    rests = "--on-demand" in arguments

    def body(m: Machine) -> str:
        without = () if rests else (healing.idle_stop, healing.slow_stop)
        return heals(created(m, arguments, address), without=without)

    body.__name__ = f"create_{name.replace(' ', '_')}"
    body.__doc__ = f"what `create` writes ({name}), through everything that can happen"
    scenario(
        needs="--connect-timeout",
        original="has no --connect-timeout=",
        slow=name != "on demand",
    )(body)


for one, given in CREATED.items():
    create_scenario(one, given)
