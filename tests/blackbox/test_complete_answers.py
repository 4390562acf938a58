"""Promise: an answer that was sent completely is never cut, however slowly its client reads."""

import signal
import socket

import pytest
from kit.differences import differs
from kit.manager import restart, stop
from kit.sockets import read_to_end
from kit.traffic import in_background, payload
from kit.waiting import wait_until

pytestmark = differs("original", reason="it cuts its connections when it ends", run=False)

ANSWER = payload(4 << 20)
SMALL = {"receive_buffer": 4096}


def ask(stage, backend):
    """A client that reads nothing yet, and whose request was answered; and the answer's sender."""
    client = stage.connect(**SMALL)
    client.sendall(b"request")
    client.shutdown(socket.SHUT_WR)
    server = backend.accept()
    assert read_to_end(server) == (b"request", "eof")

    def answer():
        with server:
            server.sendall(ANSWER)

    return client, in_background(answer)


def read_slowly(client):
    """Everything, in pieces that make the window close again and again."""
    found = bytearray()
    while piece := client.recv(3000):
        found += piece
    return found == ANSWER


@pytest.mark.parametrize("option", [[], ["--exit-idle-time=0"]], ids=["stays", "exits"])
def test_after_the_end(stage, option):
    """Also if the program itself has ended meanwhile."""
    backend = stage.backend()
    stage.launch(*option, backend.target, listeners=[stage.listener()], wait=not option)
    client, sending = ask(stage, backend)
    assert read_slowly(client)
    sending.result()
    if option:
        assert stage.proxy.wait() == 0


@pytest.mark.parametrize("how", ["restart", "reload"])
def test_a_restart_in_the_middle(stage, manager, how):
    """And then the end of the connection, and of the program."""
    backend = stage.backend()
    listeners = [stage.listener()]
    stage.launch(backend.target, listeners=listeners, names="web", notify=manager)
    client, sending = ask(stage, backend)
    for _ in range(2):
        if how == "restart":
            restart(stage, manager, backend.target)
        else:
            manager.clear()
            stage.proxy.send_signal(signal.SIGHUP)
            manager.wait_for("READY=1")
    assert read_slowly(client)
    sending.result()
    stop(stage)
    wait_until(lambda: not manager.stored, "FDSTOREREMOVE=1")
