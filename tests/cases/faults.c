/* An LD_PRELOAD interposer: calls that fail while a file exists.
 *
 * FAULTS names a directory. While there is a file CALL.ERRNO in it, that call fails with that errno:
 *   accept pipe pipesize      (accept4, pipe2 and F_SETPIPE_SZ are included)
 * except that accept with ECONNABORTED first accepts a client and closes it, as the kernel would.
 * While there is a file send.3, a write to a stream socket takes 3 bytes at most.
 * FAULT_SPLICE=ERRNO makes every splice fail, whatever files there are.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Read at the start: some programs clear their environment. */
static char *directory, *no_splice;

__attribute__((constructor)) static void read_environment(void) {
  directory = getenv("FAULTS") ? strdup(getenv("FAULTS")) : NULL;
  no_splice = getenv("FAULT_SPLICE") ? strdup(getenv("FAULT_SPLICE")) : NULL;
}

/* The number after "CALL." in the name of a file in FAULTS, or 0. */
static int fault(const char *call) {
  int saved = errno, found = 0;
  size_t length = strlen(call);
  DIR *listing;
  struct dirent *entry;
  if (!directory) return 0;
  listing = opendir(directory);
  if (listing) {
    while (!found && (entry = readdir(listing)))
      if (!strncmp(entry->d_name, call, length) && entry->d_name[length] == '.')
        found = atoi(entry->d_name + length + 1);
    closedir(listing);
  } else if (errno == EMFILE || errno == ENFILE) {
    found = errno; /* if there is no fd for this, there is none for the call either */
  }
  errno = saved;
  return found;
}

static int is_socket(int fd) {
  int kind, saved = errno;
  socklen_t size = sizeof kind;
  int result = getsockopt(fd, SOL_SOCKET, SO_TYPE, &kind, &size) == 0 && kind == SOCK_STREAM;
  errno = saved;
  return result;
}

/* How many of `size` bytes a write to this socket may take. */
static size_t allowed(int fd, size_t size) {
  int limit = is_socket(fd) ? fault("send") : 0;
  return limit > 0 && (size_t)limit < size ? (size_t)limit : size;
}

static int abort_client(int client) {
  if (client >= 0) {
    close(client);
    errno = ECONNABORTED;
  }
  return -1;
}

int accept4(int fd, struct sockaddr *address, socklen_t *size, int flags) {
  int error = fault("accept");
  if (error == ECONNABORTED) return abort_client(REAL(accept4)(fd, address, size, flags));
  if (error) return errno = error, -1;
  return REAL(accept4)(fd, address, size, flags);
}

int accept(int fd, struct sockaddr *address, socklen_t *size) {
  int error = fault("accept");
  if (error == ECONNABORTED) return abort_client(REAL(accept)(fd, address, size));
  if (error) return errno = error, -1;
  return REAL(accept)(fd, address, size);
}

int pipe2(int ends[2], int flags) {
  int error = fault("pipe");
  if (error) return errno = error, -1;
  return REAL(pipe2)(ends, flags);
}

int pipe(int ends[2]) {
  int error = fault("pipe");
  if (error) return errno = error, -1;
  return REAL(pipe)(ends);
}

ssize_t splice(int in, off64_t *in_at, int out, off64_t *out_at, size_t size, unsigned flags) {
  int error = no_splice ? atoi(no_splice) : 0;
  if (error) return errno = error, -1;
  return REAL(splice)(in, in_at, out, out_at, size, flags);
}

static int checked_fcntl(int (*real)(int, int, ...), int fd, int command, void *argument) {
  int error = command == F_SETPIPE_SZ ? fault("pipesize") : 0;
  if (error) return errno = error, -1;
  return real(fd, command, argument);
}

int fcntl(int fd, int command, ...) {
  va_list list;
  void *argument;
  va_start(list, command);
  argument = va_arg(list, void *);
  va_end(list);
  return checked_fcntl(REAL(fcntl), fd, command, argument);
}

int fcntl64(int fd, int command, ...) {
  va_list list;
  void *argument;
  va_start(list, command);
  argument = va_arg(list, void *);
  va_end(list);
  return checked_fcntl(REAL(fcntl64), fd, command, argument);
}

/* After a short write, epoll must report the socket as writable again, as it does for one that was
 * full: setting the send buffer makes the kernel do that. */
static ssize_t announced(int fd, ssize_t sent) {
  int size = 1 << 18, saved = errno;
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &size, sizeof size);
  errno = saved;
  return sent;
}

static ssize_t cut_send(int fd, const void *data, size_t size, int flags) {
  return announced(fd, REAL(send)(fd, data, allowed(fd, size), flags));
}

ssize_t send(int fd, const void *data, size_t size, int flags) {
  if (allowed(fd, size) < size) return cut_send(fd, data, size, flags);
  return REAL(send)(fd, data, size, flags);
}

ssize_t sendto(int fd, const void *data, size_t size, int flags, const struct sockaddr *address,
               socklen_t address_size) {
  if (allowed(fd, size) < size) return cut_send(fd, data, size, flags);
  return REAL(sendto)(fd, data, size, flags, address, address_size);
}

ssize_t write(int fd, const void *data, size_t size) {
  if (allowed(fd, size) < size) return cut_send(fd, data, size, MSG_NOSIGNAL);
  return REAL(write)(fd, data, size);
}

/* Of a vector, only its first piece is written, cut short. */
ssize_t writev(int fd, const struct iovec *pieces, int count) {
  if (count > 0 && allowed(fd, INT_MAX) < INT_MAX)
    return cut_send(fd, pieces[0].iov_base, pieces[0].iov_len, MSG_NOSIGNAL);
  return REAL(writev)(fd, pieces, count);
}

ssize_t sendmsg(int fd, const struct msghdr *message, int flags) {
  if (message->msg_iovlen > 0 && allowed(fd, INT_MAX) < INT_MAX)
    return cut_send(fd, message->msg_iov[0].iov_base, message->msg_iov[0].iov_len, flags);
  return REAL(sendmsg)(fd, message, flags);
}
