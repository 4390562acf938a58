"""Ports that a container engine publishes: they accept before the application listens.

The container is a real one of rootless Podman, outside the machine, and so is the network of the
proxy; the program is the machine's.
"""

from contextlib import contextmanager

from e2e.harness import CannotRun, scenario
from e2e.machine import Machine, check, same
from e2e.podman import Client, NoPodman, PublishedPort, accepts, free_port

UNITS = {
    "web-proxy.socket": "[Socket]\nListenStream=8080\n",
    "web-proxy.service": """\
[Unit]
Requires=web-proxy.socket
After=web-proxy.socket
Wants=web.service
Upholds=web.service
After=web.service
StartLimitIntervalSec=0
[Service]
Type=notify
ExecStart=/usr/bin/systemd-socket-proxyd --connect-timeout=1min {settle} 127.0.0.1:{port}
Restart=on-failure
RestartSec=1s
""",
    "web.service": """\
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart=/usr/bin/podman run --rm --publish=127.0.0.1:{port}:80 localhost/web
Restart=on-failure
RestartSec=1s
[Install]
WantedBy=multi-user.target
""",
}

SETTLE = "--settle-time=500ms"


@scenario(needs="--settle-time", original="has no --settle-time=")
def rule_published_port(m: Machine) -> str:
    """published-port: it bites with rootless Podman, `check` finds it, its mend mends it"""
    with published(m, "") as (port, _, rules):
        same("rules", rules, {"published-port"})
        client = Client(port)
        same("what a client gets before the application listens", client.answer(20), b"")
    with published(m, SETTLE) as (port, container, rules):
        same("rules", rules, set())
        client = Client(port)
        check(client.answer(3) is None, "the client is not held")
        container.let_it_listen()
        same("what it gets then", client.answer(30), b"answer word\n")
    return "bites with rootless Podman, is found, and is mended"


@contextmanager
def published(m: Machine, settle: str):
    """A container, and a proxy in front of it: (where clients connect, container, rules)."""
    try:
        container = PublishedPort()
    except NoPodman as error:
        raise CannotRun(str(error)) from error
    port = free_port()
    options = [f"--listen=127.0.0.1:{port}", "--connect-timeout=1min", *settle.split()]
    command = [m.program, *options, f"127.0.0.1:{container.port}"]
    proxy = m.container.popen_in_our_network(command)
    try:
        m.wait_for("the proxy listens", lambda: accepts(port))
        yield port, container, rules(m, settle, container.port)
    finally:
        proxy.terminate()
        proxy.wait()
        container.end()


def rules(m: Machine, settle: str, port: int) -> set[str]:
    """What `check` finds in units for this container."""
    for name, text in UNITS.items():
        m.write(f"{m.folder}/{name}", text.format(settle=settle, port=port))
    return m.rules(m.folder)
