/*
 * The load: clients and backend of a proxy under test, in one thread around one epoll.
 *
 * A client's first byte chooses what the backend does:
 *   'e'  echo: answers every message of `size` bytes with as many
 *   'u'  sink: reads and throws away (the client uploads)
 *   'd'  source: sends without end (the client downloads)
 * Kinds of clients, any number of each at the same time:
 *   pings      persistent connections, each with one message of `size` bytes in flight
 *   dials      connect, one message of `size` bytes each way, close, and again
 *   uploads, downloads   streams in writes of `write` bytes
 *   idle       connections that have exchanged one message and are then silent: with idle=1, each
 *              line on stdin sets their number, and is answered with a measurement
 *
 * A measurement begins `warmup` after every persistent connection works, lasts `seconds`, and prints
 * one line of JSON on stdout. The CPU time of the proxy is its processes' CPU clocks, read at
 * both ends of the interval: the nanoseconds of /proc/PID/task/?/schedstat, but up to date while a
 * thread runs on the other CPU (schedstat lags by up to a tick) and with threads that have ended.
 *
 * usage: load KEY=VALUE...      keys: see arguments_parse()
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum {
    BATCH = 256,               /* events taken per epoll_wait */
    BUFFER = 256 * 1024,       /* bytes moved per event at most: stays in the second-level cache */
    OPENING = 64,              /* idle connections under way at a time: no backlog overflows */
    SAMPLES_MAX = 8 << 20,     /* latencies kept per measurement */
    PIDS_MAX = 16,
    STREAMS_MAX = 64,
    DIAL_FAILURES_MAX = 1000,
    STALL_SECONDS = 10,
};

enum role { LISTENER, STREAMS, PING, DIAL, IDLE, UPLOAD, DOWNLOAD, UNDECIDED, ECHO, SINK, SOURCE };

struct peer {
    enum role role;
    int fd;
    bool writing;       /* EPOLLOUT is what we wait for, instead of EPOLLIN */
    bool established;   /* the first message came back, or the first bytes of a stream */
    size_t moved;       /* bytes of the current message sent or received */
    uint64_t began;     /* ns: when the current message (or connect) began */
    struct peer *next;  /* in the list of those to free after the batch */
};

struct mark {           /* what is read at both ends of a measurement */
    uint64_t wall, proxy, load, idle;      /* ns */
    uint64_t round_trips, dials, bytes;    /* totals since the start */
};

static struct {
    int backend;                  /* the backend's listening socket, inherited */
    struct sockaddr_storage address;
    socklen_t address_size;       /* where clients connect */
    int family;
    int pings, dials, uploads, downloads, idle;
    bool light;                   /* streams are discarded without a copy */
    size_t size, write;           /* bytes */
    double warmup, seconds;
    clockid_t clocks[PIDS_MAX];
    int clock_count;
} option = {.backend = -1, .size = 64, .write = BUFFER, .warmup = 0.2, .seconds = 1};

static int everything, streams;   /* epolls; one and the same but in a mixed load */
static int waiting;               /* persistent connections not yet established */
static int idle_wanted, idle_opened;
static uint64_t round_trips, dials, bytes, dial_failures;
static char outgoing_echo[BUFFER], outgoing_up[BUFFER], outgoing_down[BUFFER], incoming[BUFFER];
static struct peer *receiving[STREAMS_MAX]; /* the ends of streams that count bytes */
static int receiving_count;
static uint32_t *latency;         /* ns each */
static size_t latencies;
static struct peer *done;         /* freed after the batch: a stale event may still name them */

static void fail(const char *format, ...) {
    int error = errno;
    va_list arguments;
    va_start(arguments, format);
    fputs("load: ", stderr);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, ": %s\n", strerror(error));
    exit(1);
}

static void usage(const char *what, const char *which) {
    fprintf(stderr, "load: %s %s\n", what, which);
    exit(2);
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t) < 0)
        fail("the proxy is gone");
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

/* ---- peers ---- */

static bool is_stream(const struct peer *p) {
    return p->role == UPLOAD || p->role == DOWNLOAD || p->role == SINK || p->role == SOURCE;
}

/* In a mixed load the streams have an epoll of their own inside the main one, and each batch ends
   with one of their events: so pings wait for one stream at most, and their latency is that of the
   proxy and not of the load. */
static int streams_epoll(const struct peer *p) { return is_stream(p) ? streams : everything; }

static void peer_watch(struct peer *p, int operation) {
    struct epoll_event event = {.events = p->writing ? EPOLLOUT : EPOLLIN, .data.ptr = p};
    if (epoll_ctl(streams_epoll(p), operation, p->fd, &event) < 0)
        fail("epoll_ctl");
}

static struct peer *peer_new(enum role role, int fd) {
    struct peer *p = calloc(1, sizeof *p);
    if (!p)
        fail("no memory");
    p->role = role;
    p->fd = fd;
    return p;
}

static void peer_close(struct peer *p) {
    close(p->fd);
    p->fd = -1;
    p->next = done;
    done = p;
}

static void peers_free(void) {
    while (done) {
        struct peer *p = done;
        done = p->next;
        free(p);
    }
}

static void peer_wait_to(struct peer *p, bool write) {
    if (p->writing == write)
        return;
    p->writing = write;
    peer_watch(p, EPOLL_CTL_MOD);
}

static void peer_established(struct peer *p) {
    if (p->established)
        return;
    p->established = true;
    waiting--;
}

static void no_delay(int fd) {
    if (option.family != AF_UNIX)
        setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &(int){1}, sizeof(int));
}

/* ---- messages ---- */

/* Sends what is left of the current message. Returns 1 when all is sent, 0 when the socket is full,
   -1 when the connection is lost. */
static int message_send(struct peer *p) {
    while (p->moved < option.size) {
        size_t left = option.size - p->moved;
        ssize_t n = send(p->fd, outgoing_echo, left < BUFFER ? left : BUFFER, MSG_NOSIGNAL);
        if (n < 0)
            return errno == EAGAIN ? 0 : -1;
        p->moved += (size_t)n;
    }
    p->moved = 0;
    return 1;
}

/* Receives what is left of the current message. Returns 1 when it is complete, 0 when more must
   come, -1 when the connection is lost or at its end. */
static int message_receive(struct peer *p) {
    size_t left = option.size - p->moved;
    ssize_t n = recv(p->fd, incoming, left < BUFFER ? left : BUFFER, 0);
    if (n < 0)
        return errno == EAGAIN ? 0 : -1;
    if (n == 0)
        return -1;
    p->moved += (size_t)n;
    if (p->moved < option.size)
        return 0;
    p->moved = 0;
    return 1;
}

static void latency_keep(const struct peer *p) {
    uint64_t ns = now() - p->began;
    if (latencies < SAMPLES_MAX)
        latency[latencies++] = ns > UINT32_MAX ? UINT32_MAX : (uint32_t)ns;
}

static void stream_counts(struct peer *p) {
    if (receiving_count == STREAMS_MAX)
        usage("more streams", "than it can count");
    receiving[receiving_count++] = p;
}

/* Bytes that the proxy has delivered but that have not been read: its work in this interval. */
static uint64_t streams_unread(void) {
    uint64_t sum = 0;
    for (int i = 0; i < receiving_count; i++) {
        int unread = 0;
        if (ioctl(receiving[i]->fd, FIONREAD, &unread) == 0)
            sum += (uint64_t)unread;
    }
    return sum;
}

/* ---- clients ---- */

static void client_open(enum role role);

static void client_lost(struct peer *p) {
    if (p->role != DIAL || ++dial_failures > DIAL_FAILURES_MAX)
        fail("a connection was lost");
    peer_close(p);
    client_open(DIAL);
}

/* Begins a message or continues it. */
static void client_send(struct peer *p) {
    int sent = message_send(p);
    if (sent < 0)
        client_lost(p);
    else
        peer_wait_to(p, sent == 0);
}

static void client_answered(struct peer *p) {
    if (p->role == DIAL) {
        dials++;
        latency_keep(p);
        peer_close(p);
        client_open(DIAL);
        return;
    }
    peer_established(p);
    if (p->role == IDLE) {
        if (idle_opened < idle_wanted)
            client_open(IDLE);
        return;
    }
    round_trips++;
    latency_keep(p);
    p->began = now();
    client_send(p);
}

static void client_event(struct peer *p) {
    if (p->writing) {
        client_send(p);
        return;
    }
    int received = message_receive(p);
    if (received < 0)
        client_lost(p);
    else if (received > 0)
        client_answered(p);
}

static void stream_send(struct peer *p, const char *from) {
    for (size_t moved = 0; moved < BUFFER;) {
        ssize_t n = send(p->fd, from, option.write, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN)
            return;
        if (n < 0)
            fail("a stream was lost");
        moved += (size_t)n;
        if ((size_t)n < option.write)
            return;
    }
}

/* Reads as any receiver does. Discarding without a copy (light=1, MSG_TRUNC) makes every proxy a
   fifth cheaper, because the data are then not fetched from its cache, as a real receiver would do.
   It is only for runs in which the load must not be the bottleneck. */
static void stream_receive(struct peer *p) {
    ssize_t n = recv(p->fd, incoming, BUFFER, option.light ? MSG_TRUNC : 0);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0)
        fail("a stream was lost");
    bytes += (uint64_t)n;
}

static void client_open(enum role role) {
    int fd = socket(option.family, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0)
        fail("socket");
    no_delay(fd);
    struct peer *p = peer_new(role, fd);
    p->began = now();
    if (connect(fd, (void *)&option.address, option.address_size) < 0 && errno != EINPROGRESS)
        fail("connect");
    if (role != DIAL)
        waiting++;
    if (role == IDLE)
        idle_opened++;
    p->writing = role == UPLOAD;
    peer_watch(p, EPOLL_CTL_ADD);
    if (role == UPLOAD) {
        peer_established(p);
    } else if (role == DOWNLOAD) {
        /* Over loopback and UNIX sockets a connect is complete at once. */
        if (send(fd, outgoing_down, 1, MSG_NOSIGNAL) != 1)
            fail("a download could not be asked for");
        stream_counts(p);
    } else {
        client_send(p);
    }
}

/* ---- backend ---- */

static void backend_accept(void) {
    for (;;) {
        int fd = accept4(option.backend, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        if (fd < 0 && errno == EAGAIN)
            return;
        if (fd < 0)
            fail("accept");
        no_delay(fd);
        peer_watch(peer_new(UNDECIDED, fd), EPOLL_CTL_ADD);
    }
}

/* Takes the role that the client asks for with its first byte, without reading it. */
static void backend_decide(struct peer *p) {
    char first;
    ssize_t n = recv(p->fd, &first, 1, MSG_PEEK);
    if (n < 0 && errno == EAGAIN)
        return;
    if (n <= 0) {
        peer_close(p);
        return;
    }
    p->role = first == 'u' ? SINK : first == 'd' ? SOURCE : ECHO;
    if (p->role == SOURCE) {
        recv(p->fd, &first, 1, 0);
        p->writing = true;
    }
    if (!is_stream(p))
        return;
    if (p->role == SINK)
        stream_counts(p);
    if (streams != everything) {
        epoll_ctl(everything, EPOLL_CTL_DEL, p->fd, NULL);
        peer_watch(p, EPOLL_CTL_ADD);
    } else if (p->writing) {
        peer_watch(p, EPOLL_CTL_MOD);
    }
}

static void backend_echo(struct peer *p) {
    if (!p->writing) {
        int received = message_receive(p);
        if (received < 0)
            peer_close(p);
        if (received <= 0)
            return;
    }
    int sent = message_send(p);
    if (sent < 0)
        peer_close(p);
    else
        peer_wait_to(p, sent == 0);
}

/* ---- the loop ---- */

static void streams_turn(void);

static void peer_event(struct peer *p) {
    if (p->fd < 0)
        return;
    if (p->role == UNDECIDED) {
        backend_decide(p);
        if (p->fd < 0 || p->role != ECHO)
            return;
    }
    switch (p->role) {
    case LISTENER: backend_accept(); break;
    case STREAMS: streams_turn(); break;
    case ECHO: backend_echo(p); break;
    case UPLOAD: stream_send(p, outgoing_up); break;
    case SOURCE: stream_send(p, outgoing_down); break;
    case SINK: stream_receive(p); break;
    case DOWNLOAD: peer_established(p); stream_receive(p); break;
    default: client_event(p);
    }
}

static void streams_turn(void) {
    struct epoll_event event;
    if (epoll_wait(streams, &event, 1, 0) == 1)
        peer_event(event.data.ptr);
}

static void turn(void) {
    struct epoll_event event[BATCH];
    struct peer *last = NULL;
    int n = epoll_wait(everything, event, BATCH, STALL_SECONDS * 1000);
    if (n < 0 && errno != EINTR)
        fail("epoll_wait");
    if (n == 0) {
        errno = ETIMEDOUT;
        fail("nothing has moved for %d s, %d connections not established", STALL_SECONDS, waiting);
    }
    for (int i = 0; i < n; i++) {
        struct peer *p = event[i].data.ptr;
        if (p->role == STREAMS)
            last = p;
        else
            peer_event(p);
    }
    if (last)
        peer_event(last);
    peers_free();
}

/* Nanoseconds that all CPUs together were idle, from proc_uptime(5). */
static uint64_t idle_ns(void) {
    double up, idle;
    FILE *file = fopen("/proc/uptime", "re");
    if (!file || fscanf(file, "%lf %lf", &up, &idle) != 2)
        fail("/proc/uptime");
    fclose(file);
    return (uint64_t)(idle * 1e9);
}

static struct mark mark_now(void) {
    struct mark m = {
        .wall = now(), .load = clock_ns(CLOCK_PROCESS_CPUTIME_ID), .idle = idle_ns()};
    for (int i = 0; i < option.clock_count; i++)
        m.proxy += clock_ns(option.clocks[i]);
    m.round_trips = round_trips;
    m.dials = dials;
    m.bytes = bytes + streams_unread();
    return m;
}

static void turn_until(uint64_t deadline) {
    while (now() < deadline)
        turn();
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* Microseconds; 0 without a sample. */
static double percentile(double share) {
    return latencies ? latency[(size_t)(share * (double)(latencies - 1))] / 1e3 : 0;
}

static void print(struct mark a, struct mark b) {
    qsort(latency, latencies, sizeof *latency, ascending);
    double all = (double)(b.wall - a.wall) * (double)sysconf(_SC_NPROCESSORS_ONLN);
    printf("{\"idle\": %d, \"wall\": %.9f, \"proxy_cpu\": %.9f, \"load_cpu\": %.9f, "
           "\"machine_cpu\": %.9f, "
           "\"round_trips\": %lu, \"dials\": %lu, \"dial_failures\": %lu, \"bytes\": %lu, "
           "\"p50\": %.1f, \"p99\": %.1f}\n",
           idle_wanted, (double)(b.wall - a.wall) / 1e9, (double)(b.proxy - a.proxy) / 1e9,
           (double)(b.load - a.load) / 1e9, (all - (double)(b.idle - a.idle)) / 1e9,
           b.round_trips - a.round_trips, b.dials - a.dials,
           dial_failures, b.bytes - a.bytes, percentile(0.5), percentile(0.99));
    fflush(stdout);
}

static void measure(void) {
    while (waiting)
        turn();
    turn_until(now() + (uint64_t)(option.warmup * 1e9));
    latencies = 0;
    struct mark begin = mark_now();
    turn_until(begin.wall + (uint64_t)(option.seconds * 1e9));
    print(begin, mark_now());
}

static void idle_open(int count) {
    idle_wanted = count;
    for (int i = 0; i < OPENING && idle_opened < idle_wanted; i++)
        client_open(IDLE);
    while (waiting)
        turn();
}

/* Between two measurements nothing moves, so that memory can be measured: no socket holds more than
   one message. */
static void steps_measure(void) {
    char line[16];
    while (fgets(line, sizeof line, stdin)) {
        idle_open(atoi(line));
        measure();
    }
}

/* ---- the command line ---- */

/* tcp:PORT of 127.0.0.1, or unix:PATH */
static void address_parse(const char *text) {
    if (!strncmp(text, "tcp:", 4)) {
        struct sockaddr_in *in = (void *)&option.address;
        in->sin_family = AF_INET;
        in->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        in->sin_port = htons((uint16_t)atoi(text + 4));
        option.address_size = sizeof *in;
    } else {
        struct sockaddr_un *un = (void *)&option.address;
        un->sun_family = AF_UNIX;
        strncpy(un->sun_path, text + 5, sizeof un->sun_path - 1);
        option.address_size = sizeof *un;
    }
    option.family = option.address.ss_family;
}

static void cpu_parse(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)cpu, &set);
    if (cpu >= 0 && sched_setaffinity(0, sizeof set, &set) < 0)
        fail("sched_setaffinity");
}

static void pid_parse(int pid) {
    if (option.clock_count == PIDS_MAX)
        usage("too many", "pid=");
    if (clock_getcpuclockid(pid, &option.clocks[option.clock_count++]))
        fail("the clock of process %d", pid);
}

static void arguments_parse(int count, char **arguments) {
    for (int i = 1; i < count; i++) {
        char *key = arguments[i], *value = strchr(key, '=');
        if (!value)
            usage("not KEY=VALUE:", key);
        *value++ = '\0';
        if (!strcmp(key, "cpu")) cpu_parse(atoi(value));
        else if (!strcmp(key, "backend")) option.backend = atoi(value);
        else if (!strcmp(key, "connect")) address_parse(value);
        else if (!strcmp(key, "pid")) pid_parse(atoi(value));
        else if (!strcmp(key, "pings")) option.pings = atoi(value);
        else if (!strcmp(key, "dials")) option.dials = atoi(value);
        else if (!strcmp(key, "uploads")) option.uploads = atoi(value);
        else if (!strcmp(key, "downloads")) option.downloads = atoi(value);
        else if (!strcmp(key, "idle")) option.idle = atoi(value);
        else if (!strcmp(key, "size")) option.size = (size_t)atol(value);
        else if (!strcmp(key, "write")) option.write = (size_t)atol(value);
        else if (!strcmp(key, "light")) option.light = atoi(value) && option.family == AF_INET;
        else if (!strcmp(key, "warmup")) option.warmup = atof(value);
        else if (!strcmp(key, "seconds")) option.seconds = atof(value);
        else usage("unknown key", key);
    }
    if (option.backend < 0 || !option.family || option.write > BUFFER)
        usage("needs backend= and connect=,", "and write= of at most 262144");
}

static void watch_backend(void) {
    peer_watch(peer_new(LISTENER, option.backend), EPOLL_CTL_ADD);
}

static void watch_streams(void) {
    everything = streams = epoll_create1(EPOLL_CLOEXEC);
    if (!option.pings || !(option.uploads + option.downloads))
        return;
    streams = epoll_create1(EPOLL_CLOEXEC);
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = peer_new(STREAMS, streams)};
    epoll_ctl(everything, EPOLL_CTL_ADD, streams, &event);
}

int main(int count, char **arguments) {
    arguments_parse(count, arguments);
    memset(outgoing_echo, 'e', BUFFER);
    memset(outgoing_up, 'u', BUFFER);
    memset(outgoing_down, 'd', BUFFER);
    latency = malloc(SAMPLES_MAX * sizeof *latency);
    if (!latency)
        fail("no memory");
    watch_streams();
    watch_backend();
    for (int i = 0; i < option.pings; i++) client_open(PING);
    for (int i = 0; i < option.uploads; i++) client_open(UPLOAD);
    for (int i = 0; i < option.downloads; i++) client_open(DOWNLOAD);
    for (int i = 0; i < option.dials; i++) client_open(DIAL);
    if (option.idle)
        steps_measure();
    else
        measure();
    return 0;
}
