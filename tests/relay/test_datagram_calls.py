"""Which system calls the relay makes for datagrams, as test_calls.py does for streams."""

import itertools
import sys
import tempfile

import pytest
from kit.datagram_rig import DatagramRigs, receive_all
from kit.rights import kernel_refuses
from kit.traced import names, tracer, watched

# ── the scenarios, in the program that is traced ─────────────────────────────────────────────────


def question(rigs, *pair):
    """A question, its answer, and a turn in which nothing is left to do; on a flow that exists."""
    rig = rigs(*pair)
    client, own = warm(rig)
    client.send(b"question")
    watched(rig)
    assert [data for data, _ in receive_all(rig.server)] == [b"question"]
    rig.server.sendto(b"answer", own)
    watched(rig)
    assert [data for data, _ in receive_all(client)] == [b"answer"]
    watched(rig)


def first_question(rigs, *pair):
    """The first question of a client, while the target is known to be up."""
    rig = rigs(*pair)
    warm(rig)
    client = rig.client()
    client.send(b"question")
    watched(rig)
    assert [data for data, _ in receive_all(rig.server)] == [b"question"]


def burst(rigs, *pair):
    """Ten datagrams of one size each way, which wait when the relay has its turn."""
    rig = rigs(*pair)
    client, own = warm(rig)
    for number in range(10):
        client.send(b"%04d" % number)
    watched(rig)
    assert len(receive_all(rig.server)) == 10
    for number in range(10):
        rig.server.sendto(b"%04d" % number, own)
    watched(rig)
    assert len(receive_all(client)) == 10


def many_clients(rigs, *pair):
    """An answer to each of ten clients; all of them wait."""
    rig = rigs(*pair)
    clients = [warm(rig) for _ in range(10)]
    for _, own in clients:
        rig.server.sendto(b"answer", own)
    watched(rig)
    assert [len(receive_all(client)) for client, _ in clients] == [1] * 10


def held(rigs, *pair):
    """Turns while the target is down, and more and more comes for it."""
    rig = rigs(*pair)
    client, _ = warm(rig)
    rig.server_ends()
    while rig.target.state != "down":
        client.send(b"held")
        rig.settle()
    for _ in range(3):
        client.send(b"queued")
        watched(rig)


def warm(rig):
    """A client with a flow, and the address of the flow's own socket."""
    client = rig.client()
    own = rig.ask(client)
    rig.ask(client)
    rig.settle()
    return client, own


SCENARIOS = {one.__name__: one for one in (question, first_question, burst, many_clients, held)}


def play(name, listen, target):
    with tempfile.TemporaryDirectory() as folder:
        rigs = DatagramRigs(folder)
        SCENARIOS[name](rigs, listen, target)
        rigs.close()


# ── the calls ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def calls(tmp_path):
    """Runs a scenario; returns a list of calls for each of its watched turns."""
    return tracer("relay.test_datagram_calls", tmp_path)


needs_refusal = pytest.mark.skipif(not kernel_refuses(), reason="SO_PASSRIGHTS: Linux 6.16")

PAIRS = pytest.mark.parametrize(
    "pair", [("udp4", "udp4"), ("udp4", "unix"), ("unix", "udp4"), ("unix", "unix")], ids="-".join
)


@needs_refusal
@PAIRS
def test_three_calls_for_a_datagram_and_none_to_see_that_it_was_the_last(calls, pair):
    """Fewer messages than asked for tell that the queue is empty; or epoll does, where one datagram
    was asked for."""
    read = "recvmmsg" if pair[1] == "unix" else "recvfrom"
    asked, answered, nothing = calls("question", pair)
    assert names(asked) == ["epoll_wait", "recvmmsg", "sendto"]
    assert names(answered) == ["epoll_wait", read, "sendmsg"]
    assert names(nothing) == ["epoll_wait"]
    assert nothing[0].result == 0


SOCKET = {
    # Its own address, to recognise loops; whether the target refuses comes with the send.
    "udp4": ["socket", "connect", "getsockname"],
    # The kernel is to name it; SO_PASSRIGHTS.
    "unix": ["socket", "bind", "setsockopt", "connect", "getsockname"],
}


@needs_refusal
@PAIRS
def test_the_calls_of_a_new_flow(calls, pair):
    (turn,) = calls("first_question", pair)
    made = [*SOCKET[pair[1]], "epoll_ctl"]
    assert names(turn) == ["epoll_wait", "recvmmsg", *made, "sendto"]


def test_a_burst_is_read_at_once_and_sent_at_once(calls):
    """The kernel cuts it into datagrams (GSO): one message each way."""
    asked, answered = calls("burst", ("udp4", "udp4"))
    assert names(asked) == ["epoll_wait", "recvmmsg", "sendmsg"]
    # Replies come in a burst for the first time: have the next one handed over at once.
    assert names(answered) == ["epoll_wait", "recvmmsg", "setsockopt", "sendmsg"]


def test_answers_to_many_clients_leave_together(calls):
    (turn,) = calls("many_clients", ("udp4", "udp4"))
    assert names(turn) == ["epoll_wait", *["recvmmsg"] * 10, "sendmmsg"]


@PAIRS
def test_a_target_that_is_down_costs_nothing_but_waits(calls, pair):
    """What comes stays in the listener's queue."""
    found = names(itertools.chain(*calls("held", pair)))
    assert found == ["epoll_wait"] * 3


if __name__ == "__main__":
    play(*sys.argv[1:])
