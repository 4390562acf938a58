"""What only UNIX sockets do: a message with fds or credentials attached cuts a read short.

The relay takes the fds here, as if the kernel could not refuse them; test_rights.py has the rest.
"""

import os
import socket

import pytest
from kit.socket_state import is_writable, option, set_option
from kit.sockets import FAMILIES
from kit.stepped import Incoming, Outgoing, half_close
from kit.traffic import payload

targets = pytest.mark.parametrize("target", ["tcp4", "unix"])


def send_with_fd(connection, data):
    """Send bytes with an fd attached. The relay passes on the bytes and drops the fd."""
    rd, wr = os.pipe()
    try:
        assert socket.send_fds(connection, [data], [rd]) == len(data)
    finally:
        os.close(rd)
        os.close(wr)


@targets
def test_bytes_after_a_message_with_an_fd(rigs, way, target):
    """recv ends after a message that carries an fd, even if there are more bytes: a short read does
    not mean that the socket is empty."""
    rig = rigs("unix", target, may_refuse=False, **way)
    link = rig.link()
    rig.settle()
    send_with_fd(link.client, b"with an fd, ")
    link.client.send(b"and without")
    assert rig.read(link.target, 23) == b"with an fd, and without"


@targets
def test_bytes_after_a_message_with_an_fd_before_the_target_is_connected(rigs, way, target):
    """The same for the relay's very first read."""
    rig = rigs("unix", target, may_refuse=False, **way)
    client, fd = rig.new_client()
    send_with_fd(client, b"with an fd, ")
    client.send(b"and without")
    rig.connect(fd)
    assert rig.read(rig.accept_at_backend(), 23) == b"with an fd, and without"


def test_messages_with_fds_from_the_target(rigs, way):
    rig = rigs("tcp4", "unix", may_refuse=False, **way)
    link = rig.link()
    rig.settle()
    for number in range(5):
        send_with_fd(link.target, b"%d" % number)
    half_close(link.target)
    assert rig.read_to_end(link.client) == (b"01234", "eof")


@targets
def test_messages_with_fds_within_a_stream(rigs, way, target):
    """Many of them, between large messages without fds."""
    rig = rigs("unix", target, may_refuse=False, **way)
    link = rig.link()
    incoming = Incoming(link.target)
    expected = b""
    for number in range(12):
        block = payload(60_000, number)
        expected += block + b"!"
        rig.run(Outgoing(link.client, block))
        rig.until(lambda: is_writable(link.client), "room for more")
        send_with_fd(link.client, b"!")
        incoming.step()
    half_close(link.client)
    rig.run(incoming)
    assert incoming.data == expected


def test_writers_with_different_credentials(rigs, way):
    """With SO_PASSCRED (PassCredentials= in the socket unit) recv never joins the bytes of two
    writers: it ends where the writer changes."""
    rig = rigs("unix", "tcp4", **way)
    client, fd = rig.new_client()
    set_option(fd, socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    number = rig.relay.connect(fd, FAMILIES["unix"], rig.address)
    target = rig.accept_at_backend()
    rig.settle()
    client.send(b"from one, ")
    child = os.fork()
    if child == 0:
        client.send(b"from another")
        os._exit(0)
    os.waitpid(child, 0)
    assert rig.read(target, 22) == b"from one, from another"
    assert number


SO_SNDBUFFORCE = 32  # asm-generic/socket.h; CAP_NET_ADMIN


def test_a_send_buffer_is_never_reduced(rigs, way):
    """A stream asks for a larger one, but net.core.wmem_default may be larger still."""
    rig = rigs("unix", "unix", **way)
    link = rig.adopted_link()
    before = option(link.target_fd, socket.SOL_SOCKET, socket.SO_SNDBUF)
    words = payload(1_000_000)
    heard = Incoming(link.target)
    rig.run(Outgoing(link.client, words, half_close), heard)
    assert heard.data == words
    ordinary = option(link.target_fd, socket.SOL_SOCKET, socket.SO_SNDBUF)
    assert ordinary > before
    link = rig.adopted_link()
    try:
        set_option(link.target_fd, socket.SOL_SOCKET, SO_SNDBUFFORCE, 4 << 20)
    except PermissionError:
        pytest.skip("SKIPPED LOUDLY: only root may have a larger send buffer than others")
    heard = Incoming(link.target)
    rig.run(Outgoing(link.client, words, half_close), heard)
    assert heard.data == words
    assert option(link.target_fd, socket.SOL_SOCKET, socket.SO_SNDBUF) == 8 << 20
