"""A QUIC client and server (aioquic): congestion control, large datagrams, many at a time."""

from pathlib import Path

import pytest

PEER = Path(__file__).parent / "quic_peer.py"


@pytest.fixture
def serve(quic, running, datagrams):
    """Start a server at a port."""

    def start(port, wait=True):
        files = [datagrams.stage.path(name) for name in ("certificate", "key")]
        process = running.start([quic, PEER, "server", str(port), *files])
        if wait:
            running.wait_for_output(process, "serves")
        return process

    return start


def client(quic, listener, size, connections):
    port = listener.getsockname()[1]
    return [quic, str(PEER), "client", *map(str, (port, size, connections))]


@pytest.mark.parametrize(("size", "connections"), [(5_000_000, 1), (200_000, 10)])
def test_bytes_there_and_back(datagrams, serve, quic, run, size, connections):
    target, listener = datagrams.absent(), datagrams.listener()
    serve(target._address[1])
    datagrams.launch(target.text, listeners=[listener])
    assert run(client(quic, listener, size, connections), 180) == "all bytes came back\n"


def test_a_connection_waits_for_the_server(datagrams, serve, quic, running):
    """The first packet is held until the server is there."""
    target, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch(target.text, listeners=[listener])
    process = running.start(client(quic, listener, 100_000, 1))
    proxy.wait_for_log("holding datagrams until it answers.")
    serve(target._address[1])
    running.wait_for_output(process, "all bytes came back")
