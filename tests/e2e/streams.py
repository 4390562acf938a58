"""A proxy with two listeners, and many connections through it that inside/streams.py compares."""

import json
import re
import select
from pathlib import Path

from e2e.machine import TOOLS, Machine, check, same

RESTART = (Path(__file__).parents[2] / "examples/drop-ins/restart.conf").read_text()

PROXY = """
[Unit]
Requires=proxy.socket held.socket
After=proxy.socket held.socket
StartLimitIntervalSec=0
[Service]
Type=notify
RuntimeDirectory=%N
ExecStart={program} -c 4000 --connect-timeout=1h --crash-recovery=all {options} \
    web={target} held=127.0.0.1:8001
{service}
"""

TARGET = "127.0.0.1:8000"

AGAIN = "RestartSec=0\nLimitCORE=0\n"
"""For a service that is killed."""

MIX = {"ping": 2, "talk": 18, "idle": 20, "bulk": 5, "half": 20, "answer": 20, "stalled": 5}
HELD = {"held": 10}
"""A hundred connections in all states."""

PATIENCE = 60


class Streams:
    """The connections, all of them open; `end` compares what has come of them."""

    def __init__(
        self, m: Machine, counts: dict[str, int], listeners: str = "9000", target: int | str = 8000
    ):
        self.counts = counts
        self.pauses_ms: list[int] = []
        """Of each `ping`, the five longest times that it waited; after the end."""
        kinds = " ".join(f"{kind}={count}" for kind, count in counts.items())
        command = f"exec python3 {TOOLS}/streams.py {listeners} {target} {kinds}"
        self.process = m.client(command)
        said = ""
        if select.select([self.process.stdout], [], [], PATIENCE)[0]:
            said = self.process.stdout.readline()
        if said != "open\n":
            self.process.kill()
            rest = self.process.communicate()[0]
            check(False, f"they do not open: {said}{rest[-600:]}")

    def end(self) -> dict[str, dict[str, int]]:
        """End them; how many of each kind ended in which way."""
        said = self.process.communicate("\n", timeout=2 * PATIENCE)[0]
        check(said.startswith("{"), f"streams.py: {said[-600:]}")
        outcomes = json.loads(said)
        self.pauses_ms = outcomes.pop("pauses_ms")
        return outcomes

    def end_well(self) -> str:
        """End them: none may have lost a byte. Return a note for the report."""
        same("streams", self.end(), {kind: {"ok": count} for kind, count in self.counts.items()})
        pauses = self.pauses_ms
        longest = f", the longest pause {max(pauses)} ms" if pauses else ""
        return f"{sum(self.counts.values())} streams{longest}"


def times(factor: int, counts: dict[str, int]) -> dict[str, int]:
    return {kind: factor * count for kind, count in counts.items()}


def start_proxy(
    m: Machine,
    options: str = "",
    service: str = "",
    drop_in: str = RESTART,
    target: str = TARGET,
) -> None:
    """proxy.service on port 9000 and a path for the server, on port 9001 for what is held."""
    m.unit(
        "proxy.socket",
        f"[Socket]\nListenStream=127.0.0.1:9000\nListenStream={m.folder}/listener\n"
        "FileDescriptorName=web\n",
        load=False,
    )
    m.unit(
        "held.socket",
        "[Socket]\nListenStream=127.0.0.1:9001\nFileDescriptorName=held\nService=proxy.service\n",
        load=False,
    )
    text = PROXY.format(program=m.program, options=options, target=target, service=service)
    m.unit("proxy.service", text, load=False)
    m.unit("proxy.service.d/restart.conf", drop_in)
    m.start("proxy.socket", "held.socket")
    m.sh("systemctl --no-block start proxy.service")
    m.wait_for("the start", lambda: active_pid(m))


def listeners(m: Machine) -> str:
    """All listeners of `start_proxy`, that for held clients at the end."""
    return f"9000,{m.folder}/listener,9001"


def restart(m: Machine) -> None:
    """Restart, also where daemon-reexec in the middle cuts systemctl off."""
    before = m.main_pid("proxy.service")
    m.sh("systemctl --no-block restart proxy.service")
    m.wait_for("another process", lambda: active_pid(m) not in (0, before), 20)


def kill(m: Machine, signal: str = "KILL") -> None:
    """Kill the program, and wait for the next process."""
    before = m.main_pid("proxy.service")
    m.sh(f"systemctl kill --kill-whom=main --signal={signal} proxy.service")
    m.wait_for("another process", lambda: active_pid(m) not in (0, before), 20)


def active_pid(m: Machine) -> int:
    """The main process of an active proxy.service; 0 if it is not, or nobody can tell now."""
    said = m.run("systemctl show --value -p ActiveState -p MainPID proxy.service").stdout.split()
    return int(next(word for word in said if word != "active")) if "active" in said else 0


def reload(m: Machine) -> None:
    """Reload, and wait until it has been done."""
    before, done = m.main_pid("proxy.service"), m.journal("proxy.service").count(WENT_ON)
    m.sh("systemctl reload proxy.service")
    m.wait_for("the reload", lambda: m.journal("proxy.service").count(WENT_ON) > done, 20)
    same("the main process after a reload", m.main_pid("proxy.service"), before)


WENT_ON = "Going on with"
"""What the log says when a process has taken connections over."""


KEPT_MS = 2000
"""At this age each connection is kept, also on a machine with other work: it begins at 1000."""


def wait_until_kept(m: Machine, count: int, pid: int = 0, which: str = "") -> None:
    """Wait until `count` connections would outlive the process: each is old enough, and its two
    sockets lie in a page. `pid` and `which`, for socket-proxyctl, are those of another service."""
    pid = pid or m.main_pid("proxy.service")
    command = f"{m.ctl} list --json=short {which or '--unit=proxy.service'}"

    def are_kept() -> bool:
        ages = [row["ageUSec"] for row in json.loads(m.sh(command))]
        old = len(ages) >= count and min(ages) > 1000 * KEPT_MS
        return old and queued(m, pid) >= 2 * count

    m.wait_for("all are kept", are_kept, 30)


def queued(m: Machine, pid: int) -> int:
    """The number of descriptors that lie in queues of the process, but for what is stored."""
    manager = m.sh(f"sed -n 's/^PPid:\\s*//p' /proc/{pid}/status").strip()
    stored = set(re.findall(r"socket:\S+", m.run(f"ls -l /proc/{manager}/fd").stdout))
    own = dict(re.findall(r"(\d+) -> (socket:\S+)", m.run(f"ls -l /proc/{pid}/fd").stdout))
    told = m.run(f"grep -H ^scm_fds: /proc/{pid}/fdinfo/*").stdout
    counts = re.findall(r"/(\d+):scm_fds:\s*(\d+)", told)
    return sum(int(count) for fd, count in counts if own.get(fd, "") not in stored)


def stored(m: Machine) -> str:
    """The number of descriptors that the service manager has stored."""
    return m.show("proxy.service", "NFileDescriptorStore")


def version(m: Machine) -> int:
    """The version of systemd."""
    return int(m.sh("systemctl --version").split()[1].partition("~")[0])
