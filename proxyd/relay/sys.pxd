# Every system call and constant that the relay uses, all callable without the GIL.
#
# Cython knows neither the values nor the exact types: the C compiler takes both from the headers.

cdef extern from "errno.h" nogil:
    int errno
    int EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT, EAGAIN, EALREADY, EBADF, ECONNREFUSED, ECONNRESET
    int ETOOMANYREFS
    int EHOSTUNREACH, EINPROGRESS, EINTR, EINVAL, EIO, ELOOP, EMSGSIZE, ENETUNREACH, ENOBUFS, ENOMEM
    int ENOSPC, ENOSYS, ENOTCONN, ENOTSOCK, EOPNOTSUPP, EPERM, EPIPE, EPROTO, ETIMEDOUT, EUSERS

cdef extern from * nogil:
    """
    #define errno_set(value) (errno = (value))
    """
    void errno_set(int value)

cdef extern from "stdint.h" nogil:
    ctypedef unsigned char uint8_t
    ctypedef unsigned short uint16_t
    ctypedef unsigned int uint32_t
    ctypedef int int32_t
    ctypedef long long int64_t
    ctypedef unsigned long long uint64_t

cdef extern from "stdio.h" nogil:
    int snprintf(char *text, size_t size, const char *format, ...)

cdef extern from "stdlib.h" nogil:
    void *malloc(size_t size)
    void *calloc(size_t count, size_t size)
    void *realloc(void *memory, size_t size)
    void free(void *memory)
    unsigned long long strtoull(const char *text, char **end, int base)

cdef extern from "string.h" nogil:
    void *memcpy(void *to, const void *source, size_t size)
    void *memset(void *to, int byte, size_t size)
    int memcmp(const void *one, const void *other, size_t size)

cdef extern from "time.h" nogil:
    ctypedef int clockid_t
    struct timespec:
        long tv_sec
        long tv_nsec
    int CLOCK_MONOTONIC, CLOCK_PROCESS_CPUTIME_ID, CLOCK_REALTIME, CLOCK_THREAD_CPUTIME_ID
    int clock_gettime(clockid_t clock, timespec *now)

cdef extern from "unistd.h" nogil:
    int close(int fd)
    ssize_t read(int fd, void *buffer, size_t size)
    ssize_t pread(int fd, void *buffer, size_t size, long offset)
    ssize_t pwrite(int fd, const void *buffer, size_t size, long offset)
    int ftruncate(int fd, int64_t size)
    int getpid()
    int _SC_CLK_TCK, _SC_PAGESIZE
    long sysconf(int name)

cdef extern from "fcntl.h" nogil:
    int O_CLOEXEC, O_NONBLOCK
    int F_DUPFD_CLOEXEC, F_GETFL, F_SETFL, F_SETPIPE_SZ, F_GETPIPE_SZ
    int F_ADD_SEALS, F_GET_SEALS, F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK
    unsigned int SPLICE_F_MOVE, SPLICE_F_NONBLOCK
    int fcntl(int fd, int command, ...)
    int pipe2(int *ends, int flags)
    ssize_t splice(int source, void *source_offset, int to, void *to_offset, size_t size,
                   unsigned int flags)

cdef extern from "sys/ioctl.h" nogil:
    unsigned long FIONREAD
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "sys/stat.h" nogil:
    struct stat_t "stat":
        unsigned int st_mode
        uint64_t st_ino
        int64_t st_size
    bint S_ISFIFO(unsigned int mode)
    int fstat(int fd, stat_t *about)

cdef extern from "sys/mman.h" nogil:
    unsigned int MFD_ALLOW_SEALING, MFD_CLOEXEC
    int MADV_REMOVE, MAP_SHARED, PROT_READ, PROT_WRITE
    void *MAP_FAILED
    int memfd_create(const char *name, unsigned int flags)
    void *mmap(void *place, size_t size, int protection, int flags, int fd, long offset)
    int munmap(void *place, size_t size)
    int mlock(const void *place, size_t size)
    int madvise(void *place, size_t size, int advice)

cdef extern from "poll.h" nogil:
    struct pollfd:
        int fd
        short events
        short revents
    short POLLHUP, POLLIN
    int poll(pollfd *fds, unsigned long count, int timeout)

cdef extern from "linux/sockios.h" nogil:
    unsigned long SIOCINQ, SIOCOUTQ

cdef extern from "sys/socket.h" nogil:
    ctypedef unsigned int socklen_t
    ctypedef unsigned short sa_family_t
    struct sockaddr:
        sa_family_t sa_family
    struct sockaddr_storage:
        sa_family_t ss_family
    struct linger:
        int l_onoff
        int l_linger
    struct ucred:
        int pid
        uint32_t uid
    struct iovec:
        void *iov_base
        size_t iov_len
    struct msghdr:
        void *msg_name
        socklen_t msg_namelen
        iovec *msg_iov
        size_t msg_iovlen
        void *msg_control
        size_t msg_controllen
        int msg_flags
    struct mmsghdr:
        msghdr msg_hdr
        unsigned int msg_len
    struct cmsghdr:
        size_t cmsg_len
        int cmsg_level
        int cmsg_type
    int AF_INET, AF_INET6, AF_UNIX, AF_UNSPEC, AF_VSOCK
    int SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM, SOCK_NONBLOCK, SOCK_CLOEXEC
    int SOL_SOCKET, SO_COOKIE, SO_DOMAIN, SO_ERROR, SO_KEEPALIVE, SO_LINGER, SO_OOBINLINE
    int SO_BINDTODEVICE, SO_PASSCRED, SO_PASSSEC, SO_PEERCRED, SO_PROTOCOL, SO_REUSEADDR, SO_SNDBUF
    int SO_TYPE
    int MSG_CMSG_CLOEXEC, SCM_RIGHTS
    int MSG_CTRUNC, MSG_DONTWAIT, MSG_ERRQUEUE, MSG_NOSIGNAL, MSG_PEEK, MSG_TRUNC
    int SHUT_RD, SHUT_RDWR, SHUT_WR
    int socket(int family, int kind, int protocol)
    int socketpair(int family, int kind, int protocol, int *ends)
    int bind(int fd, const sockaddr *address, socklen_t size)
    int connect(int fd, const sockaddr *address, socklen_t size)
    int accept4(int fd, sockaddr *address, socklen_t *size, int flags)
    int getsockname(int fd, sockaddr *address, socklen_t *size)
    int getpeername(int fd, sockaddr *address, socklen_t *size)
    int getsockopt(int fd, int level, int option, void *value, socklen_t *size)
    int setsockopt(int fd, int level, int option, const void *value, socklen_t size)
    int shutdown(int fd, int how)
    ssize_t recv(int fd, void *buffer, size_t size, int flags)
    ssize_t recvmsg(int fd, msghdr *message, int flags)
    ssize_t send(int fd, const void *buffer, size_t size, int flags)
    ssize_t sendmsg(int fd, const msghdr *message, int flags)
    int recvmmsg(int fd, mmsghdr *messages, unsigned int count, int flags, timespec *timeout)
    int sendmmsg(int fd, mmsghdr *messages, unsigned int count, int flags)
    cmsghdr *CMSG_FIRSTHDR(msghdr *message)
    cmsghdr *CMSG_NXTHDR(msghdr *message, cmsghdr *after)
    unsigned char *CMSG_DATA(cmsghdr *part)
    size_t CMSG_LEN(size_t size)
    size_t CMSG_SPACE(size_t size)

cdef extern from "sys/random.h" nogil:
    ssize_t getrandom(void *buffer, size_t size, unsigned int flags)

cdef extern from "linux/vm_sockets.h" nogil:
    struct sockaddr_vm:
        uint32_t svm_cid

cdef extern from "netinet/in.h" nogil:
    int IPPROTO_IP, IPPROTO_IPV6, IPPROTO_TCP
    int IP_BIND_ADDRESS_NO_PORT, IP_PKTINFO, IP_RECVERR, IP_TRANSPARENT
    int IPV6_PKTINFO, IPV6_RECVERR, IPV6_RECVPKTINFO, IPV6_TRANSPARENT
    struct in_addr:
        uint32_t s_addr
    struct in6_addr:
        uint8_t s6_addr[16]
    struct sockaddr_in:
        uint16_t sin_port
        in_addr sin_addr
    struct sockaddr_in6:
        uint16_t sin6_port
        in6_addr sin6_addr
        uint32_t sin6_scope_id
    struct in_pktinfo:
        int ipi_ifindex
        in_addr ipi_spec_dst
        in_addr ipi_addr
    struct in6_pktinfo:
        in6_addr ipi6_addr
        unsigned int ipi6_ifindex

cdef extern from "netinet/tcp.h" nogil:
    int TCP_INFO, TCP_NODELAY
    int TCP_CLOSE, TCP_CLOSE_WAIT, TCP_CLOSING, TCP_ESTABLISHED, TCP_FIN_WAIT1, TCP_FIN_WAIT2
    int TCP_LAST_ACK, TCP_TIME_WAIT
    struct tcp_info:
        uint32_t tcpi_unacked

cdef extern from "sys/epoll.h" nogil:
    unsigned int EPOLLIN, EPOLLOUT, EPOLLPRI, EPOLLRDHUP, EPOLLHUP, EPOLLERR, EPOLLET
    int EPOLL_CTL_ADD, EPOLL_CTL_MOD, EPOLL_CTL_DEL, EPOLL_CLOEXEC
    ctypedef union epoll_data_t:
        void *ptr
    struct epoll_event:
        uint32_t events
        epoll_data_t data
    int epoll_create1(int flags)
    int epoll_ctl(int epoll, int operation, int fd, epoll_event *event)
    int epoll_wait(int epoll, epoll_event *events, int most, int timeout)

cdef extern from "sys/resource.h" nogil:
    struct rlimit:
        unsigned long long rlim_cur
        unsigned long long rlim_max
    int RLIMIT_NOFILE
    int getrlimit(int resource, rlimit *limit)
    int setrlimit(int resource, const rlimit *limit)

cdef extern from "signal.h" nogil:
    ctypedef struct sigset_t:
        pass
    int SIG_SETMASK, SIG_UNBLOCK
    int SIGALRM, SIGHUP, SIGINT
    ctypedef void (*sighandler_t)(int number) noexcept nogil
    sighandler_t SIG_DFL, SIG_IGN
    struct sigaction_t "sigaction":
        sighandler_t sa_handler
        sigset_t sa_mask
        int sa_flags
    int sigaction(int number, const sigaction_t *action, sigaction_t *old)
    int sigemptyset(sigset_t *mask)
    int sigaddset(sigset_t *mask, int number)
    int sigfillset(sigset_t *mask)
    int pthread_sigmask(int how, const sigset_t *mask, sigset_t *old)

cdef extern from "sys/time.h" nogil:
    struct timeval:
        long tv_sec
        long tv_usec
    struct itimerval:
        timeval it_interval
        timeval it_value
    int ITIMER_REAL
    int setitimer(int which, const itimerval *value, itimerval *old)

cdef extern from "sys/eventfd.h" nogil:
    int EFD_CLOEXEC, EFD_NONBLOCK
    int eventfd(unsigned int value, int flags)
    int eventfd_read(int fd, uint64_t *value)
    int eventfd_write(int fd, uint64_t value)

cdef extern from "pthread.h" nogil:
    ctypedef unsigned long pthread_t
    ctypedef struct pthread_attr_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_attr_init(pthread_attr_t *attributes)
    int pthread_attr_setstacksize(pthread_attr_t *attributes, size_t size)
    int pthread_attr_destroy(pthread_attr_t *attributes)
    int pthread_create(pthread_t *thread, const pthread_attr_t *attributes,
                       void *(*start)(void *) noexcept nogil, void *argument)
    int pthread_detach(pthread_t thread)
    int pthread_join(pthread_t thread, void **result)
    int pthread_timedjoin_np(pthread_t thread, void **result, const timespec *until)
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)

# Newer than the C libraries that this is built with: asm-generic/socket.h.
cdef extern from * nogil:
    """
    #include <sys/socket.h>
    #ifndef SO_PASSPIDFD
    #define SO_PASSPIDFD 76
    #endif
    #ifndef SO_PASSRIGHTS
    #define SO_PASSRIGHTS 83
    #endif
    #ifndef SO_MEMINFO
    #define SO_MEMINFO 55
    #endif
    #define MEMINFO_SIZE 9
    #define MEMINFO_DROPS 8
    #ifndef GRND_INSECURE
    #define GRND_INSECURE 4
    #endif
    #ifndef SOL_UDP
    #define SOL_UDP 17
    #endif
    #ifndef UDP_SEGMENT
    #define UDP_SEGMENT 103
    #endif
    #ifndef UDP_GRO
    #define UDP_GRO 104
    #endif
    """
    int SO_PASSPIDFD           # Linux 6.5
    int SO_PASSRIGHTS          # Linux 6.16
    unsigned int GRND_INSECURE  # getrandom(2) does not wait, Linux 5.6
    int SO_MEMINFO             # sock_diag(7): MEMINFO_SIZE numbers of 32 bits, …
    int MEMINFO_SIZE
    int MEMINFO_DROPS          # … of which this one is the number of datagrams dropped
    int SOL_UDP, UDP_GRO, UDP_SEGMENT  # linux/udp.h, whose header excludes netinet/udp.h

# What more than one thread reads. A counter has one writer, its worker, and is read at any time by
# others: a plain addition, but never torn. One with several writers takes counter_add_shared().
# Hints and moments are likewise never torn, and may be stale. An atomic is written by several
# threads, and all see its changes in the same order.
cdef extern from * nogil:
    """
    #define counter_add(place, by) \\
        __atomic_store_n((place), *(place) + (by), __ATOMIC_RELAXED)
    #define counter_add_shared(place, by) __atomic_fetch_add((place), (by), __ATOMIC_RELAXED)
    #define counter_get(place) __atomic_load_n((place), __ATOMIC_RELAXED)
    #define atomic_add(place, by) __atomic_add_fetch((place), (by), __ATOMIC_SEQ_CST)
    #define atomic_get(place) __atomic_load_n((place), __ATOMIC_SEQ_CST)
    #define atomic_set(place, to) __atomic_store_n((place), (to), __ATOMIC_SEQ_CST)
    #define atomic_take(place) __atomic_exchange_n((place), 0, __ATOMIC_SEQ_CST)
    #define hint_get(place) __atomic_load_n((place), __ATOMIC_RELAXED)
    #define hint_set(place, to) __atomic_store_n((place), (to), __ATOMIC_RELAXED)
    #define moment_get(place) __atomic_load_n((place), __ATOMIC_RELAXED)
    #define moment_set(place, to) __atomic_store_n((place), (to), __ATOMIC_RELAXED)
    #define pointer_get(place) __atomic_load_n((place), __ATOMIC_ACQUIRE)
    #define pointer_set(place, to) __atomic_store_n((place), (to), __ATOMIC_RELEASE)
    """
    void counter_add(uint64_t *place, uint64_t by)
    void counter_add_shared(uint64_t *place, uint64_t by)
    uint64_t counter_get(const uint64_t *place)
    int atomic_add(int *place, int by)
    int atomic_get(int *place)
    void atomic_set(int *place, int to)
    int atomic_take(int *place)
    int hint_get(const int *place)
    void hint_set(int *place, int to)
    int64_t moment_get(int64_t *place)
    void moment_set(int64_t *place, int64_t to)
    void *pointer_get(void **place)  # what it points to has been set before, by another thread
    void pointer_set(void **place, void *to)

# Memory that outlives this process is to be written in order: no store is moved across this by the
# compiler. The CPU needs nothing, since a killed thread has executed all before some instruction.
cdef extern from * nogil:
    """
    #define fence() __asm__ volatile("" ::: "memory")
    """
    void fence()
