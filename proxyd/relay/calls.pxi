# Functions for Python that need no relay: sockets, limits and signals. Included by _relay.pyx.

from proxyd.relay.parcel cimport ParcelRecord, file_write
from proxyd.relay.position cimport socket_given, socket_taken
from proxyd.relay.recover cimport slate_recover
from proxyd.relay.recover_entry cimport KeptEntry, KeptPipe, Recovery
from proxyd.relay.rights cimport rights_forget_writers, rights_refuse
from proxyd.relay.signals cimport (
    SIGNALS_MAX, signal_catch, signal_take, signals_clear, signals_open,
)
from proxyd.relay.slate cimport (
    slate_check, slate_head_is_valid, slate_size, slate_text_at,
)
from proxyd.relay.slate_types cimport SLATE_MAGIC, SlateHead
from proxyd.relay.socket cimport (
    socket_peer_pid, socket_self_connected, socket_take_error, socket_tune,
)
from proxyd.relay.sys cimport (
    AF_VSOCK, ECONNREFUSED, ECONNRESET, EINPROGRESS, ELOOP, F_ADD_SEALS, F_SEAL_GROW, F_SEAL_SEAL,
    F_SEAL_SHRINK, MFD_ALLOW_SEALING, MFD_CLOEXEC, MSG_DONTWAIT, MSG_PEEK, RLIMIT_NOFILE, close,
    errno, fcntl, ftruncate, getpeername, getrlimit, getsockname, int64_t, memfd_create, memset,
    recv, rlimit, setrlimit, sockaddr, sockaddr_storage, socklen_t,
)


def connected(int fd):
    """Whether a socket of dial() is connected: 0, EINPROGRESS, or the errno with which the connect
    failed. ELOOP: it was connected to itself."""
    cdef sockaddr_storage peer
    cdef socklen_t size = sizeof(peer)
    cdef int error = socket_take_error(fd)
    if error == ECONNRESET and socket_family(fd) == AF_VSOCK:
        return ECONNREFUSED  # how the virtio transport says so
    if error != 0:
        return error
    if getpeername(fd, <sockaddr *>&peer, &size) < 0:
        return EINPROGRESS
    return ELOOP if socket_self_connected(fd) else 0


def peek(int fd):
    """What a recv would return, without taking anything: 1 for bytes, 0 for the end, or -errno."""
    cdef char byte
    cdef ssize_t size = recv(fd, &byte, 1, MSG_PEEK | MSG_DONTWAIT)
    return -errno if size < 0 else size


def socket_error(int fd):
    """SO_ERROR of a socket, which reading clears; 0: none."""
    return socket_take_error(fd)


def socket_names(int fd):
    """(peer, own) addresses, packed; b"" for one that the kernel does not tell."""
    cdef sockaddr_storage name
    cdef socklen_t size = sizeof(name)
    peer = own = b""
    if getpeername(fd, <sockaddr *>&name, &size) == 0:
        peer = (<char *>&name)[:size]
    size = sizeof(name)
    if getsockname(fd, <sockaddr *>&name, &size) == 0:
        own = (<char *>&name)[:size]
    return peer, own


def stream_positions(int fd):
    """(taken, given): how much of each stream a TCP socket has passed on, according to the kernel,
    counted from where it likes. Raises OSError."""
    cdef uint64_t taken = 0, given = 0
    cdef int failure = socket_taken(fd, &taken)
    if failure == 0:
        failure = socket_given(fd, &given)
    if failure < 0:
        raise_errno(-failure)
    return taken, given


def peer_pid(int fd):
    """The process that has connected a UNIX socket; 0: not known."""
    return socket_peer_pid(fd)


def refuse_rights(int fd):
    """Have the kernel refuse descriptors that are sent to a UNIX socket from now on, if it can, and
    add no credentials to what is received."""
    rights_refuse(fd)
    rights_forget_writers(fd)


def tune_socket(int fd, int family):
    """Set the options that both legs need. TCP sockets inherit them from their listener."""
    socket_tune(fd, family)


def raise_fd_limit(long long wanted):
    """Raise the soft RLIMIT_NOFILE to `wanted`, as far as the hard one allows; what it is then.

    Never lowers it, and no higher than wanted: libraries that select() may be in this process.
    """
    cdef rlimit limit
    if getrlimit(RLIMIT_NOFILE, &limit) < 0:
        raise_errno(errno)
    if <unsigned long long>wanted > limit.rlim_cur:
        limit.rlim_cur = min(<unsigned long long>wanted, limit.rlim_max)
        setrlimit(RLIMIT_NOFILE, &limit)
        getrlimit(RLIMIT_NOFILE, &limit)
    return min(limit.rlim_cur, <unsigned long long>1 << 30)


# ── slates ───────────────────────────────────────────────────────────────────────────────────────

def slate_create(bytes text not None, unsigned int slots, unsigned int workers,
                 unsigned long long unit):
    """A new file for Relay.use_slate(), with room for that number of connections and threads; its
    fd, the caller's. `unit` is the stream_unit of the relay or more, a multiple of 4096. `text` is
    for the next process. Memory is taken as it is used. Raises OSError, ValueError."""
    cdef SlateHead head
    cdef int failure = 0
    cdef int file
    memset(&head, 0, sizeof(head))
    head.magic = SLATE_MAGIC
    head.record_size = sizeof(ParcelRecord)
    head.slot_count = slots
    head.worker_count = workers
    head.unit = unit
    head.text_size = <uint64_t>len(text)
    if not slate_head_is_valid(&head):
        raise ValueError("no such slate")
    file = memfd_create("proxyd-slate", MFD_CLOEXEC | MFD_ALLOW_SEALING)
    if file < 0:
        raise_errno(errno)
    if ftruncate(file, <int64_t>slate_size(&head)) < 0 or (
            fcntl(file, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) < 0):
        failure = -errno
    if failure == 0:
        failure = file_write(file, &head, sizeof(head), 0)
    if failure == 0:
        failure = file_write(
            file, <const char *>text, <size_t>len(text), <int64_t>slate_text_at())
    if failure < 0:
        close(file)
        raise_errno(-failure)
    return file


# ── recovery ─────────────────────────────────────────────────────────────────────────────────────

def slate_text(int slate):
    """(offset, size) of the text that was given to slate_create(). Raises ValueError if the file is
    no slate of this version, and OSError if it cannot be read."""
    cdef SlateHead head
    cdef int failure = slate_check(slate, &head)
    if failure == -EPROTO:
        raise ValueError("not a slate of this version")
    if failure < 0:
        raise_errno(-failure)
    return slate_text_at(), head.text_size


def recover(int slate, list entries not None, dict pipes not None, int file, long long offset=0,
            long long upstreams=1):
    """Make of what a killed process has left what Relay.export() writes, in `file` from `offset`
    on: (the descriptors that belong to it, the number of connections that cannot go on).

    `entries` are (slot, entry, client fd, target fd), as the messages in its pages say; -1 for an
    fd that was lost. `pipes` are the read ends of its pipes, by number. `upstreams`: how many
    indexes of targets it had. All descriptors stay the caller's; those that are not returned are to
    be closed. A connection that ended before is neither returned nor counted.

    The slate is changed, but means the same afterwards: this can be done again, also if it was
    killed meanwhile. Raises ValueError if it is no slate of this version, OSError, MemoryError.
    """
    cdef Recovery work
    cdef int64_t result, i
    memset(&work, 0, sizeof(work))
    work.entry_count = <uint64_t>len(entries)
    work.pipe_count = <uint64_t>len(pipes)
    work.upstreams = <uint64_t>max(upstreams, 0)
    work.entries = <KeptEntry *>calloc(work.entry_count + 1, sizeof(KeptEntry))
    work.pipes = <KeptPipe *>calloc(work.pipe_count + 1, sizeof(KeptPipe))
    work.fds = <int *>malloc((4 * work.entry_count + 1) * sizeof(int))
    try:
        if work.entries == NULL or work.pipes == NULL or work.fds == NULL:
            raise MemoryError()
        for i, (slot, entry, client, target) in enumerate(entries):
            work.entries[i].slot = slot
            work.entries[i].entry = entry
            work.entries[i].fds[0] = client
            work.entries[i].fds[1] = target
        for i, number in enumerate(sorted(pipes)):
            work.pipes[i].number = number
            work.pipes[i].fd = pipes[number]
        with nogil:
            result = slate_recover(&work, slate, file, offset)
        if result == -EPROTO:
            raise ValueError("not a slate of this version")
        if result < 0:
            raise_errno(<int>-result)
        return [work.fds[i] for i in range(result)], work.dropped
    finally:
        free(work.entries)
        free(work.pipes)
        free(work.fds)


# ── signals ──────────────────────────────────────────────────────────────────────────────────────

def signal_fd(numbers):
    """An fd, the caller's, that is readable once one of these signals has come; take_signals()
    tells which. It must stay open while they can come. Raises OSError.

    A SIGINT or SIGHUP that was ignored when the program was started stays ignored.
    """
    cdef int number
    cdef int failure
    cdef int fd = signals_open()
    if fd < 0:
        raise_errno(-fd)
    for number in numbers:
        if not 0 < number < SIGNALS_MAX:
            raise ValueError("no such signal")
        failure = signal_catch(number)
        if failure < 0:
            raise_errno(-failure)
    return fd


def take_signals():
    """The signals that have come since the last call, each as often as it was delivered."""
    cdef int number, count
    taken = []
    signals_clear()
    for number in range(SIGNALS_MAX):
        count = signal_take(number)  # Cython 0.29 would evaluate it twice below
        taken += [number] * count
    return taken
