"""The ways through the program, each driven once: what a filter or a trace of it has to cover.

A path is given a Proxy, which says how the program is run (hardened, traced), and fails with
Failure if the program does not do its work.
"""

import json
import select
import subprocess
from collections.abc import Callable

from e2e.machine import TOOLS, Failure, Machine, check, same
from e2e.streams import AGAIN, Streams, kill, reload, restart, wait_until_kept

CURL = "curl -sS --max-time 10"

PATHS: dict[str, Callable[["Proxy"], None]] = {}

SERVERS = """
server {{ listen unix:{folder}/target; location / {{ return 200 "unix\\n"; }} }}
server {{
    listen 127.0.0.1:8001 proxy_protocol;
    location / {{ return 200 "$proxy_protocol_addr\\n"; }}
}}
server {{ listen 127.0.0.1:8002; location = /big {{ alias /srv/e2e-big; limit_rate 1m; }} }}
"""


class Proxy:
    """proxy.service, started by proxy.socket, with `service` lines of the caller's in all paths."""

    def __init__(self, machine: Machine, service: str = "", program: str = ""):
        self.machine = machine
        self.service = service
        self.program = program or machine.program

    def start(
        self, listen: str, target: str, options: str = "", service: str = "", socket: str = ""
    ) -> Machine:
        lines = f"Type=notify\nTimeoutStartSec=20\n{self.service}\n{service}"
        m = self.machine
        m.proxy(
            "proxy",
            listen,
            target,
            options=options,
            service=lines,
            socket=socket,
            program=self.program,
        )
        return m

    def end(self, result: str = "success") -> None:
        m = self.machine
        m.stop("proxy.socket", "proxy.service")
        same("result", m.show("proxy.service", "Result"), result)


def path(body: Callable[[Proxy], None]) -> Callable[[Proxy], None]:
    PATHS[body.__name__.replace("_", " ")] = body
    return body


def set_up(m: Machine) -> None:
    """The servers that the paths lead to."""
    m.nginx_for_load(8000)
    m.nginx("others", SERVERS.format(folder=m.folder))
    m.start("others.service")
    m.wait_for("they listen", lambda: m.listens(8001))


def drive(proxy: Proxy, after: Callable[[], None]) -> None:
    """Drive all paths, and call `after` when one has ended; what it raises goes first."""
    for name, body in PATHS.items():
        try:
            body(proxy)
        except Failure as error:
            raise Failure(f"path '{name}': {error}") from error
        finally:
            proxy.machine.run("systemctl stop proxy.socket proxy.service; systemctl reset-failed")
            after()


def load(m: Machine, *numbers: int) -> None:
    """Short, bulk and abusive connections to port 9000, as many as `numbers` say: all served."""
    counts = m.load_result(m.start_load("mix", 9000, *numbers))
    same("load", {how for one in counts.values() for how in one}, {"ok"})


@path
def forward_tcp(proxy: Proxy) -> None:
    m = proxy.start("127.0.0.1:9000 [::1]:9000", "127.0.0.1:8000")
    load(m, 100, 5, 5)
    same("by IPv6", m.sh(f"{CURL} http://[::1]:9000/small"), "small\n")
    proxy.end()


@path
def forward_unix(proxy: Proxy) -> None:
    m = proxy.start(
        f"127.0.0.1:9000 {proxy.machine.folder}/listener", f"{proxy.machine.folder}/target"
    )
    by_unix = f"{CURL} --unix-socket {m.folder}/listener http://localhost/"
    same("answers", m.sh(f"{CURL} http://127.0.0.1:9000/; {by_unix}"), "unix\n" * 2)
    proxy.end()


@path
def hold(proxy: Proxy) -> None:
    """A client that comes before its target, and an outage in the middle."""
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8000")
    for _ in range(2):
        m.stop("backend.service")
        client = m.client(f"exec {CURL} http://127.0.0.1:9000/small")
        m.wait_for("it is held", lambda: "1 waiting" in m.show("proxy.service", "StatusText"))
        m.start("backend.service")
        same("answer", client.communicate(timeout=20)[0], "small\n")
    proxy.end()


@path
def datagrams(proxy: Proxy) -> None:
    """UDP, and UNIX datagrams, that come before their target."""
    m = proxy.machine
    m.unit("echo.service", f"[Service]\nExecStart=python3 {TOOLS}/datagram_backend.py 9001\n")
    listeners = "ListenDatagram=9000\nListenDatagram=/run/e2e-datagrams"
    proxy.start("127.0.0.1:9000", "127.0.0.1:9001", socket=listeners)
    client = m.client(f"exec python3 {TOOLS}/datagram_client.py 9000 20")
    m.wait_for(
        "they are held", lambda: "datagrams waiting" in m.show("proxy.service", "StatusText")
    )
    m.start("echo.service")
    same("answers", client.communicate(timeout=20)[0].count("echo "), 20)
    m.sh("logger --socket /run/e2e-datagrams line")
    m.stop("echo.service")
    proxy.end()


@path
def give_up(proxy: Proxy) -> None:
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:1", "--connect-timeout=300ms")
    check(m.run(f"{CURL} http://127.0.0.1:9000/").returncode, "an answer from nobody")
    check("Failed to connect" in m.journal("proxy.service"), "no message")
    proxy.end()


@path
def names(proxy: Proxy) -> None:
    """From DNS with several addresses, with so many that DNS needs TCP; from /etc/hosts; none."""
    m = proxy.machine
    m.write("/etc/resolv.conf", "nameserver 127.0.0.1\n")
    m.unit(
        "dns.service",
        "[Service]\nExecStart=/usr/sbin/dnsmasq --keep-in-foreground --user=root --no-resolv "
        "--no-hosts --listen-address=127.0.0.1 --bind-interfaces "
        "--address=/backend.test/127.0.0.1 --address=/backend.test/::1 "
        f"--addn-hosts={m.folder}/hosts\n",
    )
    m.sh(f"for i in $(seq 0 60); do echo 127.0.0.$((i + 1)) many.test; done >{m.folder}/hosts")
    m.start("dns.service")
    m.wait_for("dnsmasq answers", lambda: m.sh("ss -Hlun sport = 53"))
    for target in ("backend.test:8000", "many.test:8000", "localhost:8000"):
        proxy.start("127.0.0.1:9000", target)
        load(m, 20, 1, 1)
        proxy.end()
    proxy.start("127.0.0.1:9000", "nowhere.test:http", "--connect-timeout=500ms")
    check(m.run(f"{CURL} http://127.0.0.1:9000/").returncode, "an answer from nowhere")
    proxy.end()
    m.stop("dns.service")


@path
def limit(proxy: Proxy) -> None:
    """Past --connections-max=, and past the fds that there may be."""
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8000", "-c 2")
    m.load_result(m.start_load("mix", 9000, 0, 12, 0))
    check("Hit connection limit" in m.journal("proxy.service"), "no client was refused")
    proxy.end()
    proxy.start("127.0.0.1:9000", "127.0.0.1:8000", service="LimitNOFILE=24")
    m.load_result(m.start_load("mix", 9000, 0, 30, 0))
    same("then", m.sh(f"{CURL} http://127.0.0.1:9000/small"), "small\n")
    proxy.end()


@path
def drain(proxy: Proxy) -> None:
    """Stopped with a connection open, which may finish."""
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8002", "--drain-timeout=30s")
    client = slow_download(m)
    m.stop("proxy.socket", "proxy.service")
    same("the download", (client.communicate(timeout=30)[0], client.returncode), ("", 0))
    proxy.end()


@path
def cut(proxy: Proxy) -> None:
    """Stopped with a connection open, which may not."""
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8002")
    client = slow_download(m)
    proxy.end()
    check("curl: (" in client.communicate(timeout=20)[0], "the download was not cut")


@path
def go_on(proxy: Proxy) -> None:
    """Restarted, and reloaded, with connections open; sockets of its own go along."""
    m = proxy.start(
        "127.0.0.1:9000",
        "127.0.0.1:8010",
        "--listen=127.0.0.1:9001",
        "FileDescriptorStoreMax=1\nExecReload=kill -HUP $MAINPID\n",
    )
    m.start("proxy.service")
    open_ones = Streams(m, {"talk": 2, "stalled": 2}, "9000,9001", 8010)
    restart(m)
    reload(m)
    open_ones.end_well()
    proxy.end()


@path
def survive(proxy: Proxy) -> None:
    """Killed, with connections open whose bytes are copied and spliced, and with all kinds of ends.

    They are over before the stop.
    """
    m = proxy.start(
        "127.0.0.1:9000",
        "127.0.0.1:8010",
        "--listen=127.0.0.1:9001",
        "FileDescriptorStoreMax=1\nRestart=on-failure\nRuntimeDirectory=proxy\n" + AGAIN,
    )
    m.start("proxy.service")
    counts = {"talk": 2, "bulk": 2, "stalled": 2, "half": 1, "answer": 1}
    open_ones = Streams(m, counts, "9000,9001", 8010)
    wait_until_kept(m, sum(counts.values()))
    kill(m)
    kill(m)
    open_ones.end_well()
    proxy.end()


def slow_download(m: Machine) -> subprocess.Popen:
    """A client in the middle of two seconds' worth of bytes."""
    client = m.client("exec curl -sS http://127.0.0.1:9000/big | cmp - /srv/e2e-big")
    m.wait_for("it is served", lambda: m.sh("ss -Htn state established dport = 8002"))
    return client


@path
def exit_when_idle(proxy: Proxy) -> None:
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8000", "--exit-idle-time=300ms")
    for _ in range(2):
        same("answer", m.sh(f"{CURL} http://127.0.0.1:9000/small"), "small\n")
        m.wait_for("it ends", lambda: not m.is_active("proxy.service"))
        same("result", m.show("proxy.service", "Result"), "success")
    proxy.end()


@path
def idle_connection(proxy: Proxy) -> None:
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8000", "--idle-timeout=300ms")
    m.sh("timeout 10 bash -c 'exec 3<>/dev/tcp/127.0.0.1/9000; cat <&3'")
    proxy.end()


@path
def proxy_protocol(proxy: Proxy) -> None:
    for version in ("v1", "v2"):
        m = proxy.start("127.0.0.1:9000", "127.0.0.1:8001", f"--proxy-protocol={version}")
        same(version, m.sh(f"{CURL} http://127.0.0.1:9000/"), "127.0.0.1\n")
        proxy.end()


@path
def counters(proxy: Proxy) -> None:
    """SIGUSR1, the log at debug level, and the watchdog."""
    m = proxy.start(
        "127.0.0.1:9000",
        "127.0.0.1:8000",
        service="Environment=SYSTEMD_LOG_LEVEL=debug\nWatchdogSec=2s\n",
    )
    same("answer", m.sh(f"{CURL} http://127.0.0.1:9000/small"), "small\n")
    before = m.journal("proxy.service").count("\n")
    m.sh("systemctl kill --kill-whom=main --signal=USR1 proxy.service")
    m.wait_for("counters", lambda: m.journal("proxy.service").count("\n") > before)
    told = m.show("proxy.service", "WatchdogTimestampMonotonic")
    m.wait_for(
        "the watchdog is told",
        lambda: m.show("proxy.service", "WatchdogTimestampMonotonic") != told,
    )
    proxy.end()


@path
def listen(proxy: Proxy) -> None:
    """Sockets of its own, a stale socket file among them."""
    service = "RuntimeDirectory=proxy\nRuntimeDirectoryPreserve=yes\n"
    m = proxy.start(
        "127.0.0.1:9001",
        "127.0.0.1:8000",
        "--listen=127.0.0.1:9000 --listen=[::1]:9000 --listen=@e2e --listen=/run/proxy/socket",
        service,
    )
    for _ in range(2):
        m.start("proxy.service")
        by_unix = f"{CURL} --unix-socket /run/proxy/socket http://localhost/small"
        by_name = f"{CURL} --abstract-unix-socket e2e http://localhost/small"
        answers = m.sh(f"{CURL} http://127.0.0.1:9000/small; {by_unix}; {by_name}")
        same("answers", answers, "small\n" * 3)
        m.run("systemctl kill --signal=KILL proxy.service")
        m.wait_for("it ends", lambda: not m.is_active("proxy.service"))
    m.start("proxy.service")
    proxy.end()
    m.sh("rm -r /run/proxy /run/private/proxy || true")


@path
def several_targets(proxy: Proxy) -> None:
    """NAME=TARGET, and the port that the client connected to."""
    m = proxy.start("127.0.0.1:9000", "web=127.0.0.1:8000", socket="FileDescriptorName=web")
    same("by name", m.sh(f"{CURL} http://127.0.0.1:9000/small"), "small\n")
    proxy.end()
    proxy.start("127.0.0.2:8000", "127.0.0.1:*")
    same("by port", m.sh(f"{CURL} http://127.0.0.2:8000/small"), "small\n")
    proxy.end()


@path
def threads(proxy: Proxy) -> None:
    m = proxy.start(
        "127.0.0.1:9000", "127.0.0.1:8000", "--threads=3 --hand-over=always --buffer-size=64K"
    )
    load(m, 100, 5, 5)
    tasks = m.sh(f"ls /proc/{m.main_pid('proxy.service')}/task").split()
    check(len(tasks) >= 3, f"{len(tasks)} threads")
    proxy.end()


@path
def connected_socket(proxy: Proxy) -> None:
    m = proxy.machine
    m.unit(
        "proxy@.service", f"[Service]\n{proxy.service}\nExecStart={proxy.program} 127.0.0.1:8000\n"
    )
    m.unit("proxy.socket", "[Socket]\nListenStream=127.0.0.1:9000\nAccept=yes\n")
    m.start("proxy.socket")
    same("answer", m.sh(f"{CURL} http://127.0.0.1:9000/small"), "small\n")
    units = "systemctl list-units --plain --no-legend 'proxy@*.service'"
    m.wait_for("the instance ends", lambda: m.sh(units) == "")
    m.stop("proxy.socket")


@path
def inspection(proxy: Proxy) -> None:
    """Every method on the inspection socket, a watcher that leaves, and callers of another user."""
    m = proxy.start("127.0.0.1:9000", "127.0.0.1:8000", service="RuntimeDirectory=proxy\n")
    client = m.client("exec socat -u TCP:127.0.0.1:9000 -")
    listed = f"{m.ctl} list --json=short"  # fails until the client has started the proxy
    m.wait_for("it is listed", lambda: m.run(listed).stdout not in ("", "[]\n"))
    (row,) = json.loads(m.sh(listed))
    watch = m.client(f"exec {m.ctl} watch --json=short")
    m.wait_for("it watches", lambda: m.sh(f"{CURL} http://127.0.0.1:9000/small") and ended(watch))
    check("accepted_total" in m.sh(f"{m.ctl} metrics"), "no metrics")
    m.sh(f"setpriv --reuid=65534 --clear-groups {m.ctl} status --socket=/run/proxy/inspect")
    m.sh(f"{m.ctl} terminate {row['id']}")
    m.wait_for("the client is cut", lambda: client.poll() is not None)
    watch.kill()
    proxy.end()


def ended(watch: subprocess.Popen) -> bool:
    """Whether a watcher has something to read."""
    return bool(select.select([watch.stdout], [], [], 0)[0])


@path
def misuse(proxy: Proxy) -> None:
    """An error at start is a line and status 1."""
    m = proxy.start("127.0.0.1:9000", "")
    m.run("systemctl start proxy.service")
    same("status", m.show("proxy.service", "ExecMainStatus"), "1")
    check("Not enough parameters." in m.journal("proxy.service"), "no message")
    proxy.end("exit-code")
