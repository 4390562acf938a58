# Pipes for splice, pooled.
#
# A half holds a pipe only while bytes are inside it, so a handful serves thousands of connections.
# What goes back to the pool is empty; a pipe with bytes in it can only be closed. So is one that
# came from another process: only its read end is passed on (parcel.pxd).

from proxyd.relay.sys cimport (
    EAGAIN, F_GETPIPE_SZ, F_SETPIPE_SZ, O_CLOEXEC, O_NONBLOCK, atomic_add, close, errno, fcntl,
    int64_t, pipe2, read,
)
from proxyd.relay.types cimport POOL_MAX, Pipe, PipePool

cdef enum:
    PIPE_SIZE_MIN = 16 * 4096  # bytes; past pipe-user-pages-soft new pipes have 1 or 2 slots
    PIPE_RETRY_MS = 1000       # after a pipe was refused, none is asked for during this time
    SCRAP = 4096               # bytes


cdef inline int pipe_get(PipePool *pool, Pipe *pipe, int64_t now_ms) noexcept nogil:
    """An empty pipe, from the pool or new; 0 or -errno."""
    cdef int failure
    if pool.count > 0:
        pool.count -= 1
        pipe[0] = pool.idle[pool.count]
        return 0
    if pool.refused_ms != 0 and now_ms - pool.refused_ms < PIPE_RETRY_MS:
        return -EAGAIN
    failure = pipe_open(pipe, pool.size)
    pool.refused_ms = now_ms if failure < 0 else 0
    return failure


cdef inline int pipe_open(Pipe *pipe, size_t size) noexcept nogil:
    """A new pipe, as close to `size` bytes as this user may have; 0 or -errno."""
    cdef int ends[2]
    cdef int capacity
    if pipe2(ends, O_CLOEXEC | O_NONBLOCK) < 0:
        return -errno
    pipe.rd = ends[0]
    pipe.wr = ends[1]
    capacity = fcntl(pipe.wr, F_SETPIPE_SZ, <int>size)
    while capacity < 0 and size > PIPE_SIZE_MIN:
        size //= 2
        capacity = fcntl(pipe.wr, F_SETPIPE_SZ, <int>size)
    if capacity < 0:
        capacity = fcntl(pipe.wr, F_GETPIPE_SZ)
    if capacity < PIPE_SIZE_MIN:
        pipe_close(pipe)
        return -EAGAIN
    pipe.capacity = <size_t>capacity
    pipe.filled = 0
    return 0


cdef inline void pipe_put(PipePool *pool, Pipe *pipe) noexcept nogil:
    """Give the pipe up: into the pool if it is empty and there is room."""
    if pipe.wr >= 0 and pipe.filled == 0 and pool.count < POOL_MAX:
        pool.idle[pool.count] = pipe[0]
        pool.count += 1
        pipe_init(pipe)
    else:
        pipe_close(pipe)


cdef inline void pool_clear(PipePool *pool) noexcept nogil:
    while pool.count > 0:
        pool.count -= 1
        pipe_close(&pool.idle[pool.count])


cdef inline void pipe_drop(Pipe *pipe) noexcept nogil:
    """Close a pipe, whatever it has. It does not stay in memory for as long as a page has it."""
    cdef char scrap[SCRAP]
    if pipe.page_alive != NULL and pipe.filled > 0:
        while read(pipe.rd, scrap, SCRAP) > 0:
            pass
    pipe_close(pipe)


cdef inline void pipe_close(Pipe *pipe) noexcept nogil:
    if pipe.page_alive != NULL:
        fcntl(pipe.rd, F_SETPIPE_SZ, SCRAP)  # what a page has counts for the user; not if filled
    if pipe.rd >= 0:
        close(pipe.rd)
    if pipe.wr >= 0:
        close(pipe.wr)
    if pipe.page_alive != NULL:
        atomic_add(pipe.page_alive, -1)
    pipe_init(pipe)


cdef inline void pipe_init(Pipe *pipe) noexcept nogil:
    pipe.rd = pipe.wr = -1
    pipe.filled = pipe.capacity = 0
    pipe.number = 0
    pipe.page_alive = NULL
