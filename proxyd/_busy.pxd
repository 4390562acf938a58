# How busy a relay is, and whether another thread could help it.
#
# A thread helps where one has more to do than a CPU can, and another CPU is idle. Otherwise it
# takes the CPU from somebody who needs it as much, the peers among them; and the first further
# thread costs the program 2 to 6 % of each small message, since the kernel then counts the users
# of every fd.
#
# So time is looked at in windows, each as long as the policy says or somewhat longer. After one in
# which the relay has hardly slept the kernel is asked how long the CPUs were idle meanwhile. (Not
# how many tasks want to run: a relay looks when it has just woken its peers.)

from proxyd._linux cimport (
    CLOCK_MONOTONIC, _SC_CLK_TCK, clock_gettime, int64_t, pread, strtoull, sysconf, timespec,
)

cdef enum:
    ASLEEP_MOST = 10           # per cent of a window; with less a relay has all that it can do
    SPARE_MOST = 100           # where nobody knows

# how much of another CPU must have been idle, in per cent
cdef enum:
    SPARE_LEAST = 25           # with less, the peers lose what is gained
    SPARE_FOR_NEW = 75         # a short connection costs half as much again in another thread

ctypedef struct Busy:
    int64_t since_ns           # when this window began, on CLOCK_MONOTONIC
    int64_t asleep_ns          # how much of it the relay has slept
    int64_t idle_ns            # idle time of all CPUs until then; -1: was not asked
    int spare                  # per cent of one CPU that were idle in the last window; 0: it slept


cdef inline int64_t clock_ns() noexcept nogil:
    cdef timespec now
    clock_gettime(CLOCK_MONOTONIC, &now)
    return <int64_t>now.tv_sec * 1000000000 + now.tv_nsec


cdef inline int64_t machine_idle_ns(int stat) noexcept nogil:
    """How long all CPUs together were idle since the machine was started, or -1.

    proc_stat(5): the first line is "cpu" and the times of user, nice, system, idle and iowait, in
    ticks; a CPU that waits for a disk is idle.
    """
    cdef char text[256]
    cdef char *at = text + 3
    cdef ssize_t size = pread(stat, text, sizeof(text) - 1, 0)
    cdef int64_t ticks = 0
    cdef int field
    if size < 4:
        return -1
    text[size] = 0
    for field in range(5):
        if field >= 3:
            ticks += <int64_t>strtoull(at, &at, 10)
        else:
            strtoull(at, &at, 10)
    return ticks * (1000000000 // sysconf(_SC_CLK_TCK))


cdef inline void busy_window(Busy *busy, int stat) noexcept nogil:
    """End a window and begin the next. `stat` is an fd of /proc/stat; where nothing can be read
    there, a CPU is taken to be idle: more threads than one were asked for."""
    cdef int64_t now_ns = clock_ns()
    cdef int64_t length_ns = max(now_ns - busy.since_ns, 1)
    cdef bint full = busy.asleep_ns // ASLEEP_MOST <= length_ns // 100
    cdef int64_t idle_ns = machine_idle_ns(stat) if full else -1
    busy.spare = 0
    if full and idle_ns < 0:
        busy.spare = SPARE_MOST
    elif full and busy.idle_ns >= 0:
        busy.spare = <int>min((idle_ns - busy.idle_ns) * 100 // length_ns, <int64_t>SPARE_MOST)
    busy.idle_ns = idle_ns
    busy.since_ns = now_ns
    busy.asleep_ns = 0
