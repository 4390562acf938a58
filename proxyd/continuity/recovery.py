"""Going on after the last process was killed: what it has left in root becomes a parcel."""

import _socket
import posix

from proxyd import log
from proxyd._relay import raise_fd_limit, recover, slate_text
from proxyd.activation import PAGES_NAME
from proxyd.continuity import arrival, fd_queue, keep
from proxyd.continuity import blocks as text_blocks
from proxyd.continuity.keep import Keeper
from proxyd.continuity.parcel import Parcel, ParcelError, seal
from proxyd.continuity.parcel import make_file as parcel_file
from proxyd.continuity.root import close_all
from proxyd.errors import reason

TYPE_CHECKING = False  # as in typing, which is slow to import
if TYPE_CHECKING:
    from proxyd.continuity.parts import Parts
    from proxyd.continuity.root import Generation, Root

_DATA_MAX = 64
"""More than any message of a page has, in bytes."""

_PAGE_FDS = 256
"""Descriptors that a page may have."""

_SLOTS_MAX = 1 << 20

_ENTRIES_MAX = 1 << 64

_PIPES_MAX = 1 << 32

_ATTEMPTS_MAX = 50
"""Processes in a row that may be killed before they have lasted: what they all go on with may be
what kills them, and a unit without a start limit would go on with it for ever."""


def take(parts: "Parts", root: "Root", parcel: Parcel | None) -> Keeper | None:
    """Go on with the connections of the last process; return what keeps them for the next one.

    It has stopped by itself if there is a parcel: then that is the truth. What cannot go on is
    reset, with one line. Nothing moves before root has nothing that is not true any more.
    """
    generation = _read(root)
    if parcel is not None:
        if generation is not None:
            generation.close()
        arrival.take(parts, parcel, lambda: keep.forget(parts, root))
    else:
        _recover(parts, root, generation)
    if root.sender is not None and parts.options.crash_recovery != "no":
        return Keeper(parts, root)
    parts.notifier.remove_stored(PAGES_NAME)  # not wanted, or killed before anything was kept
    root.close()
    return None


def _read(root: "Root") -> "Generation | None":
    try:
        return root.read()
    except OSError as error:
        _warn(error)
        return None


def _recover(parts: "Parts", root: "Root", generation: "Generation | None") -> None:
    found = None
    if generation is not None:
        try:
            _attempt(root)
            found = Found(parts, generation)
        except (OSError, ValueError, MemoryError, ParcelError) as error:
            _warn(error)
        finally:
            generation.close()
    if found is None:
        keep.forget(parts, root)
    else:
        parcel, dropped = found.parcel, found.dropped
        arrival.take_recovered(parts, parcel, dropped, lambda: _keep_on(parts, root))


def _attempt(root: "Root") -> None:
    """Note the attempt. Raises ParcelError if there were too many in vain."""
    if root.attempts >= _ATTEMPTS_MAX:
        raise ParcelError(f"{root.attempts} processes that went on with them were, too")
    try:
        root.attempt()
    except OSError:
        pass  # then nothing can be kept either, which begin() tells


def _keep_on(parts: "Parts", root: "Root") -> None:
    if parts.options.crash_recovery == "no":
        keep.forget(parts, root)
    else:
        keep.begin(parts, root)


def _warn(error: Exception) -> None:
    log.warning(f"Resetting the connections of the last process, which was killed: {reason(error)}")


class Found:
    """What a generation has, as a parcel."""

    __slots__ = ("_entries", "_lost", "_open", "_pipes", "dropped", "parcel")

    def __init__(self, parts: "Parts", generation: "Generation") -> None:
        """Raises ValueError, ParcelError, OSError, MemoryError."""
        self._entries: dict[int, tuple[int, int, int, int]] = {}
        self._pipes: dict[int, int] = {}
        self._open: set[int] = set()
        """Descriptors that are still ours."""
        self._lost = generation.lost
        self.dropped = 0
        """Connections that cannot go on."""
        try:
            for page in generation.pages:
                self._read_page(page)
            self.parcel = self._recover(generation.slate)
        finally:
            for fd in self._open:
                _close(parts, fd)
        if self._lost:
            log.warning("Not all that the last process has left fits into the limit of open files.")

    def _read_page(self, fd: int) -> None:
        receiver = fd_queue.copy(fd)
        try:
            fd_queue.look_from_start(receiver)
            raise_fd_limit(len(self._open) + _PAGE_FDS + fd_queue.OTHERS)
            while True:
                data, fds = fd_queue.look(receiver, _DATA_MAX)
                if not data:
                    return
                self._add(data, fds)
        finally:
            receiver.close()

    def _add(self, data: bytes, fds: list[int]) -> None:
        """Add what a message of a page has: "SLOT ENTRY" and two sockets, or "p NUMBER" and a pipe.

        It may be in two pages, if it was being moved from one to the other.
        """
        words = data.split()
        is_pipe = words[:1] == [b"p"]
        numbers = [int(word) for word in words[is_pipe:] if word.isdigit() and len(word) <= 20]
        if len(words) != 2 or len(numbers) != 2 - is_pipe or len(fds) > len(numbers):
            close_all(fds)
        elif is_pipe and fds and numbers[0] < _PIPES_MAX and numbers[0] not in self._pipes:
            self._pipes[numbers[0]] = fds[0]
            self._open |= {*fds}
        elif not is_pipe and self._is_new(*numbers):
            client, target = [*fds, -1, -1][:2]
            self._entries[numbers[1]] = numbers[0], numbers[1], client, target
            self._open |= {*fds}
            self._lost += len(fds) < len(numbers)
        else:
            close_all(fds)

    def _is_new(self, slot: int, entry: int) -> bool:
        return slot < _SLOTS_MAX and entry < _ENTRIES_MAX and entry not in self._entries

    def _recover(self, slate: int) -> Parcel:
        offset, size = slate_text(slate)
        blocks = text_blocks.read(posix.pread(slate, size, offset))
        indexes = [one.number("index") for one in blocks if one.kind == "target"]
        file = parcel_file(blocks)
        try:
            start = posix.fstat(file).st_size
            entries = list(self._entries.values())
            upstreams = max(indexes, default=-1) + 1
            fds, self.dropped = recover(slate, entries, self._pipes, file, start, upstreams)
            seal(file)
        except BaseException:
            posix.close(file)
            raise
        self._open -= {*fds}
        return Parcel(file, fds)


def _close(parts: "Parts", fd: int) -> None:
    """Close what does not go on. If a socket is owed anything, it sees a reset: see socket_guard().

    To close one of UNIX may take as long as its peer likes.
    """
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:  # it is a pipe
        posix.close(fd)
        return
    if sock.family == _socket.AF_UNIX:
        parts.loop.relay.hang_up(sock.detach(), reset=True)
    else:
        sock.close()
