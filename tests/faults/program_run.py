"""One run of the program inside this process, with one failure in it.

The whole program runs on the main thread, from cli.main() on. Only EventLoop.run(), in which it
waits for events, is wrapped: there the world around it (clients, backend) has its turn. So nothing
depends on scheduling, and call number n is the same call in every run.

Timeouts cost no time: when nothing moves any more, the extension's clock is put forward until they
have expired.
"""

import errno
import functools
import gc
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from typing import NamedTuple

from faults.callers import INFO, LIST, STATUS
from faults.control import NO_STRIKE
from faults.datagrams import Asker
from faults.killed import KilledProcess
from faults.store import Store
from faults.world import CUT, World
from kit.kept import kept
from kit.rig import open_fds

from proxyd import cli, event_loop

PASSED_ON = 3
"""The fd at which the service manager passes a socket …"""

PASSED_ON_TOO = 4
"""… and one for datagrams, if the scenario has any; or what is stored …"""

PASSED_ON_LAST = 5
"""… in either place."""

PASSED_FDS = {str(PASSED_ON), str(PASSED_ON_TOO), str(PASSED_ON_LAST)}

NEVER_CLOSED = ("anon_inode:[eventfd]",)
"""What the program opens once and keeps open until its process ends."""

IMPORTED_LATE = (
    "timespan", "proxy_protocol", "resolver", "lookup", "ports", "inspection", "datagrams",
    "datagram_upstream", "continuity", "header_reader", "received_header", "networks", "crc32c",
    "sources", "user_namespace",
)  # fmt: skip
"""Modules that the program imports only when it needs them: each run imports them again."""

STILL_TURNS = 25
"""Turns in which nothing moves before the clock is put forward."""

THREADS_FACTOR = 8
"""This many times as many turns if other threads work too, which may have to wait for a CPU."""

STEPS_MS = (50, 250, 1000, 1000, 6000, 6000, 12000, 30000)
"""The steps by which the clock is put forward."""

LAST_STEPS_MS = (12000, 30000)
"""The same once all has been judged: what is left only has to time out, in whatever order."""

PATIENCE_S = 0.5
"""The program hangs if nothing has moved for this long after the last step."""

NAP_MS = 2
"""The longest sleep of the other relay threads, which then look at the clock again."""

LONGEST_S = 15.0
"""The longest run, whatever still moves."""

PROCESSES_MAX = 6
"""How often the program is started in a scenario that restarts it."""

NOT_KEPT = ("kept in case of a kill", "Ignoring NOTIFY_SOCKET")
"""Lines that tell that connections would be lost by a kill."""

LOST = (
    "Failed to keep the connections",
    "No store for connections",
    "Failed to go on",
    "parcel is bad",
    "were cut",
    "Cannot use what the last process has left",
    "Not all that the last process has left",
    "Resetting the connections of the last process",
)
"""Lines that tell that connections were lost between two processes …"""

RESET = re.compile(r"Had to reset (\d+) connections")
"""… and how many."""

LINES_MAX = 12
"""More lines on stderr are a flood."""


def forget_modules():
    """Have modules imported again that a run imports late."""
    package = sys.modules["proxyd"]
    for name in list(sys.modules):
        if name.removeprefix("proxyd.").partition(".")[0] in IMPORTED_LATE:
            del sys.modules[name]
    for name in IMPORTED_LATE:
        if hasattr(package, name):
            delattr(package, name)


def is_unix_listener(fd):
    """Whether it is a socket that the program keeps open until its process ends."""
    sock = socket.socket(fileno=fd)
    try:
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return bool(listens) and sock.family == socket.AF_UNIX
    finally:
        sock.detach()


def is_of_worker(fd):
    """Whether it may be one with which a thread waits for events."""
    return kind_of(fd).startswith("anon_inode:")


def kind_of(fd):
    """What an fd is, as in socket:[1234]; empty if a thread has closed it meanwhile."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except FileNotFoundError:
        return ""


def reserve(fd):
    """Have nothing else use an fd, which the program may have closed."""
    try:
        os.fstat(fd)
    except OSError:
        os.dup2(1, fd)


def close_passed_fds():
    """Close what was passed on, and have nothing else use these fds."""
    for fd in PASSED_FDS:
        os.dup2(1, int(fd))


def described(fds):
    """What these fds are."""
    return ", ".join(f"{fd} {kind_of(fd)}" for fd in sorted(fds, key=int))


def count_ends(fds):
    """How many of these fds are ends of pipes, or sockets.

    Not the one for the service manager, which is the only one for datagrams: a process that could
    not open it does without. Nor queues, which last as long as the process, if it has them.
    """
    found = [(fd, kind_of(fd)) for fd in fds]
    return sum(
        what.startswith("pipe:")
        or (what.startswith("socket:") and type_of(fd) != socket.SOCK_DGRAM and not is_queue(fd))
        for fd, what in found
    )


def is_queue(fd):
    """Whether it may be an end of root, or of one of its pages."""
    return kind_of(fd).startswith("socket:") and type_of(fd) == socket.SOCK_SEQPACKET


def type_of(fd):
    """The type of a socket."""
    sock = socket.socket(fileno=os.dup(int(fd)))
    try:
        return sock.type
    finally:
        sock.close()


def sockets_in_use():
    """How many sockets there are in this network, wherever they are: also in queues."""
    with open("/proc/self/net/sockstat") as file:
        return int(file.readline().split()[2])


class Outcome(NamedTuple):
    """The result of one run."""

    kind: str
    """The effect of the failure."""
    faults: list
    """What is wrong, in words."""
    hits: int
    """The number of calls that failed."""
    log: str
    calls: dict
    """{(scope, kind of call): the number of calls}"""


SERVED_ON, ONE_WAS_HIT, REFUSED_TO_START = "served on", "one was hit", "refused to start"


class OwnListener:
    """A socket file on which the program itself listens, with the methods that clients need."""

    family = socket.AF_UNIX

    def __init__(self, path):
        self._path = path

    def getsockname(self):
        return self._path

    def close(self):
        """Nothing: the program closes it."""


class Hang(BaseException):
    """Nothing moves any more. Not an Exception, which the program would catch."""


class WalkError(BaseException):
    """The walk itself has a fault."""


class ProgramRun:
    """Runs one scenario once. `control` is that of the interposer loaded into this process."""

    def __init__(self, scenario, control, log):
        self.scenario = scenario
        self.control = control
        self.log_file = log
        self.directory = tempfile.mkdtemp(prefix="faults-")
        self.faults = []
        self.still = self.steps = 0
        self.start = self.moved = time.monotonic()
        self.ready = False
        self.fresh = None
        self.wanted = lambda: "; ".join(f"{c}: {self.world.state(c)}" for c in self.world.conns)
        """What the run waits for, in words."""
        self.keeps = None
        self.calls = None
        self.ends_at_first = 0
        self.judged = self.judged_in_run = False
        self.troubled = []
        self.died = False
        """A later process has ended at its start, with the parcel that it had received."""
        self.store = Store()
        self.satisfied = False
        """The script is done, a fresh client was served, and everything was released."""

    def run(self, strike=NO_STRIKE):
        """Run it; the Outcome."""
        self.strike = strike
        self.control.pause(1)
        self.before = open_fds()
        self.sockets_before = sockets_in_use()
        self.log_file.seek(0)
        self.log_file.truncate()
        self.world = self._make_world()
        try:
            status = self._run_program(strike)
            log = self._log()
            self._afterwards(status, log)
        finally:
            self.control.begun = 0
            self.store.empty()
            self.world.close()
            shutil.rmtree(self.directory, ignore_errors=True)
        left = self._left()
        if left and self.judged_in_run:
            self.faults.append(f"open at the end: {', '.join(left)}")
        if self.scenario.keeps and not self.faults:
            self._judge_sockets()
        hits = self.control.struct.hits
        return Outcome(
            self._kind(status), self.faults, hits, log, self.calls or self.control.calls()
        )

    # ── before the run ───────────────────────────────────────────────────────────────────────

    def _make_world(self):
        one = self.scenario
        world = World(
            self.directory,
            one.client or "tcp4",
            one.target or "tcp4",
            listens=one.listens,
            datagrams=one.datagrams,
        )
        world.log_size = lambda: os.fstat(2).st_size
        world.put_forward = self._put_forward
        world.kept = lambda: kept(self.store)
        world.tells_not_kept = lambda: any(line in self._log() for line in NOT_KEPT)
        if world.datagrams:
            world.datagrams.now_ms = lambda: self.control.struct.clock_ms
        self.script = one.script(world)
        return world

    def _arguments(self):
        target = self.world.target
        if self.scenario.by_name:
            target = f"localhost:{self.world.backend.getsockname()[1]}"
        inspect = [f"--inspect={self.world.inspection_path}"] if self.scenario.inspected else []
        targets = [target]
        if self.world.datagrams:
            datagrams = self.world.datagrams.target
            if self.scenario.by_name:
                datagrams = datagrams.replace("127.0.0.1", "localhost")
            targets = [f"streams={target}", f"datagrams={datagrams}"]
        return ["systemd-socket-proxyd", *self.scenario.options, *inspect, *targets]

    def _pass_on(self):
        """Give the program what the service manager would give it: fd 3 and the environment."""
        for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_LOG_LEVEL"):
            os.environ.pop(name, None)
        os.environ.update(self.scenario.environment)
        os.environ.pop("RUNTIME_DIRECTORY", None)
        if self.scenario.inspected_by_default:
            os.environ["RUNTIME_DIRECTORY"] = self.directory
        os.environ["NOTIFY_SOCKET"] = "@" + self.notify.getsockname()[1:].decode()
        if self.scenario.opens:
            return
        os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
        if self.scenario.restarts:
            os.environ["LISTEN_FDNAMES"] = "web"
        if self.store.stored:
            names = ["web", *self.store.names]
            os.environ.update(LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
            for number, (_, fd) in enumerate(self.store.stored):
                os.dup2(fd, PASSED_ON_TOO + number)
        if self.scenario.accepted:
            connection, _ = self.world.listen_socket.accept()
            self.world.sockets.append(connection)
            self.keeps = connection  # as the service manager does, until the service ends
            os.dup2(connection.fileno(), PASSED_ON)
        else:
            os.dup2(self.world.listen_socket.fileno(), PASSED_ON)
        if self.world.datagrams:
            os.environ.update(LISTEN_FDS="2", LISTEN_FDNAMES="streams:datagrams")
            os.dup2(self.world.datagrams.listen_socket.fileno(), PASSED_ON_TOO)

    # ── the run ──────────────────────────────────────────────────────────────────────────────

    def _run_program(self, strike):
        """Run the program; its exit status."""
        forget_modules()
        while signal.sigtimedwait((signal.SIGTERM, signal.SIGUSR1), 0):
            pass
        self.notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        self.notify.bind("")
        self.world.sockets.append(self.notify)
        arguments = self._arguments()
        if self.scenario.opens:
            path = os.path.join(self.directory, "socket")
            arguments.insert(1, f"--listen={path}")
            self.world.listen_socket = OwnListener(path)
        self.play = self._play()
        if self.scenario.early:
            next(self.script)
        real_run, real_relay = event_loop.EventLoop.run, event_loop.Relay
        event_loop.EventLoop.run = self._wrapped(real_run)
        if self.scenario.copies:
            event_loop.Relay = functools.partial(real_relay, may_splice=False)
        self.live_before = self.control.struct.live
        status = None
        self.control.reset()
        self.control.struct.nap_ms = NAP_MS
        self.control.struct.pid = os.getpid() + 1  # or UNIX clients would be taken for itself
        try:
            for number in range(self.scenario.kills):
                self._run_until_killed(arguments, strike if number else None)
            if self.scenario.kills < 2:
                self.control.arm(strike)
            status = self._start_process(arguments)
            while self.scenario.restarts and self.ready and not self.satisfied:
                status = self._next_process(arguments)
        except Hang as why:
            self.faults.append(f"hangs: {why}")
        except WalkError:
            raise
        except BaseException as error:
            self.faults.append(f"{type(error).__name__} out of main(): {error}")
        finally:
            event_loop.EventLoop.run, event_loop.Relay = real_run, real_relay
            gc.collect()
            self.control.pause(1)
            self.control.struct.begun = 0
        return status

    def _next_process(self, arguments):
        """Start the program again, with what the last one has stored."""
        self.control.pause(1)
        gc.collect()
        self._count_process()
        return self._start_process(arguments)

    def _count_process(self):
        self.store.obey(self.notify)
        if self.world.processes >= PROCESSES_MAX:
            raise Hang("it does not start again")
        self.world.processes += 1

    def _start_process(self, arguments):
        """Run it until its end; its exit status."""
        forget_modules()
        self._pass_on()
        self.wait = self._turn
        self.control.pause(0)
        status = cli.main(arguments)
        self.died |= self.world.processes > 1 and status != 0
        return status

    def _run_until_killed(self, arguments, strike):
        """Run a process in a child until the script has it killed. Start it again if it ends before
        that. `strike`: make calls fail."""
        if strike is not None:
            self.control.arm(strike)
        killed = False
        while not killed:
            live = self.control.struct.live
            child = KilledProcess(
                functools.partial(self._start_in_child, arguments), self._report, LONGEST_S
            )
            try:
                killed = self._have_turns(child)
            except TimeoutError:
                raise Hang("a process that is to be killed does not come back") from None
            finally:
                child.kill()
                self.control.struct.live = live  # the kernel has freed what it had
            self._count_process()

    def _start_in_child(self, arguments, wait):
        self.wait = wait
        forget_modules()
        self._pass_on()
        self.control.pause(0)
        return cli.main(arguments)

    def _report(self):
        """The number of ends that a process has open at its first turn. One is the channel's."""
        return b"%d" % (count_ends(open_fds() - self.world.fds() - self.store.fds) - 1)

    def _have_turns(self, child):
        """Let both the child and the world have turns; whether it was killed."""
        while child.takes_turn():
            self.ends_at_first = self.ends_at_first or int(child.report)
            try:
                moved = self._turn()
            except Exception as error:
                raise WalkError from error
            if self.world.wants_kill:
                self.world.wants_kill = False
                child.kill()
                return True
            child.go_on(moved=moved)
        status = child.end()
        if status <= 0:
            self.faults.append(f"a process that was not killed yet has ended: {status}")
        self.died = True
        return False

    def _wrapped(self, real_run):
        def run(program, timeout_ms):
            self.control.pause(1)
            try:
                moved = self.wait()
            except Exception as error:  # the walk's: the program must not catch it
                raise WalkError from error
            finally:
                self.control.pause(0)
            return real_run(program, 0 if moved or timeout_ms == 0 else 1)

        return run

    def _turn(self):
        """The world's turn; whether anything has moved."""
        if self.world.log_size() > 100_000:
            raise Hang("a flood of lines")
        if self.scenario.restarts:
            reserve(PASSED_ON_TOO)
            reserve(PASSED_ON_LAST)
            self.store.obey(self.notify)
        moved = self.world.step()
        next(self.play)
        now = time.monotonic()
        if now - self.start > LONGEST_S:
            raise Hang(f"no end after {LONGEST_S:g} s")
        if moved:
            self.still, self.steps, self.moved = 0, 0, now
            return True
        self.still += 1
        if self.still >= STILL_TURNS * (THREADS_FACTOR if self.scenario.has_threads else 1):
            self.still = 0
            self._step_forward(now)
        return False

    def _step_forward(self, now):
        steps = LAST_STEPS_MS if self.judged_in_run else STEPS_MS
        if self.steps < len(steps):
            self._put_forward(steps[self.steps])
            self.steps += 1
        elif now - self.moved > PATIENCE_S:
            raise Hang(self.wanted())

    def _put_forward(self, milliseconds):
        self.control.struct.clock_ms += milliseconds

    def _play(self):
        """Everything that happens in this run, with a yield for every turn of the program."""
        world = self.world
        first = open_fds()
        if not self.scenario.kills:
            self.ends_at_first = count_ends(first - world.fds())
        live = self.control.struct.live
        self.ready = True
        yield from self.script
        if not self.scenario.ends:
            yield from world.until_all_over()
            self.calls = self.control.calls()
            self.control.lift()
            self._let_answers_age()
            self.fresh = world.connect(300, 300)
            yield from world.until(lambda: self.fresh.over)
            if world.datagrams:
                yield from self._ask_freshly()
            if world.callers:
                yield from self._call_freshly()
            self._judge()
            self.judged_in_run = True
            self.still, self.steps, self.moved = 0, 0, time.monotonic()
            world.leave()
            self.wanted = lambda: (
                f"open still: {described(open_fds() - first - world.fds())}, "
                f"blocks more than at first: {self.control.struct.live - live}"
            )
            yield from world.until(lambda: self._is_released(first, live))
            os.kill(os.getpid(), signal.SIGTERM)
        self.satisfied = True
        while True:
            yield

    def _is_released(self, first, live):
        """Whether the program has given back what it has taken since its first turn."""
        if self.world.processes > 1:  # it is another one, perhaps with more threads than the first
            left = open_fds() - self.world.fds() - self._stored_for_ever()
            return count_ends(left) <= self.ends_at_first
        left = open_fds() - first - self.world.fds()
        if self.scenario.keeps:
            left = {fd for fd in left - self.store.fds if not is_queue(fd)}
        blocks = self.control.struct.live - live
        if self.scenario.quarantines and blocks > 0:
            left = {fd for fd in left if not is_of_worker(fd)}
        return not left and blocks <= self.scenario.blocks_kept

    def _stored_for_ever(self):
        """What a program that could not open the socket of the service manager cannot have removed
        from its store."""
        if "Ignoring NOTIFY_SOCKET" in self._log() or self.scenario.keeps:
            return self.store.fds
        return set()

    # ── after the run ────────────────────────────────────────────────────────────────────────

    def _ask_freshly(self):
        """Another client of datagrams is answered."""
        asker = self.world.datagrams.asker()
        yield from self.world.datagrams.asked(asker)
        if not asker.answered:
            self.faults.append("a fresh client of datagrams is not answered")

    def _call_freshly(self):
        """Another caller is answered, now that no call fails any more."""
        caller = self.world.call(INFO, STATUS, LIST)
        yield from self.world.until(lambda: caller.over)
        if not caller.answered:
            self.faults.append(f"a fresh caller is not answered: {bytes(caller.hearing.data)!r}")

    def _let_answers_age(self):
        """A failed look-up is an answer too, which is used for a second."""
        if self._look_up_failed():
            self.control.struct.clock_ms += 1100

    def _look_up_failed(self):
        return (
            self.control.struct.hits
            and self.scenario.by_name
            and self.strike.point == "getaddrinfo"
        )

    def _judge(self):
        self.judged = True
        self.world.left_on_unix = (
            self.control.struct.error == errno.EPIPE and self.control.hit_family() == socket.AF_UNIX
        )
        self.troubled = self.world.judge()
        self.faults += self.world.faults
        if self.fresh in self.troubled:
            self.faults.append(f"a fresh client is not served: {self.world.state(self.fresh)}")

    def _afterwards(self, status, log):
        """Check everything once the program has ended."""
        if not self.judged:
            self._end_of_process(status)
            self._judge()
        self._judge_hits(log)
        self._judge_end(status, log)
        if self.scenario.keeps and self.satisfied:
            self.store.obey(self.notify)
            if self.store.names and "NOTIFY_SOCKET" not in log:
                self.faults.append(f"in the store at the end: {', '.join(self.store.names)}")
        if self.control.struct.live != self.live_before:
            self.faults.append(
                f"{self.control.struct.live - self.live_before} blocks are not freed"
            )

    def _end_of_process(self, status):
        """Do what the end of the process would: close everything that the program has open. The
        service manager drops what is stored, as after a stop."""
        self.store.empty()
        close_passed_fds()
        left = self._left()
        if left and status == 0:
            self.faults.append(f"open at the end: {', '.join(left)}")
        if self.keeps is not None:
            self.keeps.close()
        for each in [*self.world.conns, *self.world.fars]:
            each.reads = True
        self._step_world()
        for conn in self.world.conns:
            if conn.far is None and not conn.over and (self.scenario.ends or not self.ready):
                conn.expect = CUT  # it is still in the backlog, which is the service manager's
        self.world.listen_socket.close()
        self._step_world()

    def _step_world(self):
        """Step the world until every connection has ended, or nothing arrives any more."""
        for _ in range(50):
            self.world.step()
            if all(conn.over for conn in self.world.conns):
                return
            time.sleep(0.001)

    def _judge_hits(self, log):
        """No more connections may be affected than calls failed, and no others than theirs.

        An error that is taken to last costs all datagrams that wait, which the log must tell.
        """
        hits = self.control.struct.hits
        troubled = [
            conn
            for conn in self.troubled
            if conn is not self.fresh and not (isinstance(conn, Asker) and ", dropping " in log)
        ]
        if not self.ready or self._look_up_failed():
            return
        if hits and self.scenario.restarts and self._all_may_be_lost(log):
            return  # but none of them may see a clean end too soon
        if len(troubled) > hits + sum(int(count) for count in RESET.findall(log)):
            told = "; ".join(f"{conn}: {self.world.state(conn)}" for conn in troubled)
            self.faults.append(f"{hits} calls failed, but these are in trouble: {told}")
        ports = self.control.hit_ports()
        hit = [conn for conn in self.world.conns if conn.has(ports)]
        if hits == 1 and hit and set(troubled) - set(hit):
            self.faults.append(f"{troubled[0]} is in trouble, but {hit[0]} was hit")

    def _all_may_be_lost(self, log):
        """Whether the log tells so; or a process has died with a parcel, which it had taken out of
        the store. What a killed process has left is only looked at."""
        told = (*LOST, *NOT_KEPT) if self.scenario.kills > 1 else LOST
        return (self.died and not self.scenario.kills) or any(line in log for line in told)

    def _judge_end(self, status, log):
        lines = log.splitlines()
        for sign in ("Traceback", "Internal error", "Exception ignored"):
            if sign in log:
                self.faults.append(f"{sign} on stderr")
        if len(lines) > LINES_MAX * (4 if self.scenario.environment else 1):
            self.faults.append(f"{len(lines)} lines on stderr")
        if status == 1 and not self.ready:
            if not 1 <= len(lines) <= 2:
                self.faults.append(f"exit 1 with {len(lines)} lines on stderr")
        elif status != 0 and status is not None:
            self.faults.append(f"exit {status} while it served")
        elif not self.satisfied and not self.scenario.ends and not self.faults:
            self.faults.append(f"exit {status}, without being asked to end")

    def _judge_sockets(self):
        """No socket may live on anywhere. The kernel takes a moment to close what was in queues."""
        close_passed_fds()
        end = time.monotonic() + PATIENCE_S
        while (left := sockets_in_use() - self.sockets_before) > 0 and time.monotonic() < end:
            time.sleep(0.001)
        if left > 0:
            self.faults.append(f"{left} sockets live on")

    def _kind(self, status):
        if status == 1 and not self.ready:
            return REFUSED_TO_START
        return ONE_WAS_HIT if self.troubled else SERVED_ON

    def _left(self):
        """Close what the program has left open; returns what it should have closed."""
        left = []
        for fd in open_fds() - self.before - self.world.fds() - self.store.fds - PASSED_FDS:
            what = os.readlink(f"/proc/self/fd/{fd}")
            kept = what.startswith("socket:") and is_unix_listener(int(fd))
            os.close(int(fd))
            if what not in NEVER_CLOSED and not kept:
                left.append(f"{fd} ({what})")
        return left

    def _log(self):
        return os.pread(2, 1 << 16, 0).decode(errors="replace")
