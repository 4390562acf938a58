"""The PROXY protocol, read by real servers."""

from e2e.harness import scenario
from e2e.machine import Machine, same

# Each server answers with the client's address and port as the PROXY header gives them, and each
# has what it takes for the client when the header names none (UNKNOWN, LOCAL).
NGINX = """server {{
    listen 127.0.0.1:8001 proxy_protocol;
    location / {{ return 200 "$proxy_protocol_addr $proxy_protocol_port\\n"; }}
}}"""

HAPROXY = """
defaults
    mode http
    timeout client 10s
    timeout connect 10s
    timeout server 10s
frontend caller
    bind 127.0.0.1:8002 accept-proxy
    http-request return status 200 content-type text/plain lf-string "%[src] %[src_port]\\n"
"""


def start_receivers(m: Machine) -> None:
    m.nginx("nginx1", NGINX.format())
    conf = m.write(f"{m.folder}/haproxy.cfg", HAPROXY)
    m.unit("haproxy1.service", f"[Service]\nExecStart=/usr/sbin/haproxy -db -f {conf}\n")
    m.start("nginx1.service", "haproxy1.service")
    for port in (8001, 8002):
        m.wait_for(f"port {port} listens", lambda port=port: m.listens(port))


def ask(m: Machine, where: str) -> list[str]:
    """[address, port] as the server sees the client, then those that the client has itself."""
    own = "-w '%{local_ip} %{local_port}'"
    return m.sh(f"curl -sS --max-time 10 {own} {where}").split()


def check_receiver(m: Machine, version: str, receiver: str, port: int) -> None:
    """IPv4, IPv6, IPv4 by a dual-stack listener, and UNIX clients of one receiver."""
    m.proxy(
        "proxy",
        f"127.0.0.1:9000 [::1]:9000 9001 {m.folder}/socket",
        f"127.0.0.1:{port}",
        options=f"--proxy-protocol={version}",
    )
    for where in ("127.0.0.1:9000", "[::1]:9000", "127.0.0.1:9001", "[::1]:9001"):
        address, number, own_address, own_number = ask(m, f"http://{where}/")
        same(f"{receiver} by {version} of {where}", (address, number), (own_address, own_number))
    unix = m.sh(
        f"curl -sS -w '%{{http_code}}' -o /dev/null --unix-socket {m.folder}/socket "
        "http://localhost/"
    )
    same(f"{receiver} by {version}, status for a UNIX client", unix, "200")
    m.stop("proxy.socket", "proxy.service")


def check_both_receivers(m: Machine, version: str) -> None:
    start_receivers(m)
    check_receiver(m, version, "nginx", 8001)
    check_receiver(m, version, "HAProxy", 8002)


@scenario(needs="--proxy-protocol", original="sends IPv4-mapped addresses as IPv6")
def proxy_protocol_v1(m: Machine) -> None:
    """nginx and HAProxy see the client's address by PROXY v1"""
    check_both_receivers(m, "v1")


@scenario(needs="--proxy-protocol", original="knows v1 only")
def proxy_protocol_v2(m: Machine) -> None:
    """nginx and HAProxy see the client's address by PROXY v2"""
    check_both_receivers(m, "v2")
