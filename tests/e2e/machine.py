"""The booted container as scenarios see it: units, clients, servers, the journal.

Everything a scenario makes here is undone by `end()`.
"""

import json
import subprocess
import time
from collections.abc import Callable
from contextlib import contextmanager

from kit.containers import cgroup
from kit.containers.container import Container

UNIT_FOLDER = "/etc/systemd/system"

MEGABYTE = 1 << 20

NGINX_CONF = """
daemon off;
user www-data;
worker_processes 1;
pid {folder}/{name}.pid;
error_log stderr;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    sendfile on;
    client_max_body_size 0;
    client_body_temp_path {folder}/body;
    {http}
}}
"""

# The path of the folder inside/ in the container.
TOOLS = "/opt/e2e"


class Failure(Exception):
    """The scenario failed; str() says how."""


def check(condition: object, what: str) -> None:
    if not condition:
        raise Failure(what)


def same(what: str, got: object, wanted: object) -> None:
    if got != wanted:
        raise Failure(f"{what}: {got!r}, not {wanted!r}")


class Machine:
    """`program` is what ExecStart= runs, and `ctl` its companion.

    `folder` is a directory of the running scenario.
    """

    def __init__(self, container: Container, program: str):
        self.container = container
        self.program = program
        self.ctl = f"{program.rpartition('/')[0]}/socket-proxyctl"
        self.folder = ""
        self._units: list[str] = []
        self._files: list[str] = []
        self._replaced: list[str] = []
        self._clients: list[subprocess.Popen] = []
        self._cursor = ""
        self.help = self.run(f"{program} --help").stdout

    # --- a scenario's life ---------------------------------------------------------------------

    def begin(self, name: str) -> None:
        self.folder = f"/srv/{name}"
        self._cursor = (
            self.sh("journalctl -q -n 1 --show-cursor").rpartition("cursor: ")[-1].strip()
        )
        self.sh(f"mkdir -p {self.folder}")

    def reboot(self) -> None:
        """Reboot. The journal is volatile, so earlier log lines are lost."""
        self.container.reboot()
        self._cursor = ""

    def end(self) -> None:
        for client in self._clients:
            if client.poll() is None:
                client.kill()
            client.wait()
        sockets_first = sorted(self._units, key=lambda unit: not unit.endswith(".socket"))
        script = [f"systemctl stop '{unit}'" for unit in sockets_first]
        script += [f"rm -rf '{path}'" for path in [*self._files, self.folder]]
        script += [f"test ! -e {path}.e2e || mv {path}.e2e {path}" for path in self._replaced]
        script += ["systemctl daemon-reload", "systemctl reset-failed"]
        self.run("\n".join(script), timeout=120)
        self._units, self._files, self._replaced, self._clients = [], [], [], []

    # --- commands ------------------------------------------------------------------------------

    def run(
        self, script: str, timeout: float = 60, stdin: str | None = None
    ) -> subprocess.CompletedProcess:
        """Run a bash script inside; its exit status does not matter."""
        return self.container.run(script, timeout, stdin)

    def sh(self, script: str, timeout: float = 60, stdin: str | None = None) -> str:
        """Run a bash script inside and return its output; Failure if it fails."""
        done = self.run("set -e -o pipefail\n" + script, timeout, stdin)
        if done.returncode:
            why = f"no end after {timeout} s" if done.returncode in (124, 137) else done.returncode
            raise Failure(f"{script.strip()!r}: {why} {done.stderr.strip()[-600:]}")
        return done.stdout

    def client(self, script: str) -> subprocess.Popen:
        """Start a bash script inside, with pipes to it; ended with the scenario."""
        argv = ["setpriv", "--pdeathsig", "KILL", "/bin/bash", "-c", script]
        process = subprocess.Popen(
            self.container.command(argv),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self._clients.append(process)
        return process

    def write(self, path: str, text: str, mode: str = "644") -> str:
        """Write a file inside (removed after the scenario) and return its path."""
        self.sh(f"mkdir -p $(dirname {path}); cat >{path}; chmod {mode} {path}", stdin=text)
        self._files.append(path)
        return path

    def replace(self, path: str, text: str) -> None:
        """Write a program that the machine may have as well, and has again after the scenario."""
        self.sh(f"test -e {path}.e2e -o ! -e {path} || mv {path} {path}.e2e")
        self.write(path, text, mode="755")
        self._replaced.append(path)

    def wait_for(self, what: str, condition: Callable[[], object], timeout: float = 10) -> None:
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                raise Failure(f"{what}: not within {timeout:g} s")
            time.sleep(0.03)

    def rules(self, what: str) -> set[str]:
        """The rules that systemd-socket-proxyd-units finds broken in `what`."""
        listed = self.run(f"{self.program}-units check --json=short {what}").stdout
        return {finding["rule"] for finding in json.loads(listed or "[]")} - {"verify"}

    # --- units ---------------------------------------------------------------------------------

    def unit(self, name: str, text: str, load: bool = True) -> str:
        """Write a unit file (or, as NAME.d/x.conf, a drop-in) and load it."""
        self.write(f"{UNIT_FOLDER}/{name}", text)
        self.uses(name.partition(".d/")[0])
        if load:
            self.sh("systemctl daemon-reload")
        return name

    def uses(self, *units: str) -> None:
        """Stop these units after the scenario, too."""
        self._units.extend(units)

    def proxy(
        self,
        name: str,
        listen: str,
        target: str,
        *,
        options: str = "",
        unit: str = "",
        service: str = "",
        socket: str = "",
        gated: bool = False,
        program: str = "",
    ) -> None:
        """A started socket unit that listens on the addresses `listen`, and a proxy service."""
        gate = f"{TOOLS}/gate " if gated else ""
        # Scenarios start and stop faster than StartLimitBurst= allows.
        unit = f"Requires={name}.socket\nAfter={name}.socket\nStartLimitIntervalSec=0\n{unit}"
        streams = "".join(f"ListenStream={address}\n" for address in listen.split())
        self.unit(f"{name}.socket", f"[Socket]\n{streams}{socket}\n", load=False)
        self.unit(
            f"{name}.service",
            f"[Unit]\n{unit}\n[Service]\n"
            f"ExecStart={gate}{program or self.program} {options} {target}\n{service}\n",
        )
        self.start(f"{name}.socket")

    def nginx(self, name: str, http: str, service: str = "") -> None:
        """An nginx of our own as NAME.service: `http` is the inside of its http block."""
        conf = self.nginx_conf(name, http)
        self.unit(f"{name}.service", f"[Service]\nExecStart=/usr/sbin/nginx -c {conf}\n{service}\n")

    def nginx_conf(self, name: str, http: str) -> str:
        """Write an nginx configuration for the foreground and return its path."""
        return self.write(
            f"{self.folder}/{name}.conf",
            NGINX_CONF.format(folder=self.folder, name=name, http=http),
        )

    def nginx_for_load(self, port: int, service: str = "") -> None:
        """The started server that inside/load.py expects: backend.service."""
        self.write("/srv/e2e-big", "")
        self.sh("head -c 2M /dev/urandom >/srv/e2e-big")
        self.nginx(
            "backend",
            f"""server {{
            listen 127.0.0.1:{port} backlog=1024;
            location = /small {{ return 200 "small\\n"; }}
            location = /big {{ alias /srv/e2e-big; }}
        }}""",
            service,
        )
        self.start("backend.service")
        self.wait_for("nginx listens", lambda: self.listens(port))

    def start_load(self, kind: str, *numbers: int) -> subprocess.Popen:
        """Start inside/load.py; `load_result` awaits it."""
        return self.client(f"exec python3 {TOOLS}/load.py {kind} {' '.join(map(str, numbers))}")

    def load_result(self, load: subprocess.Popen) -> dict[str, dict[str, int]]:
        """The number of requests of each kind by outcome ("ok" or an error's text)."""
        output, _ = load.communicate(timeout=180)
        check(output.startswith("{"), f"load.py: {output[-600:]}")
        return json.loads(output)

    def listens(self, port: int) -> bool:
        return bool(self.sh(f"ss -Hltn sport = {port}"))

    def start(self, *units: str) -> None:
        self.sh(f"systemctl start {' '.join(units)}")

    def stop(self, *units: str) -> None:
        self.sh(f"systemctl stop {' '.join(units)}")

    def show(self, unit: str, prop: str) -> str:
        return self.sh(f"systemctl show --value -p {prop} {unit}").strip()

    def is_active(self, unit: str) -> bool:
        return self.show(unit, "ActiveState") == "active"

    def main_pid(self, unit: str) -> int:
        """The pid of a service's main process inside the container, 0 if there is none."""
        return int(self.show(unit, "MainPID"))

    def host_pid(self, unit: str) -> int:
        """The pid of a service's main process on the host; never 0, which would mean ourselves."""
        pid = self.container.host_pid(self.main_pid(unit))
        check(pid, f"{unit} has no process")
        return pid

    def journal(self, unit: str = "") -> str:
        """What was logged since the scenario began, by one unit or by all."""
        which = f"-u {unit}" if unit else ""
        since = f"--after-cursor='{self._cursor}'" if self._cursor else "-b"
        return self.sh(f"journalctl -q --no-hostname -o short-monotonic {which} {since}")

    # --- limits --------------------------------------------------------------------------------

    @contextmanager
    def limited(self, unit: str, memory: int, tasks: int):
        """Start `unit`, whose proxy is `gated`, under limits (bytes, tasks).

        Yields a note on how they are enforced: by systemd itself, or, where it cannot because the
        host's controllers are cgroup v1's, by groups of the host around the main process.
        """
        self.run("rm -f /run/e2e-gate")
        self.sh(f"systemctl start --no-block {unit}")
        self.wait_for(f"{unit} has a process", lambda: self.main_pid(unit))
        limits = cgroup.Limits(f"e2e-{unit}-{self.container.leader}")
        try:
            yield self._enforce(limits, unit, memory, tasks)
        finally:
            self.run(f"systemctl stop {unit}")
            limits.remove()

    def _enforce(self, limits: cgroup.Limits, unit: str, memory: int, tasks: int) -> str:
        group = "/sys/fs/cgroup" + self.show(unit, "ControlGroup")
        if self.run(f"test -e {group}/memory.max -a -e {group}/pids.max").returncode == 0:
            note = "limits by systemd"
        elif limits.apply(self.host_pid(unit), memory, tasks):
            note = "limits by cgroup v1 groups of the host"
        else:
            note = "MemoryMax= and TasksMax= NOT enforced on this host"
        self.sh("touch /run/e2e-gate")
        return note
