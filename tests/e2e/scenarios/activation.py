"""Other ways to hand the program its sockets than one socket unit that listens."""

from e2e.harness import scenario
from e2e.machine import Machine, check, same

HELLO = 'server { listen 127.0.0.1:8000; location / { return 200 "hello\\n"; } }'
CURL = "curl -sS --max-time 10 http://127.0.0.1:9000/"


def start_backend(m: Machine) -> None:
    m.nginx("backend", HELLO)
    m.start("backend.service")
    m.wait_for("nginx listens", lambda: m.listens(8000))


def serve_under_socket_activate(m: Machine, options: str) -> None:
    start_backend(m)
    m.unit(
        "proxy.service",
        f"[Service]\nExecStart=systemd-socket-activate {options} -l 127.0.0.1:9000 "
        f"{m.program} 127.0.0.1:8000\n",
    )
    m.start("proxy.service")
    m.wait_for("it listens", lambda: m.listens(9000))
    for _ in range(3):
        same("answer", m.sh(CURL), "hello\n")


@scenario()
def socket_activate(m: Machine) -> None:
    """Under systemd-socket-activate"""
    serve_under_socket_activate(m, "")


@scenario(original="does not take a connected socket")
def socket_activate_accept(m: Machine) -> None:
    """Under systemd-socket-activate --accept: one process per connection"""
    serve_under_socket_activate(m, "--accept")


@scenario(original="does not take a connected socket")
def accept_yes(m: Machine) -> None:
    """Accept=yes: an instance per connection, which ends with it"""
    start_backend(m)
    m.unit("proxy@.service", f"[Service]\nExecStart={m.program} 127.0.0.1:8000\n")
    m.unit("proxy.socket", "[Socket]\nListenStream=127.0.0.1:9000\nAccept=yes\n")
    m.start("proxy.socket")
    for _ in range(5):
        same("answer", m.sh(CURL), "hello\n")
    m.wait_for("all instances ended", lambda: instances(m) == "")
    failed = [line for line in m.journal().splitlines() if "Failed with result" in line]
    check(not failed, "an instance failed")


def instances(m: Machine) -> str:
    return m.sh("systemctl list-units --plain --no-legend 'proxy@*.service'")


@scenario(original="cannot listen by itself")
def without_service_manager(m: Machine) -> None:
    """--listen= in a service without a socket unit, on TCP and UNIX"""
    start_backend(m)
    m.unit(
        "proxy.service",
        f"[Service]\nType=notify\nExecStart={m.program} "
        f"--listen=127.0.0.1:9000 --listen={m.folder}/socket 127.0.0.1:8000\n",
    )
    m.start("proxy.service")
    same("by TCP", m.sh(CURL), "hello\n")
    same("by UNIX", m.sh(f"curl -sS --unix-socket {m.folder}/socket http://localhost/"), "hello\n")
    m.stop("proxy.service")
    same("result", m.show("proxy.service", "Result"), "success")
    same("socket file left", m.run(f"test -e {m.folder}/socket").returncode, 1)
