/*
 * Starts a program the way a service manager does: pinned, SIGPIPE ignored, the listening socket as
 * fd 3, LISTEN_FDS=1 and LISTEN_PID its own pid.
 *
 *   launch CPU LISTENER PROGRAM [ARGUMENT...]         executes the program; LISTENER -1: none
 *   launch time CPU LISTENER BACKEND ADDRESS PROGRAM...
 *       The stopwatch. A client connects to ADDRESS (tcp:PORT, unix:PATH), sends 64 bytes and waits
 *       in the backlog of LISTENER. The program is started; the listener BACKEND is served by an
 *       echo. Prints as JSON the seconds from just before execve to the first byte back at the
 *       client, the CPU seconds of the program by then, and its pid; after a line on stdin it ends
 *       the program.
 *   launch time CPU -1 -1 - PROGRAM...
 *       Prints the seconds from just before execve to the program's end.
 *
 * Written in C, because a fork of the Python harness would add the copying and dropping of its
 * memory map to what is measured.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { FIRST_PASSED_FD = 3, MESSAGE = 64 };

static void check(long result, const char *what) {
    if (result >= 0)
        return;
    perror(what);
    exit(1);
}

static double seconds(clockid_t clock) {
    struct timespec t;
    check(clock_gettime(clock, &t), "clock_gettime");
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static void keep_to_ourselves(int fd) { check(fcntl(fd, F_SETFD, FD_CLOEXEC), "fcntl"); }

/* Does not return. `started` gets the time just before the exec, if given. */
static void become(int cpu, int listener, char **program, volatile double *started) {
    char pid[16];
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (cpu >= 0)
        check(sched_setaffinity(0, sizeof set, &set), "sched_setaffinity");
    signal(SIGPIPE, SIG_IGN);
    prctl(PR_SET_PDEATHSIG, SIGTERM); /* nothing outlives the benchmark */
    if (listener >= 0) {
        keep_to_ourselves(listener);
        if (listener == FIRST_PASSED_FD)
            check(fcntl(listener, F_SETFD, 0), "fcntl");
        else
            check(dup2(listener, FIRST_PASSED_FD), "dup2");
        snprintf(pid, sizeof pid, "%d", (int)getpid());
        setenv("LISTEN_FDS", "1", 1);
        setenv("LISTEN_PID", pid, 1);
    }
    if (started)
        *started = seconds(CLOCK_MONOTONIC);
    execvp(program[0], program);
    perror(program[0]);
    _exit(127);
}

static int client_connect(const char *address) {
    struct sockaddr_un un = {.sun_family = AF_UNIX};
    struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int is_unix = !strncmp(address, "unix:", 5);
    int fd = socket(is_unix ? AF_UNIX : AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    check(fd, "socket");
    if (is_unix)
        strncpy(un.sun_path, address + 5, sizeof un.sun_path - 1);
    else
        in.sin_port = htons((uint16_t)atoi(address + 4));
    const struct sockaddr *where = is_unix ? (void *)&un : (void *)&in;
    check(connect(fd, where, is_unix ? sizeof un : sizeof in), "connect");
    return fd;
}

static void transfer(int from, int to) {
    char message[MESSAGE];
    check(recv(from, message, sizeof message, MSG_WAITALL) - MESSAGE, "recv");
    check(send(to, message, sizeof message, MSG_NOSIGNAL) - MESSAGE, "send");
}

static pid_t start(int cpu, int listener, char **program, volatile double *started) {
    pid_t pid = fork();
    check(pid, "fork");
    if (pid == 0)
        become(cpu, listener, program, started);
    return pid;
}

static void time_first_byte(int cpu, int listener, int backend, const char *address, char **program,
                            volatile double *started) {
    char message[MESSAGE] = {0};
    clockid_t clock;
    keep_to_ourselves(backend);
    int client = client_connect(address);
    check(send(client, message, sizeof message, 0) - MESSAGE, "send");
    pid_t pid = start(cpu, listener, program, started);
    alarm(20);
    int served = accept4(backend, NULL, NULL, SOCK_CLOEXEC);
    check(served, "accept");
    transfer(served, served);
    check(recv(client, message, sizeof message, MSG_WAITALL) - 1, "recv");
    double ended = seconds(CLOCK_MONOTONIC);
    check(-clock_getcpuclockid(pid, &clock), "clock_getcpuclockid");
    printf("{\"wall\": %.9f, \"proxy_cpu\": %.9f, \"pid\": %d}\n", ended - *started,
           seconds(clock), pid);
    fflush(stdout);
    getchar();
    kill(pid, SIGTERM);
    waitpid(pid, NULL, 0);
}

static void time_whole(int cpu, char **program, volatile double *started) {
    struct rusage used;
    pid_t pid = start(cpu, -1, program, started);
    waitpid(pid, NULL, 0);
    double ended = seconds(CLOCK_MONOTONIC);
    check(getrusage(RUSAGE_CHILDREN, &used), "getrusage");
    double cpu_seconds = (double)(used.ru_utime.tv_sec + used.ru_stime.tv_sec) +
                         (double)(used.ru_utime.tv_usec + used.ru_stime.tv_usec) / 1e6;
    printf("{\"wall\": %.9f, \"proxy_cpu\": %.9f, \"pid\": 0}\n", ended - *started, cpu_seconds);
}

int main(int count, char **arguments) {
    if (count >= 4 && strcmp(arguments[1], "time"))
        become(atoi(arguments[1]), atoi(arguments[2]), arguments + 3, NULL);
    if (count < 7)
        return 2;
    int cpu = atoi(arguments[2]), listener = atoi(arguments[3]), backend = atoi(arguments[4]);
    volatile double *started = mmap(NULL, sizeof *started, PROT_READ | PROT_WRITE,
                                    MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (started == MAP_FAILED)
        return 1;
    if (listener < 0)
        time_whole(cpu, arguments + 6, started);
    else
        time_first_byte(cpu, listener, backend, arguments[5], arguments + 6, started);
    return 0;
}
