"""Several targets of one process, and equal addresses in different namespaces."""

from e2e.harness import scenario
from e2e.machine import Machine, check, same

SAYS = 'server {{ listen {listen}; location / {{ return 200 "{word}\\n"; }} }}'
CURL = "curl -sS --max-time 10"


@scenario(original="takes one target")
def two_ports(m: Machine) -> None:
    """Two sockets with FileDescriptorName= through one process with NAME=TARGET"""
    m.nginx(
        "backend",
        SAYS.format(listen="127.0.0.1:8000", word="web")
        + SAYS.format(listen=f"unix:{m.folder}/admin", word="admin"),
    )
    m.start("backend.service")
    for name, port in (("web", 9000), ("admin", 9001)):
        m.unit(
            f"{name}.socket",
            f"[Socket]\nListenStream=127.0.0.1:{port}\n"
            f"FileDescriptorName={name}\nService=proxy.service\n",
        )
    m.unit(
        "proxy.service",
        "[Unit]\nRequires=web.socket admin.socket\n"
        f"[Service]\nSockets=web.socket admin.socket\n"
        f"ExecStart={m.program} admin={m.folder}/admin web=127.0.0.1:8000\n",
    )
    m.start("web.socket", "admin.socket")
    for _ in range(2):
        same("port 9000", m.sh(f"{CURL} http://127.0.0.1:9000/"), "web\n")
        same("port 9001", m.sh(f"{CURL} http://127.0.0.1:9001/"), "admin\n")


@scenario(original="takes one target")
def listener_without_target(m: Machine) -> None:
    """A listener that no NAME=TARGET serves is an error at start that names it"""
    m.unit("proxy.service", f"[Service]\nExecStart={m.program} web=127.0.0.1:8000\n")
    m.unit(
        "other.socket",
        "[Socket]\nListenStream=127.0.0.1:9000\nFileDescriptorName=other\nService=proxy.service\n",
    )
    m.start("other.socket")
    m.run("systemctl start proxy.service")
    m.wait_for("it fails", lambda: m.show("proxy.service", "ExecMainStatus") == "1")
    check("other" in m.journal("proxy.service"), "the listener is not named")
    check("Traceback" not in m.journal("proxy.service"), "a traceback")


@scenario()
def same_address_other_network(m: Machine) -> None:
    """Listener and target have one address, in two network namespaces"""
    m.nginx(
        "backend", SAYS.format(listen="127.0.0.1:7000", word="inner"), service="PrivateNetwork=yes"
    )
    m.start("backend.service")
    m.proxy(
        "proxy",
        "127.0.0.1:7000",
        "127.0.0.1:7000",
        service="PrivateNetwork=yes",
        unit="JoinsNamespaceOf=backend.service\nAfter=backend.service",
    )
    for _ in range(3):
        same("answer", m.sh(f"{CURL} http://127.0.0.1:7000/"), "inner\n")


@scenario()
def same_path_other_mounts(m: Machine) -> None:
    """Listener and target have one UNIX path, in two mount namespaces"""
    m.sh(f"mkdir {m.folder}/outer {m.folder}/inner")
    inside = f"BindPaths={m.folder}/inner:{m.folder}/outer"
    m.nginx(
        "backend", SAYS.format(listen=f"unix:{m.folder}/outer/socket", word="inner"), service=inside
    )
    m.start("backend.service")
    m.proxy(
        "proxy",
        f"{m.folder}/outer/socket",
        f"{m.folder}/outer/socket",
        service=inside,
        unit="After=backend.service",
    )
    for _ in range(3):
        answer = m.sh(f"{CURL} --unix-socket {m.folder}/outer/socket http://localhost/")
        same("answer", answer, "inner\n")


@scenario()
def own_tail(m: Machine) -> None:
    """A proxy whose target is its own listener refuses the loop and lives"""
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:9000", service="LimitNOFILE=256")
    m.run("curl -sS --max-time 5 http://127.0.0.1:9000/", timeout=10)
    check(m.is_active("proxy.service"), "the service ended")
    lines = m.journal("proxy.service").count("\n")
    check(lines < 20, f"{lines} lines in the journal")
