# How busy a worker is, and whether another thread could help it.
#
# A thread helps if one has more to do than a CPU can, and another CPU is idle. Otherwise it takes
# the CPU from a process that needs it as much, the peers among them; and from the second thread on
# the kernel counts the users of every fd, which costs 2 to 6 % of each small message.
#
# So time is looked at in windows, each as long as the policy says or somewhat longer. After one in
# which the worker has hardly slept, the kernel is asked how long the CPUs that this process may use
# were idle meanwhile. (The number of runnable tasks would not do: a worker looks when it has just
# woken its peers.) An idle CPU does not help if a quota (CPUQuota=) is used up, or if the worker
# itself had to wait for a CPU, perhaps for a quota that cannot be seen from here.

from proxyd.relay.clock cimport clock_ns
from proxyd.relay.sys cimport (
    CLOCK_PROCESS_CPUTIME_ID, CLOCK_THREAD_CPUTIME_ID, _SC_CLK_TCK, clock_gettime, clockid_t,
    int64_t, pread, strtoull, sysconf, timespec, uint64_t,
)
from proxyd.relay.records cimport CPUS_MAX, Busy, Machine

cdef enum:
    ASLEEP_MAX = 10            # per cent of a window; a worker that slept less is busy
    SPARE_MAX = 100            # per cent; taken for granted if the kernel tells nothing
    LINE = 255                 # bytes to read if the first line tells all
    READ_RARELY = 200          # a reading is repeated after this number of times its own duration

# how much of another CPU must have been idle, in per cent
cdef enum:
    SPARE_MIN = 25             # with less, the peers lose what is gained
    SPARE_FOR_NEW = 75         # a short connection costs half as much again in another thread


# ── windows ──────────────────────────────────────────────────────────────────────────────────────

cdef inline bint busy_window(
    Busy *busy, const Machine *machine, char *buffer, size_t size
) noexcept nogil:
    """End a window and begin the next. Whether `spare` was measured anew."""
    cdef int64_t now_ns = clock_ns()
    cdef int64_t length_ns = max(now_ns - busy.since_ns, 1)
    cdef int64_t asleep_ns = busy.asleep_ns
    cdef int64_t ran_ns = spent_ns(CLOCK_THREAD_CPUTIME_ID)
    cdef int64_t process_ns = spent_ns(CLOCK_PROCESS_CPUTIME_ID)
    cdef int64_t waited_ns = length_ns - asleep_ns - (ran_ns - busy.ran_ns)
    cdef int64_t used_ns = process_ns - busy.spent_ns
    cdef bint waited = waited_ns // max(machine.wait_max, 1) > length_ns // 100
    busy.since_ns = now_ns
    busy.asleep_ns = 0
    busy.ran_ns = ran_ns
    busy.spent_ns = process_ns
    if asleep_ns // ASLEEP_MAX > length_ns // 100:
        busy.spare = 0
        busy.sampled = False
        return False
    if not busy_sample(busy, machine, now_ns, waited, buffer, size):
        return False
    if machine.quota > 0:
        busy.spare = <int>max(min(
            <int64_t>busy.spare, machine.quota - used_ns * 100 // length_ns), 0)
    return True


cdef inline bint busy_sample(
    Busy *busy, const Machine *machine, int64_t now_ns, bint waited, char *buffer, size_t size
) noexcept nogil:
    """After a window in which the worker was busy: measure how much of another CPU was idle since
    the last reading. Whether there is a result. If the kernel tells nothing, assume an idle CPU:
    anyone using --threads has CPUs to spare."""
    cdef int64_t before_ns
    cdef uint64_t idle_ns = 0
    cdef bint answered_ping = False
    if machine.stat_fd >= 0 and now_ns < busy.sample_after_ns:
        return False
    before_ns = spent_ns(CLOCK_THREAD_CPUTIME_ID)
    if not machine_idle(machine, buffer, size, &idle_ns):
        busy.spare = SPARE_MAX
        return True
    busy.sample_after_ns = now_ns + READ_RARELY * (spent_ns(CLOCK_THREAD_CPUTIME_ID) - before_ns)
    busy.spare = 0
    if busy.sampled and not waited and now_ns > busy.sampled_ns:
        busy.spare = <int>max(min(
            <int64_t>(idle_ns - busy.idle_ns) * 100 // (now_ns - busy.sampled_ns),
            <int64_t>SPARE_MAX), 0)
        answered_ping = True
    busy.sampled = True
    busy.sampled_ns = now_ns
    busy.idle_ns = idle_ns
    return answered_ping


cdef inline int64_t spent_ns(clockid_t clock) noexcept nogil:
    """CPU time of this thread, or of the process."""
    cdef timespec spent
    if clock_gettime(clock, &spent) < 0:
        return 0
    return <int64_t>spent.tv_sec * 1000000000 + spent.tv_nsec


# ── how idle the machine is ──────────────────────────────────────────────────────────────────────

cdef inline bint machine_idle(
    const Machine *machine, char *buffer, size_t size, uint64_t *idle_ns
) noexcept nogil:
    """How long the CPUs that count were idle since the machine was started, modulo 2**64. False if
    that cannot be known. `buffer` is for the text; what does not fit counts as busy."""
    cdef ssize_t got
    cdef size_t asked = size - 1
    if machine.stat_fd < 0:
        return False
    if not machine.some_cpus:
        asked = min(asked, <size_t>LINE)
    got = pread(machine.stat_fd, buffer, asked, 0)
    if got < 4:
        return False
    buffer[got] = 0
    if buffer[0] == c"c":
        idle_ns[0] = stat_idle(machine, buffer) * <uint64_t>(1000000000 // sysconf(_SC_CLK_TCK))
    else:
        idle_ns[0] = uptime_idle_ns(buffer)
    return True


cdef inline uint64_t stat_idle(const Machine *machine, char *text) noexcept nogil:
    """proc_stat(5): lines "cpu", of all CPUs, then "cpu0" …; in ticks."""
    cdef uint64_t ticks = 0
    cdef uint64_t cpu
    cdef char *at = text + 3
    cdef bint counts = not machine.some_cpus
    while True:
        if counts:
            ticks += stat_line_idle(&at)
        if not machine.some_cpus:
            return ticks
        while at[0] != 0 and at[0] != c"\n":
            at += 1
        if at[0] == 0 or at[1] != c"c" or at[2] != c"p" or at[3] != c"u":
            return ticks
        at += 4
        cpu = strtoull(at, &at, 10)
        counts = machine_has(machine, cpu)


cdef inline uint64_t stat_line_idle(char **at) noexcept nogil:
    """Idle ticks of a line of /proc/stat: user, nice, system, idle, iowait; a CPU that waits for a
    disk is idle. `at` is behind the name of the CPU, and then behind these numbers."""
    cdef uint64_t ticks = 0
    cdef int field
    for field in range(5):
        if field >= 3:
            ticks += strtoull(at[0], at, 10)
        else:
            strtoull(at[0], at, 10)
    return ticks


cdef inline bint machine_has(const Machine *machine, uint64_t cpu) noexcept nogil:
    """Whether a CPU counts."""
    return cpu < CPUS_MAX and (machine.cpus[cpu // 8] >> (cpu % 8)) & 1


cdef inline uint64_t uptime_idle_ns(char *text) noexcept nogil:
    """proc_uptime(5): seconds since the start, and those that all CPUs together were idle, both
    with two decimal places."""
    cdef char *at = text
    cdef uint64_t seconds
    while at[0] != 0 and at[0] != c" ":
        at += 1
    seconds = strtoull(at, &at, 10)
    if at[0] != c".":
        return seconds * 1000000000
    return seconds * 1000000000 + strtoull(at + 1, &at, 10) * 10000000
