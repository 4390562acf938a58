"""Units that heal: the examples whose proxy starts no backend, through what can happen to it."""

import re

from e2e import healing
from e2e.harness import scenario
from e2e.healing import BACKEND, Subject, heals
from e2e.machine import Machine
from e2e.scenarios.healing import example

OF_A_BACKEND = (
    healing.crash_loop,
    healing.failing_start,
    healing.refused_start,
    healing.slow_start,
    healing.slow_stop,
    healing.idle_stop,
)


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_several_ports(m: Machine) -> str:
    """examples/several-ports, through what can happen to a proxy"""
    units = example("several-ports")
    for name, text in units.items():  # the listeners have these ports of every address
        units[name] = re.sub(r"mail\.internal:(\d+)", r"127.0.0.2:8\1", text)
    return heals(
        Alone(
            m,
            units,
            "127.0.0.2",
            ("825", "8143"),
            sockets="mail-smtp.socket mail-imap.socket",
            proxy="mail-proxy.service",
            address="TCP:127.0.0.1:25 TCP:127.0.0.1:143",
        ),
        without=OF_A_BACKEND,
    )


@scenario(needs="--connect-timeout", original="has no --connect-timeout=", slow=True)
def heals_network_namespace(m: Machine) -> str:
    """examples/network-namespace, through what can happen to a proxy"""
    try:
        return heals(
            InNamespace(
                m,
                example("network-namespace"),
                "127.0.0.1",
                ("8080",),
                sockets="blue-web.socket",
                proxy="blue-web.service",
                address="TCP:127.0.0.1:8080",
            ),
            without=OF_A_BACKEND,
        )
    finally:
        m.run("systemctl stop 'blue-web.*' 'target@*'; ip netns del blue")


class Alone(Subject):
    """A set without a backend. What listens on `ports` of `host` runs on, and is what crashes."""

    place = ""

    def __init__(
        self, m: Machine, units: dict[str, str], host: str, ports: tuple[str, ...], **names: str
    ):
        self.targets = [f"target@{port}.service" for port in ports]
        target = TARGET.format(backend=BACKEND, host=host, place=self.place)
        files = units | {"target@.service": target}
        super().__init__(m, files, backend="", crashes=self.targets[0], **names)

    def register(self, written: list[str]) -> None:
        super().register(written)
        self.machine.uses(*self.targets)

    def prepare(self) -> None:
        super().prepare()
        self.machine.sh(f"systemctl start {' '.join(self.targets)}")


TARGET = """\
[Unit]
StartLimitIntervalSec=0
[Service]
ExecStart={backend} {host} %i
Restart=always
RestartSec=1s
{place}
"""


class InNamespace(Alone):
    """The same, where the target is in the network namespace `blue`."""

    place = "NetworkNamespacePath=/run/netns/blue"

    def prepare(self) -> None:
        make = "ip netns add blue && ip -n blue link set lo up"
        self.machine.sh(f"test -e /run/netns/blue || {{ {make}; }}")
        super().prepare()
