"""A proxy, its socket and its backend, and all that can happen to them.

A Subject is a set of units, written into the machine. A step does something bad to it, and fails if
a client is not served afterwards. `broken` and `mended` sets are the same but for one line.
"""

import os
import time
from collections.abc import Callable

from e2e.machine import TOOLS, UNIT_FOLDER, Failure, Machine, check, same

CONTROL = "/run/e2e-heal"
BACKEND = f"/usr/bin/python3 {TOOLS}/backend.py"

SOCKET = "[Socket]\nListenStream=127.0.0.1:9000\n"

PROXY = """\
[Unit]
Requires=heal.socket
After=heal.socket
Wants=back.service
Upholds=back.service
After=back.service
StartLimitIntervalSec=0

[Service]
Type=notify
ExecStart={program} --connect-timeout=20s --exit-idle-time=2s --idle-timeout=2s 127.0.0.1:8000
Restart=on-failure
RestartSec=1s
"""

ANSWER = "answer word\n"

GATE = f"ExecStartPre=/bin/sh -c '! test -e {CONTROL}/fail'\n"

BACK = f"""\
[Unit]
ConditionPathExists=!{CONTROL}/refuse
StopWhenUnneeded=yes
StartLimitIntervalSec=0

[Service]
{GATE}ExecStart={BACKEND} 127.0.0.1 8000
"""

UNITS = {"heal.socket": SOCKET, "heal.service": PROXY, "back.service": BACK}

# The link that ExecStart= runs: taking it away is a proxy that cannot start.
PROGRAM = f"{CONTROL}/systemd-socket-proxyd"


def datagrams(port: int) -> str:
    """The address of a client that sends datagrams: no end tells it that this is the answer."""
    return f"UDP:127.0.0.1:{port},readbytes={len(ANSWER)}"


class Subject:
    """Units in the machine: {name: text}, `-> X` being a symlink.

    `sockets` are started, and a client connects to `address`. `backend` is empty if the proxy
    starts none.
    """

    def __init__(
        self,
        machine: Machine,
        units: dict[str, str],
        *,
        sockets: str = "heal.socket",
        proxy: str = "heal.service",
        backend: str = "back.service",
        address: str = "TCP:127.0.0.1:9000",
        crashes: str = "",
    ):
        self.machine = machine
        self.sockets = sockets
        self.proxy = proxy
        self.backend = backend
        self.addresses = address.split()
        """Where clients connect; a set that serves does so at all of them."""
        self.address = self.addresses[0]
        self.crashes = crashes or backend
        """The unit whose process is killed as the backend: of a container, another one."""
        for name, text in units.items():
            path = os.path.join(self.folder, name)
            if text.startswith("-> "):
                machine.write(path, "")
                machine.sh(f"ln -sf {text[3:]} {path}")
            else:
                machine.write(path, text.replace("{program}", PROGRAM))
        self.register([name for name in units if name.endswith((".service", ".socket"))])
        self.begin()

    folder = UNIT_FOLDER
    systemctl = "systemctl"

    def register(self, written: list[str]) -> None:
        """Have the units stopped after the scenario."""
        own = [name for name in written if "/" not in name and "@." not in name]
        self.machine.uses(*own, *self.units())

    def units(self) -> list[str]:
        """The sockets, the proxy, and the backend if there is one."""
        return [*self.sockets.split(), self.proxy, *self.backend.split()]

    def begin(self) -> None:
        """Bring everything to where nobody has connected yet."""
        m = self.machine
        m.run(f"rm -rf {CONTROL}; {self.systemctl} stop {' '.join(self.units())}", timeout=60)
        self.prepare()
        m.sh(f"{self.systemctl} daemon-reload; {self.systemctl} reset-failed")
        m.run(f"{self.systemctl} start {self.sockets}")

    def prepare(self) -> None:
        """Make the folder of the orders, and in it the link to the program."""
        m = self.machine
        m.sh(f"mkdir -p {CONTROL}; ln -sf {m.program} {PROGRAM}")

    def restart_all(self) -> None:
        """Boot the machine anew."""
        self.machine.reboot()
        self.prepare()

    def ask(self, seconds: float = 20, address: str = "") -> bool:
        """Tell whether a client is answered within `seconds`."""
        line = f"echo word | timeout {seconds} socat -t {seconds} - {address or self.address}"
        return self.machine.run(line, timeout=seconds + 10).stdout == ANSWER

    def served(self, what: str) -> None:
        """Fail unless a client is served, which may have to come again as real ones do."""
        deadline = time.monotonic() + 30
        for address in self.addresses:
            while not self.ask(10, address):
                if time.monotonic() > deadline:
                    raise Failure(f"{what}: no client is served any more ({self.states()})")
                time.sleep(0.2)

    def states(self) -> str:
        return ", ".join(
            f"{u} {self.show('ActiveState', u)}/{self.show('Result', u)}" for u in self.units()
        )

    def show(self, prop: str, unit: str = "") -> str:
        command = f"{self.systemctl} show --value -p {prop} {unit or self.proxy}"
        return self.machine.sh(command).strip()

    def order(self, name: str, value: str = "") -> None:
        self.machine.sh(f"echo {value} >{CONTROL}/{name}")

    def cancel(self, name: str) -> None:
        self.machine.sh(f"rm -f {CONTROL}/{name}")

    def kill(self, unit: str) -> None:
        self.machine.sh(f"{self.systemctl} kill --signal=KILL {unit}")

    def wait(self, what: str, condition: Callable[[], object], timeout: float = 20) -> None:
        self.machine.wait_for(what, condition, timeout)

    def wait_idle(self) -> None:
        self.wait("the proxy ends", lambda: self.show("ActiveState") == "inactive")

    def socket_failed(self) -> str:
        """The result of a socket that has failed, or empty."""
        socket = self.sockets.split()[0]
        failed = self.show("ActiveState", socket) == "failed"
        return self.show("Result", socket) if failed else ""

    def rules(self) -> set[str]:
        """The rules that systemd-socket-proxyd-units finds broken, asking the manager itself."""
        return self.machine.rules(self.proxy)

    def rules_of_files(self) -> set[str]:
        """The same without asking the manager, which may know that something does no harm."""
        return self.machine.rules(f"{UNIT_FOLDER}/{self.proxy}")


# What can happen. Each step begins with a set that nobody has used.


def crash(s: Subject) -> None:
    """The backend is killed while nobody is there."""
    s.served("at first")
    s.kill(s.crashes)
    s.served("after a crash")


def crash_with_clients(s: Subject) -> None:
    """The backend is killed, and clients keep trying meanwhile."""
    s.served("at first")
    loop = (
        f"until echo word | timeout 2 socat -t 2 - {s.address} | grep -q answer; do sleep .1; done"
    )
    clients = [s.machine.client(f"{s.systemctl} is-active {s.backend}; {loop}") for _ in range(4)]
    s.kill(s.crashes)
    for client in clients:
        client.communicate(timeout=40)
    s.served("after a crash")


def crash_loop(s: Subject) -> None:
    """The backend crashes as soon as it listens, for some seconds."""
    s.order("crash")
    check(not s.ask(4), "served by a backend that crashes")
    s.cancel("crash")
    s.served("after a crash loop")


def failing_start(s: Subject) -> None:
    """The backend cannot start, clients try, it is repaired; nobody touches the socket."""
    s.order("fail")
    for _ in range(3):
        check(not s.ask(1), "served by a backend that cannot start")
    s.cancel("fail")
    s.served("after the repair")


def refused_start(s: Subject) -> None:
    """A condition of the backend does not hold for a while."""
    s.order("refuse")
    check(not s.ask(2), "served by a backend that may not start")
    s.cancel("refuse")
    s.served("once the condition holds")


def slow_start(s: Subject) -> None:
    s.order("start-delay", "3")
    check(s.ask(15), f"the client of a slow start is lost ({s.states()})")


def slow_stop(s: Subject) -> None:
    """A client comes while the backend takes its time to stop."""
    s.served("at first")
    s.order("stop-delay", "3")
    s.machine.sh(f"{s.systemctl} stop --no-block {s.proxy}")
    s.wait("it stops", lambda: s.show("ActiveState", s.backend) == "deactivating")
    check(s.ask(15), f"the client that comes during a slow stop is lost ({s.states()})")


def idle_stop(s: Subject) -> None:
    for _ in range(2):
        s.served("first client")
        s.wait_idle()
        s.wait("the backend ends", lambda: s.show("ActiveState", s.backend) == "inactive")
        same("result", s.show("Result"), "success")
    s.served("after a rest")


def proxy_killed(s: Subject) -> None:
    s.served("at first")
    s.kill(s.proxy)
    s.served("after a crash of the proxy")


def proxy_killed_often(s: Subject) -> None:
    for _ in range(8):
        s.ask(5)
        s.machine.run(f"{s.systemctl} kill --signal=KILL {s.proxy}")
    s.served("after eight crashes of the proxy")


def proxy_cannot_start(s: Subject) -> None:
    """The program is not there for a while; nobody touches the socket."""
    s.machine.sh(f"rm {PROGRAM}")
    for _ in range(3):
        check(not s.ask(1), "served by a program that is not there")
    s.machine.sh(f"ln -s {s.machine.program} {PROGRAM}")
    s.served("after the repair")


def restarts_by_hand(s: Subject) -> None:
    s.served("at first")
    for unit in reversed(s.units()):
        done = s.machine.run(f"{s.systemctl} restart {unit}")
        check(not done.returncode, f"restart of {unit}: {done.stderr.strip()}")
        s.served(f"after a restart of {unit}")


def reload(s: Subject) -> None:
    s.served("at first")
    s.machine.sh(f"{s.systemctl} daemon-reload")
    s.kill(s.crashes)
    s.machine.sh(f"{s.systemctl} daemon-reload")
    s.served("after a daemon-reload")


def stop_all(s: Subject) -> None:
    """What is stopped as a whole stays stopped."""
    s.served("at first")
    s.machine.sh(f"{s.systemctl} stop {' '.join(s.units())}")
    for unit in s.units():
        same(unit, s.show("ActiveState", unit) in ("inactive", "failed"), True)


def reboot(s: Subject) -> None:
    """Nothing runs after a reboot but the sockets, until there is a client."""
    s.machine.sh(f"{s.systemctl} enable {s.sockets}")
    try:
        s.served("at first")
        s.restart_all()
        for unit in () if "*" in s.proxy else (s.proxy, *s.backend.split()):
            same(f"{unit} after a reboot", s.show("ActiveState", unit), "inactive")
        s.served("after a reboot")
    finally:  # after a signal, there is no machine to run it on, and no Failure to hide that
        s.machine.run(f"{s.systemctl} disable {s.sockets}")


STEPS = (
    crash,
    crash_with_clients,
    crash_loop,
    failing_start,
    refused_start,
    slow_start,
    slow_stop,
    idle_stop,
    proxy_killed,
    proxy_killed_often,
    proxy_cannot_start,
    restarts_by_hand,
    reload,
    stop_all,
    reboot,
)


def heals(s: Subject, *, without: tuple[Callable[[Subject], None], ...] = ()) -> str:
    """Take all steps; Failure names those that were not healed."""
    failures = []
    taken = [step for step in STEPS if step not in without]
    for step in taken:
        s.begin()
        try:
            step(s)
        except Failure as error:
            failures.append(f"{step.__name__}: {error}")
    if failures:
        raise Failure(f"{len(failures)} of {len(taken)} not healed: " + "; ".join(failures))
    return f"{len(taken)} steps"
