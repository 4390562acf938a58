"""Which failures of which calls are tried: those in the call's manual page or in the kernel.

Calls of the extension that are not tried are in LEFT_OUT, with the reason.
"""

import errno
import socket

from faults.control import FAIL, FOR_EVER, SHORTEN, ZERO


def _row(text):
    """{failure: lengths of series}: one call; with +3 three in a row too; with +all every later one
    too."""
    row = {}
    for word in text.split():
        name, _, more = word.partition("+")
        row[name] = (1,) + {"": (), "3": (3,), "all": (FOR_EVER,)}[more]
    return row


def strike_of(failure):
    """(action, error) of a failure: an errno or EAI_ error by name, `short`, or `0` bytes."""
    if failure == "short":
        return SHORTEN, 0
    if failure == "0":
        return ZERO, 0
    if failure.startswith("EAI_"):
        return FAIL, getattr(socket, failure)
    return FAIL, getattr(errno, failure)


RELAY = {
    "accept4": "EINTR+3 ECONNABORTED+3 EMFILE+3 ENFILE ENOBUFS ENOMEM EPERM",
    "bind": "ENOMEM EADDRINUSE",
    "calloc": "ENOMEM+3",
    "close": "EINTR EIO",
    "connect": "ECONNREFUSED+3 EAGAIN+3 EADDRNOTAVAIL ENETUNREACH EHOSTUNREACH ETIMEDOUT "
    "ENOBUFS ENOMEM EACCES EINTR",
    "epoll_create1": "EMFILE ENFILE ENOMEM",
    "epoll_ctl_add": "ENOMEM+3 ENOSPC+3",
    "epoll_ctl_mod": "ENOMEM+all",
    "epoll_wait": "EINTR+3 short+all",
    "eventfd": "EMFILE ENFILE ENOMEM",
    "fcntl": "EPERM",
    "fstat": "EIO ENOMEM",
    "fcntl_setpipe": "EPERM+all EBUSY ENOMEM+all short+all",
    "ftruncate": "ENOMEM EFBIG",
    "getpeername": "ENOTCONN ENOBUFS",
    "getrlimit": "EPERM",
    "getsockname": "ENOBUFS",
    "getsockopt": "ENOBUFS",
    "getsockopt_error": "ENOBUFS",
    "ioctl": "EINVAL+all",
    "madvise": "EINVAL",
    "malloc": "ENOMEM+3",
    "memfd_create": "EMFILE ENFILE ENOMEM ENOSYS",
    "mlock": "ENOMEM EPERM",
    "mmap": "ENOMEM EAGAIN EPERM",
    "pipe2": "EMFILE+all ENFILE+all ENOMEM",
    "poll": "EINTR ENOMEM",
    "pread": "EINTR EIO short",
    "pthread_create": "EAGAIN+all EPERM",
    "pwrite": "EINTR EIO ENOSPC short",
    "read": "EINTR EAGAIN EIO short",
    "realloc": "ENOMEM",
    "recv": "EINTR+3 EAGAIN+3 ENOMEM ECONNRESET ETIMEDOUT short+3",
    "recvmmsg": "EINTR+3 EAGAIN+3 ENOMEM ECONNRESET+3 short+3",
    "recvmsg": "EINTR+3 EAGAIN+3 ENOMEM ECONNRESET short+3",
    "sendmmsg": "EINTR+3 EAGAIN+3 ENOBUFS ENOMEM EPIPE EPERM EMSGSIZE short+3",
    "sendmsg": "EINTR+3 EAGAIN+3 ENOBUFS ENOMEM ECONNREFUSED+3 EPERM EMSGSIZE EINVAL EIO "
    "ENETUNREACH",
    "send": "EINTR+3 EAGAIN+3 ENOBUFS ENOMEM EPIPE ECONNRESET short+3",
    "setrlimit": "EPERM",
    "setsockopt": "ENOBUFS EPERM+all",
    "shutdown": "ENOTCONN ENOBUFS",
    "socket": "EMFILE+3 ENFILE ENOBUFS ENOMEM+3 EACCES",
    "socketpair": "EMFILE+3 ENFILE ENOMEM",
    "splice_in": "EINTR+3 EAGAIN+3 ENOMEM EINVAL+all ENOSYS+all EPERM ECONNRESET short+3 0",
    "splice_out": "EINTR+3 EAGAIN+3 ENOMEM EINVAL+all ENOSYS EPERM EPIPE ECONNRESET short+3",
    "write": "EINTR EAGAIN",
}

PYTHON = {
    "accept4": "EINTR ECONNABORTED EMFILE+3 ENFILE ENOBUFS ENOMEM EPERM",
    "bind": "EADDRINUSE EACCES",
    "chmod": "EACCES EPERM EROFS",
    "close": "EINTR EIO",
    "eventfd": "EMFILE ENFILE ENOMEM",
    "eventfd_read": "EAGAIN EINTR",
    "fcntl": "EPERM",
    "fstat": "ENOMEM EIO",
    "getaddrinfo": "EAI_AGAIN+3 EAI_NONAME+3 EAI_MEMORY EAI_SYSTEM EAI_FAIL",
    "getpeername": "ENOBUFS ENOTCONN",
    "getsockname": "ENOBUFS",
    "getsockopt": "ENOBUFS ENOPROTOOPT",
    "getsockopt_error": "ENOBUFS",
    "ioctl": "EIO",
    "listen": "EADDRINUSE",
    "lseek": "ESPIPE",
    "lstat": "EACCES ENOMEM",
    "memfd_create": "EMFILE ENFILE ENOMEM ENOSYS",
    "open": "EMFILE+3 ENFILE ENOMEM EACCES EINTR",
    "opendir": "EMFILE ENOMEM EACCES",
    "pidfd_open": "EMFILE ENOSYS EPERM",
    "poll": "EINTR ENOMEM+3",
    "pread": "EIO short",
    "pthread_create": "EAGAIN+all EPERM",
    "read": "EINTR EAGAIN",
    "read_file": "EINTR EIO short",
    "readlink": "EACCES ENOMEM",
    "recv": "EINTR EAGAIN ENOMEM ECONNRESET short",
    "recvmsg": "EINTR EAGAIN ENOMEM ECONNRESET short",
    "send": "EINTR EAGAIN+3 ENOBUFS ENOMEM EPIPE ECONNRESET short+3",
    "sendto": "EAGAIN EINTR ECONNREFUSED ENOBUFS ENOMEM ENOENT",
    "sendmsg": "EAGAIN ENOBUFS ENOMEM ETOOMANYREFS EPIPE",
    "setrlimit": "EPERM",
    "setsockopt": "ENOBUFS EPERM",
    "socket": "EMFILE+3 ENFILE ENOMEM EACCES EAFNOSUPPORT",
    "socketpair": "EMFILE ENFILE ENOMEM",
    "stat": "EACCES ENOMEM",
    "unlink": "EACCES ENOENT",
    "write": "EINTR EAGAIN EPIPE EIO ENOSPC",
}

FAILURES = {
    "relay": {point: _row(text) for point, text in RELAY.items()},
    "python": {point: _row(text) for point, text in PYTHON.items()},
}
"""{scope: {point: {failure: lengths of series}}}"""

AT_START = ("python", "close")
"""This concerns files, which are read at the start: the close of a socket cannot fail."""

LEFT_OUT = {
    "clock_gettime": "cannot fail with a clock that exists (and is no system call: vDSO)",
    "getpid": "cannot fail",
    "epoll_ctl_del": "needs no memory: fails only for an fd that is not there",
    "free": "cannot fail",
    "pthread_timedjoin_np": "a timeout is what it is called for",
    "setitimer": "fails only for a bad argument",
    "sigaction": "fails only for a bad argument",
    "pthread_sigmask": "fails only for a bad argument",
    "eventfd_read": "only after an event: a counter that is not 0 can always be read",
    "eventfd_write": "the counter is far from full",
    "pthread_join": "fails only for a bad argument",
    "pthread_mutex_lock": "of a plain mutex that exists cannot fail",
    "sigaddset": "fails only for a bad argument, and is no system call",
    "sigemptyset": "cannot fail, and is no system call",
    "recvfrom": "is not called by the program",
}
"""Calls that are not made to fail, and why."""

SYSTEM_CALLS = {
    "accept4": "accept4",
    "bind": "bind",
    "chmod": "chmod",
    "clone": "pthread_create",
    "clone3": "pthread_create",
    "close": "close",
    "connect": "connect",
    "epoll_create1": "epoll_create1",
    "epoll_ctl": "epoll_ctl_add epoll_ctl_mod",
    "epoll_wait": "epoll_wait",
    "eventfd2": "eventfd",
    "fcntl": "fcntl fcntl_setpipe",
    "fstat": "fstat",
    "ftruncate": "ftruncate",
    "getpeername": "getpeername",
    "getsockname": "getsockname",
    "getsockopt": "getsockopt getsockopt_error",
    "ioctl": "ioctl",
    "listen": "listen",
    "lseek": "lseek",
    "lstat": "lstat",
    "madvise": "madvise",
    "memfd_create": "memfd_create",
    "mlock": "mlock",
    "mmap": "mmap",
    "newfstatat": "stat lstat fstat",
    "openat": "open opendir",
    "pidfd_open": "pidfd_open",
    "pipe2": "pipe2",
    "poll": "poll",
    "pread64": "pread",
    "pwrite64": "pwrite",
    "prlimit64": "getrlimit setrlimit",
    "read": "read read_file",
    "readlink": "readlink",
    "recvfrom": "recv",
    "recvmmsg": "recvmmsg",
    "recvmsg": "recvmsg",
    "sendmmsg": "sendmmsg",
    "sendmsg": "sendmsg",
    "sendto": "send sendto",
    "setsockopt": "setsockopt",
    "shutdown": "shutdown",
    "socket": "socket",
    "socketpair": "socketpair",
    "splice": "splice_in splice_out",
    "stat": "stat",
    "unlink": "unlink",
    "write": "write",
}
"""{system call: the kinds of calls with which it is made to fail}"""

SYSTEM_CALLS_LEFT_OUT = {
    "brk": "memory of the interpreter, which dies by its own rules; the extension's is malloc",
    "exit": "does not return",
    "exit_group": "does not return",
    "flock": "every error is treated alike; tests/unit/test_bind.py holds the lock",
    "futex": "locks of the C library; does not fail",
    "getdents64": "of a folder that could be opened",
    "getpid": "cannot fail",
    "getrandom": "the interpreter's, which has an answer without it",
    "gettid": "cannot fail",
    "mprotect": "of the dynamic loader, whose failure is an ImportError",
    "munmap": "gives memory back",
    "rseq": "the C library's, at the start of a thread",
    "rt_sigaction": "fails only for a bad argument",
    "rt_sigprocmask": "fails only for a bad argument",
    "rt_sigreturn": "does not return",
    "set_robust_list": "the C library's, at the start of a thread",
    "setitimer": "fails only for a bad argument",
    "uname": "cannot fail",
}
"""System calls that are not made to fail, and why."""
