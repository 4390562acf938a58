"""Running proxies, seen from outside: the inspection socket, its users and its tools."""

import json
import re

from e2e.harness import CannotRun, scenario
from e2e.machine import TOOLS, UNIT_FOLDER, Failure, Machine, check, same
from e2e.scenarios.examples import install
from e2e.scenarios.privilege import HARDENING
from e2e.scenarios.user_manager import UserManager

INTERFACE = "net.socketproxyd.Proxy"
METRICS = "io.systemd.Metrics"
SYSTEMD_REPORT = "/usr/lib/systemd/systemd-report"
REPORT = "socket-proxyctl-report.socket"
REPORT_PATH = "/run/systemd/report/net.socketproxyd"

FOLDER = "RuntimeDirectory=%N\n"
NOTIFY = f"Type=notify\n{FOLDER}"
INSPECT = "/run/proxy/inspect"

HELLO = 'server { listen 127.0.0.1:8000; location / { return 200 "hello\\n"; } }'
CURL = "curl -sS --max-time 10 http://127.0.0.1:9000/"
CLIENT = "exec socat -u TCP:127.0.0.1:9000 -"
"""A client that stays."""


def start_backend(m: Machine) -> None:
    m.nginx("backend", HELLO)
    m.start("backend.service")
    m.wait_for("nginx listens", lambda: m.listens(8000))


def start_proxy(m: Machine, *, options: str = "", service: str = NOTIFY) -> None:
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000", options=options, service=service)
    m.start("proxy.service")
    m.wait_for("it is active", lambda: m.is_active("proxy.service"))


def rows(m: Machine, arguments: str = "") -> list[dict]:
    """What `socket-proxyctl list` tells."""
    return json.loads(m.sh(f"{m.ctl} list --json=short {arguments}") or "[]")


def wait_for_rows(m: Machine, count: int) -> list[dict]:
    m.wait_for(f"{count} connections", lambda: len(rows(m)) == count)
    return rows(m)


def asked(m: Machine, path: str, method: str, parameters: str = "{}") -> list[dict]:
    """The replies to a call, made without any tool of systemd or ours."""
    script = f"python3 {TOOLS}/varlink.py {path} {method} '{parameters}'"
    return [json.loads(line) for line in m.sh(script).splitlines()]


def units_of_metrics(m: Machine, replies: list[dict]) -> set[str]:
    return {reply["parameters"]["object"] for reply in replies}


# varlinkctl.


class Varlinkctl:
    """varlinkctl of the suite. Raises CannotRun without one."""

    def __init__(self, m: Machine, path: str = INSPECT):
        if m.run("command -v varlinkctl").returncode:
            raise CannotRun("this suite has no varlinkctl")
        self.m = m
        self.path = path

    def sh(self, verb: str, *arguments: str) -> str:
        return self.m.sh(f"varlinkctl --no-pager {verb} {self.path} {' '.join(arguments)}")

    def call(self, method: str, parameters: str = "{}") -> dict:
        return json.loads(self.sh("--json=short call", method, f"'{parameters}'"))

    def stream(self, method: str, parameters: str = "{}") -> list[dict]:
        return json.loads(self.sh("--collect --json=short call", method, f"'{parameters}'"))

    def fails(self, method: str, parameters: str = "{}", more: bool = False) -> str:
        """The error of a call that must fail."""
        more_ = "--more" if more else ""
        done = self.m.run(f"varlinkctl {more_} call {self.path} {method} '{parameters}'")
        check(done.returncode, f"{method} has not failed: {done.stdout}")
        return done.stderr


@scenario(needs="--inspect")
def inspection_varlinkctl(m: Machine) -> str:
    """varlinkctl of the suite: info, introspect, and every method of a running proxy"""
    tool = Varlinkctl(m)
    start_backend(m)
    start_proxy(m)
    client = m.client(CLIENT)
    (row,) = wait_for_rows(m, 1)
    info = tool.sh("info")
    check(INTERFACE in info and METRICS in info, f"info says {info}")
    text = tool.sh("introspect", INTERFACE)
    for method in ("List", "Watch", "Terminate", "Status"):
        check(f"method {method}(" in text, f"no {method} in {text}")
    same("open", tool.call(f"{INTERFACE}.Status")["open"], 1)
    (reply,) = tool.stream(f"{INTERFACE}.List")
    for name in ("id", "client", "target", "localAddress"):
        same(name, reply["connection"][name], row[name])
    same("held", tool.fails(f"{INTERFACE}.List", '{"state":"held"}', more=True).count("NoSuch"), 1)
    try_metrics(m, tool)
    watch = m.client(f"exec varlinkctl --more --json=short call {INSPECT} {INTERFACE}.Watch '{{}}'")
    m.wait_for("it watches", lambda: try_watcher(m))
    tool.call(f"{INTERFACE}.Terminate", f'{{"id":{row["id"]}}}')
    m.wait_for("the client is cut", lambda: client.poll() is not None)
    check("NoSuchConnection" in tool.fails(f"{INTERFACE}.Terminate", '{"id":1}'), "no error")
    m.stop("proxy.service", "proxy.socket")
    seen = re.findall(r'"event":"(begin|end)"', watch.communicate(timeout=20)[0])
    check({"begin", "end"} <= set(seen), f"Watch tells {seen}")
    return m.sh("systemctl --version").split("\n")[0]


def try_watcher(m: Machine) -> bool:
    """Make a connection that a watcher sees, and tell whether there is a watcher."""
    m.sh(CURL)
    return len(m.run(f"ss -Hxn state established src {INSPECT}").stdout.splitlines()) > 0


def try_metrics(m: Machine, tool: Varlinkctl) -> None:
    described = {one["name"] for one in tool.stream(f"{METRICS}.Describe")}
    values = tool.stream(f"{METRICS}.List")
    check({one["name"] for one in values} <= described, "there is a metric without a description")
    accepted = [one["value"] for one in values if one["name"].endswith(".Accepted")]
    same("accepted", accepted, [1])


# All running proxies.


@scenario(needs="--inspect")
def inspection_of_all(m: Machine) -> str:
    """socket-proxyctl finds two proxies without options, one by --unit=, and starts none"""
    start_backend(m)
    start_proxy(m)
    m.proxy("other", "127.0.0.1:9001", "127.0.0.1:8000", service=NOTIFY)
    m.proxy("down", "127.0.0.1:9002", "127.0.0.1:8000", service=NOTIFY)
    m.proxy("blind", "127.0.0.1:9003", "127.0.0.1:8000", service="Type=notify")
    m.start("other.service", "blind.service")
    for port in (9000, 9001):
        m.client(f"exec socat -u TCP:127.0.0.1:{port} -")
    found = wait_for_rows(m, 2)
    both = {"proxy.service", "other.service"}
    same("units", {row["unit"] for row in found}, both)
    same("by name", {row["unit"] for row in rows(m, "--unit=other")}, {"other.service"})
    same("status", {one["unit"] for one in json.loads(m.sh(f"{m.ctl} status --json=short"))}, both)
    text = m.sh(f"{m.ctl} metrics")
    check(all(f'unit="{unit}"' in text for unit in both), f"metrics are {text[:600]}")
    notes = m.run(f"{m.ctl} list").stderr
    check("blind.service has no inspection socket" in notes, f"no note: {notes}")
    check("not running" in m.run(f"{m.ctl} list --unit=down").stderr, "no error for down.service")
    check(not m.is_active("down.service"), "socket-proxyctl has started a proxy")
    (row,) = rows(m, "--unit=other")
    m.sh(f"{m.ctl} terminate --unit=other {row['id']}")
    m.wait_for("one is left", lambda: len(rows(m)) == 1)
    return "two of four"


def install_report(m: Machine) -> None:
    """The units of the aggregator: as the package has them, or from the wheel."""
    if m.run(f"systemctl cat {REPORT}").returncode == 0:
        return
    prefix = m.program.rpartition("/bin/")[0]
    for name in (REPORT, "socket-proxyctl-report@.service"):
        text = m.sh(f"cat {prefix}/lib/systemd/system/{name}")
        m.unit(name, text.replace("ExecStart=socket-proxyctl", f"ExecStart={m.ctl}"))


@scenario(needs="--inspect")
def inspection_report_unit(m: Machine) -> str:
    """The aggregator's units: not enabled, and, on every systemd, the metrics of all proxies"""
    start_backend(m)
    start_proxy(m)
    m.proxy("other", "127.0.0.1:9001", "127.0.0.1:8000", service=f"{NOTIFY}{hardening()}")
    m.start("other.service")
    install_report(m)
    same("enabled", m.run(f"systemctl is-enabled {REPORT}").stdout.strip(), "disabled")
    check(m.run(f"test -e {REPORT_PATH}").returncode, "the socket is there without being enabled")
    m.sh(f"systemctl enable --now {REPORT}")
    try:
        replies = asked(m, REPORT_PATH, f"{METRICS}.List")
        same("units", units_of_metrics(m, replies), {"proxy.service", "other.service"})
        as_nobody = f"setpriv --reuid=65534 --clear-groups python3 {TOOLS}/varlink.py"
        check(m.sh(f"{as_nobody} {REPORT_PATH} {METRICS}.Describe"), "nobody gets no answer")
        m.wait_for("the instances end", lambda: not instances(m))
    finally:
        m.sh(f"systemctl disable --now {REPORT}")
    check(m.run(f"test -e {REPORT_PATH}").returncode, "the socket file is left behind")
    check("Failed with result" not in m.journal(), f"something has failed: {m.journal()[-900:]}")
    return f"{len(replies)} metrics"


def hardening() -> str:
    """The lines of hardening.conf that belong to [Service]."""
    return HARDENING.partition("[Service]\n")[2]


def instances(m: Machine) -> str:
    return m.sh("systemctl list-units --plain --no-legend 'socket-proxyctl-report@*'")


@scenario(needs="--inspect")
def inspection_systemd_report(m: Machine) -> str:
    """systemd-report shows the metrics of all running proxies, and starts none"""
    if m.run(f"test -x {SYSTEMD_REPORT}").returncode:
        raise CannotRun("this suite has no systemd-report")
    start_backend(m)
    start_proxy(m)
    m.proxy("other", "127.0.0.1:9001", "127.0.0.1:8000", service=NOTIFY)
    m.proxy("down", "127.0.0.1:9002", "127.0.0.1:8000", service=NOTIFY)
    m.start("other.service")
    for _ in range(3):
        m.sh(CURL)
    install_report(m)
    m.start(REPORT)
    report = f"{SYSTEMD_REPORT} --no-pager"
    check("net.socketproxyd" in m.sh(f"{report} list-sources"), "it is not a source")
    metrics = sequence(m.sh(f"{report} --json=short metrics net.socketproxyd"))
    accepted = {one["object"]: one["value"] for one in metrics if one["name"].endswith(".Accepted")}
    same("accepted", accepted, {"proxy.service": 3, "other.service": 0})
    shown = m.sh(f"{report} metrics net.socketproxyd")
    check("down.service" not in shown, "a proxy that is down is shown")
    check("Accepted" in m.sh(f"{report} describe net.socketproxyd"), "not described")
    check("net.socketproxyd.Accepted" in m.sh(f"{report} generate"), "not in the whole report")
    check(not m.is_active("down.service"), "the report has started a proxy")
    m.stop(REPORT)
    check("net.socketproxyd" not in m.sh(f"{report} metrics"), "a source that is gone is shown")
    return f"{len(metrics)} metrics"


def sequence(text: str) -> list[dict]:
    """The objects of a JSON text sequence (RFC 7464)."""
    return [json.loads(line) for line in text.replace("\x1e", "").splitlines() if line]


# Who may call what.

ACCESS = {
    # Lines in [Service]: whether the service's own user may list. Root may, others may not.
    "User=e2e-owner": True,
    "User=nobody": False,
    "DynamicUser=yes": True,
    "User=e2e-owner\nPrivateUsers=yes": True,
    "DynamicUser=yes\nPrivateUsers=yes": True,
    "hardening.conf": True,
}


@scenario(needs="--inspect")
def inspection_access(m: Machine) -> str:
    """Who may list: root, and the service's own user unless that is nobody; others get metrics"""
    m.sh("useradd --system e2e-owner; useradd --system e2e-other")
    start_backend(m)
    try:
        notes = [f"{how}: {try_access(m, lines, own)}" for how, lines, own in access_cases()]
    finally:
        m.run("userdel e2e-owner; userdel e2e-other")
    return f"own user: {', '.join(notes)}"


def access_cases() -> list[tuple[str, str, bool]]:
    return [
        (how.replace("\n", " "), hardening() if how == "hardening.conf" else how, own)
        for how, own in ACCESS.items()
    ]


def try_access(m: Machine, lines: str, own: bool) -> str:
    start_proxy(m, service=f"{NOTIFY}{lines}")
    m.client(CLIENT)
    m.wait_for("it is open", lambda: status(m)["open"] == 1)
    owner = m.sh(f"stat -c %u /proc/{m.main_pid('proxy.service')}").strip()
    check(owner != "0", "the proxy runs as root")
    other = m.sh("id -u e2e-other").strip()
    same("root may list", may_list(m, "0"), True)
    same("another user may list", may_list(m, other), False)
    same("nobody may list", may_list(m, "65534"), False)
    for uid in (other, owner):
        text = m.sh(f"setpriv --reuid={uid} --clear-groups {m.ctl} metrics --socket={INSPECT}")
        check("socketproxyd_accepted_total" in text, f"uid {uid} gets no metrics")
    same("its own user may list", may_list(m, owner), own)
    check("SIGSYS" not in m.journal() and "status=31" not in m.journal(), "killed by the filter")
    m.stop("proxy.service", "proxy.socket")
    check(m.run("test -e /run/proxy").returncode, "the folder is left behind")
    return "yes" if own else "no"


def may_list(m: Machine, uid: str) -> bool:
    """Whether a process with this uid may list the connections."""
    done = m.run(
        f"setpriv --reuid={uid} --clear-groups {m.ctl} list --json=short --socket={INSPECT}"
    )
    if done.returncode == 0:
        same("connections", len(json.loads(done.stdout)), 1)
        return True
    check("only root and" in done.stderr, f"uid {uid}: {done.stderr}")
    return False


def status(m: Machine) -> dict:
    """The reply to Status of the one proxy."""
    (reply,) = asked(m, INSPECT, f"{INTERFACE}.Status")
    return reply["parameters"]


@scenario(needs="--inspect")
def inspection_user_manager(m: Machine) -> None:
    """A proxy of a user's manager: --user finds it, the system's does not, root may by --socket="""
    user = UserManager(m)
    try:
        start_backend(m)
        user.unit("proxy.socket", "[Socket]\nListenStream=127.0.0.1:9000\n")
        user.unit("proxy.service", f"[Service]\n{NOTIFY}ExecStart={m.program} 127.0.0.1:8000\n")
        user.sh("systemctl --user daemon-reload; systemctl --user start proxy.socket proxy.service")
        m.client(CLIENT)
        m.wait_for("it is listed", lambda: len(rows_of_user(m, user)) == 1)
        (row,) = rows_of_user(m, user)
        path = f"/run/user/{user.number}/proxy/inspect"
        same("where", (row["unit"], row["socket"]), ("proxy.service", path))
        same("of the system", rows(m), [])
        same("by root", len(rows(m, f"--socket={path}")), 1)
        user.sh(f"{m.ctl} --user >/dev/null 2>&1 || true; {m.ctl} terminate --user {row['id']}")
        m.wait_for("it is cut", lambda: not rows_of_user(m, user))
    finally:
        user.end()


def rows_of_user(m: Machine, user: UserManager) -> list[dict]:
    return json.loads(user.sh(f"{m.ctl} list --user --json=short") or "[]")


# The life of the socket.

SECOND = """\
[Socket]
ListenStream=/run/{name}.inspect
FileDescriptorName=varlink
Service=proxy.service
SocketMode=0666
"""


@scenario(needs="--inspect")
def inspection_inherited(m: Machine) -> None:
    """--inspect=fd:NAME: a listener of a second socket unit, which also starts the proxy"""
    start_backend(m)
    for order in ("a-inspect", "z-inspect"):  # the order of the fds is that of the units
        m.unit(f"{order}.socket", SECOND.format(name=order))
        m.proxy(
            "proxy",
            "127.0.0.1:9000",
            "127.0.0.1:8000",
            options="--inspect=fd:varlink",
            unit=f"Requires={order}.socket\nAfter={order}.socket",
            service=f"Type=notify\nSockets=proxy.socket {order}.socket",
        )
        m.start(f"{order}.socket")
        path = f"/run/{order}.inspect"
        check(not m.is_active("proxy.service"), "it runs before anybody has called")
        (reply,) = asked(m, path, f"{INTERFACE}.Status")
        same(
            "listeners", [one["name"] for one in reply["parameters"]["listeners"]], ["proxy.socket"]
        )
        same("answer", m.sh(CURL), "hello\n")
        m.client(CLIENT)
        (row,) = wait_for_rows(m, 1)
        same("found at", row["socket"], path)
        m.stop("proxy.socket", f"{order}.socket", "proxy.service")


@scenario(needs="--inspect --exit-idle-time")
def inspection_and_rest(m: Machine) -> None:
    """Callers put off no idle exit; the folder comes and goes with the proxy, at restarts, too"""
    start_backend(m)
    start_proxy(m, options="--exit-idle-time=1s", service=f"{NOTIFY}Restart=on-failure\n")
    for _ in range(2):
        watch = m.client(f"exec {m.ctl} watch --unit=proxy")
        poll = m.client(f"while :; do {m.ctl} status --socket={INSPECT}; done")
        m.wait_for("it ends", lambda: not m.is_active("proxy.service"), 20)
        same("result", m.show("proxy.service", "Result"), "success")
        poll.kill()
        watch.communicate(timeout=20)
        check(m.run("test -e /run/proxy").returncode, "the folder is left behind")
        same("answer", m.sh(CURL), "hello\n")
        m.wait_for("it has a socket again", lambda: not m.run(f"test -S {INSPECT}").returncode)
    for signal in ("KILL", "ABRT"):
        crash(m, signal)
    m.sh("systemctl restart proxy.service")
    check(answers(m), "no answer after a restart")
    m.stop("proxy.socket", "proxy.service")
    check(m.run("test -e /run/proxy").returncode, "the folder is left behind")


def crash(m: Machine, signal: str) -> None:
    """Kill the proxy: its successor, kept from resting by a client, has an inspection socket."""
    client = m.client(CLIENT)
    m.wait_for("it is open", lambda: answers(m) and status(m)["open"])
    before = m.main_pid("proxy.service")
    m.sh(f"systemctl kill --signal={signal} --kill-whom=main proxy.service")
    client.communicate(timeout=20)
    m.client(CLIENT)
    m.wait_for("another one runs", lambda: m.main_pid("proxy.service") not in (0, before), 20)
    m.wait_for("it answers", lambda: answers(m))


def answers(m: Machine) -> bool:
    try:
        return status(m)["pid"] == m.main_pid("proxy.service")
    except Failure:
        return False


@scenario(needs="--inspect")
def inspection_of_instances(m: Machine) -> str:
    """Instances of a template, one with a colon in its name: each has a socket of its own"""
    start_backend(m)
    unit = "[Unit]\nRequires=proxy@%i.socket\nAfter=proxy@%i.socket\n"
    service = f"{unit}[Service]\n{NOTIFY}ExecStart={m.program} 127.0.0.1:8000\n"
    m.unit("proxy@.service", service)
    m.unit("proxy@.socket", f"[Socket]\nListenStream={m.folder}/%i\n")
    names = ["plain", "127.0.0.1:80"]
    version = int(m.sh("systemctl --version").split()[1].partition("~")[0])
    if version != 257:  # which cannot start a service with such a folder
        names.append(r"a\x2db")
    units = [f"proxy@{name}.service" for name in names]
    for name in names:
        m.uses(f"proxy@{name}.socket", f"proxy@{name}.service")
        m.sh(f"systemctl start 'proxy@{name}.socket' 'proxy@{name}.service'")
    found = json.loads(m.sh(f"{m.ctl} status --json=short"))
    same("units", sorted(one["unit"] for one in found), sorted(units))
    same("No warning", m.journal().count("No inspection socket"), 0)
    return f"{len(names)} instances"


@scenario(needs="--inspect")
def inspection_textfile(m: Machine) -> str:
    """examples/metrics: a timer writes the metrics of all proxies for node_exporter"""
    start_backend(m)
    start_proxy(m)
    m.sh(CURL)
    folder = "/var/lib/prometheus/node-exporter"
    m.sh(f"mkdir -p {folder}")
    install(m, "metrics")
    for unit in ("socket-proxyctl-textfile.service", "socket-proxyctl-textfile.timer"):
        m.sh(f"sed -i 's|/usr/bin/socket-proxyctl|{m.ctl}|' {UNIT_FOLDER}/{unit}")
    m.sh("systemctl daemon-reload; systemctl start socket-proxyctl-textfile.timer")
    try:
        m.start("socket-proxyctl-textfile.service")  # as the timer does within a minute
        text = m.sh(f"cat {folder}/proxies.prom")
        check('unit="proxy.service"' in text, f"written is {text[:600]}")
        same("files", m.sh(f"ls -A {folder}").split(), ["proxies.prom"])
        same("mode", m.sh(f"stat -c %a {folder}/proxies.prom").strip(), "644")
        next_ = m.show("socket-proxyctl-textfile.timer", "NextElapseUSecMonotonic")
        check(next_ not in ("", "infinity"), f"the timer's next time: {next_!r}")
    finally:
        m.run(f"rm -rf {folder}")
    return f"{len(text.splitlines())} lines"
