# Signals: handlers that interrupt what waits, and an alarm that goes on interrupting.
#
# Handlers have no argument but the number, so what they write is static. There is one copy, since
# all of this is compiled into one extension.

from proxyd.relay.sys cimport (
    ITIMER_REAL, SIGALRM, SIG_DFL, itimerval, setitimer, sigaction, sigaction_t,
)

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
