"""The program under test, started as a service manager starts it, and observed from outside."""

import contextlib
import fcntl
import os
import re
import resource
import signal
import tempfile
import time
from pathlib import Path

from kit.socket_state import state_of
from kit.waiting import wait_until

PASSED_ON = re.compile(r"^(PATH|LANG|HOME|PYTHON\w+|LD_\w+|\w+SAN_OPTIONS|COVERAGE_\w+)$")
"""Variables that the program inherits from the test run."""

AS_SERVICE_MANAGER = """
LISTEN_PID=$$; export LISTEN_PID
if [ "$WATCHDOG_PID" = own ]; then WATCHDOG_PID=$$; fi
exec "$@"
"""
"""LISTEN_PID must be the pid of the program, which only the child process knows."""

SEQPACKET = b"0005"
"""The type of a socket in /proc/net/unix."""

SIGNS_OF_A_CRASH = ("Traceback (most recent call last)", "Sanitizer", "runtime error:")


def spawn(command, *, inherit, environment, stdout, stderr, listen_pid, sigpipe_ignored=True):
    """Start `command` with the sockets `inherit` as fd 3, 4, ...; returns its pid.

    posix_spawn is used because the test process has threads.
    """
    high = [fcntl.fcntl(entry, fcntl.F_DUPFD_CLOEXEC, 100) for entry in inherit]
    actions = [
        (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
        (os.POSIX_SPAWN_DUP2, stdout, 1),
        (os.POSIX_SPAWN_DUP2, stderr, 2),
    ]
    actions += [(os.POSIX_SPAWN_DUP2, fd, 3 + index) for index, fd in enumerate(high)]
    if listen_pid == "own":
        command = ["/bin/sh", "-c", AS_SERVICE_MANAGER, "sh", *command]
    elif listen_pid is not None:
        environment = environment | {"LISTEN_PID": listen_pid}
    try:
        # CPython ignores SIGPIPE, as the service manager does; the child inherits that.
        return os.posix_spawnp(
            command[0],
            command,
            environment,
            file_actions=actions,
            setsigdef=[signal.SIGINT, signal.SIGHUP]
            + ([] if sigpipe_ignored else [signal.SIGPIPE]),
            setsigmask=[],
        )
    finally:
        for fd in high:
            os.close(fd)


def base_environment():
    """The part of the environment that has nothing to do with socket activation."""
    return {key: value for key, value in os.environ.items() if PASSED_ON.match(key)}


class Proxy:
    """A running program under test. Call `end()` in the end; the `stage` fixture does."""

    def __init__(
        self,
        command,
        *,
        inherit=(),
        names=None,
        environment=None,
        listen_pid="own",
        notify=None,
        sigpipe_ignored=True,
        journal=False,
    ):
        """Start `command`, an argument vector that may begin with `prlimit` or `setpriv`.

        `names` is LISTEN_FDNAMES. `environment` is added to the inherited variables: None removes
        one, and "own" for WATCHDOG_PID is the program's pid. `listen_pid` is LISTEN_PID: "own" is
        the program's pid, None leaves it out. `notify` is a NotifySocket. With `journal`, the
        program is told that its stderr is the journal.
        """
        variables = base_environment()
        if inherit:
            variables["LISTEN_FDS"] = str(len(inherit))
        if names is not None:
            variables["LISTEN_FDNAMES"] = names
        if notify:
            variables["NOTIFY_SOCKET"] = notify.environment_value
        self._stdout = tempfile.TemporaryFile()  # noqa: SIM115 - closed by release()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115
        if journal:
            file = os.fstat(self._stderr.fileno())
            variables["JOURNAL_STREAM"] = f"{file.st_dev}:{file.st_ino}"
        variables.update(environment or {})
        variables = {key: value for key, value in variables.items() if value is not None}
        self.notify = notify
        self.status = None
        self.pid = spawn(
            command,
            inherit=inherit,
            environment=variables,
            stdout=self._stdout.fileno(),
            stderr=self._stderr.fileno(),
            listen_pid=listen_pid,
            sigpipe_ignored=sigpipe_ignored,
        )
        self.pidfd = os.pidfd_open(self.pid)

    # Its output

    def output(self):
        """Its stdout so far."""
        return _content(self._stdout)

    def log(self):
        """Its stderr so far."""
        return _content(self._stderr)

    def log_lines(self, part=""):
        """The lines on stderr that contain `part`."""
        return [line for line in self.log().splitlines() if part in line]

    def wait_for_log(self, part):
        """Wait for a line on stderr that contains `part`."""
        wait_until(lambda: self.log_lines(part), f"{part!r} on stderr; there: {self.log()!r}")

    # Its state and its end

    def send_signal(self, number):
        """Send it a signal, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def has_ended(self):
        """True once it has exited; `status` is then its exit status, negative for a signal."""
        if self.status is None and state_of(self.pidfd):  # select() knows no fd beyond 1023
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status is not None

    def wait(self, timeout=None):
        """Wait for its end; returns the exit status."""
        wait_until(self.has_ended, f"the program's end; its stderr: {self.log()!r}", timeout)
        return self.status

    def wait_until_ready(self):
        """Wait for READY=1; if it ends before, fail with what it wrote to stderr."""
        wait_until(
            lambda: self.has_ended() or "READY=1" in self.notify.lines(),
            f"READY=1; stderr: {self.log()!r}",
        )
        assert self.status is None, f"exit {self.status} before READY=1: {self.log()!r}"

    def waits_for_events(self):
        """Whether it sleeps, with an epoll instance to wait for events."""
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{self.worker}/stat").read_text().rpartition(")")[2].split()[0]
            return state == "S" and any("eventpoll" in what for what in self.fds().values())
        return False

    def kill(self):
        """End it by SIGKILL."""
        if not self.has_ended():
            self.send_signal(signal.SIGKILL)
            self.wait()

    def end(self):
        """End it by SIGTERM, or by SIGKILL if that does nothing; True if SIGTERM was enough."""
        if self.has_ended():
            return True
        self.send_signal(signal.SIGTERM)
        try:
            self.wait(5.0)
            return True
        except AssertionError:
            self.kill()
            return False

    def release(self):
        """Kill the program and close what this object has open; it cannot be used afterwards."""
        self.kill()
        os.close(self.pidfd)
        self._stdout.close()
        self._stderr.close()

    # Its resources

    @property
    def worker(self):
        """The pid of the process that forwards: the program, or its only child (nginx)."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except FileNotFoundError:  # a kernel that does not list children
            children = []
        return int(children[0]) if children else self.pid

    def _cpu_times(self):
        """{thread: (seconds it has run, seconds it had to wait for a CPU)}."""
        times, tasks = {}, Path(f"/proc/{self.worker}/task")
        for task in os.listdir(tasks):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                ran, waited, _ = map(int, (tasks / task / "schedstat").read_text().split())
                times[task] = (ran / 1e9, waited / 1e9)
        return times

    def cpu_seconds(self):
        """The CPU time of all its threads so far."""
        return sum(ran for ran, _ in self._cpu_times().values())

    def cpu_share(self, seconds=0.6):
        """The share of one CPU that it uses over the next `seconds`: 1.0 is a whole CPU."""
        before, start = self.cpu_seconds(), time.monotonic()
        time.sleep(seconds)  # the interval that is measured
        return (self.cpu_seconds() - before) / (time.monotonic() - start)

    def cpu_demand(self, seconds=0.6):
        """The share of the time in which its busiest thread runs or waits for a CPU.

        For a busy loop this is 1.0 on any machine, however loaded.
        """
        before, start = self._cpu_times(), time.monotonic()
        time.sleep(seconds)  # the interval that is measured
        span = time.monotonic() - start
        after = self._cpu_times()
        return max(sum(after[task]) - sum(before.get(task, (0, 0))) for task in after) / span

    def resident_bytes(self):
        """Resident memory, RSS."""
        with open(f"/proc/{self.worker}/status") as file:
            return int(re.search(r"VmRSS:\s+(\d+) kB", file.read())[1]) * 1024

    def fds(self):
        """{fd number: what it is}, such as `socket:[1234]`."""
        found, directory = {}, f"/proc/{self.worker}/fd"
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                found[int(name)] = os.readlink(f"{directory}/{name}")
        return found

    def socket_count(self):
        """The number of its fds that are sockets, without those with which it keeps others."""
        sockets = [link for link in self.fds().values() if link.startswith("socket:")]
        return len(sockets) - len(self._queues().intersection(sockets))

    def _queues(self):
        """Its SEQPACKET sockets, as fds() names them: in their queues it keeps its connections."""
        with open(f"/proc/{self.worker}/net/unix", "rb") as table:
            words = [line.split() for line in table]  # of other tests, names of any bytes
        return {f"socket:[{word[6].decode()}]" for word in words if word[4:5] == [SEQPACKET]}

    def fd_flags(self, fd):
        """The open(2) flags of one of its fds, O_CLOEXEC included."""
        with open(f"/proc/{self.worker}/fdinfo/{fd}") as file:
            return int(re.search(r"flags:\s+(\d+)", file.read())[1], 8)

    def fd_limit(self):
        """Its (soft, hard) limit of open files."""
        return resource.prlimit(self.worker, resource.RLIMIT_NOFILE)

    def set_fd_limit(self, soft, hard=None):
        """Change its limit of open files while it runs."""
        resource.prlimit(self.worker, resource.RLIMIT_NOFILE, (soft, hard or self.fd_limit()[1]))

    def leave_no_fd(self):
        """Lower its limit of open files so that it cannot open any; returns the former limit."""
        fds, former = self.fds(), self.fd_limit()[0]
        self.set_fd_limit(next(number for number in range(former) if number not in fds))
        return former


def _content(file):
    return os.pread(file.fileno(), 1 << 24, 0).decode(errors="replace")
