"""Clients and a backend around the program, stepped by the walk, and what they must observe."""

import contextlib
import os
import select
import socket

from faults.callers import CallerRun
from faults.datagrams import Asker, DatagramSide
from kit.socket_state import write_error
from kit.sockets import is_unix, open_listener, reset
from kit.stepped import Incoming, Outgoing, open_client
from kit.traffic import payload

NAME_SIZE = 8
"""Every client sends its name first, so that the backend recognises it."""

RECEIVE_BUFFER = 64 * 1024
"""Of the listeners, and so of accepted connections: it is soon full if the reader stalls."""

SEND_BUFFER = 128 * 1024
"""Of the clients' listener, and so of the program's sockets towards them."""

COMPLETE, REFUSED, CUT = "complete", "refused", "cut"
"""The expected result of a connection: all bytes and clean ends, nothing, or an early end."""


def half_close(connection):
    """End the stream, unless the connection has ended already."""
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_WR)


def has_hung_up(connection):
    """Whether poll(2) says so."""
    poll = select.poll()
    poll.register(connection, 0)
    return bool(poll.poll(0))


def tcp_ports(own, peer):
    """(own, peer's) port of a socket of the program with these names; None for a UNIX socket."""
    return (own[1], peer[1]) if isinstance(own, tuple) else None


class Conn:
    """One client, what it sends and receives, and the backend's end once that is known."""

    def __init__(self, client, number, up, down, *, then, answers_at_end, expect, header):
        self.name = b"conn%04d" % number
        self.up = self.name + up
        self.down = down
        self.client = client
        self.ports = tcp_ports(client.getpeername(), client.getsockname())
        self.sending = Outgoing(client, header + self.up, then)
        self.hearing = Incoming(client)
        self.reads = True
        """Whether the client reads."""
        self.answers_at_end = answers_at_end
        """Whether the backend waits for the client's end before it answers."""
        self.far = None
        self.expect = expect
        self.gone = False
        """The client has left by itself, and receives nothing more."""

    def __str__(self):
        return self.name.decode()

    def step(self):
        if self.gone:
            return
        self.sending.step()
        if self.client.fileno() < 0:
            self.gone = True
        elif self.reads:
            self.hearing.step()

    def say(self, data, then=half_close):
        """The client, which has sent all so far, sends more."""
        self.up += data
        self.sending = Outgoing(self.client, data, then)

    @property
    def hangs_up(self):
        """Whether an end has nothing more to expect, or an error, even if it has not read it."""
        ends = [self.client] if self.far is None else [self.client, self.far.connection]
        return any(has_hung_up(one) for one in ends)

    def has(self, ports):
        """Whether these are the TCP ports (own, peer's) of one of the program's two sockets for it.

        Both ports must match: the kernel may give the same local port to a client and to a socket
        of the program, since they connect to different ports.
        """
        return ports in (self.ports, self.far.ports if self.far else None)

    @property
    def over(self):
        """Whether both ends have seen its end."""
        return (self.gone or self.hearing.end is not None) and (
            self.far is None or self.far.over or self.far.lost
        )


class Far:
    """The backend's end of a connection."""

    def __init__(self, connection, name, world):
        self.connection = connection
        self.ports = tcp_ports(name, connection.getsockname())
        self.hearing = Incoming(connection)
        self.sending = None
        self.conn = None
        self.reads = True
        self.lost = False
        """The scenario has closed it."""
        self._world = world
        self._header_size = None

    @property
    def over(self):
        return self.hearing.end is not None

    def said(self):
        """The client's bytes as they arrived, without the PROXY header."""
        return bytes(memoryview(self.hearing.data)[self._header_size or 0 :])

    def step(self):
        if self.lost:
            return
        if self.reads:
            self.hearing.step()
        if self.conn is None:
            self._recognise()
        if self.conn is not None and self.sending is None and self._may_answer():
            self.sending = Outgoing(self.connection, self.conn.down, half_close)
        if self.sending is not None:
            self.sending.step()

    def _may_answer(self):
        return self.over or not self.conn.answers_at_end

    def _recognise(self):
        size = self._world.header_size(self.hearing.data)
        if size is None or len(self.hearing.data) < size + NAME_SIZE:
            return
        self._header_size = size
        name = bytes(self.hearing.data[size : size + NAME_SIZE])
        self.conn = next((c for c in self._world.conns if c.name == name), None)
        if self.conn is None:
            self._world.faults.append(f"the backend was sent {name!r}, which no client sent")
        elif self.conn.far is not None and not self.conn.far.lost:
            self._world.faults.append(f"{self.conn} has reached the backend twice")
        else:
            self.conn.far = self
            self.reads = self._world.backend_reads


class World:
    """Everything around one run of the program."""

    def __init__(self, directory, client="tcp4", target="tcp4", *, listens=True, datagrams=None):
        self.directory = directory
        self.faults = []
        self.conns = []
        self.fars = []
        self.callers = []
        self.sockets = []
        self.log_size = lambda: 0
        self.put_forward = lambda milliseconds: None
        """Puts the clock forward. It is done anyway once nothing has moved for a while."""
        self.kept = lambda: 0
        """How many connections the next process would find if this one was killed now."""
        self.tells_not_kept = lambda: False
        """Whether the log tells that not all are kept."""
        self.wants_kill = False
        """The program is to be killed."""
        self.backend_reads = True
        """Whether the backend continues to read once it has recognised the client."""
        self.left_on_unix = False
        """The program was told that a UNIX peer has closed: it must pass this on as a clean end."""
        self.processes = 1
        """How often the program was started."""
        self.listen_socket = self._keep(
            open_listener(client, directory, receive_buffer=RECEIVE_BUFFER, backlog=64)
        )
        self.listen_socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        self.backend = self._keep(self._open_backend(target))
        if listens:
            self.backend.listen(64)
        self.client_family = client
        self.proxy_protocol = ""
        self.header = b""
        """What every client sends first, and the program takes."""
        self.datagrams = DatagramSide(directory, *datagrams, serves=listens) if datagrams else None
        """What is there for datagrams, if anything."""

    def _open_backend(self, family):
        backend = open_listener(family, self.directory, receive_buffer=RECEIVE_BUFFER, backlog=None)
        backend.setblocking(False)
        return backend

    def _keep(self, connection):
        self.sockets.append(connection)
        return connection

    @property
    def target(self):
        """The program's TARGET argument."""
        name = self.backend.getsockname()
        if self.backend.family == socket.AF_UNIX:
            return name
        return f"[{name[0]}]:{name[1]}" if ":" in name[0] else f"{name[0]}:{name[1]}"

    def listen_port(self):
        """The TCP port of the listener, or -1."""
        name = self.listen_socket.getsockname() if self.listen_socket.fileno() >= 0 else ""
        return name[1] if isinstance(name, tuple) else -1

    def fds(self):
        """The fds of all sockets of the world."""
        mine = [
            *self.sockets,
            *(conn.client for conn in self.conns),
            *(far.connection for far in self.fars),
            *(caller.socket for caller in self.callers),
        ]
        datagrams = self.datagrams.fds() if self.datagrams else set()
        return {str(one.fileno()) for one in mine} | datagrams

    def leave(self):
        """Close all clients, the backend's connections, and the callers."""
        if self.datagrams:
            self.datagrams.leave()
        for conn in self.conns:
            conn.client.close()
        for far in self.fars:
            far.connection.close()
        for caller in self.callers:
            caller.socket.close()

    def close(self):
        self.leave()
        if self.datagrams:
            self.datagrams.close()
        for connection in self.sockets:
            connection.close()

    # ── for scenarios ────────────────────────────────────────────────────────────────────────

    def connect(
        self, up, down, *, then=half_close, answers_at_end=False, expect=COMPLETE, header=None
    ):
        """A client that sends `up` bytes, and is answered with `down` bytes. `header`: another one
        than that of the world."""
        client = self._keep(open_client(self.listen_socket, receive_buffer=RECEIVE_BUFFER))
        number = len(self.conns)
        self.conns.append(
            Conn(
                client,
                number,
                payload(up, number + 1),
                payload(down, number + 101),
                then=then,
                answers_at_end=answers_at_end,
                expect=expect,
                header=self.header if header is None else header,
            )
        )
        return self.conns[-1]

    def exchange(self, up=300, down=500, **options):
        """A whole conversation, from the connect until both ends have seen its end."""
        conn = self.connect(up, down, **options)
        yield from self.until(lambda: conn.over)

    @property
    def inspection_path(self):
        """Where the inspection socket is, if the program has one."""
        return os.path.join(self.directory, "inspect")

    def call(self, *calls):
        """A caller of the inspection socket, which makes these calls without waiting."""
        self.callers.append(CallerRun(self.inspection_path, list(calls)))
        return self.callers[-1]

    def until(self, condition):
        """Let the program have turns until `condition()` holds."""
        while not condition():
            yield

    def turns(self, count):
        """Let the program have `count` turns."""
        for _ in range(count):
            yield

    def until_still(self):
        """Let the program have turns until nothing moves any more."""
        still, before = 0, None
        while still < 4:
            now = self.signature()
            still = still + 1 if now == before else 0
            before = now
            yield

    def until_all_over(self):
        yield from self.until(lambda: all(conn.over for conn in self.conns))

    # ── the world's turns ────────────────────────────────────────────────────────────────────

    def step(self):
        """Let every socket of the world send and receive what it can; True if anything moved."""
        before = self.signature()
        while select.select([self.backend], [], [], 0)[0]:
            try:
                connection, name = self.backend.accept()
            except OSError:
                break
            connection.setblocking(False)
            self.fars.append(Far(connection, name, self))
        for each in [*self.conns, *self.fars, *self.callers]:
            each.step()
        if self.datagrams:
            self.datagrams.step()
        return self.signature() != before

    def signature(self):
        """A value that changes whenever anything moves."""
        return (
            len(self.fars),
            self.log_size(),
            sum(len(each.hearing.data) for each in [*self.conns, *self.fars]),
            sum(each.hearing.end is not None for each in [*self.conns, *self.fars]),
            sum(len(conn.sending.rest) for conn in self.conns),
            sum(len(far.sending.rest) for far in self.fars if far.sending),
            sum(len(caller.hearing.data) for caller in self.callers),
            sum(caller.hearing.end is not None for caller in self.callers),
            self.datagrams and self.datagrams.signature(),
        )

    def header_size(self, data):
        """The length of the PROXY header at the start of `data`; None if it is incomplete."""
        if not self.proxy_protocol:
            return 0
        if self.proxy_protocol == "v1":
            at = data.find(b"\r\n")
            return at + 2 if at >= 0 else None
        return 16 + int.from_bytes(data[14:16], "big") if len(data) >= 16 else None

    # ── the verdict ──────────────────────────────────────────────────────────────────────────

    def judge(self):
        """Check every connection; returns those that ended otherwise than without a failure, and
        clients that lack an answer."""
        for caller in self.callers:
            self.faults += caller.judge()
        unanswered = []
        if self.datagrams:
            unanswered = self.datagrams.judge()
            self.faults += self.datagrams.faults
        return [conn for conn in self.conns if not self._judge(conn)] + unanswered

    def _judge(self, conn):
        """Whether it ended as it would have without a failure; records what must never happen."""
        heard = bytes(conn.hearing.data)
        if not conn.down.startswith(heard):
            self.faults.append(f"{conn}: the client received bytes that were never sent")
        said = conn.far.said() if conn.far else b""
        if not conn.up.startswith(said):
            self.faults.append(f"{conn}: the backend received bytes that were never sent")
        if not conn.over:
            self.faults.append(f"{conn}: not all have seen an end: {self.state(conn)}")
            return False
        up = conn.far is not None and said == conn.up and self._end(conn.far) == "eof"
        down = heard == conn.down and self._end(conn) == "eof"
        if not conn.gone and not down and self._clean(conn) and conn.far is not None:
            self.faults.append(f"{conn}: the client sees a clean end too soon: {self.state(conn)}")
        if conn.far is not None and not conn.far.lost and not up and self._clean(conn.far):
            self.faults.append(f"{conn}: the backend sees a clean end too soon: {self.state(conn)}")
        if conn.expect == COMPLETE:
            return up and down
        if conn.expect == REFUSED:
            return conn.far is None and not heard
        return True

    def _end(self, end):
        """How it ended. After a failed write, a read does not report the error again."""
        return "reset" if end.sending is not None and end.sending.error else end.hearing.end

    def _clean(self, end):
        """Whether the end looks like a clean one to this peer. A UNIX socket has no reset: there,
        it is a failed write that tells."""
        if self._end(end) != "eof" or self.left_on_unix:
            return False
        connection = end.client if isinstance(end, Conn) else end.connection
        if connection.fileno() < 0:
            return False
        return not (is_unix(connection) and write_error(connection))

    def state(self, conn):
        """A connection, or a client of datagrams, in a few words."""
        if isinstance(conn, Asker):
            return conn.state()
        far = conn.far
        there = "never at the backend"
        if far is not None:
            there = f"{len(far.said())} of {len(conn.up)} up, {self._end(far)}"
        return f"{there}; {len(conn.hearing.data)} of {len(conn.down)} down, {self._end(conn)}"


def reset_client(conn):
    """The client crashes. A UNIX socket has no reset: its stream ends with what it has sent."""
    conn.gone = True
    if is_unix(conn.client):
        conn.up = conn.up[: len(conn.up) - len(conn.sending.rest)]
    reset(conn.client)


def reset_far(conn):
    """The backend crashes."""
    conn.far.lost = True
    reset(conn.far.connection)
