"""Link-local addresses: the interface is looked up for each connect, as it may be recreated."""

import socket
import subprocess

import pytest
from kit.differences import differs
from kit.namespaces import in_network_namespace_of, namespace_prefix, network_of
from kit.socket_state import is_quiet
from kit.stage import Backend
from kit.traffic import talk
from kit.waiting import never_within

PORT = 4000
LINK = "eth9"

MAKE = f"""
ip link add {LINK} type veth peer name peer9
ip link set peer9 up
ip link set {LINK} up
"""
ADDRESS = f"ip -6 address add fe80::9/64 dev {LINK} nodad"


def in_namespace(stage, command):
    """Run a shell command in the network namespace of the program."""
    subprocess.run([*network_of(stage.proxy.pid), "sh", "-ec", command], check=True)


def launch(stage, *arguments, setup="true"):
    """Start the program in a new network namespace, and a target at all its addresses."""
    prefix = namespace_prefix(f"ip link set lo up\n{setup}")
    notify = stage.notify_socket(stage.path("notify"))  # abstract names end at the namespace
    stage.launch(*arguments, listeners=[stage.listener()], prefix=prefix, notify=notify)
    return Backend(
        in_network_namespace_of(
            stage.proxy.pid,
            lambda: socket.create_server(("::", PORT), family=socket.AF_INET6),
        )
    )


@differs("original", reason="takes the brackets for part of the name", run=False)
def test_an_interface_that_appears_later_and_is_recreated(stage):
    """As with containers, VPNs and USB adapters, its index is a different one each time."""
    backend = launch(stage, f"[fe80::9%{LINK}]:{PORT}")
    client = stage.connect()
    stage.proxy.wait_for_log("Failed to connect to remote host: No such device")
    assert is_quiet(client)
    in_namespace(stage, f"{MAKE}\n{ADDRESS}")
    talk(client, backend.accept())
    for _ in range(2):
        talk(stage.connect(), backend.accept())
        in_namespace(stage, f"ip link delete {LINK}")
        client = stage.connect()
        never_within(0.3, lambda held=client: not is_quiet(held), "the end of a held client")
        in_namespace(stage, f"{MAKE}\n{ADDRESS}")
        talk(client, backend.accept())
    backend.close()


@differs("original", reason="takes the brackets for part of the name", run=False)
def test_an_interface_that_is_recreated_while_no_client_comes(stage):
    """The next client is served without being held."""
    backend = launch(stage, f"[fe80::9%{LINK}]:{PORT}", setup=f"{MAKE}\n{ADDRESS}")
    talk(stage.connect(), backend.accept())
    in_namespace(stage, f"ip link delete {LINK}\n{MAKE}\n{ADDRESS}")
    talk(stage.connect(), backend.accept())
    assert stage.proxy.log() == ""
    backend.close()


@differs("original", reason="takes the brackets for part of the name", run=False)
def test_a_name_that_belongs_to_another_interface_now(stage):
    """The first one still exists, under another name."""
    backend = launch(stage, f"[fe80::9%{LINK}]:{PORT}", setup=f"{MAKE}\n{ADDRESS}")
    talk(stage.connect(), backend.accept())
    in_namespace(stage, f"ip link set {LINK} down\nip link set {LINK} name old9 up")
    client = stage.connect()
    stage.proxy.wait_for_log("Failed to connect to remote host: No such device")
    assert is_quiet(client)
    in_namespace(stage, f"{MAKE.replace('peer9', 'more9')}\n{ADDRESS}")
    talk(client, backend.accept())
    backend.close()


@differs("original", reason="has no --listen=", run=False)
@pytest.mark.parametrize(
    ("address", "why", "helps"),
    [
        ("[fe80::9%eth9]:80", "there is no network interface 'eth9'", "BindToDevice="),
        ("[fe80::9%lo]:80", "Cannot assign requested address", "FreeBind="),
        ("192.0.2.1:80", "Cannot assign requested address", "FreeBind="),
    ],
)
def test_listen_at_an_address_that_does_not_exist_yet(stage, address, why, helps):
    """One line that says what is missing, and which setting helps."""
    outcome = stage.run(f"--listen={address}", "/run/target")
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert line.startswith(f"Failed to listen on {address}: {why}")
    assert helps in line
