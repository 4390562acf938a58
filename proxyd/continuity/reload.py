"""SIGHUP: the program is executed again in place, and goes on with its connections.

The process and its listeners stay, so no client notices more than a pause; code and modules are
read again, the options are the same. The new version is tried first, in a child. Until execve(2)
has succeeded nothing is given up, so a version that does not start costs a line in the log.
"""

import _signal  # type: ignore[import-not-found]
import _thread
import errno
import posix
import sys

from proxyd import log
from proxyd._relay import take_signals
from proxyd.continuity import departure, fd_queue
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable

    from proxyd.acceptor import Acceptor
    from proxyd.continuity.keep import Keeper
    from proxyd.continuity.parts import Parts

PARCEL_VARIABLE = "PROXYD_PARCEL"
"""Tells the new program which descriptor is the parcel, and whose: FD:PID."""

PAGES_VARIABLE = "PROXYD_PAGES"
"""Likewise, the receiving end of root, if there is one (root.py)."""

_SIGNALS = (
    _signal.SIGHUP,
    _signal.SIGTERM,
    _signal.SIGINT,
    _signal.SIGUSR1,
    _signal.SIGUSR2,
    _signal.SIGALRM,
)

_TRIAL_MS = 10_000
"""How long the new version may take to say which one it is."""

_LISTEN_FDS_START = 3


def is_possible(acceptor: "Acceptor") -> bool:
    """Tell whether SIGHUP means to reload; otherwise it ends the program, as ever.

    With a terminal it says that the terminal is gone. A single connection (Accept=yes) is not
    carried on.
    """
    if acceptor.passed_in:
        return False
    try:
        posix.close(posix.open("/dev/tty", posix.O_RDWR | posix.O_NOCTTY | posix.O_CLOEXEC))
    except OSError:
        return True
    return False


class Reload:
    """One SIGHUP: first the trial, then the new program. Ends with `done` if it has failed."""

    __slots__ = ("_keeper", "_parts", "_pid", "_pidfd", "_status", "done", "until_ms")

    def __init__(
        self, parts: "Parts", keeper: "Callable[[], Keeper | None]" = lambda: None
    ) -> None:
        """`keeper`: what keeps connections by then in case of a kill."""
        self._parts = parts
        self._keeper = keeper
        self.done = False
        self.until_ms = parts.loop.relay.now_ms + _TRIAL_MS
        """When the trial counts as failed."""
        self._pid = self._pidfd = -1
        self._status: int | None = None
        """How the trial has ended, as of waitpid(2)."""
        parts.notifier.reloading()
        parts.loop.relay.trim_pipes()  # descriptors may be short
        try:
            self._pid = _spawn_trial()
            self._pidfd = posix.pidfd_open(self._pid)
            parts.loop.watch(self._pidfd, lambda _events: self._tried(), quiet=True)
        except OSError as error:
            self._reap(kill=True)
            self._fail(f"cannot be tried: {reason(error)}")

    def step(self, now_ms: int) -> None:
        """After a batch of events: become the new program if it has passed the trial.

        Not sooner, for the rest of the batch may have clients that were accepted just now.
        """
        late = now_ms >= self.until_ms
        if self._status is not None:
            if late or self._status != 0 or self._is_settled():
                self._go_on(self._status)
        elif not self.done and late:
            self._reap(kill=True)
            self._fail("does not start within 10 s")

    def cancel(self) -> None:
        """The program is about to end."""
        self._reap(kill=True)

    def _tried(self) -> None:
        self._status = self._reap(kill=False)

    def _is_settled(self) -> bool:
        """Tell whether the service manager knows all that it has to: the new program does not."""
        keeper = self._keeper()
        return not self._parts.notifier.removes and not (keeper is not None and keeper.waits)

    def _go_on(self, status: int) -> None:
        if status != 0:
            self._fail(f"does not start: {_explain(status)}")
            return
        try:
            self._execute()
        except (OSError, MemoryError) as error:
            departure.resume(self._parts)
            self._fail(f"cannot go on with the connections: {reason(error)}")

    def _reap(self, *, kill: bool) -> int:
        """End the trial; return its status as of waitpid(2)."""
        pid, pidfd = self._pid, self._pidfd
        self._pid = self._pidfd = -1
        if pidfd >= 0:
            self._parts.loop.unwatch(pidfd)
            posix.close(pidfd)
        if pid < 0:
            return 0
        if kill:
            posix.kill(pid, _signal.SIGKILL)
        _, status = posix.waitpid(pid, 0)
        return status

    def _fail(self, why: str) -> None:
        self.done = True
        log.warning(f"Not reloaded, going on with the same version: the program {why}")
        self._parts.notifier.ready()

    def _execute(self) -> None:
        """Become the new program. Raises OSError."""
        parts = self._parts
        sender, receiver = fd_queue.pair()
        inherited = _inherited(parts)
        left = {PARCEL_VARIABLE: receiver.fileno()}
        keeper = self._keeper()
        if keeper is not None:
            left[PAGES_VARIABLE] = keeper.bequeath()
        fds = [fd for fd in [*left.values(), *[fd for fd, _ in inherited]] if fd >= 0]
        # They would end the new program before it is ready for them; it unblocks them.
        blocked = _signal.pthread_sigmask(_signal.SIG_BLOCK, _SIGNALS)
        for number in take_signals():  # come meanwhile: they wait, and are for the new program, too
            _signal.pthread_kill(_thread.get_ident(), number)
        try:
            what = departure.pack(parts, sender)
            sender.close()
            if parts.loop.relay.quarantine_blocks:  # execve(2) would wait for its thread
                raise OSError(errno.EBUSY, "a file descriptor that was sent to it cannot be closed")
            log.info(f"Reloading with {what}.")
            log.finish()
            for fd in fds:
                posix.set_inheritable(fd, True)
            command = [sys.executable, *sys.orig_argv[1:]]
            posix.execve(sys.executable, command, _environ(left, inherited))
        finally:  # it has failed
            for fd in fds:
                posix.set_inheritable(fd, False)
            _signal.pthread_sigmask(_signal.SIG_SETMASK, blocked)
            sender.close()
            receiver.close()


def _inherited(parts: "Parts") -> list[tuple[int, str]]:
    """Return (fd, name) of the sockets that the service manager has passed. Raises OSError."""
    listeners = parts.acceptor.listeners
    passed = listeners[: len(listeners) - len(parts.options.listen)]
    if parts.entrance is not None and (parts.options.inspect or "").startswith("fd:"):
        passed = [*passed, parts.entrance]
    found = sorted((one.fd, one.name) for one in passed)
    first = _LISTEN_FDS_START
    if [fd for fd, _ in found] != list(range(first, first + len(found))):
        raise OSError(errno.EBADF, "a listener is not where it was")
    return found


def _spawn_trial() -> int:
    """Start the program as it is installed now, with --version; return its pid. Raises OSError."""
    before = len(sys.orig_argv) - (len(sys.argv) - 1)
    command = [*sys.orig_argv[:before], "--version"]
    actions = [(posix.POSIX_SPAWN_OPEN, 1, "/dev/null", posix.O_WRONLY, 0)]
    if not sys.executable:
        raise OSError(errno.ENOENT, "the interpreter is not known")
    pid = posix.posix_spawn(sys.executable, command, posix.environ, file_actions=actions)
    _let_it_die_first(pid)
    return pid


def _let_it_die_first(pid: int) -> None:
    """Have the OOM killer prefer the trial: with MemoryMax= there may not be room for two."""
    try:
        with open(f"/proc/{pid}/oom_score_adj", "wb", 0) as file:
            file.write(b"1000")
    except OSError:
        pass  # no /proc, or it has ended already


def _explain(status: int) -> str:
    code = posix.waitstatus_to_exitcode(status)
    return f"it was ended by signal {-code}" if code < 0 else f"its exit status is {code}"


def _environ(left: dict[str, int], inherited: list[tuple[int, str]]) -> dict[bytes, bytes]:
    """Return the environment for the new program, with the listeners of this one.

    `left`: what else it is told of, by the name of the variable.
    """
    ours = PARCEL_VARIABLE.encode(), PAGES_VARIABLE.encode()  # perhaps of an earlier reload
    environ = {
        name: value
        for name, value in posix.environ.items()
        if not name.startswith(b"LISTEN_") and name not in ours
    }
    for variable, fd in left.items():
        if fd >= 0:
            environ[variable.encode()] = b"%d:%d" % (fd, posix.getpid())
    if inherited:
        environ[b"LISTEN_PID"] = str(posix.getpid()).encode()
        environ[b"LISTEN_FDS"] = str(len(inherited)).encode()
        names = ":".join([name for _, name in inherited])
        environ[b"LISTEN_FDNAMES"] = names.encode("utf-8", "surrogateescape")
    return environ
