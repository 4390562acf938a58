"""The two examples of the original's man page, with the distro's nginx.service."""

from e2e.harness import scenario
from e2e.machine import Machine, check, same

NGINX_CONF = """
user www-data;
pid /run/nginx.pid;
events {}
http { server { %s; location / { return 200 "from nginx\\n"; } } }
"""

# [Install] is left out: the scenarios start the socket by hand, enabling it is systemd's business.
PROXY_SOCKET = """
[Socket]
ListenStream=80
"""

PROXY_SERVICE = """
[Unit]
Requires=nginx.service
After=nginx.service
Requires=proxy-to-nginx.socket
After=proxy-to-nginx.socket
%s

[Service]
ExecStart=%s
PrivateTmp=yes
PrivateNetwork=yes
"""


def set_up(m: Machine, nginx_listen: str, nginx_service: str, target: str, unit: str) -> None:
    m.write("/etc/nginx/nginx.conf", NGINX_CONF % nginx_listen)
    m.unit("nginx.service.d/e2e.conf", f"[Service]\n{nginx_service}\n")
    m.unit("proxy-to-nginx.socket", PROXY_SOCKET)
    m.unit("proxy-to-nginx.service", PROXY_SERVICE % (unit, f"{m.program} {target}"))
    m.start("proxy-to-nginx.socket")


def fetch_thrice(m: Machine) -> None:
    """The first request starts both services; IPv6 is the listener's other half."""
    for host in ("localhost", "127.0.0.1", "[::1]"):
        same(host, m.sh(f"curl -sS --max-time 10 http://{host}:80/"), "from nginx\n")
    check(m.is_active("nginx.service"), "nginx was not started")


@scenario()
def man_page_unix(m: Machine) -> None:
    """Man page example 1: nginx behind a UNIX socket"""
    set_up(m, "listen unix:/run/nginx/socket", "RuntimeDirectory=nginx", "/run/nginx/socket", "")
    check(not m.is_active("nginx.service"), "nginx is active before the first request")
    fetch_thrice(m)


@scenario()
def man_page_namespace(m: Machine) -> None:
    """Man page example 2: proxy and nginx in one private network namespace"""
    set_up(
        m,
        "listen 8080",
        "PrivateTmp=yes\nPrivateNetwork=yes",
        "127.0.0.1:8080",
        "JoinsNamespaceOf=nginx.service",
    )
    fetch_thrice(m)
    direct = m.run("curl -sS --max-time 3 http://127.0.0.1:8080/")
    same("curl's status without the proxy", direct.returncode, 7)
