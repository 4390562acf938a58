/*
 * The load of datagrams: clients and backend of a UDP proxy under test, in one thread around one
 * epoll.
 *
 * Kinds of clients, each connected to the proxy's socket; one run has one kind:
 *   pings      one datagram of `size` bytes in flight each, which the backend sends back
 *   uploads    send datagrams of `size` bytes, which the backend counts
 *   downloads  the backend sends datagrams of `size` bytes, which they count
 *   dials      a new socket, one datagram each way, close, and again
 *   idle       clients that have exchanged one datagram and are then silent, alongside the pings:
 *              with idle=1, each line on stdin sets their number, and is answered with a measurement
 * With segments=N the sender hands N datagrams at once to the kernel (UDP_SEGMENT), as QUIC does.
 *
 * No proxy has to drop anything: at most `window` datagrams of a sender are on their way, which is
 * fewer than a receive queue holds. What does not arrive within 100 ms is counted as lost.
 *
 * A measurement is as in load.c: it begins `warmup` after the start, lasts `seconds`, and prints one
 * line of JSON, with the CPU time of the proxy's processes: each `pid`, and `parent` with those that
 * it has made for its clients.
 *
 * usage: datagrams KEY=VALUE...      keys: see arguments_parse()
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <netinet/in.h>
#include <sched.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#ifndef UDP_SEGMENT
#define UDP_SEGMENT 103
#endif
#ifndef SOL_UDP
#define SOL_UDP 17
#endif

enum {
    BATCH = 64,
    BATCHES_MAX = 4,   /* of the backend in one turn */
    SIZE_MAX_ = 65536,
    CLIENTS_MAX = 20000,
    SAMPLES_MAX = 8 << 20,
    PIDS_MAX = 16,
    LOST_MS = 100,
    OPENING = 64,
};

enum kind { NONE, PINGS, UPLOADS, DOWNLOADS, DIALS, IDLE };

struct client {
    int fd;
    enum kind kind;
    bool answered;
    uint64_t began;              /* ns: when its datagram was sent */
    int in_flight;               /* datagrams from the backend to it */
    struct sockaddr_storage flow; /* where the backend sends to */
    socklen_t flow_size;
};

struct mark {
    uint64_t wall, proxy, load, idle;
    uint64_t round_trips, dials, datagrams, bytes;
};

static struct {
    int backend, cpu, pings, uploads, downloads, dials, idle, parent;
    struct sockaddr_in address;
    size_t size;
    int segments, window;
    double warmup, seconds;
    clockid_t clocks[PIDS_MAX];
    int clock_count;
} option = {.backend = -1, .cpu = -1, .size = 64, .segments = 1, .window = 64, .warmup = 0.2,
            .seconds = 1};

static struct client *clients;
static int client_count, unanswered, on_the_way, epoll;
static uint64_t round_trips, dials, datagrams, bytes, lost;
static uint32_t *latency;
static size_t latencies;
static char buffers[BATCH][SIZE_MAX_];
static struct iovec iovs[BATCH];
static struct mmsghdr messages[BATCH];
static struct sockaddr_storage names[BATCH];
static char outgoing[SIZE_MAX_];

static void fail(const char *what) {
    fprintf(stderr, "datagrams: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t) < 0)
        fail("the proxy is gone");
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t now(void) { return clock_ns(CLOCK_MONOTONIC); }

/* ---- sending ---- */

/* Send `count` datagrams at once to a name (NULL: connected); how many there was room for. */
static int send_datagrams(int fd, struct sockaddr_storage *name, socklen_t name_size, int count) {
    char control[CMSG_SPACE(sizeof(uint16_t))] = {0};
    struct iovec data = {outgoing, option.size * (size_t)count};
    struct msghdr message = {.msg_name = name, .msg_namelen = name_size, .msg_iov = &data,
                             .msg_iovlen = 1};
    if (count > 1) {
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        struct cmsghdr *part = CMSG_FIRSTHDR(&message);
        part->cmsg_level = SOL_UDP;
        part->cmsg_type = UDP_SEGMENT;
        part->cmsg_len = CMSG_LEN(sizeof(uint16_t));
        uint16_t size = (uint16_t)option.size;
        memcpy(CMSG_DATA(part), &size, sizeof size);
    }
    if (sendmsg(fd, &message, MSG_DONTWAIT) >= 0)
        return count;
    if (errno != EAGAIN && errno != ECONNREFUSED)
        fail("send");
    return 0;
}

static void ping(struct client *c) {
    c->began = now();
    send_datagrams(c->fd, NULL, 0, 1);
}

static void upload_more(void) {
    static int turn;
    while (on_the_way + option.segments <= option.window) {
        struct client *c = &clients[turn++ % option.uploads];
        int sent = send_datagrams(c->fd, NULL, 0, option.segments);
        if (!sent)
            return;
        on_the_way += sent;
    }
}

static void download_more(struct client *c) {
    while (c->flow_size && c->in_flight + option.segments <= option.window) {
        int sent = send_datagrams(option.backend, &c->flow, c->flow_size, option.segments);
        if (!sent)
            return;
        c->in_flight += sent;
    }
}

/* ---- receiving ---- */

static int receive(int fd, bool with_names) {
    for (int i = 0; i < BATCH; i++) {
        iovs[i] = (struct iovec){buffers[i], SIZE_MAX_};
        messages[i].msg_hdr = (struct msghdr){.msg_iov = &iovs[i], .msg_iovlen = 1};
        if (with_names) {
            messages[i].msg_hdr.msg_name = &names[i];
            messages[i].msg_hdr.msg_namelen = sizeof names[i];
        }
    }
    int count = recvmmsg(fd, messages, BATCH, MSG_DONTWAIT, NULL);
    return count < 0 ? 0 : count;
}

static void echo_all(int count) {
    for (int i = 0; i < count; i++)
        iovs[i].iov_len = messages[i].msg_len;
    for (int sent = 0; sent < count;) {
        int more = sendmmsg(option.backend, messages + sent, (unsigned)(count - sent), MSG_DONTWAIT);
        sent += more > 0 ? more : 1;
    }
}

/* The first datagram of a downloading client has its number. */
static void learn_flows(int count) {
    for (int i = 0; i < count; i++) {
        int number;
        memcpy(&number, buffers[i], sizeof number);
        if (number < 0 || number >= client_count)
            continue;
        struct client *c = &clients[number];
        if (!c->flow_size)
            unanswered--;
        c->flow = names[i];
        c->flow_size = messages[i].msg_hdr.msg_namelen;
        download_more(c);
    }
}

static void backend_event(void) {
    int count, batches = 0;
    do {
        count = receive(option.backend, option.uploads == 0);
        if (option.uploads) {
            datagrams += (uint64_t)count;
            for (int i = 0; i < count; i++)
                bytes += messages[i].msg_len;
            on_the_way -= count < on_the_way ? count : on_the_way;
            unanswered = 0;
            upload_more();
        } else if (option.downloads) {
            learn_flows(count);
        } else {
            echo_all(count);
        }
    } while (count == BATCH && ++batches < BATCHES_MAX);
}

static void client_open(struct client *c) {
    int wide = 4 << 20;
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = c};
    c->fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
    if (c->fd < 0)
        fail("socket");
    if (c->kind == DOWNLOADS)
        setsockopt(c->fd, SOL_SOCKET, SO_RCVBUF, &wide, sizeof wide);
    if (connect(c->fd, (struct sockaddr *)&option.address, sizeof option.address) < 0)
        fail("connect");
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, c->fd, &event) < 0)
        fail("epoll_ctl");
}

static void sample(const struct client *c) {
    if (latencies < SAMPLES_MAX)
        latency[latencies++] = (uint32_t)(now() - c->began);
}

static void client_event(struct client *c) {
    if (c->kind == DOWNLOADS) {
        int count = receive(c->fd, false);
        datagrams += (uint64_t)count;
        for (int i = 0; i < count; i++)
            bytes += messages[i].msg_len;
        c->in_flight -= count < c->in_flight ? count : c->in_flight;
        download_more(c);
        return;
    }
    if (recv(c->fd, buffers[0], SIZE_MAX_, MSG_DONTWAIT) < 0)
        return;
    if (!c->answered) {
        c->answered = true;
        unanswered--;
    }
    if (c->kind == PINGS) {
        sample(c);
        round_trips++;
        ping(c);
    } else if (c->kind == DIALS) {
        sample(c);
        dials++;
        close(c->fd);
        client_open(c);
        ping(c);
    }
}

/* ---- the loop ---- */

static struct client *client_add(enum kind kind) {
    if (client_count == CLIENTS_MAX)
        fail("too many clients");
    struct client *c = &clients[client_count++];
    c->kind = kind;
    client_open(c);
    unanswered++;
    return c;
}

/* Nothing has come for a while: what was on its way is lost, and is sent again. */
static void start_again(void) {
    if (option.uploads) {
        lost += (uint64_t)on_the_way;
        on_the_way = 0;
        upload_more();
    }
    for (int i = 0; i < client_count; i++) {
        struct client *c = &clients[i];
        if (c->kind == DOWNLOADS) {
            lost += (uint64_t)c->in_flight;
            c->in_flight = 0;
            if (c->flow_size)
                download_more(c);
            else
                send(c->fd, &i, sizeof i, 0);
        } else if (c->kind == PINGS || c->kind == DIALS || (c->kind == IDLE && !c->answered)) {
            if (c->answered)
                lost++;
            ping(c);
        }
    }
}

static void turn(void) {
    struct epoll_event events[BATCH];
    int count = epoll_wait(epoll, events, BATCH, LOST_MS);
    if (count == 0)
        start_again();
    for (int i = 0; i < count; i++) {
        if (events[i].data.ptr)
            client_event(events[i].data.ptr);
        else
            backend_event();
    }
}

static void until(uint64_t end) {
    while (now() < end)
        turn();
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

/* Nanoseconds of CPU time of a process, from Documentation/scheduler/sched-stats.rst. */
static uint64_t process_ns(int pid) {
    char path[64];
    unsigned long long ns = 0;
    snprintf(path, sizeof path, "/proc/%d/schedstat", pid);
    FILE *file = fopen(path, "re");
    if (!file || fscanf(file, "%llu", &ns) != 1)
        fail(path);
    fclose(file);
    return ns;
}

static int parent_of(const char *pid) {
    char path[300];
    int parent = 0;
    snprintf(path, sizeof path, "/proc/%s/stat", pid);
    FILE *file = fopen(path, "re");
    if (!file)
        return 0;
    if (fscanf(file, "%*d (%*[^)]) %*c %d", &parent) != 1)
        parent = 0;
    fclose(file);
    return parent;
}

/* The same of a program that makes a process for each client. */
static uint64_t family_ns(int pid) {
    uint64_t ns = process_ns(pid);
    DIR *folder = opendir("/proc");
    if (!folder)
        fail("/proc");
    for (struct dirent *entry; (entry = readdir(folder));)
        if (parent_of(entry->d_name) == pid)
            ns += process_ns(atoi(entry->d_name));
    closedir(folder);
    return ns;
}

static struct mark mark_now(void) {
    struct mark m = {.wall = now(), .load = clock_ns(CLOCK_PROCESS_CPUTIME_ID), .idle = idle_ns(),
                     .round_trips = round_trips, .dials = dials, .datagrams = datagrams,
                     .bytes = bytes};
    for (int i = 0; i < option.clock_count; i++)
        m.proxy += clock_ns(option.clocks[i]);
    if (option.parent)
        m.proxy += family_ns(option.parent);
    return m;
}

static int by_value(const void *one, const void *other) {
    uint32_t a = *(const uint32_t *)one, b = *(const uint32_t *)other;
    return (a > b) - (a < b);
}

static double percentile(double share) {
    return latencies ? latency[(size_t)((double)(latencies - 1) * share)] / 1e3 : 0;
}

static void measure(void) {
    uint64_t patience = now() + 10000000000u;
    while (unanswered > 0 && now() < patience)
        turn();
    if (unanswered > 0) {
        fprintf(stderr, "datagrams: %d clients got no answer\n", unanswered);
        exit(1);
    }
    until(now() + (uint64_t)(option.warmup * 1e9));
    latencies = 0;
    lost = 0;
    struct mark begin = mark_now();
    until(begin.wall + (uint64_t)(option.seconds * 1e9));
    struct mark end = mark_now();
    qsort(latency, latencies, sizeof *latency, by_value);
    double all = (double)(end.wall - begin.wall) * (double)sysconf(_SC_NPROCESSORS_ONLN);
    printf("{\"wall\": %.9f, \"proxy_cpu\": %.9f, \"load_cpu\": %.9f, \"machine_cpu\": %.9f, "
           "\"round_trips\": %llu, \"dials\": %llu, \"datagrams\": %llu, \"bytes\": %llu, "
           "\"p50\": %.1f, \"p99\": %.1f, \"dial_failures\": %llu}\n",
           (double)(end.wall - begin.wall) / 1e9, (double)(end.proxy - begin.proxy) / 1e9,
           (double)(end.load - begin.load) / 1e9, (all - (double)(end.idle - begin.idle)) / 1e9,
           (unsigned long long)(end.round_trips - begin.round_trips),
           (unsigned long long)(end.dials - begin.dials),
           (unsigned long long)(end.datagrams - begin.datagrams),
           (unsigned long long)(end.bytes - begin.bytes), percentile(0.5), percentile(0.99),
           (unsigned long long)lost);
    fflush(stdout);
}

static void measure_idle(void) {
    int wanted, opened = 0;
    while (scanf("%d", &wanted) == 1) {
        while (opened < wanted) {
            for (int i = 0; i < OPENING && opened < wanted; i++, opened++)
                ping(client_add(IDLE));
            while (unanswered > 0)
                turn();
        }
        measure();
    }
}

/* ---- the command line ---- */

static void add_process(int pid) {
    if (option.clock_count == PIDS_MAX ||
        clock_getcpuclockid(pid, &option.clocks[option.clock_count++]) != 0)
        fail("pid");
}

static void argument_parse(const char *key, const char *value) {
    if (!strcmp(key, "backend")) option.backend = atoi(value);
    else if (!strcmp(key, "cpu")) option.cpu = atoi(value);
    else if (!strcmp(key, "pid")) add_process(atoi(value));
    else if (!strcmp(key, "parent")) option.parent = atoi(value);
    else if (!strcmp(key, "size")) option.size = (size_t)atoi(value);
    else if (!strcmp(key, "segments")) option.segments = atoi(value);
    else if (!strcmp(key, "window")) option.window = atoi(value);
    else if (!strcmp(key, "warmup")) option.warmup = atof(value);
    else if (!strcmp(key, "seconds")) option.seconds = atof(value);
    else if (!strcmp(key, "pings")) option.pings = atoi(value);
    else if (!strcmp(key, "uploads")) option.uploads = atoi(value);
    else if (!strcmp(key, "downloads")) option.downloads = atoi(value);
    else if (!strcmp(key, "dials")) option.dials = atoi(value);
    else if (!strcmp(key, "idle")) option.idle = atoi(value);
    else if (!strcmp(key, "light")) return; /* for load.c */
    else if (!strcmp(key, "connect")) {
        option.address.sin_family = AF_INET;
        option.address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        option.address.sin_port = htons((uint16_t)atoi(strrchr(value, ':') + 1));
    } else {
        fprintf(stderr, "datagrams: unknown key %s\n", key);
        exit(2);
    }
}

static void arguments_parse(char **arguments) {
    for (; *arguments; arguments++) {
        char *value = strchr(*arguments, '=');
        if (!value) {
            fprintf(stderr, "datagrams: %s has no value\n", *arguments);
            exit(2);
        }
        *value = 0;
        argument_parse(*arguments, value + 1);
    }
    if (option.size * (size_t)option.segments > 65000 || option.size < sizeof(int)) {
        fprintf(stderr, "datagrams: sizes out of range\n");
        exit(2);
    }
}

int main(int count, char **arguments) {
    (void)count;
    arguments_parse(arguments + 1);
    cpu_set_t cpus;
    CPU_ZERO(&cpus);
    if (option.cpu >= 0) {
        CPU_SET((size_t)option.cpu, &cpus);
        if (sched_setaffinity(0, sizeof cpus, &cpus) < 0)
            fail("sched_setaffinity");
    }
    clients = calloc(CLIENTS_MAX, sizeof *clients);
    latency = malloc(SAMPLES_MAX * sizeof *latency);
    epoll = epoll_create1(EPOLL_CLOEXEC);
    if (!clients || !latency || epoll < 0)
        fail("set-up");
    struct epoll_event event = {.events = EPOLLIN, .data.ptr = NULL};
    if (epoll_ctl(epoll, EPOLL_CTL_ADD, option.backend, &event) < 0)
        fail("epoll_ctl");
    for (int i = 0; i < option.pings; i++)
        ping(client_add(PINGS));
    for (int i = 0; i < option.dials; i++)
        ping(client_add(DIALS));
    for (int i = 0; i < option.uploads; i++)
        client_add(UPLOADS);
    for (int i = 0; i < option.downloads; i++)
        if (send(client_add(DOWNLOADS)->fd, &i, sizeof i, 0) < 0)
            fail("send");
    if (option.uploads)
        upload_more();
    if (option.idle)
        measure_idle();
    else
        measure();
    return 0;
}
