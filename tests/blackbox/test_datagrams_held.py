"""Datagrams whose target cannot be reached yet: they wait in the kernel's queue."""

import contextlib
import fcntl
import signal
import socket
import termios

import pytest
from kit.datagrams import greet, status
from kit.differences import differs
from kit.name_server import NameServer
from kit.namespaces import with_hosts, with_name_server
from kit.waiting import never_within, wait_until

pytestmark = differs("original", reason="forwards no datagrams", run=False)

REFUSED = "Failed to reach remote host: Connection refused"
MISSING = "Failed to reach remote host: No such file or directory"
HOLDING = ", holding datagrams until it answers."


def numbered(first, last):
    return [b"%d" % number for number in range(first, last)]


@pytest.mark.parametrize("family", ["udp4", "udp6", "unix", "abstract"])
def test_datagrams_wait_for_a_target(datagrams, family):
    """They arrive once it is there, all of them, in order, and once."""
    server, listener = datagrams.absent(family), datagrams.listener()
    proxy = datagrams.launch(server.text, listeners=[listener])
    client = datagrams.client(listener)
    for number in numbered(0, 50):
        client.send(number)
    why = MISSING if family == "unix" else REFUSED
    proxy.wait_for_log(f"{why} ({server.text}){HOLDING}")
    status(proxy, f"datagrams waiting for {server.text}, down since ")
    server.start()
    flow = server.expect(*numbered(0, 50))
    server.answer(b"answer", flow)
    assert client.recv(100) == b"answer"
    proxy.wait_for_log(f"{server.text} answers after ")
    assert server.has_nothing()


def test_the_datagram_that_has_started_the_program_waits(datagrams):
    """Socket activation: it is in the queue before the program is there, and before its target."""
    server, listener = datagrams.absent(), datagrams.listener()
    client = datagrams.client(listener)
    client.send(b"first")
    proxy = datagrams.launch("--exit-idle-time=0", server.text, listeners=[listener])
    proxy.wait_for_log(HOLDING)
    server.start()
    flow = server.expect(b"first")
    server.answer(b"answer", flow)
    assert client.recv(100) == b"answer"


@pytest.mark.parametrize("family", ["udp4", "unix"])
def test_a_target_that_is_restarted(datagrams, family):
    """What comes while it is known to be down waits; nothing is sent twice."""
    listener, server = datagrams.forward("udp4", family)
    client = datagrams.client(listener)
    for turn in range(3):
        client.send(b"before %d" % turn)
        server.expect(b"before %d" % turn)
        server.stop()
        client.send(b"lost?")
        settle(datagrams.stage.proxy, listener)
        for number in range(5):
            client.send(b"during %d %d" % (turn, number))
        settle(datagrams.stage.proxy)
        server.start()
        if family == "unix":  # where a datagram that cannot be delivered is refused at once
            server.expect(b"lost?")
        server.expect(*[b"during %d %d" % (turn, number) for number in range(5)])
    assert server.has_nothing()


def settle(proxy, listener=None):
    """Wait until the proxy has done all it can with what was sent."""

    def idle():
        queued = fcntl.ioctl(listener, termios.FIONREAD, bytes(4)) if listener else bytes(4)
        return not any(queued) and proxy.waits_for_events()

    wait_until(idle, "an empty queue")


def test_clients_of_several_listeners_wait_for_one_target(datagrams):
    """Each of them is served in the end; the outage is logged once."""
    server = datagrams.absent()
    listeners = [datagrams.listener("udp4"), datagrams.listener("unix")]
    proxy = datagrams.launch(server.text, listeners=listeners)
    for listener in listeners:
        client = datagrams.client(listener)
        for number in range(3):
            client.send(b"%d" % number)
    proxy.wait_for_log(HOLDING)
    server.start()
    assert sorted(server.receive()[0] for _ in range(6)) == sorted(numbered(0, 3) * 2)
    assert len(proxy.log_lines(HOLDING)) == 1


def test_another_target_is_not_held_up(datagrams):
    """The listeners of a target that is up go on."""
    down, up = datagrams.absent(), datagrams.echo()
    listeners = [datagrams.listener(), datagrams.listener()]
    datagrams.launch(f"a={down.text}", f"b={up.text}", listeners=listeners, names="a:b")
    datagrams.client(listeners[0]).send(b"waits")
    datagrams.stage.proxy.wait_for_log(HOLDING)
    client = datagrams.client(listeners[1])
    for _ in range(3):
        greet(client)


def test_waiting_uses_no_processor_time(datagrams):
    """The listener stays readable all the time."""
    server, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch(server.text, listeners=[listener])
    client = datagrams.client(listener)
    for number in numbered(0, 50):
        client.send(number)
    proxy.wait_for_log(HOLDING)
    assert proxy.cpu_demand() < 0.5


# ── the time that they wait ───────────────────────────────────────────────────────────────────────


def test_after_the_connect_timeout_all_are_dropped_with_one_line(datagrams):
    """The hand and the queue; later ones wait again."""
    server, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch("--connect-timeout=300ms", server.text, listeners=[listener])
    client = datagrams.client(listener)
    for number in numbered(0, 20):
        client.send(number)
    proxy.wait_for_log("dropping")
    (line,) = proxy.log_lines("dropping")
    assert line == f"{REFUSED} ({server.text}), dropping 20 datagrams."
    status(proxy, "20 datagrams dropped")
    server.start()
    client.send(b"later")
    server.expect(b"later")
    assert server.has_nothing()


def test_a_connect_timeout_of_0_holds_nothing(datagrams):
    """A datagram that is refused is dropped; the next one is tried."""
    server, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch("--connect-timeout=0", server.text, listeners=[listener])
    client = datagrams.client(listener)
    client.send(b"lost")
    proxy.wait_for_log(f"{REFUSED} ({server.text})")
    assert not proxy.log_lines("holding")
    server.start()

    def arrives():
        client.send(b"there")
        return not server.has_nothing(0.1)

    wait_until(arrives, "a datagram at the target")
    assert server.receive()[0] == b"there"


def test_infinity_waits_for_longer_than_the_default_pace(datagrams):
    """No line about dropped datagrams; they arrive in the end."""
    server, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch("--connect-timeout=infinity", server.text, listeners=[listener])
    datagrams.client(listener).send(b"patient")
    proxy.wait_for_log(HOLDING)
    never_within(1.0, lambda: proxy.log_lines("dropping"), "dropped")
    server.start()
    server.expect(b"patient")


def test_an_error_that_cannot_pass_drops_at_once(datagrams):
    """A stream socket at the path: nothing will ever be sent there."""
    path = datagrams.stage.path("stream")
    with socket.socket(socket.AF_UNIX) as stream:
        stream.bind(path)
        stream.listen()
        listener = datagrams.listener()
        proxy = datagrams.launch(path, listeners=[listener])
        datagrams.client(listener).send(b"lost")
        proxy.wait_for_log(
            f"Failed to reach remote host: Protocol wrong type for socket ({path}), dropping"
        )


def test_what_is_in_hand_at_the_end_is_told(datagrams):
    """It cannot be put back into the queue; the rest stays there."""
    server, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch(server.text, listeners=[listener])
    client = datagrams.client(listener)
    for number in numbered(0, 10):
        client.send(number)
    proxy.wait_for_log(HOLDING)
    proxy.send_signal(signal.SIGTERM)
    assert proxy.wait() == 0
    assert proxy.log_lines("Stopped; ")[0].endswith("1 held datagram was lost.")
    listener.settimeout(0)
    assert [listener.recv(100) for _ in range(9)] == numbered(1, 10)


@pytest.mark.parametrize("listen", ["udp4", "unix"])
def test_a_unix_target_that_does_not_read(datagrams, listen):
    """Its queue is full: what comes waits, and arrives in order once it reads."""
    listener, server = datagrams.forward(listen, "unix")
    client = datagrams.client(listener)
    client.settimeout(None if listen == "udp4" else 0.3)
    sent = []
    with contextlib.suppress(TimeoutError):
        for number in numbered(0, 150):
            client.send(number)
            sent.append(number)
    assert len(sent) > 20
    settle(datagrams.stage.proxy)
    assert datagrams.stage.proxy.cpu_demand() < 0.5
    server.expect(*sent)
    assert server.has_nothing()


def test_a_unix_target_that_does_not_read_for_too_long(datagrams):
    """What waits is dropped, and later datagrams arrive."""
    listener, server = datagrams.forward("udp4", "unix", "--connect-timeout=500ms")
    client = datagrams.client(listener)
    for number in numbered(0, 100):
        client.send(number)
    datagrams.stage.proxy.wait_for_log(", dropping ")
    received = 0
    while not server.has_nothing():
        assert server.receive()[0] == b"%d" % received
        received += 1
    assert 0 < received < 100
    client.send(b"later")
    server.expect(b"later")


# ── names ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def names():
    """A name server."""
    server = NameServer()
    yield server
    server.close()


def start(datagrams, names, target, *arguments):
    """Start the program with this target and name server; the listener."""
    listener = datagrams.listener()
    prefix = with_name_server(datagrams.stage.directory, names.address)
    datagrams.launch(*arguments, target, listeners=[listener], prefix=prefix)
    return listener


def test_a_name_is_looked_up(datagrams):
    server, listener = datagrams.target(), datagrams.listener()
    prefix = with_hosts(datagrams.stage.directory, ["127.0.0.1 known.test"])
    datagrams.launch(f"known.test:{server.port()}", listeners=[listener], prefix=prefix)
    client = datagrams.client(listener)
    for number in numbered(0, 20):
        client.send(number)
    server.expect(*numbered(0, 20))


def test_a_name_that_does_not_exist_yet_is_waited_for(datagrams, names):
    """As for streams."""
    server = datagrams.target()
    listener = start(datagrams, names, f"later.test:{server.port()}")
    client = datagrams.client(listener)
    for number in numbered(0, 5):
        client.send(number)
    datagrams.stage.proxy.wait_for_log("Failed to resolve host: ")
    assert datagrams.stage.proxy.log_lines(HOLDING)
    names.zone["later.test"] = ["127.0.0.1"]
    server.expect(*numbered(0, 5))


def test_the_first_address_that_answers_is_used(datagrams, names):
    """An address that refuses is left for the next one."""
    server = datagrams.target()
    names.zone["two.test"] = ["127.0.0.2", "127.0.0.1"]
    listener = start(datagrams, names, f"two.test:{server.port()}")
    client = datagrams.client(listener)
    for number in numbered(0, 5):
        client.send(number)
    server.expect(*numbered(0, 5))


def test_new_flows_go_to_a_new_address(datagrams, names):
    """While datagrams pass, the name is looked up again; flows that there are stay."""
    old = datagrams.target(host="127.0.0.2")
    new = datagrams.target(host="127.0.0.3", port=old.port())
    names.zone["moves.test"] = ["127.0.0.2"]
    listener = start(datagrams, names, f"moves.test:{old.port()}")
    first = datagrams.client(listener)
    first.send(b"old")
    flow = old.expect(b"old")
    names.zone["moves.test"] = ["127.0.0.3"]

    def moved():
        first.send(b"still")  # datagrams pass: only then names are looked up
        datagrams.client(listener).send(b"new?")
        return not new.has_nothing(0.05)

    wait_until(moved, "a new flow at the new address")
    old.answer(b"answer", flow)
    assert first.recv(100) == b"answer"
    old.expect(b"still")


def test_a_target_that_has_moved_is_found(datagrams, names):
    """The old address refuses, and the name has another one by then."""
    old = datagrams.target(host="127.0.0.2")
    new = datagrams.target(host="127.0.0.3", port=old.port())
    names.zone["moves.test"] = ["127.0.0.2"]
    listener = start(datagrams, names, f"moves.test:{old.port()}")
    client = datagrams.client(listener)
    client.send(b"old")
    old.expect(b"old")
    names.zone["moves.test"] = ["127.0.0.3"]
    old.stop()
    client.send(b"lost")
    settle(datagrams.stage.proxy, listener)
    client.send(b"moved")
    new.expect(b"moved")


def test_without_a_name_server_nothing_is_sent_twice(datagrams, names):
    """A look-up that fails is not an answer: the last address is used."""
    server = datagrams.target()
    names.zone["known.test"] = ["127.0.0.1"]
    listener = start(datagrams, names, f"known.test:{server.port()}")
    client = datagrams.client(listener)
    client.send(b"1")
    server.expect(b"1")
    names.zone["known.test"] = 2  # SERVFAIL
    never_within(1.2, datagrams.stage.proxy.has_ended, "the end")
    client.send(b"2")
    server.expect(b"2")
