# Functions for Python that need no relay: sockets, limits and signals. Included by _relay.pyx.

from proxyd.relay.rights cimport rights_forget_writers, rights_refuse
from proxyd.relay.signals cimport (
    SIGNALS_MAX, signal_catch, signal_take, signals_clear, signals_open,
)
from proxyd.relay.socket cimport (
    socket_peer_pid, socket_self_connected, socket_take_error, socket_tune,
)
from proxyd.relay.sys cimport (
    AF_VSOCK, ECONNREFUSED, ECONNRESET, EINPROGRESS, ELOOP, MSG_DONTWAIT, MSG_PEEK, RLIMIT_NOFILE,
    errno, getpeername, getrlimit, getsockname, recv, rlimit, setrlimit, sockaddr, sockaddr_storage,
    socklen_t,
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
