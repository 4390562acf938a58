"""Both sockets of a connection: keepalive, no Nagle delay, urgent bytes in their place."""

import socket

import pytest
from kit.differences import differs
from kit.kernel import borrowed_sockets
from kit.sockets import read_exactly


def both_sockets(stage, listener, *, early=False):
    """The program's two sockets of one connection from `listener` to a TCP target.

    `early`: the client connects before the program starts.
    """
    backend = stage.backend()
    client = stage.connect(listener) if early else None
    stage.launch(backend.target, listeners=[listener])
    client = client or stage.connect()
    client.sendall(b"x")
    assert read_exactly(backend.accept(), 1) == b"x"
    sockets = borrowed_sockets(stage.proxy)
    assert len(sockets) == 2
    return sockets


@differs("original", reason="sets no socket options")
@pytest.mark.parametrize("listen", ["tcp4", "tcp6"])
@pytest.mark.parametrize("early", [False, True], ids=["", "early"])
@pytest.mark.parametrize(
    ("level", "option"),
    [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE),
        (socket.IPPROTO_TCP, socket.TCP_NODELAY),
        (socket.SOL_SOCKET, socket.SO_OOBINLINE),
    ],
    ids=["keepalive", "nodelay", "oobinline"],
)
def test_option_is_on(stage, listen, early, level, option):
    """The option is set on both sides, even if the client connected before the program could set
    it on the listener."""
    for sock in both_sockets(stage, stage.listener(listen), early=early):
        with sock:
            assert sock.getsockopt(level, option)


def test_settings_of_the_listener_are_kept(stage):
    """A listener with its own keepalive times (KeepAliveTimeSec=) passes them to its clients."""
    listener = stage.listener()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        (socket.TCP_KEEPIDLE, 33),
        (socket.TCP_KEEPINTVL, 7),
        (socket.TCP_KEEPCNT, 4),
    ):
        listener.setsockopt(socket.IPPROTO_TCP, option, value)
    address = listener.getsockname()
    sockets = both_sockets(stage, listener)
    (client_sock,) = (sock for sock in sockets if sock.getsockname() == address)
    assert client_sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert client_sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 33
    assert client_sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 7
    assert client_sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 4
    for sock in sockets:
        sock.close()
