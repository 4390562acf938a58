/* Proof of the journal of CRASH.md: a relay of one direction that is killed at random instants, and one that is killed at
   EVERY instruction of its copy step (single-stepped), and resumed by another process from the slate alone. The stream
   must arrive whole and in order. gcc -O2 -Wall -Wextra -o crash-kill crash-kill.c; ./crash-kill tcp|unix tcp|unix KILLS
   ./crash-kill … steps: single-steps.

   The sockets are kept by the parent, as a page would. Not the program's code: the same order of steps. */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/sockios.h>
#include <linux/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#define UNIT 65536
#define barrier() __asm__ volatile("" ::: "memory")
enum { NONE, COPY, FLUSH };
struct slate {
	/* journal */
	volatile uint32_t slot, what;
	volatile uint64_t position;
	struct mmsghdr in, out;
	struct iovec in_v, out_v;
	/* slot */
	uint64_t moved;                 /* UNIX: T */
	volatile uint64_t spill_end;    /* position behind the spill */
	volatile uint32_t spill_size;   /* UNIX: what is left of it; TCP: what it was at first; 0: none */
	int64_t t0, g0;
	char buffer[UNIT], spill[UNIT];
};
static struct slate *S;
static int src, dst, src_tcp, dst_tcp;
static uint64_t windows[3], spills;

static int64_t counter(int fd, int taken) {
	struct tcp_info i; socklen_t n; int q, before = -1; int64_t v, w = -1;
	(void)before;
	do {
		v = w; n = sizeof i; memset(&i, 0, sizeof i);
		if (!taken) ioctl(fd, SIOCOUTQ, &q);
		getsockopt(fd, IPPROTO_TCP, TCP_INFO, &i, &n);
		if (taken) ioctl(fd, SIOCINQ, &q);
		w = taken ? (int64_t)i.tcpi_bytes_received - q : (int64_t)i.tcpi_bytes_acked + q;
	} while (v != w);
	return w;
}
static uint64_t T(void) { return src_tcp ? (uint64_t)(counter(src, 1) + S->t0) : S->moved; }
static uint64_t G(void) { return (uint64_t)(counter(dst, 0) + S->g0); }

/* One step of the relay; 0: nothing to do. This is what is single-stepped. */
static int wait_for(int fd, short what) { struct pollfd p = {fd, what, 0}; return poll(&p, 1, -1); }
static uint64_t moved;                  /* Half.moved, in memory */
__attribute__((noinline)) static int copy_step(void) {
	ssize_t got, sent = 0;
	if (S->spill_size) {            /* flush */
		uint64_t given = dst_tcp ? G() : S->spill_end - S->spill_size;
		size_t left = (size_t)(S->spill_end - given);
		if (left == 0) { S->spill_size = 0; return 1; }
		char *from = S->spill + (dst_tcp ? S->spill_size - left : UNIT - left);
		S->position = given; S->out.msg_len = 0; S->what = FLUSH; barrier(); S->slot = 1; barrier();
		if (dst_tcp) sent = send(dst, from, left, MSG_DONTWAIT | MSG_NOSIGNAL);
		else {
			S->out_v = (struct iovec){from, left};
			sent = sendmmsg(dst, &S->out, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
			if (sent == 1) sent = S->out.msg_len;
			if (sent > 0) { barrier(); S->spill_size -= (uint32_t)sent; }
		}
		barrier(); S->slot = 0; barrier();
		if (sent < 0) return -2;
		return 1;
	}
	S->position = moved; S->in.msg_len = S->out.msg_len = 0; S->what = COPY; barrier(); S->slot = 1; barrier();
	if (src_tcp) got = recv(src, S->buffer, UNIT, MSG_DONTWAIT);
	else {
		S->in_v = (struct iovec){S->buffer, UNIT};
		got = recvmmsg(src, &S->in, 1, MSG_DONTWAIT, NULL);
		if (got == 1) got = S->in.msg_len;
	}
	if (got <= 0) { int e = got < 0; barrier(); S->slot = 0; return e ? -1 : 0; }
	moved += (uint64_t)got;
	if (dst_tcp) sent = send(dst, S->buffer, (size_t)got, MSG_DONTWAIT | MSG_NOSIGNAL);
	else {
		S->out_v = (struct iovec){S->buffer, (size_t)got};
		sent = sendmmsg(dst, &S->out, 1, MSG_DONTWAIT | MSG_NOSIGNAL);
		if (sent == 1) sent = S->out.msg_len;
	}
	if (sent < 0) sent = 0;
	if (sent < got) {               /* at the end of the region for UNIX, so that what is left needs no start */
		size_t left = (size_t)(got - sent);
		memcpy(dst_tcp ? S->spill : S->spill + UNIT - left, S->buffer + sent, left);
		S->spill_end = moved; barrier(); S->spill_size = (uint32_t)left; barrier();
	}
	S->moved = moved; barrier();
	S->slot = 0; barrier();
	return 1;
}
/* What the next process does first. May be killed as well: idempotent. */
static void recover(void) {
	if (S->slot) {
		uint64_t t, g;
		windows[S->what]++;
		if (S->what == COPY) {
			t = src_tcp ? T() : S->position + S->in.msg_len;
			g = dst_tcp ? G() : S->position + S->out.msg_len;
			size_t left = (size_t)(t - g);
			if (g < S->position || t - S->position > UNIT || g > t) { fprintf(stderr, "impossible: position %lu t %lu g %lu\n", S->position, t, g); _exit(3); }
			if (left) {
				memcpy(dst_tcp ? S->spill : S->spill + UNIT - left, S->buffer + (g - S->position), left);
				S->spill_end = t;
			}
			barrier(); S->spill_size = (uint32_t)left;
			S->moved = t;
		} else if (!dst_tcp) {
			S->spill_size = (uint32_t)(S->spill_end - (S->position + S->out.msg_len));
		}
		barrier(); S->slot = 0; barrier();
	}
	if (S->spill_size) spills++;
	moved = T();
}
static void relay(void) {
	for (;;) switch (copy_step()) {
		case 0: shutdown(dst, SHUT_WR); _exit(0);
		case -1: if (errno != EAGAIN && errno != EINTR) _exit(4); wait_for(src, POLLIN); break;
		case -2: if (errno != EAGAIN && errno != EINTR) _exit(5); wait_for(dst, POLLOUT); break;
	}
}
static void pair(int tcp, int *a, int *b) {
	if (!tcp) { int p[2]; socketpair(AF_UNIX, SOCK_STREAM, 0, p); *a = p[0]; *b = p[1]; return; }
	struct sockaddr_in in = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)}; socklen_t n = sizeof in;
	int l = socket(AF_INET, SOCK_STREAM, 0), small = 16384;
	bind(l, (void *)&in, n); setsockopt(l, SOL_SOCKET, SO_RCVBUF, &small, 4); listen(l, 1); getsockname(l, (void *)&in, &n);
	*a = socket(AF_INET, SOCK_STREAM, 0); setsockopt(*a, SOL_SOCKET, SO_SNDBUF, &small, 4); connect(*a, (void *)&in, n);
	*b = accept(l, 0, 0); close(l);
}
static uint32_t noise(uint64_t i) { i *= 0x9E3779B97F4A7C15ull; return (uint32_t)(i >> 40); }
int main(int argc, char **argv) {
	if (argc < 4) return 2;
	src_tcp = !strcmp(argv[1], "tcp"); dst_tcp = !strcmp(argv[2], "tcp");
	int steps = !strcmp(argv[3], "steps"); long kills = steps ? 1 << 30 : atol(argv[3]), killed = 0;
	int fd = memfd_create("slate", MFD_CLOEXEC), client, server, status;
	if (ftruncate(fd, sizeof *S)) return 2;
	S = mmap(NULL, sizeof *S, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0); mlock(S, sizeof *S); memset(S, 0, sizeof *S);
	S->in.msg_hdr.msg_iov = &S->in_v; S->out.msg_hdr.msg_iov = &S->out_v;
	S->in.msg_hdr.msg_iovlen = S->out.msg_hdr.msg_iovlen = 1;
	pair(src_tcp, &client, &src); pair(dst_tcp, &dst, &server);
	if (src_tcp) S->t0 = -counter(src, 1);
	if (dst_tcp) S->g0 = -counter(dst, 0);
	uint64_t total = steps ? 40000000 : (uint64_t)kills * 30000, stop = 0;
	uint64_t *shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	pid_t feeder = fork();
	if (!feeder) {
		char b[20000]; srand(1);
		for (uint64_t at = 0; at < total;) {
			size_t n = (size_t)rand() % sizeof b + 1; if (n > total - at) n = (size_t)(total - at);
			for (size_t i = 0; i < n; i++) b[i] = (char)noise(at + i);
			for (size_t o = 0; o < n;) { ssize_t k = send(client, b + o, n - o, 0); if (k < 0) _exit(1); o += (size_t)k; }
			at += n; if (shared[1]) break; 
		}
		shared[0] = 1; _exit(0);
	}
	pid_t reader = fork();
	if (!reader) {
		char b[9000]; uint64_t at = 0; ssize_t n; close(dst); close(client);
		while ((n = recv(server, b, sizeof b, 0)) > 0) {
			for (ssize_t i = 0; i < n; i++, at++) if (b[i] != (char)noise(at)) { fprintf(stderr, "WRONG BYTE at %lu\n", at); shared[1] = 2; _exit(1); }
			if (at % 7 == 0) usleep(300);
		}
		shared[2] = at; _exit(0);
	}
	close(client); close(server); srand((unsigned)getpid());
	struct timespec from; clock_gettime(CLOCK_MONOTONIC, &from);
	uint64_t *stats = shared + 8; long step_at = 0;
	for (;;) {
		pid_t child = fork();
		if (!child) {
			if (steps) { ptrace(PTRACE_TRACEME, 0, 0, 0); raise(SIGSTOP); }
			memset(windows, 0, sizeof windows); spills = 0; recover();
			for (int i = 0; i < 3; i++) stats[i] += windows[i];
			stats[3] += spills;
			relay();
		}
		if (steps) {            /* run `step_at` instructions, then kill */
			waitpid(child, &status, 0); int ended = 0;
			for (long i = 0; i < step_at && !ended; i++) { ptrace(PTRACE_SINGLESTEP, child, 0, 0); waitpid(child, &status, 0); ended = WIFEXITED(status) || WIFSIGNALED(status); }
			if (ended) break;
			step_at = (step_at + 1) % 1500; killed++;
			struct timespec now; clock_gettime(CLOCK_MONOTONIC, &now);
			if (now.tv_sec - from.tv_sec > 20 && !stop) { shared[1] = 1; stop = 1; }
			if (stop && shared[0]) { kill(child, SIGKILL); waitpid(child, &status, 0); steps = 0; kills = 0; continue; }
			kill(child, SIGKILL); waitpid(child, &status, 0); continue;
		}
		if (killed < kills) {
			for (volatile int i = rand() % 60000; i > 0; i--) ;
			if (rand() % 4 == 0) usleep((useconds_t)(rand() % 300));
			kill(child, SIGKILL); killed++;
		}
		waitpid(child, &status, 0);
		if (WIFEXITED(status) && WEXITSTATUS(status) == 0) break;
		if (WIFEXITED(status)) { fprintf(stderr, "child %d\n", WEXITSTATUS(status)); return 1; }
	}
	close(dst); close(src); waitpid(reader, &status, 0); kill(feeder, SIGKILL);
	printf("%s>%s: %ld kills; journal open: copy %lu, flush %lu; resumed with a spill: %lu; %lu bytes, reader %d\n", argv[1], argv[2], killed, stats[1], stats[2], stats[3], shared[2], status);
	return status != 0;
}
