"""One caller: its calls are read and answered one after the other, without waiting for it."""

import _socket
import errno

from proxyd._relay import refuse_rights
from proxyd.inspection.access import Peer, peer_of
from proxyd.inspection.varlink import Call, CallError, MessageError, failure, parse

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    Answer = Callable[[Call, Peer], "bytes | Stream"]
    """Answers a call. Raises CallError."""
else:
    Protocol = object

CALL_MAX = 64 * 1024
"""The maximum size of a message to us, in bytes."""

STALL_MS = 10_000
"""A caller may take this long to finish a message, or to take any byte of a reply."""

_READ = 16 * 1024


class Stream:
    """The replies to one call, piece by piece. After an error it is finished."""

    __slots__ = ("finished",)

    def __init__(self) -> None:
        self.finished = False
        """Whether next() has returned everything."""

    def next(self) -> bytes | None:
        """Return the next messages, which may be b""; None if there are none at the moment.

        Raises CallError for a call that fails late.
        """
        raise NotImplementedError  # pragma: no cover - every stream has its own

    @property
    def overflows(self) -> bool:
        """Tell whether more waits for the caller than it is worth.

        Most streams make the rest only when the caller has read.
        """
        return False

    def on_more(self, wake: "Callable[[], None]") -> None:
        """Have `wake` called whenever there is something after next() has returned None."""

    def close(self) -> None:
        """Forget the caller: it has got everything, or is gone."""


class SharedStream(Stream):
    """A stream of what several callers wait for; `wakes` are called when there is more of it."""

    __slots__ = ("_wake", "_wakes")

    def __init__(self, wakes: "list[Callable[[], None]]") -> None:
        super().__init__()
        self._wakes = wakes
        self._wake: Callable[[], None] | None = None

    def on_more(self, wake: "Callable[[], None]") -> None:
        """Call `wake` when there is more."""
        self._wake = wake
        self._wakes.append(wake)

    def close(self) -> None:
        """Do nothing more for the caller."""
        if self._wake is not None:
            self._wakes.remove(self._wake)


class CallerGoneError(Exception):
    """The caller has left, breaks the rules, or is too slow."""


class Caller:
    """One connection to the inspection socket. Calls are answered one after the other."""

    __slots__ = (
        "_answer",
        "_input",
        "_oneway",
        "_output",
        "_sock",
        "_stream",
        "_waiting_ms",
        "_wake",
        "active_ms",
        "fd",
        "has_left",
        "known",
        "peer",
    )

    def __init__(
        self, fd: int, answer: "Answer", now_ms: int, wake: "Callable[[Caller], None]"
    ) -> None:
        """`wake` is called when there is something to do without an event of the socket."""
        self.fd = fd
        # The family is given because to find it costs system calls.
        self._sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM, 0, fileno=fd)
        refuse_rights(fd)
        self._answer = answer
        self._wake = wake
        self._input = bytearray()
        self._output = b""
        self._stream: Stream | None = None
        self._oneway = False
        """Whether the replies of `_stream` are not wanted."""
        self.has_left = False
        """Whether it reads no more replies. What it has sent is to be done nevertheless."""
        self.active_ms = now_ms
        """When it has last sent or taken anything."""
        self._waiting_ms: int | None = None
        """Since when we wait for the rest of a message, or for it to read; None: we do not."""
        try:
            self.peer = peer_of(self._sock)
            self.known = True
        except OSError:
            self.peer = Peer(0, privileged=False)
            self.known = False
        """Whether the kernel has told who it is."""

    @property
    def idle(self) -> bool:
        """Tell whether it asks nothing at the moment."""
        return self._stream is None and not self._output and not self._input

    @property
    def stalled_ms(self) -> int | None:
        """When it will have stalled for too long."""
        return None if self._waiting_ms is None else self._waiting_ms + STALL_MS

    def step(self, now_ms: int) -> bool:
        """Do one piece of work; return True if there may be more to do at once.

        Raises CallerGoneError.
        """
        if self.has_left:
            self._output = b""
            self._end_stream()
        if self._stream is not None and self._stream.overflows:
            raise CallerGoneError
        if self._output:
            return self._send(now_ms)
        if self._stream is not None:
            return self._continue(self._stream, now_ms)
        message, nul, rest = self._input.partition(b"\0")
        if nul:
            self._input = rest
            self._waiting_ms = None
            self._serve(bytes(message))
            return True
        if self._input and self._waiting_ms is None:
            self._waiting_ms = now_ms  # for the rest of a message that came with the last one
        return self._receive(now_ms)

    def _send(self, now_ms: int) -> bool:
        """Send what is left of the output; return False if the caller has to read first."""
        try:
            count = self._sock.send(self._output, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        except OSError as error:
            if error.errno != errno.EAGAIN:
                raise CallerGoneError from None
            count = 0
        if count or self._waiting_ms is None:
            self._waiting_ms = self.active_ms = now_ms
        self._output = self._output[count:]
        if self._output:
            return count > 0  # until EAGAIN, as the event is edge-triggered
        self._waiting_ms = None
        return True

    def _continue(self, stream: Stream, now_ms: int) -> bool:
        try:
            data: bytes | None = stream.next()
        except CallError as error:
            data = failure(error)
        if data is None:
            return False
        if not self._oneway:
            self._output = data
        if stream.finished:
            self._end_stream()
            return True
        return not self._output or self._send(now_ms)

    def _serve(self, message: bytes) -> None:
        try:
            call = parse(message)
        except MessageError:
            raise CallerGoneError from None
        if self.has_left and call.more:
            return  # nothing reads the replies, and that is all that such a call is for
        try:
            answer = self._answer(call, self.peer)
        except CallError as error:
            answer = failure(error)
        if not isinstance(answer, bytes):
            self._stream = answer
            self._oneway = call.oneway
            answer.on_more(lambda: self._wake(self))
        elif not call.oneway:
            self._output = answer

    def _receive(self, now_ms: int) -> bool:
        """Read some bytes; return False if there are none yet."""
        data = self._read()
        if data is None:
            return False
        if not data:
            raise CallerGoneError
        self.active_ms = now_ms
        if self._waiting_ms is None:
            self._waiting_ms = now_ms
        self._input += data
        if len(self._input) > CALL_MAX and self._input.find(b"\0", 0, CALL_MAX + 1) < 0:
            raise CallerGoneError
        return True

    def _read(self) -> bytes | None:
        """Return what has come, b"" at the end, None if there is nothing yet.

        Descriptors are never taken: closing them may block. The end of a caller that sends some is
        left to the relay, which has a thread for that.
        """
        try:
            peeked, _, flags, _ = self._sock.recvmsg(
                _READ, 0, _socket.MSG_PEEK | _socket.MSG_DONTWAIT
            )
            if flags & _socket.MSG_CTRUNC:
                raise CallerGoneError
            return self._sock.recv(len(peeked), _socket.MSG_DONTWAIT) if peeked else b""
        except OSError as error:
            if error.errno == errno.EAGAIN:
                return None
            raise CallerGoneError from None

    def close(self) -> None:
        """Give up the socket, which stays open, and what it has been waiting for."""
        self._end_stream()
        self._sock.detach()

    def _end_stream(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.close()
