"""Targets on another host: what becomes of a datagram is told later, or never."""

import contextlib
import ctypes
import errno
import fcntl
import socket
import struct
import subprocess

import pytest
from kit.child import in_child
from kit.datagram_rig import receive_all
from kit.namespaces import Namespace, enter_own_network
from kit.waiting import wait_until

from proxyd._datagram import TargetDown, TargetUp

HERE, THERE, NOBODY = "10.98.0.1", "10.98.0.2", "10.98.0.3"
PORT = 4242

SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17


class Remote:
    """A rig whose target is on another host, which is a network namespace behind a link."""

    def __init__(self, datagram_rigs, host=THERE):
        self.network = Namespace()
        for command in (
            f"link add v0 type veth peer name v1 netns {self.network.path}",
            f"addr add {HERE}/24 dev v0",
            "link set v0 up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        self.network.run("ip link set lo up; ip link set v1 up")
        self.network.run(f"ip addr add {THERE}/24 dev v1")
        with open("/proc/sys/net/ipv4/neigh/v0/retrans_time_ms", "w") as file:
            file.write("30")  # after three times this, a host that does not answer is not there
        self.rig = datagram_rigs("udp4", "udp4")
        address = struct.pack("=H", socket.AF_INET) + struct.pack("!H", PORT)
        self.address = address + socket.inet_aton(host) + bytes(8)
        self.rig.target.set_address(self.address)

    def refuses(self, send):
        """`send` something, run turns until it is forwarded, and wait for its refusal.

        No turn may see that silence has lasted, however long a busy machine takes for that.
        """
        send()
        sent, refused = counter("Udp", "OutDatagrams"), counter("Icmp", "InDestUnreachs")
        self.rig.until(lambda: counter("Udp", "OutDatagrams") > sent, "the datagram in hand")
        wait_until(lambda: counter("Icmp", "InDestUnreachs") > refused, "the refusal")

    def serve(self, host=THERE):
        """Begin to serve there."""

        def begin():
            server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            server.setblocking(False)
            server.bind((host, PORT))
            return server

        self.rig.server = self.rig.keep(self.network.enter(begin))


def counter(protocol, name):
    """What this network has counted so far, by the names of /proc/net/snmp."""
    with open("/proc/thread-self/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith(f"{protocol}: "))
    return int(values[names.index(name)])


def on_another_host(scenario, host=THERE):
    """Run `scenario(Remote)` in a child, in a network of its own."""

    def run(datagram_rigs):
        try:
            enter_own_network()
        except OSError as error:
            pytest.skip(f"no network namespace: {error}")
        remote = Remote(datagram_rigs, host)
        with contextlib.closing(remote.network):
            scenario(remote)

    return lambda datagram_rigs: in_child(lambda: run(datagram_rigs), patience=40)


def test_a_refusal_comes_in_time_for_the_datagram_in_hand(datagram_rigs):
    def scenario(remote):
        rig = remote.rig
        client = rig.client()
        remote.refuses(lambda: [client.send(b"%d" % number) for number in range(5)])
        assert rig.wait_for(TargetDown).error == errno.ECONNREFUSED
        assert rig.target.held == 1
        remote.refuses(rig.target.probe)
        rig.wait_for(TargetDown, 2)
        remote.serve()
        rig.target.probe()
        assert [data for data, _ in rig.received(5)] == [b"%d" % number for number in range(5)]
        rig.wait_for(TargetUp)
        rig.settle()
        assert receive_all(rig.server) == []
        assert rig.datagrams.flows == 1
        assert rig.datagrams.totals().datagrams_to_targets == 5

    on_another_host(scenario)(datagram_rigs)


def test_silence_counts_as_a_good_sign_after_a_while(datagram_rigs):
    """Otherwise nothing could be sent to servers that never reply, such as those of syslog."""

    def scenario(remote):
        rig = remote.rig
        remote.serve()
        client = rig.client()
        for number in range(5):
            client.send(b"%d" % number)
        found = rig.received()
        assert found[0][0] == b"0"
        assert rig.target.state == "doubt" or len(found) > 1
        rig.until(lambda: rig.target.state == "up", "the verdict")
        found += rig.received(5 - len(found))
        assert [data for data, _ in found] == [b"%d" % number for number in range(5)]
        assert rig.events == []

    on_another_host(scenario)(datagram_rigs)


def test_a_reply_is_a_verdict(datagram_rigs):
    def scenario(remote):
        rig = remote.rig
        remote.serve()
        rig.ask(rig.client())
        assert rig.target.state == "up"
        totals = rig.datagrams.totals()
        assert (totals.datagrams_to_targets, totals.datagrams_to_clients) == (1, 1)
        assert (totals.bytes_to_targets, totals.bytes_to_clients) == (8, 6)

    on_another_host(scenario)(datagram_rigs)


def test_a_server_that_goes_away_is_missed(datagram_rigs):
    def scenario(remote):
        rig = remote.rig
        remote.serve()
        client = rig.client()
        own = rig.ask(client)
        rig.server.close()
        client.send(b"lost")
        rig.until(lambda: rig.target.state == "doubt", "the refusal")
        remote.refuses(lambda: client.send(b"held"))
        rig.wait_for(TargetDown)
        remote.serve()
        rig.target.probe()
        ((data, sender),) = rig.received()
        assert (data, sender) == (b"held", own)
        rig.server.sendto(b"reply", sender)
        assert rig.replies(client) == [b"reply"]
        assert rig.datagrams.totals().flows == 1

    on_another_host(scenario)(datagram_rigs)


def test_a_host_that_is_not_there_is_an_outage(datagram_rigs):
    """A container's, say, that is yet to start. Its address is resolved again for each datagram."""

    def scenario(remote):
        rig = remote.rig
        client = rig.client()
        for number in range(3):
            client.send(b"%d" % number)
        rig.until(lambda: rig.datagrams.totals().datagrams_to_targets > 0, "the belief")
        rig.pass_time(300)
        client.send(b"held")
        event = rig.wait_for(TargetDown)
        assert event.error == errno.EHOSTUNREACH
        assert rig.target.held > 0
        assert rig.is_calm()
        remote.network.run(f"ip addr add {NOBODY}/24 dev v1")
        remote.serve(NOBODY)
        rig.target.probe()
        _data, sender = rig.received()[0]
        rig.server.sendto(b"reply", sender)
        assert rig.replies(client) == [b"reply"]
        rig.wait_for(TargetUp)
        assert rig.datagrams.totals().flows == 1

    on_another_host(scenario, NOBODY)(datagram_rigs)


def test_a_device_without_checksums_gets_datagrams_one_by_one(datagram_rigs):
    def scenario(remote):
        rig = remote.rig
        remote.serve()
        client = rig.client()
        rig.ask(client)
        value = ctypes.create_string_buffer(struct.pack("II", ETHTOOL_STXCSUM, 0))
        request = struct.pack("16sP16x", b"v0", ctypes.addressof(value))
        fcntl.ioctl(client, SIOCETHTOOL, request)
        for _ in range(3):
            for number in range(6):
                client.send(bytes([number]) * 100)
            found = [data for data, _ in rig.received(6)]
            assert found == [bytes([number]) * 100 for number in range(6)]
        assert rig.dropped() == {}
        assert rig.events == []

    on_another_host(scenario)(datagram_rigs)
