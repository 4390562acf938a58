/* AF_VSOCK for the program under test, on a kernel without it: TCP on loopback, with the errors of the
 * virtio transport.
 *
 * What differs from TCP, according to af_vsock.c and virtio_transport_common.c:
 *   send before the connect is done    ENOTCONN, not EAGAIN
 *   no listener on that port           ECONNRESET, not ECONNREFUSED, and always later
 * A connect is done once the program has waited for events. To be preloaded; not for several threads.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <linux/vm_sockets.h>
#include <netinet/in.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum { FDS = 1024 };
static struct { char is_vsock, connecting; int error; } known[FDS];

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

static int is_vsock(int fd) { return fd >= 0 && fd < FDS && known[fd].is_vsock; }

int socket(int family, int type, int protocol)
{
    int fd = REAL(socket)(family == AF_VSOCK ? AF_INET : family, type, protocol);
    if (fd >= 0 && fd < FDS) {
        memset(&known[fd], 0, sizeof(known[fd]));
        known[fd].is_vsock = family == AF_VSOCK;
    }
    return fd;
}

int connect(int fd, const struct sockaddr *address, socklen_t size)
{
    const struct sockaddr_vm *vm = (const void *)address;
    struct sockaddr_in in = {.sin_family = AF_INET};
    if (!is_vsock(fd) || address->sa_family != AF_VSOCK)
        return REAL(connect)(fd, address, size);
    in.sin_port = htons(vm->svm_port);
    in.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    known[fd].connecting = 1;
    if (REAL(connect)(fd, (void *)&in, sizeof(in)) < 0 && errno != EINPROGRESS)
        known[fd].error = errno;
    errno = EINPROGRESS;
    return -1;
}

ssize_t send(int fd, const void *data, size_t size, int flags)
{
    if (is_vsock(fd) && known[fd].connecting) {
        errno = ENOTCONN;
        return -1;
    }
    return REAL(send)(fd, data, size, flags);
}

int epoll_wait(int epoll, struct epoll_event *events, int events_max, int timeout)
{
    for (int fd = 0; fd < FDS; fd++)
        known[fd].connecting = 0;
    return REAL(epoll_wait)(epoll, events, events_max, timeout);
}

int getpeername(int fd, struct sockaddr *address, socklen_t *size)
{
    if (is_vsock(fd) && known[fd].connecting) {
        errno = ENOTCONN;
        return -1;
    }
    return REAL(getpeername)(fd, address, size);
}

int getsockopt(int fd, int level, int option, void *value, socklen_t *size)
{
    int result;
    if (is_vsock(fd) && level == SOL_SOCKET && option == SO_DOMAIN) {
        *(int *)value = AF_VSOCK;
        return 0;
    }
    if (is_vsock(fd) && level == SOL_SOCKET && option == SO_ERROR && known[fd].connecting) {
        *(int *)value = 0;
        return 0;
    }
    result = REAL(getsockopt)(fd, level, option, value, size);
    if (is_vsock(fd) && level == SOL_SOCKET && option == SO_ERROR && result == 0) {
        if (known[fd].error != 0)
            *(int *)value = known[fd].error;
        known[fd].error = 0;
        if (*(int *)value == ECONNREFUSED)
            *(int *)value = ECONNRESET;
    }
    return result;
}
