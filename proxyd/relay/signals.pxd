# Signals: handlers that interrupt whatever waits, and an alarm that goes on interrupting.
#
# Handlers, and not signalfd(2): a signal is to end even a wait that nobody expected. A handler is
# given nothing but the number of its signal, so what it writes to is static. There is one copy of
# that, since all of this is compiled into one extension.

from proxyd.relay.sys cimport (
    EFD_CLOEXEC, EFD_NONBLOCK, ITIMER_REAL, SIGALRM, SIGHUP, SIGINT, SIG_DFL, SIG_IGN, SIG_UNBLOCK,
    atomic_add, atomic_set, atomic_take, errno, errno_set, eventfd, eventfd_read, eventfd_write,
    itimerval, memset, pthread_sigmask, setitimer, sigaction, sigaction_t, sigaddset, sigemptyset,
    sigset_t, uint64_t,
)

cdef extern from * nogil:
    """
    static int signal_wake_fd = -1;  /* eventfd */
    static int signal_counts[65];    /* delivered and not yet taken, by number; Linux has 64 */
    """
    int signal_wake_fd
    int signal_counts[65]

cdef enum:
    SIGNALS_MAX = 65
    ALARM_MS = 50              # how often a signal interrupts until it is taken


# ── signals for the policy ───────────────────────────────────────────────────────────────────────

cdef inline int signals_open() noexcept nogil:
    """An fd that is readable while a signal waits to be taken; or -errno."""
    cdef int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)
    if fd < 0:
        return -errno
    atomic_set(&signal_wake_fd, fd)
    signal_handle(SIGALRM, alarm_came)  # which fails only for a bad number
    return fd


cdef inline int signal_catch(int number) noexcept nogil:
    """Count a signal from now on; 0 or -errno. A SIGINT or SIGHUP that was ignored when the program
    was started stays ignored, as nohup(1) wants it."""
    if (number == SIGINT or number == SIGHUP) and signal_is_ignored(number):
        return 0
    return signal_handle(number, signal_came)


cdef inline void signals_clear() noexcept nogil:
    """Before they are taken: what comes later makes the fd readable again."""
    cdef uint64_t count
    eventfd_read(signal_wake_fd, &count)
    alarm_set(0)


cdef inline int signal_take(int number) noexcept nogil:
    """How often it was delivered since the last call."""
    return atomic_take(&signal_counts[number])


cdef inline int signal_handle(int number, void (*handler)(int) noexcept nogil) noexcept nogil:
    """Set a handler and unblock the signal; 0 or -errno. Without SA_RESTART: it is to end any wait.
    """
    cdef sigaction_t action
    cdef sigset_t mask
    memset(&action, 0, sizeof(action))
    action.sa_handler = handler
    if sigaction(number, &action, NULL) < 0:
        return -errno
    sigemptyset(&mask)
    sigaddset(&mask, number)
    return -pthread_sigmask(SIG_UNBLOCK, &mask, NULL)


cdef inline bint signal_is_ignored(int number) noexcept nogil:
    cdef sigaction_t now
    return sigaction(number, NULL, &now) == 0 and now.sa_handler == SIG_IGN


# ── handlers ─────────────────────────────────────────────────────────────────────────────────────

cdef inline void signal_came(int number) noexcept nogil:
    """Count it and wake the loop. What it interrupts may have been just about to wait; so an alarm
    goes on interrupting until the signal is taken."""
    cdef int error = errno
    atomic_add(&signal_counts[number], 1)
    eventfd_write(signal_wake_fd, 1)
    alarm_set(ALARM_MS)
    errno_set(error)


cdef inline void alarm_came(int number) noexcept nogil:
    """Interrupt, no more."""


# ── the alarm ────────────────────────────────────────────────────────────────────────────────────

cdef inline void alarm_set(long ms) noexcept nogil:
    """Interrupt this process every `ms` from now on; 0: no more."""
    cdef itimerval every
    every.it_interval.tv_sec = every.it_value.tv_sec = 0
    every.it_interval.tv_usec = every.it_value.tv_usec = ms * 1000
    setitimer(ITIMER_REAL, &every, NULL)


cdef inline bint alarm_is_handled() noexcept nogil:
    """Whether an alarm would do no more than interrupt."""
    cdef sigaction_t now
    return sigaction(SIGALRM, NULL, &now) == 0 and now.sa_handler != SIG_DFL
