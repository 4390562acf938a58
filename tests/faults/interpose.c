/* Counts calls of the C library, and makes chosen ones fail or come up short.
 *
 * Preloaded into the program by the walk of this folder. Its orders are in a file that both processes
 * map (FAULTS_FILE), so that the walk can change them while the program runs, and read the counts.
 *
 * A failure must be one that the kernel could have returned, with all its consequences:
 *   EAGAIN, short      epoll is made to report the fd again, as it would once there is more
 *   ECONNRESET, EPIPE, ETIMEDOUT on a connected socket: it is really ended, for the peer as well
 *   close              closes all the same
 *   F_SETPIPE_SZ short the pipe really has one page, as beyond pipe-user-pages-soft
 *   connect EINTR      continues in the background
 * Datagrams have no short calls, their connect never waits, and a refusal is all that ends a peer;
 * recvmmsg and sendmmsg that come up short have taken one message, or of a stream one byte.
 * Calls of the extensions are counted separately from those of everything else, mostly Python.
 */
#define _GNU_SOURCE
#undef _FORTIFY_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* A C function has several points if it matters which of its uses fails. */
#define POINTS(X) \
    X(accept4) X(bind) X(calloc) X(chmod) X(close) X(connect) X(epoll_create1) X(epoll_ctl_add) \
    X(epoll_ctl_mod) X(epoll_ctl_del) X(epoll_wait) X(eventfd) X(eventfd_read) X(eventfd_write) \
    X(fcntl) X(fcntl_setpipe) X(fstat) X(ftruncate) X(getaddrinfo) X(getpeername) X(getrlimit) \
    X(getsockname) X(getsockopt) X(getsockopt_error) X(ioctl) X(listen) X(lseek) X(lstat) X(madvise) \
    X(malloc) X(memfd_create) X(mlock) X(mmap) X(open) X(opendir) X(pidfd_open) X(pipe2) X(poll) \
    X(pread) X(pthread_create) \
    X(pwrite) X(read) X(read_file) X(readlink) X(recv) \
    X(recvfrom) X(recvmmsg) X(recvmsg) X(send) X(sendmmsg) X(sendmsg) X(sendto) X(setrlimit) \
    X(setsockopt) X(shutdown) X(pthread_sigmask) X(realloc) X(socket) X(socketpair) X(splice_in) X(splice_out) \
    X(stat) X(unlink) X(write)

#define AS_ENUM(name) P_##name,
#define AS_STRING(name) #name,
enum { POINTS(AS_ENUM) POINT_COUNT };
static const char *const names[] = {POINTS(AS_STRING)};

enum { RELAY, PYTHON, SCOPES };
enum { NOTHING, FAIL, SHORTEN, ZERO };

struct control {
    int32_t begun;            /* calls are counted */
    int32_t point;            /* P_*, or -1 */
    int32_t scope;
    int32_t action;
    int32_t error;            /* errno; for getaddrinfo an EAI_ */
    int32_t hit_fd;           /* of the last call that failed; -1: it had none */
    int32_t pid;              /* what getpid() tells the extension; 0: the truth */
    int32_t nap_ms;           /* the longest sleep of the extension; 0: no limit */
    int64_t from;             /* the number of the first call to fail, from 1 */
    int64_t count;            /* of calls to fail, in a row */
    int64_t hits;             /* calls that failed so far */
    int64_t clock_ms;         /* how far the extension's clock is put forward */
    int64_t live;             /* blocks of memory allocated by the extension */
    int64_t calls[SCOPES][POINT_COUNT];
    struct sockaddr_storage own, peer; /* names of hit_fd; family 0: none */
};

static struct control *control;
enum { EXTENSIONS = 2 };
static const char *const extension_names[EXTENSIONS] = {"/_relay.", "/_datagram."};
static struct {
    uintptr_t start, end;       /* where it is loaded; 0: nowhere yet */
} extensions[EXTENSIONS];
static __thread int paused;     /* these calls are the walk's, which runs in the same process */

#define FDS 4096
static struct {
    int epoll;                  /* 0: not registered */
    struct epoll_event event;
} watched[FDS];

/* ── called by the walk ──────────────────────────────────────────────────────────────────────── */

size_t faults_size(void) { return sizeof(struct control); }
int faults_points(void) { return POINT_COUNT; }
const char *faults_name(int point) { return names[point]; }
void faults_pause(int on) { paused = on; }

/* ── the real functions ──────────────────────────────────────────────────────────────────────── */

void *__libc_malloc(size_t);
void *__libc_calloc(size_t, size_t);
void *__libc_realloc(void *, size_t);
void __libc_free(void *);

/* In an instrumented program (ci/parts/sanitize.sh) those of AddressSanitizer come next. */
__attribute__((weak)) void *__interceptor_malloc(size_t);
__attribute__((weak)) void *__interceptor_calloc(size_t, size_t);
__attribute__((weak)) void *__interceptor_realloc(void *, size_t);
__attribute__((weak)) void __interceptor_free(void *);
#define NEXT(name) (__interceptor_##name ? __interceptor_##name : __libc_##name)

static void *found(void **cache, const char *name) {
    if (*cache == NULL)
        *cache = dlsym(RTLD_NEXT, name);
    return *cache;
}
#define REAL(name) ({ static void *cache; (__typeof__(&name))found(&cache, #name); })
#define CALLER ((uintptr_t)__builtin_return_address(0))

static int find_extension(struct dl_phdr_info *info, size_t size, void *data) {
    int number = *(int *)data;
    uintptr_t first = (uintptr_t)-1, last = 0;
    (void)size;
    if (strstr(info->dlpi_name, extension_names[number]) == NULL)
        return 0;
    for (int i = 0; i < info->dlpi_phnum; i++) {
        const ElfW(Phdr) *part = &info->dlpi_phdr[i];
        uintptr_t start = info->dlpi_addr + part->p_vaddr;
        if (part->p_type != PT_LOAD)
            continue;
        if (start < first)
            first = start;
        if (start + part->p_memsz > last)
            last = start + part->p_memsz;
    }
    extensions[number].start = first;
    extensions[number].end = last;
    return 1;
}

void *dlopen(const char *path, int mode) {
    void *library = REAL(dlopen)(path, mode);
    for (int i = 0; i < EXTENSIONS; i++)
        if (path != NULL && extensions[i].end == 0 && strstr(path, extension_names[i]) != NULL)
            dl_iterate_phdr(find_extension, &i);
    return library;
}

__attribute__((constructor)) static void map_control(void) {
    const char *path = getenv("FAULTS_FILE");
    int fd = path != NULL ? REAL(open)(path, O_RDWR | O_CLOEXEC) : -1;
    if (fd < 0)
        return;
    void *memory = mmap(NULL, sizeof(struct control), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    REAL(close)(fd);
    if (memory != MAP_FAILED)
        control = memory;
}

/* ── whether a call fails ────────────────────────────────────────────────────────────────────── */

static int from_relay(uintptr_t caller) {
    for (int i = 0; i < EXTENSIONS; i++)
        if (caller >= extensions[i].start && caller < extensions[i].end)
            return 1;
    return 0;
}

static void record_hit(int fd) {
    socklen_t size = sizeof(control->own);
    control->hit_fd = fd;
    control->own.ss_family = control->peer.ss_family = 0;
    if (fd < 0)
        return;
    if (REAL(getsockname)(fd, (struct sockaddr *)&control->own, &size) < 0)
        control->own.ss_family = 0;
    size = sizeof(control->peer);
    if (REAL(getpeername)(fd, (struct sockaddr *)&control->peer, &size) < 0)
        control->peer.ss_family = 0;
}

/* What to do with this call; sets errno for FAIL. */
static int strike(int point, uintptr_t caller, int fd) {
    struct control *c = control;
    int scope = from_relay(caller) ? RELAY : PYTHON;
    int64_t number;
    if (c == NULL || !c->begun || paused)
        return NOTHING;
    number = __atomic_add_fetch(&c->calls[scope][point], 1, __ATOMIC_SEQ_CST);
    if (c->point != point || c->scope != scope || number < c->from || number - c->from >= c->count)
        return NOTHING;
    record_hit(fd);
    __atomic_add_fetch(&c->hits, 1, __ATOMIC_SEQ_CST);
    errno = c->error;
    return c->action;
}

/* Have epoll report the present events of fd once more. */
static void announce(int fd) {
    int error = errno;
    if (fd >= 0 && fd < FDS && watched[fd].epoll > 0)
        REAL(epoll_ctl)(watched[fd].epoll, EPOLL_CTL_MOD, fd, &watched[fd].event);
    errno = error;
}

/* End a connected socket as if its peer or the network had failed. */
static void end_socket(int fd) {
    struct sockaddr nowhere = {.sa_family = AF_UNSPEC};
    struct sockaddr_storage own;
    socklen_t size = sizeof(own);
    int error = errno;
    if (REAL(getsockname)(fd, (struct sockaddr *)&own, &size) == 0) {
        if (own.ss_family == AF_UNIX)
            REAL(shutdown)(fd, SHUT_RDWR);
        else
            REAL(connect)(fd, &nowhere, sizeof(nowhere));
    }
    errno = error;
}

static int has_kind(int fd, int wanted) {
    int kind = 0, error = errno;
    socklen_t size = sizeof(kind);
    int known = REAL(getsockopt)(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0;
    errno = error;
    return known && kind == wanted;
}

static int is_datagram(int fd) { return has_kind(fd, SOCK_DGRAM); }

/* The consequences of a failed call on a connected socket. */
static void follow_up(int fd) {
    int ends = errno == ECONNRESET || errno == EPIPE || errno == ETIMEDOUT;
    if (errno == EAGAIN)
        announce(fd);
    else if (ends && is_datagram(fd))
        errno = ECONNREFUSED;
    else if (ends)
        end_socket(fd);
}

/* ── memory: only the extension's; the interpreter does not survive a failure ────────────────── */

/* AddressSanitizer keeps count itself. It also needs a Python without pymalloc, whose PyMem_Free()
   jumps to free(): blocks of Python would be taken for those of the extension. */
static void count_block(int64_t by) {
    if (!__interceptor_malloc)
        __atomic_add_fetch(&control->live, by, __ATOMIC_SEQ_CST);
}

void *malloc(size_t size) {
    if (control == NULL || !from_relay(CALLER))
        return NEXT(malloc)(size);
    if (strike(P_malloc, CALLER, -1))
        return NULL;
    count_block(1);
    return NEXT(malloc)(size);
}

void *calloc(size_t count, size_t size) {
    if (control == NULL || !from_relay(CALLER))
        return NEXT(calloc)(count, size);
    if (strike(P_calloc, CALLER, -1))
        return NULL;
    count_block(1);
    return NEXT(calloc)(count, size);
}

void *realloc(void *memory, size_t size) {
    if (control == NULL || !from_relay(CALLER))
        return NEXT(realloc)(memory, size);
    if (strike(P_realloc, CALLER, -1))
        return NULL;
    if (memory == NULL)
        count_block(1);
    return NEXT(realloc)(memory, size);
}

void free(void *memory) {
    if (control != NULL && memory != NULL && from_relay(CALLER))
        count_block(-1);
    NEXT(free)(memory);
}

/* Likewise: the interpreter takes its memory so, and the dynamic loader maps files. */
#define MMAP(name, offset_type) \
    void *name(void *place, size_t size, int protection, int flags, int fd, offset_type offset) { \
        if (from_relay(CALLER) && strike(P_mmap, CALLER, fd)) \
            return MAP_FAILED; \
        return REAL(name)(place, size, protection, flags, fd, offset); \
    }

MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

/* ── time ────────────────────────────────────────────────────────────────────────────────────── */

int clock_gettime(clockid_t clock, struct timespec *now) {
    int result = REAL(clock_gettime)(clock, now);
    if (control != NULL && control->clock_ms != 0 && clock == CLOCK_MONOTONIC && from_relay(CALLER)) {
        int64_t ns = now->tv_nsec + (control->clock_ms % 1000) * 1000000;
        now->tv_sec += control->clock_ms / 1000 + ns / 1000000000;
        now->tv_nsec = ns % 1000000000;
    }
    return result;
}

/* Clients in the same process would all be taken for connections of the program to itself. */
pid_t getpid(void) {
    if (control != NULL && control->pid != 0 && from_relay(CALLER))
        return control->pid;
    return REAL(getpid)();
}

/* The program's own code begins where its script restores the default action of SIGINT. Before that,
 * the interpreter starts. */
int sigaction(int number, const struct sigaction *action, struct sigaction *old) {
    if (control != NULL && number == SIGINT && action != NULL && action->sa_handler == SIG_DFL
            && strstr(program_invocation_short_name, "python") != NULL)
        control->begun = 1;
    return REAL(sigaction)(number, action, old);
}

/* ── calls whose failure has no consequences ─────────────────────────────────────────────────── */

#define PLAIN(name, point, fd, type, params, args) \
    type name params { \
        if (strike(P_##point, CALLER, fd)) \
            return -1; \
        return REAL(name) args; \
    }

PLAIN(bind, bind, fd, int, (int fd, const struct sockaddr *a, socklen_t n), (fd, a, n))
PLAIN(listen, listen, fd, int, (int fd, int backlog), (fd, backlog))
PLAIN(socket, socket, -1, int, (int family, int kind, int protocol), (family, kind, protocol))
PLAIN(accept4, accept4, fd, int, (int fd, struct sockaddr *a, socklen_t *n, int flags), (fd, a, n, flags))
PLAIN(getsockname, getsockname, fd, int, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n))
PLAIN(getpeername, getpeername, fd, int, (int fd, struct sockaddr *a, socklen_t *n), (fd, a, n))
PLAIN(setsockopt, setsockopt, fd, int, (int fd, int level, int name, const void *value, socklen_t size),
      (fd, level, name, value, size))
PLAIN(shutdown, shutdown, fd, int, (int fd, int how), (fd, how))
PLAIN(epoll_create1, epoll_create1, -1, int, (int flags), (flags))
PLAIN(eventfd, eventfd, -1, int, (unsigned int value, int flags), (value, flags))
PLAIN(eventfd_read, eventfd_read, fd, int, (int fd, eventfd_t *value), (fd, value))
PLAIN(eventfd_write, eventfd_write, fd, int, (int fd, eventfd_t value), (fd, value))
PLAIN(pipe2, pipe2, -1, int, (int ends[2], int flags), (ends, flags))
PLAIN(poll, poll, -1, int, (struct pollfd *fds, nfds_t count, int timeout), (fds, count, timeout))
PLAIN(madvise, madvise, -1, int, (void *memory, size_t size, int advice), (memory, size, advice))
PLAIN(mlock, mlock, -1, int, (const void *memory, size_t size), (memory, size))
PLAIN(ftruncate, ftruncate, fd, int, (int fd, off_t size), (fd, size))
PLAIN(ftruncate64, ftruncate, fd, int, (int fd, off64_t size), (fd, size))
PLAIN(memfd_create, memfd_create, -1, int, (const char *name, unsigned int flags), (name, flags))
PLAIN(socketpair, socketpair, -1, int, (int family, int kind, int protocol, int ends[2]),
      (family, kind, protocol, ends))
PLAIN(chmod, chmod, -1, int, (const char *path, mode_t mode), (path, mode))
PLAIN(unlink, unlink, -1, int, (const char *path), (path))
PLAIN(readlink, readlink, -1, ssize_t, (const char *path, char *buffer, size_t size), (path, buffer, size))
PLAIN(lseek64, lseek, fd, off64_t, (int fd, off64_t offset, int whence), (fd, offset, whence))
PLAIN(stat64, stat, -1, int, (const char *path, struct stat64 *s), (path, s))
PLAIN(lstat64, lstat, -1, int, (const char *path, struct stat64 *s), (path, s))
PLAIN(fstat64, fstat, fd, int, (int fd, struct stat64 *s), (fd, s))
PLAIN(fstat, fstat, fd, int, (int fd, struct stat *s), (fd, s))
PLAIN(fstatat64, stat, -1, int, (int fd, const char *path, struct stat64 *s, int flags), (fd, path, s, flags))
PLAIN(getrlimit64, getrlimit, -1, int, (__rlimit_resource_t which, struct rlimit64 *limit), (which, limit))
PLAIN(setrlimit64, setrlimit, -1, int, (__rlimit_resource_t which, const struct rlimit64 *limit), (which, limit))

int getsockopt(int fd, int level, int name, void *value, socklen_t *size) {
    int point = level == SOL_SOCKET && name == SO_ERROR ? P_getsockopt_error : P_getsockopt;
    if (strike(point, CALLER, fd))
        return -1;
    return REAL(getsockopt)(fd, level, name, value, size);
}

DIR *opendir(const char *path) {
    if (strike(P_opendir, CALLER, -1))
        return NULL;
    return REAL(opendir)(path);
}

/* These return the error instead of setting errno. */

int pthread_sigmask(int how, const sigset_t *mask, sigset_t *old) {
    if (strike(P_pthread_sigmask, CALLER, -1))
        return errno;
    return REAL(pthread_sigmask)(how, mask, old);
}

int pthread_create(pthread_t *thread, const pthread_attr_t *how, void *(*run)(void *), void *with) {
    if (strike(P_pthread_create, CALLER, -1))
        return errno;
    return REAL(pthread_create)(thread, how, run, with);
}

int getaddrinfo(const char *host, const char *service, const struct addrinfo *hints,
                struct addrinfo **found_ones) {
    if (strike(P_getaddrinfo, CALLER, -1)) {
        int error = errno;
        errno = EMFILE; /* for EAI_SYSTEM */
        return error > 0 ? -error : error;
    }
    return REAL(getaddrinfo)(host, service, hints, found_ones);
}

/* These have a variable number of arguments. */

static int do_fcntl(int fd, int command, void *argument, uintptr_t caller) {
    switch (strike(command == F_SETPIPE_SZ ? P_fcntl_setpipe : P_fcntl, caller, fd)) {
    case NOTHING: return REAL(fcntl64)(fd, command, argument);
    case SHORTEN: return REAL(fcntl64)(fd, command, (void *)(intptr_t)getpagesize());
    default: return -1;
    }
}

int fcntl64(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return do_fcntl(fd, command, argument, CALLER);
}

int fcntl(int fd, int command, ...) {
    va_list rest;
    va_start(rest, command);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    return do_fcntl(fd, command, argument, CALLER);
}

int ioctl(int fd, unsigned long request, ...) {
    va_list rest;
    va_start(rest, request);
    void *argument = va_arg(rest, void *);
    va_end(rest);
    if (strike(P_ioctl, CALLER, fd))
        return -1;
    return REAL(ioctl)(fd, request, argument);
}

static int do_open(const char *path, int flags, mode_t mode, uintptr_t caller) {
    if (strike(P_open, caller, -1))
        return -1;
    return REAL(open64)(path, flags, mode);
}

int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    mode_t mode = va_arg(rest, mode_t);
    va_end(rest);
    return do_open(path, flags, mode, CALLER);
}

int __open64_2(const char *path, int flags) { return do_open(path, flags, 0, CALLER); }

long syscall(long number, ...) {
    long a[6];
    va_list rest;
    va_start(rest, number);
    for (int i = 0; i < 6; i++)
        a[i] = va_arg(rest, long);
    va_end(rest);
    if (number == SYS_pidfd_open && strike(P_pidfd_open, CALLER, -1))
        return -1;
    return REAL(syscall)(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}

/* ── calls whose failure has consequences ────────────────────────────────────────────────────── */

int close(int fd) {
    int action = strike(P_close, CALLER, fd);
    int error = errno;
    if (fd >= 0 && fd < FDS)
        watched[fd].epoll = 0;
    int result = REAL(close)(fd);
    if (action == NOTHING)
        return result;
    errno = error;
    return -1;
}

int connect(int fd, const struct sockaddr *address, socklen_t size) {
    if (!strike(P_connect, CALLER, fd))
        return REAL(connect)(fd, address, size);
    if (errno == EINTR && is_datagram(fd))
        return REAL(connect)(fd, address, size);
    if (errno == EINTR) {
        REAL(connect)(fd, address, size);
        errno = EINTR;
    }
    return -1;
}

int epoll_ctl(int epoll, int operation, int fd, struct epoll_event *event) {
    int point = operation == EPOLL_CTL_ADD ? P_epoll_ctl_add
        : operation == EPOLL_CTL_MOD ? P_epoll_ctl_mod : P_epoll_ctl_del;
    int result = strike(point, CALLER, fd) ? -1 : REAL(epoll_ctl)(epoll, operation, fd, event);
    if (result == 0 && fd >= 0 && fd < FDS) {
        watched[fd].epoll = operation == EPOLL_CTL_DEL ? 0 : epoll;
        if (event != NULL)
            watched[fd].event = *event;
    }
    return result;
}

int epoll_wait(int epoll, struct epoll_event *events, int max_events, int timeout) {
    /* A sleeping thread would not notice that the clock was put forward. */
    if (control != NULL && control->nap_ms > 0 && (timeout < 0 || timeout > control->nap_ms)
            && from_relay(CALLER))
        timeout = control->nap_ms;
    switch (strike(P_epoll_wait, CALLER, -1)) {
    case NOTHING: return REAL(epoll_wait)(epoll, events, max_events, timeout);
    case SHORTEN: return REAL(epoll_wait)(epoll, events, 1, timeout);
    default: return -1;
    }
}

ssize_t read(int fd, void *buffer, size_t size) {
    struct stat64 what;
    int file = control != NULL && REAL(fstat64)(fd, &what) == 0 && S_ISREG(what.st_mode);
    switch (strike(file ? P_read_file : P_read, CALLER, fd)) {
    case NOTHING: return REAL(read)(fd, buffer, size);
    case SHORTEN: return REAL(read)(fd, buffer, size > 1 ? size / 2 : size);
    default: return -1;
    }
}

ssize_t write(int fd, const void *buffer, size_t size) {
    switch (strike(P_write, CALLER, fd)) {
    case NOTHING: return REAL(write)(fd, buffer, size);
    case SHORTEN: return REAL(write)(fd, buffer, size > 1 ? size / 2 : size);
    default: return -1;
    }
}

/* The extension has 64 bits for offsets under the first name, and Python under the second. */
#define AT_OFFSET(name, point, buffer_type) \
    ssize_t name(int fd, buffer_type buffer, size_t size, off64_t offset) { \
        switch (strike(P_##point, CALLER, fd)) { \
        case NOTHING: return REAL(name)(fd, buffer, size, offset); \
        case SHORTEN: return REAL(name)(fd, buffer, size > 1 ? size / 2 : size, offset); \
        default: return -1; \
        } \
    }

AT_OFFSET(pread, pread, void *)
AT_OFFSET(pread64, pread, void *)
AT_OFFSET(pwrite, pwrite, const void *)
AT_OFFSET(pwrite64, pwrite, const void *)

/* Short means one byte: half of what was asked for is often all that there is. */

static int strike_stream(int point, uintptr_t caller, int fd) {
    int action = strike(point, caller, fd);
    return action == SHORTEN && (is_datagram(fd) || has_kind(fd, SOCK_SEQPACKET)) ? NOTHING : action;
}

/* A queue that says EAGAIN is empty: a message that is in it is there. */
static int strike_queue(int point, uintptr_t caller, int fd) {
    int action = strike_stream(point, caller, fd);
    return action == FAIL && errno == EAGAIN && has_kind(fd, SOCK_SEQPACKET) ? NOTHING : action;
}

ssize_t recv(int fd, void *buffer, size_t size, int flags) {
    ssize_t got;
    switch (strike_queue(P_recv, CALLER, fd)) {
    case NOTHING:
        return REAL(recv)(fd, buffer, size, flags);
    case SHORTEN:
        got = REAL(recv)(fd, buffer, 1, flags);
        announce(fd);
        return got;
    default:
        follow_up(fd);
        return -1;
    }
}

ssize_t recvmsg(int fd, struct msghdr *message, int flags) {
    struct iovec whole = {NULL, 0};
    ssize_t got;
    if (message->msg_iovlen > 0)
        whole = message->msg_iov[0];
    int looks = flags & MSG_PEEK;
    switch (looks ? strike_queue(P_recvmsg, CALLER, fd) : strike_stream(P_recvmsg, CALLER, fd)) {
    case NOTHING:
        return REAL(recvmsg)(fd, message, flags);
    case SHORTEN:
        message->msg_iov[0].iov_len = 1;
        got = REAL(recvmsg)(fd, message, flags);
        message->msg_iov[0] = whole;
        announce(fd);
        return got;
    default:
        follow_up(fd);
        return -1;
    }
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
    ssize_t sent;
    switch (strike_stream(P_send, CALLER, fd)) {
    case NOTHING:
        return REAL(send)(fd, data, size, flags);
    case SHORTEN:
        sent = REAL(send)(fd, data, 1, flags);
        announce(fd);
        return sent;
    default:
        follow_up(fd);
        return -1;
    }
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
    if (strike(P_sendmsg, CALLER, fd)) {
        follow_up(fd);
        return -1;
    }
    return REAL(sendmsg)(fd, message, flags);
}

/* The first of these messages; of a stream, which has but one, its first byte. */
static size_t shorten_first(struct mmsghdr *messages, int fd) {
    struct msghdr *first = &messages->msg_hdr;
    size_t whole = first->msg_iovlen > 0 ? first->msg_iov[0].iov_len : 0;
    if (whole > 1 && !is_datagram(fd))
        first->msg_iov[0].iov_len = 1;
    return whole;
}

static void restore_first(struct mmsghdr *messages, size_t whole) {
    if (messages->msg_hdr.msg_iovlen > 0)
        messages->msg_hdr.msg_iov[0].iov_len = whole;
}

int recvmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags, struct timespec *until) {
    size_t whole;
    int got;
    switch (strike(P_recvmmsg, CALLER, fd)) {
    case NOTHING:
        return REAL(recvmmsg)(fd, messages, count, flags, until);
    case SHORTEN:
        whole = shorten_first(messages, fd);
        got = REAL(recvmmsg)(fd, messages, 1, flags, until);
        restore_first(messages, whole);
        announce(fd);
        return got;
    default:
        follow_up(fd);
        return -1;
    }
}

int sendmmsg(int fd, struct mmsghdr *messages, unsigned int count, int flags) {
    size_t whole;
    int sent;
    switch (strike(P_sendmmsg, CALLER, fd)) {
    case NOTHING:
        return REAL(sendmmsg)(fd, messages, count, flags);
    case SHORTEN:
        whole = shorten_first(messages, fd);
        sent = REAL(sendmmsg)(fd, messages, 1, flags);
        restore_first(messages, whole);
        if (!is_datagram(fd))
            announce(fd);
        return sent;
    default:
        follow_up(fd);
        return -1;
    }
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *to,
               socklen_t to_size) {
    if (strike(P_sendto, CALLER, fd))
        return -1;
    return REAL(sendto)(fd, data, size, flags, to, to_size);
}

ssize_t recvfrom(int fd, void *buffer, size_t size, int flags, struct sockaddr *from,
                 socklen_t *from_size) {
    if (strike(P_recvfrom, CALLER, fd))
        return -1;
    return REAL(recvfrom)(fd, buffer, size, flags, from, from_size);
}

ssize_t splice(int source, off64_t *source_at, int to, off64_t *to_at, size_t size,
               unsigned int flags) {
    struct stat64 what;
    int inwards = REAL(fstat64)(source, &what) == 0 && S_ISSOCK(what.st_mode);
    int end = inwards ? source : to;
    ssize_t moved;
    switch (strike(inwards ? P_splice_in : P_splice_out, CALLER, end)) {
    case NOTHING:
        return REAL(splice)(source, source_at, to, to_at, size, flags);
    case SHORTEN:
        moved = REAL(splice)(source, source_at, to, to_at, 1, flags);
        announce(end);
        return moved;
    case ZERO:
        return 0;
    default:
        follow_up(end);
        return -1;
    }
}
