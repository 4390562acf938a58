# How much of a stream a TCP socket has passed on: the kernel counts it, and knows it also when this
# process does not live to note it.
#
# Both numbers differ from those of the stream by a constant, since the kernel counts the SYN. It
# counts the FIN as well, which is no part of the stream: the state of the socket tells whether
# there was one. In the state CLOSE that is not known, and a FIN is assumed: see recover.pxd.

from proxyd.relay.sys cimport (
    IPPROTO_TCP, SIOCINQ, SIOCOUTQ, TCP_CLOSE, TCP_CLOSE_WAIT, TCP_CLOSING, TCP_FIN_WAIT1,
    TCP_FIN_WAIT2, TCP_INFO, TCP_LAST_ACK, TCP_TIME_WAIT, errno, getsockopt, ioctl, memset,
    socklen_t, uint64_t, uint8_t,
)

cdef enum:
    INFO_WORDS = 32            # of 8 bytes: more than struct tcp_info has; its first byte is
    #                            tcpi_state …
    WORD_ACKED = 15            # … and there are tcpi_bytes_acked
    WORD_RECEIVED = 16         # and tcpi_bytes_received, which old headers do not have


cdef inline int socket_taken(int fd, uint64_t *position) noexcept nogil:
    """How much was read from it; 0 or -errno. What arrives meanwhile changes nothing, but both
    numbers have to be of the same moment."""
    cdef uint64_t info[INFO_WORDS]
    cdef uint64_t received
    cdef int queued = 0
    cdef int failure = socket_info(fd, info)
    while failure == 0:
        received = info[WORD_RECEIVED]
        if ioctl(fd, SIOCINQ, &queued) < 0:
            return -errno
        failure = socket_info(fd, info)
        if info[WORD_RECEIVED] == received:
            break
    position[0] = info[WORD_RECEIVED] - <uint64_t>queued - state_has_received_end(info_state(info))
    return failure


cdef inline int socket_given(int fd, uint64_t *position) noexcept nogil:
    """How much was written to it; 0 or -errno. Likewise, while its peer acknowledges."""
    cdef uint64_t info[INFO_WORDS]
    cdef uint64_t acked
    cdef int queued = 0
    cdef int failure = socket_info(fd, info)
    while failure == 0:
        acked = info[WORD_ACKED]
        if ioctl(fd, SIOCOUTQ, &queued) < 0:
            return -errno
        failure = socket_info(fd, info)
        if info[WORD_ACKED] == acked:
            break
    position[0] = info[WORD_ACKED] + <uint64_t>queued - state_has_sent_end(info_state(info))
    return failure


cdef inline int socket_state(int fd) noexcept nogil:
    """TCP_*, or -errno."""
    cdef uint64_t info[INFO_WORDS]
    cdef int failure = socket_info(fd, info)
    return failure if failure < 0 else info_state(info)


cdef inline int socket_info(int fd, uint64_t *info) noexcept nogil:
    cdef socklen_t size = INFO_WORDS * sizeof(uint64_t)
    memset(info, 0, size)
    return -errno if getsockopt(fd, IPPROTO_TCP, TCP_INFO, info, &size) < 0 else 0


cdef inline int info_state(const uint64_t *info) noexcept nogil:
    return (<const uint8_t *>info)[0]


cdef inline bint state_has_received_end(int state) noexcept nogil:
    return (state == TCP_CLOSE_WAIT or state == TCP_LAST_ACK or state == TCP_CLOSING
            or state == TCP_TIME_WAIT or state == TCP_CLOSE)


cdef inline bint state_has_sent_end(int state) noexcept nogil:
    return (state == TCP_FIN_WAIT1 or state == TCP_FIN_WAIT2 or state == TCP_LAST_ACK
            or state == TCP_CLOSING or state == TCP_TIME_WAIT or state == TCP_CLOSE)
