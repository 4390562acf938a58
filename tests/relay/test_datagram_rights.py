"""File descriptors in datagrams: none is forwarded, and nobody waits for one to be closed."""

import contextlib
import gc
import os
import socket

import pytest
from kit.datagram_rig import DatagramRig, open_datagram_socket, receive_all
from kit.rig import open_fds
from kit.rights import kernel_refuses, send_slow, thread_ids

from proxyd._datagram import DROP_RIGHTS
from proxyd._relay import Relay

SO_PASSCRED = 16


def older_kernel(monkeypatch):
    """Have relays take this kernel for one that cannot refuse descriptors."""
    monkeypatch.setattr("kit.datagram_rig.Relay", lambda: Relay(may_refuse=False))


def with_descriptor(client, data):
    """Send a datagram with a descriptor of a file that can be closed at once."""
    reader, writer = os.pipe()
    try:
        socket.send_fds(client, [data], [writer])
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not kernel_refuses(), reason="SO_PASSRIGHTS is of Linux 6.16")
def test_descriptors_are_refused(datagram_rigs):
    rig = datagram_rigs("unix", "udp4")
    client = rig.client()
    with pytest.raises(PermissionError):
        with_descriptor(client, b"with a descriptor")
    rig.ask(client)


@pytest.mark.parametrize("older", [False, True])
def test_what_was_queued_before_is_read_with_care(datagram_rigs, monkeypatch, older):
    if older:
        older_kernel(monkeypatch)
    elif not kernel_refuses():
        pytest.skip("SO_PASSRIGHTS is of Linux 6.16")
    rig = datagram_rigs("unix", "udp4", started=False)
    late = rig.keep(open_datagram_socket("unix", rig.directory))
    rig.listen_socket = late
    client = rig.client()
    client.send(b"first")
    with_descriptor(client, b"with a descriptor")
    with_descriptor(client, b"")
    client.send(b"last")
    rig.add_listener(late)
    assert [data for data, _ in rig.received(2)] == [b"first", b"last"]
    assert rig.dropped() == {DROP_RIGHTS: 2}
    rig.ask(client)


def test_nobody_waits_for_a_file_that_does_not_close(tmp_path, monkeypatch):
    older_kernel(monkeypatch)
    before, threads = open_fds(), thread_ids()
    rig = DatagramRig(str(tmp_path), "unix", "udp4")
    client = rig.client()
    rig.ask(client)
    slow = send_slow(client, b"slow")
    with contextlib.closing(slow.peer):
        client.send(b"not held up")
        assert [data for data, _ in rig.received()] == [b"not held up"]
        rig.ask(client)
        with_descriptor(client, b"this one waits")  # there is one thread for all of them
        client.send(b"later")
        rig.pass_time(30)
        assert receive_all(rig.server) == []
        assert rig.is_calm()
        slow.release()
        assert [data for data, _ in rig.received()] == [b"later"]
        assert rig.dropped() == {DROP_RIGHTS: 2}
    rig.until(lambda: thread_ids() <= threads, "the end of the thread")
    rig.close()
    del rig
    gc.collect()
    assert open_fds() - before == set()


def test_credentials_are_no_descriptors(datagram_rigs, monkeypatch):
    """PassCredentials= of the socket unit."""
    older_kernel(monkeypatch)
    rig = datagram_rigs("unix", "udp4", started=False)
    late = rig.keep(open_datagram_socket("unix", rig.directory))
    late.setsockopt(socket.SOL_SOCKET, SO_PASSCRED, 1)
    rig.listen_socket = late
    client = rig.client()
    client.send(b"first")
    rig.add_listener(late)
    assert [data for data, _ in rig.received()] == [b"first"]
    assert rig.dropped() == {}
