"""Datagrams under a real systemd: they start the proxy and its backend, and wait for both."""

import time

from e2e.harness import scenario
from e2e.machine import TOOLS, Machine, check, same
from e2e.scenarios.examples import install

ORIGINAL = "forwards no datagrams"

ON_DEMAND = (
    "Requires=app-proxy.socket\nAfter=app-proxy.socket\n"
    "Wants=app.service\nUpholds=app.service\nAfter=app.service\nStartLimitIntervalSec=0\n"
)
BACKEND = "[Unit]\nStopWhenUnneeded=yes\nStartLimitIntervalSec=0\n[Service]\n"
IDLE = "--exit-idle-time=1s --idle-timeout=1s"


def ask(m: Machine, port: int, count: int = 1) -> None:
    """Send datagrams and get all answers, in order."""
    wanted = "".join(f"echo {number}\n" for number in range(count))
    same("answers", m.sh(f"python3 {TOOLS}/datagram_client.py {port} {count}"), wanted)


def set_up(m: Machine, options: str = IDLE, sockets: str = "ListenDatagram=9000\n") -> None:
    """A backend on demand at port 9001."""
    m.unit("app.service", f"{BACKEND}ExecStart=python3 {TOOLS}/datagram_backend.py 9001\n")
    m.unit("app-proxy.socket", f"[Socket]\n{sockets}[Install]\nWantedBy=sockets.target\n")
    m.unit(
        "app-proxy.service",
        f"[Unit]\n{ON_DEMAND}[Service]\nType=notify\n"
        f"ExecStart={m.program} --connect-timeout=20s {options} 127.0.0.1:9001\n"
        "Restart=on-failure\nRestartSec=1s\n",
    )
    m.start("app-proxy.socket")


def stopped(m: Machine) -> bool:
    return not any(m.is_active(unit) for unit in ("app-proxy.service", "app.service"))


def listens(m: Machine) -> None:
    same("the socket", m.show("app-proxy.socket", "ActiveState"), "active")


@scenario(needs="unix-dgram", original=ORIGINAL)
def datagrams_on_demand(m: Machine) -> str:
    """The first datagram starts a UDP service that takes 2 s, and is answered; then both stop"""
    m.write("/run/heal/start-delay", "2")
    set_up(m)
    took = []
    for _ in range(3):
        check(stopped(m), "it runs before it has a client")
        began = time.monotonic()
        ask(m, 9000)
        took.append(time.monotonic() - began)
        check(m.is_active("app.service"), "app.service was not started")
        m.wait_for("both stop", lambda: stopped(m), 20)
        same("result", m.show("app-proxy.service", "Result"), "success")
        listens(m)
    return f"answers after {', '.join(f'{one:.1f}' for one in took)} s"


@scenario(needs="unix-dgram", original=ORIGINAL)
def datagrams_wait_in_the_queue(m: Machine) -> str:
    """Two hundred datagrams that come before the proxy and its backend are answered in order"""
    m.write("/run/heal/start-delay", "2")
    set_up(m, sockets="ListenDatagram=9000\nReceiveBuffer=1M\n")
    ask(m, 9000, 200)
    journal = m.journal("app-proxy.service")
    check("holding datagrams until it answers" in journal, "they were not held")
    check("dropping" not in journal, "some were dropped")
    return "200 answers"


@scenario(needs="unix-dgram", original=ORIGINAL)
def datagrams_of_both_kinds(m: Machine) -> None:
    """ListenStream= and ListenDatagram= of one port, and one proxy for both"""
    m.nginx("web", 'server { listen 127.0.0.1:9001; location / { return 200 "stream\\n"; } }')
    set_up(m, "", "ListenStream=9000\nListenDatagram=9000\n")
    m.start("web.service")
    for _ in range(2):
        ask(m, 9000, 3)
        same("page", m.sh("curl -sS --max-time 10 http://127.0.0.1:9000/"), "stream\n")


@scenario(needs="unix-dgram", original=ORIGINAL)
def datagrams_of_syslog(m: Machine) -> None:
    """logger(1) over a UNIX datagram socket: the lines wait for a service that comes later"""
    target = f"{m.folder}/target"
    m.unit("app.service", f"{BACKEND}ExecStart=python3 {TOOLS}/datagram_backend.py {target}\n")
    m.unit("app-proxy.socket", "[Socket]\nListenDatagram=/run/e2e-log\n")
    m.unit(
        "app-proxy.service",
        f"[Unit]\n{ON_DEMAND}[Service]\nType=notify\n"
        f"ExecStart={m.program} --inspect={m.folder}/inspect {target}\n",
    )
    m.write("/run/heal/start-delay", "1")
    m.start("app-proxy.socket")
    m.sh("for i in 1 2 3 4 5; do logger --socket /run/e2e-log line $i; done")
    m.wait_for(
        "five lines at the service",
        lambda: delivered(m, f"{m.folder}/inspect") == 5,
        20,
    )


def delivered(m: Machine, path: str) -> int:
    """How many datagrams were delivered to targets."""
    command = f"$(dirname {m.program})/socket-proxyctl metrics --socket={path}"
    lines = m.run(command).stdout.splitlines()
    prefix = "socketproxyd_datagrams_to_targets_total"
    return int(sum(float(line.split()[-1]) for line in lines if line.startswith(prefix)))


@scenario(needs="unix-dgram", original=ORIGINAL)
def datagrams_and_a_failing_backend(m: Machine) -> str:
    """A backend that fails for longer than the timeout does not cost the socket"""
    m.write("/run/heal/crash", "")
    set_up(m, "--connect-timeout=1s " + IDLE)
    for _ in range(4):
        m.run(f"python3 {TOOLS}/datagram_client.py 9000 20 1.5")
        listens(m)
    check("dropping" in m.journal("app-proxy.service"), "nothing was dropped")
    m.sh("rm /run/heal/crash")
    m.wait_for(
        "an answer",
        lambda: m.run(f"python3 {TOOLS}/datagram_client.py 9000 1 2").returncode == 0,
        20,
    )
    starts = m.journal("app-proxy.service").count("Started ")
    listens(m)
    return f"{starts} starts of the proxy"


@scenario(needs="unix-dgram", original=ORIGINAL)
def datagrams_and_a_killed_proxy(m: Machine) -> str:
    """A proxy that is killed with datagrams in the queue, ten times: they start it again"""
    set_up(m, "")
    for _ in range(10):
        ask(m, 9000)
        m.sh("systemctl kill --kill-who=main --signal=SIGKILL app-proxy.service")
        m.wait_for("it is dead", lambda: not m.is_active("app-proxy.service"))
    ask(m, 9000)
    listens(m)
    return "10 kills"


@scenario(needs="unix-dgram", original=ORIGINAL)
def example_game_server(m: Machine) -> None:
    """examples/game-server: the first datagram starts the game, and it ends with the proxy"""
    install(m, "game-server")
    m.unit(
        "game.service.d/e2e.conf",
        f"[Service]\nExecStart=\nExecStart=python3 {TOOLS}/datagram_backend.py 30001\n",
    )
    m.start("game-proxy.socket")
    check(not m.is_active("game.service"), "the game runs before it has a player")
    ask(m, 30000, 10)
    check(m.is_active("game.service"), "game.service was not started")
    # The proxy ends by itself after a quarter of an hour: here it is told to.
    m.stop("game-proxy.service")
    m.wait_for("the game ends", lambda: not m.is_active("game.service"))
    ask(m, 30000)
