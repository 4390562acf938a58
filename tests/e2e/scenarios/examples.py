"""The units in examples/, as they are but for the program's path."""

from pathlib import Path

from e2e.harness import scenario
from e2e.machine import Machine, check, same

EXAMPLES = Path(__file__).parents[3] / "examples"
CURL = "curl -sS --max-time 20"

NGINX = "user www-data;\npid /run/nginx.pid;\nevents {{}}\nhttp {{\n{server}\n}}\n"


def install(m: Machine, folder: str) -> None:
    """Copy the units and drop-ins of an example; enabling them is systemd's business."""
    for path in sorted((EXAMPLES / folder).rglob("*")):
        if path.suffix in (".service", ".socket", ".timer") or path.parent.suffix == ".d":
            name = str(path.relative_to(EXAMPLES / folder))
            m.unit(name, path.read_text().replace("/usr/bin/systemd-socket-proxyd", m.program))


def install_nginx(m: Machine, folder: str, service: str) -> None:
    """The example's part of nginx.conf in the distribution's nginx.service, and a page."""
    server = (EXAMPLES / folder / "nginx.conf").read_text()
    m.write("/etc/nginx/nginx.conf", NGINX.format(server=server))
    m.unit("nginx.service.d/e2e.conf", f"[Service]\n{service}\n")
    m.write("/var/www/html/page", "the page\n")


def wait_until_ready(m: Machine, unit: str) -> None:
    """The examples are Type=notify: they serve earlier, but are not active before READY=1."""
    m.wait_for(f"{unit} is active", lambda: m.is_active(unit), 5)
    m.sh(f"{m.ctl} status --unit={unit}")


def serve_page(m: Machine, example: str, service: str) -> None:
    """Install an example with nginx behind it, and get a page through it."""
    install_nginx(m, example, service)
    install(m, example)
    m.start("proxy-to-nginx.socket")
    same("page", m.sh(f"{CURL} http://localhost/page"), "the page\n")
    wait_until_ready(m, "proxy-to-nginx.service")


@scenario(original="252 never says that it is ready", until=252)
def example_nginx(m: Machine) -> None:
    """examples/nginx"""
    serve_page(m, "nginx", "RuntimeDirectory=nginx")


@scenario(original="252 never says that it is ready", until=252)
def example_nginx_namespace(m: Machine) -> None:
    """examples/nginx-namespace: nobody but the proxy reaches nginx"""
    serve_page(m, "nginx-namespace", "PrivateTmp=yes\nPrivateNetwork=yes")
    same("curl's status", m.run(f"{CURL} http://127.0.0.1:8080/page").returncode, 7)


@scenario(needs="--proxy-protocol", original="knows no v2")
def example_proxy_protocol(m: Machine) -> None:
    """examples/proxy-protocol: nginx logs the client's own address"""
    install_nginx(m, "proxy-protocol", "RuntimeDirectory=nginx")
    install(m, "proxy-protocol")
    m.start("web-proxy.socket")
    m.sh("rm -f /var/log/nginx/access.log")
    same("page", m.sh(f"{CURL} http://127.0.0.1/page"), "the page\n")
    m.wait_for("a line in the log", lambda: m.run("cat /var/log/nginx/access.log").stdout)
    same("client", m.sh("cut -d' ' -f1 /var/log/nginx/access.log"), "127.0.0.1\n")


@scenario(needs="--connect-timeout", original="has no --connect-timeout=")
def example_on_demand(m: Machine) -> None:
    """examples/on-demand: the first client starts the application, and it ends with the proxy"""
    install(m, "on-demand")
    m.start("app-proxy.socket")
    check(not m.is_active("app.service"), "the application runs before it has a client")
    check("Directory listing" in m.sh(f"{CURL} http://127.0.0.1:8000/"), "no answer")
    check(m.is_active("app.service"), "app.service was not started")
    # The proxy ends by itself after a quarter of an hour: here it is told to.
    m.stop("app-proxy.service")
    m.wait_for("the application ends", lambda: not m.is_active("app.service"))
    check("Directory listing" in m.sh(f"{CURL} http://127.0.0.1:8000/"), "no second answer")


@scenario(original="252 never says that it is ready", until=252)
def example_network_namespace(m: Machine) -> None:
    """examples/network-namespace: a port of the host that leads into a named namespace"""
    m.sh("ip netns add blue && ip -n blue link set lo up")
    try:
        m.nginx(
            "inner",
            'server { listen 127.0.0.1:8080; location / { return 200 "inner\\n"; } }',
            "NetworkNamespacePath=/run/netns/blue",
        )
        install(m, "network-namespace")
        m.start("inner.service", "blue-web.socket")
        same("answer", m.sh(f"{CURL} http://127.0.0.1:8080/"), "inner\n")
        wait_until_ready(m, "blue-web.service")
        m.stop("blue-web.socket", "blue-web.service", "inner.service")
    finally:
        m.sh("ip netns del blue")


@scenario(original="takes one target")
def example_several_ports(m: Machine) -> None:
    """examples/several-ports: two listeners, two targets of a host by name"""
    # The units listen on these ports of every address: the targets are in another namespace.
    m.sh("cp /etc/hosts /run/e2e-hosts; echo '10.9.9.2 mail.internal' >>/etc/hosts")
    m.sh(
        "ip netns add mail && ip link add mail0 type veth peer name eth0 netns mail && "
        "ip addr add 10.9.9.1/24 dev mail0 && ip link set mail0 up && "
        "ip -n mail addr add 10.9.9.2/24 dev eth0 && ip -n mail link set eth0 up"
    )
    try:
        says = "server {{ listen 10.9.9.2:{port}; location / {{ return 200 '{port}\\n'; }} }}\n"
        m.nginx(
            "mail",
            says.format(port=25) + says.format(port=143),
            "NetworkNamespacePath=/run/netns/mail",
        )
        install(m, "several-ports")
        m.start("mail.service", "mail-smtp.socket", "mail-imap.socket")
        for port in (25, 143):
            same("answer", m.sh(f"{CURL} http://127.0.0.1:{port}/"), f"{port}\n")
        m.stop("mail-smtp.socket", "mail-imap.socket", "mail-proxy.service", "mail.service")
    finally:
        m.sh("ip link del mail0; ip netns del mail; cat /run/e2e-hosts >/etc/hosts")
