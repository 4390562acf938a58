# File descriptors in datagrams over UNIX sockets. None is forwarded, and taking such a datagram out
# of a listener's queue may wait for as long as its sender likes: see rights.pxd.
#
#   kernel             what is done
#   6.16 and newer     The listener refuses them. What was queued before is read with care, until
#                      the queue was empty.
#   older              Every datagram is read with care.
#
# With care means: a look first. A datagram with descriptors is taken, and dropped, by a thread of
# its own. There is one such thread at a time: while it waits, a listener whose next datagram has
# descriptors waits for it, and no other. Targets are trusted not to send any.

from proxyd.relay.flow_types cimport DROP_RIGHTS, FlowListener, Flows, RightsDropper
from proxyd.relay.rights cimport rights_forget_writers, rights_refuse
from proxyd.relay.sys cimport (
    AF_UNIX, F_DUPFD_CLOEXEC, MSG_CTRUNC, MSG_DONTWAIT, MSG_PEEK, SIG_SETMASK, atomic_get,
    atomic_set, close, fcntl, iovec, memset, msghdr, pthread_create, pthread_detach,
    pthread_sigmask, pthread_t, recvmsg, sigfillset, sigset_t,
)

cdef enum:
    LOOK_MS = 10               # between two looks while the next datagram has descriptors


cdef inline void listener_set_rights(FlowListener *listener, bint may_refuse) noexcept nogil:
    """Refuse them, if possible."""
    listener.careful = listener.family == AF_UNIX
    listener.refuses_rights = listener.careful and may_refuse and rights_refuse(listener.fd)


cdef inline void listener_was_empty(FlowListener *listener) noexcept nogil:
    """What comes from now on was sent when descriptors were refused already."""
    if listener.refuses_rights:
        listener.careful = False


cdef inline bint listener_avoids_rights(Flows *flows, FlowListener *listener) noexcept nogil:
    """Whether the next datagram must not be read here; it is left to the thread. Looked at again
    at FlowListener.rights_ms."""
    listener.rights_ms = 0
    if not listener_rights_ahead(listener):
        return False
    listener.rights_ms = flows.worker.ctx.now_ms + LOOK_MS
    if atomic_get(&flows.dropper.busy) == 0 and dropper_start(flows.dropper, listener.fd):
        listener.target.totals.dropped[DROP_RIGHTS] += 1
    return True


cdef inline bint listener_rights_ahead(const FlowListener *listener) noexcept nogil:
    """Whether the next datagram has descriptors."""
    if not socket_rights_ahead(listener.fd):
        return False
    rights_forget_writers(listener.fd)  # there is no room for credentials either
    return socket_rights_ahead(listener.fd)


cdef inline bint socket_rights_ahead(int fd) noexcept nogil:
    """Whether more than data comes with the next datagram. This look drops no last reference: the
    queue has another."""
    cdef msghdr message
    cdef iovec data
    cdef char first
    data.iov_base = &first
    data.iov_len = 1
    memset(&message, 0, sizeof(message))
    message.msg_iov = &data
    message.msg_iovlen = 1
    return recvmsg(fd, &message, MSG_PEEK | MSG_DONTWAIT) >= 0 and (
        message.msg_flags & MSG_CTRUNC) != 0


# ── the thread ───────────────────────────────────────────────────────────────────────────────────

cdef inline bint dropper_start(RightsDropper *dropper, int fd) noexcept nogil:
    """Have a thread take one datagram from a socket; False: there is no fd or thread for that now.

    It outlives everything else, and has its own fd of the socket."""
    cdef sigset_t every, before
    cdef pthread_t thread
    cdef bint started
    dropper.fd = fcntl(fd, F_DUPFD_CLOEXEC, 0)
    if dropper.fd < 0:
        return False
    atomic_set(&dropper.busy, 1)
    sigfillset(&every)
    pthread_sigmask(SIG_SETMASK, &every, &before)  # signals are for the main thread
    started = pthread_create(&thread, NULL, dropper_run, dropper) == 0
    pthread_sigmask(SIG_SETMASK, &before, NULL)
    if started:
        pthread_detach(thread)
    else:
        close(dropper.fd)
        atomic_set(&dropper.busy, 0)
    return started


cdef inline void *dropper_run(void *argument) noexcept nogil:
    cdef RightsDropper *dropper = <RightsDropper *>argument
    cdef msghdr message
    memset(&message, 0, sizeof(message))
    recvmsg(dropper.fd, &message, MSG_DONTWAIT)
    close(dropper.fd)
    atomic_set(&dropper.busy, 0)
    return NULL
