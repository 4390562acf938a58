"""File descriptors that a peer sends over a UNIX socket, and whose last close(2) waits for as long
as the peer likes: no thread that others wait for may be the one to close them.

Each runs in a process of its own, which hangs where a relay's thread does.
"""

import errno
import os
import resource
import socket
import tempfile

import pytest
from kit.child import in_child
from kit.crew import Crewed
from kit.rig import PATIENCE_S, Rigs
from kit.rights import kernel_refuses, send_slow, tasks
from kit.socket_state import write_error
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, half_close, open_client
from kit.traffic import payload

from proxyd._relay import Refused

STRAYS_MOST = 4
"""So many sockets that wait to be closed are kept beside those of connections."""


class Scene:
    """A rig with a UNIX listener, another connection that has to go on, and slow sockets."""

    def __init__(self, rigs, target, threads, options):
        self.rig = rigs("unix", target, **options)
        self.threads_before = tasks()
        if threads:
            self.crew = Crewed(self.rig, threads)
        self.other = self.rig.link()
        self.slow = []

    def send_slow(self, connection, data, flags=0):
        self.slow.append(send_slow(connection, data, flags))

    def others_go_on(self):
        """Both ways, over a connection that was there before and over a new one."""
        for link in (self.other, self.rig.link()):
            link.client.send(b"ping")
            assert self.rig.read(link.target, 4) == b"ping"
            link.target.send(b"pong")
            assert self.rig.read(link.client, 4) == b"pong"

    def release(self):
        for slow in self.slow:
            slow.release()

    def until_blocked(self):
        """Until a thread has begun to wait; the rest of the program goes on."""
        before = self.threads_before

        def blocked():
            return any(waits_in_close(task) for task in tasks() - before)

        self.rig.until(blocked, "a close that waits")


def waits_in_close(task):
    try:
        with open(f"/proc/self/task/{task}/wchan") as wchan:
            place = wchan.read()
    except OSError:
        return False
    return place not in ("0", "") and "epoll" not in place and "ep_poll" not in place


def play(act, target="tcp4", threads=0, **options):
    """`act(scene)` in a process of its own, in which nothing is left in the end."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            rigs = Rigs(folder)
            scene = Scene(rigs, target, threads, options)
            act(scene)
            scene.release()
            del scene
            rigs.close()
            assert not rigs.leaked()

    in_child(run, patience=2 * PATIENCE_S)


targets = pytest.mark.parametrize("target", ["tcp4", "unix"])
threads = pytest.mark.parametrize("threads", [0, 2])
forms = pytest.mark.parametrize("may_refuse", [True, False], ids=["refused", "taken"])


# ── what comes with bytes ────────────────────────────────────────────────────────────────────────


@threads
@targets
@forms
def test_descriptors_that_were_queued_before(way, target, threads, may_refuse):
    """What a client has sent before it was accepted arrives, all of it and in order."""

    def act(scene):
        client, fd = scene.rig.knock()
        client.send(b"one ")
        scene.send_slow(client, b"two ")
        client.send(b"three")
        scene.rig.connect(fd)
        target = scene.rig.meet()
        assert scene.rig.read(target, 8) == b"one two "
        scene.until_blocked()
        scene.others_go_on()
        scene.release()
        assert scene.rig.read(target, 5) == b"three"
        half_close(client)
        assert scene.rig.read_to_end(target) == (b"", "eof")

    play(act, target, threads, may_refuse=may_refuse, **way)


@targets
def test_descriptors_between_bytes(way, target):
    """Where the kernel cannot refuse them, at any time. Nobody reads before the test's copy is
    closed: otherwise that would wait."""

    def act(scene):
        link = scene.rig.link()
        block = payload(700_000)
        incoming = Incoming(link.target, most=len(block) + 1)
        scene.rig.run(Outgoing(link.client, block), what="a stream")
        scene.send_slow(link.client, b"!")
        link.client.send(b"?")
        scene.rig.run(incoming, what="the stream")
        assert bytes(incoming.data) == block + b"!"
        scene.until_blocked()
        scene.others_go_on()
        scene.release()
        assert scene.rig.read(link.target, 1) == b"?"

    play(act, target, may_refuse=False, **way)


def test_descriptors_from_the_target(way):
    def act(scene):
        link = scene.rig.link()
        scene.send_slow(link.target, b"with one")
        assert scene.rig.read(link.client, 8) == b"with one"
        scene.until_blocked()
        scene.others_go_on()
        scene.release()
        reset(link.client)
        scene.rig.until(lambda: write_error(link.target) != 0, "the end")

    play(act, "unix", may_refuse=False, **way)


@pytest.mark.skipif(not kernel_refuses(), reason="SO_PASSRIGHTS: Linux 6.16")
@pytest.mark.parametrize("side", ["client", "target"])
def test_descriptors_are_refused(rigs, way, side):
    """Where the kernel can. The connection goes on, and is spliced."""
    rig = rigs("unix", "unix", **way)
    link = rig.link()
    sender, receiver = link.client, link.target
    if side == "target":
        sender, receiver = receiver, sender
    with pytest.raises(OSError, match="not permitted"):
        socket.send_fds(sender, [b"refused"], [0])
    block = payload(3_000_000)
    incoming = Incoming(receiver)
    rig.run(Outgoing(sender, block, half_close), incoming, what="a stream")
    assert incoming.data == block
    assert (rig.totals().spliced > 0) == way.get("may_splice", True)


def test_nothing_is_spliced_that_may_have_descriptors(rigs):
    rig = rigs("unix", "unix", may_refuse=False)
    link = rig.link()
    block = payload(3_000_000)
    incoming = Incoming(link.target)
    rig.run(Outgoing(link.client, block, half_close), incoming, what="a stream")
    assert incoming.data == block
    assert rig.totals().spliced == 0


def test_credentials_are_no_descriptors(rigs):
    """A listener's SO_PASSCRED is inherited, and they are told in the same way."""
    rig = rigs("unix", "unix", may_refuse=False)
    before = tasks()
    client, fd = rig.knock()
    borrowed = socket.socket(fileno=os.dup(fd))
    borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    borrowed.close()
    client.send(b"one")
    rig.connect(fd)
    target = rig.meet()
    assert rig.read(target, 3) == b"one"
    client.send(b"two")
    assert rig.read(target, 3) == b"two"
    assert tasks() == before, "nothing was in quarantine"


# ── what is closed with it unread ────────────────────────────────────────────────────────────────


@forms
def test_refused_clients(may_refuse):
    """Those over the limit, in whatever number: no more are accepted than can be closed."""

    def act(scene):
        rig = scene.rig
        rig.relay.connections_max = 0
        rig.gate.auto_connect(rig.address)
        clients = [open_client(rig.door) for _ in range(2 * STRAYS_MOST)]
        for client in clients:
            scene.send_slow(client, b"!")
        rig.until(lambda: len(rig.of_kind(Refused)) == STRAYS_MOST, "as many as may wait")
        scene.until_blocked()
        assert scene.rig.is_calm(100)
        assert len(rig.of_kind(Refused)) == STRAYS_MOST
        scene.other.client.send(b"ping")
        assert rig.read(scene.other.target, 4) == b"ping"
        scene.release()
        rig.until(lambda: len(rig.of_kind(Refused)) == len(clients), "the others")
        for client in clients:
            assert rig.read_to_end(client)[0] == b""
            client.close()
        rig.gate.auto_connect(None)

    play(act, may_refuse=may_refuse)


@threads
def test_a_client_that_python_hangs_up(threads):
    def act(scene):
        client, fd = scene.rig.knock()
        scene.send_slow(client, b"!")
        scene.rig.relay.hang_up(fd)
        assert scene.rig.read_to_end(client)[0] == b""
        scene.until_blocked()
        scene.others_go_on()
        assert scene.rig.relay.in_quarantine == 1, "it keeps its place"
        assert scene.rig.relay.connections == 2, "no longer a connection"
        scene.release()
        scene.rig.until(lambda: scene.rig.relay.in_quarantine == 0, "its close")

    play(act, threads=threads)


@pytest.mark.parametrize("data", [b"", b"unread"])
def test_what_a_client_sees_of_a_close(rigs, data):
    """The same as of close(2) alone: with unread data it is ECONNRESET."""
    rig = rigs("unix", "tcp4")
    client, fd = rig.knock()
    if data:
        client.send(data)
    rig.relay.hang_up(fd)
    if data:
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    else:
        assert client.recv(1) == b""
    assert write_error(client) == errno.EPIPE


@pytest.mark.parametrize("before", [b"", b"unread "])
@pytest.mark.parametrize("after", [b"", b" more"])
def test_an_urgent_byte_is_no_descriptor(rigs, before, after):
    """It ends a look at the queue, and has to be looked behind."""
    rig = rigs("unix", "tcp4")
    client, fd = rig.knock()
    threads = tasks()
    for data, flags in [(before, 0), (b"!", socket.MSG_OOB), (after, 0)]:
        if data:
            client.send(data, flags)
    rig.relay.hang_up(fd)
    assert rig.relay.in_quarantine == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert tasks() == threads


@pytest.mark.parametrize("place", ["before", "with", "behind"])
def test_descriptors_and_an_urgent_byte(place):
    def act(scene):
        client, fd = scene.rig.knock()
        client.send(b"plain ")
        if place == "before":
            scene.send_slow(client, b"with one ")
        if place == "with":
            scene.send_slow(client, b"!", socket.MSG_OOB)
        else:
            client.send(b"!", socket.MSG_OOB)
        if place == "behind":
            scene.send_slow(client, b" with one")
        scene.rig.relay.hang_up(fd)
        assert scene.rig.relay.in_quarantine == 1
        scene.until_blocked()
        scene.others_go_on()

    play(act)


def test_a_long_queue_without_descriptors(rigs):
    """Longer than one look."""
    rig = rigs("unix", "tcp4", client_buffers={"send_buffer": 4 << 20})
    client, fd = rig.knock()
    outgoing = Outgoing(client, payload(1_500_000))
    outgoing.step()
    assert len(outgoing.rest) < 1_000_000, "more than a look shows is queued"
    rig.relay.hang_up(fd)
    assert rig.relay.in_quarantine == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)


@threads
@forms
def test_a_connection_that_ends_before_they_are_read(threads, may_refuse):
    """Its target resets while the client's stream stalls, with descriptors at its end."""

    def act(scene):
        client, fd = scene.rig.knock()
        incoming = Outgoing(client, payload(100_000))
        incoming.step()
        scene.send_slow(client, b"!")
        number = scene.rig.connect(fd)
        target = scene.rig.meet()
        reset(target)
        scene.rig.until(lambda: scene.rig.ended(number), "the end")
        scene.until_blocked()
        scene.others_go_on()

    play(act, threads=threads, may_refuse=may_refuse)


@threads
@forms
def test_the_end_of_the_program(threads, may_refuse):
    """close_all() with descriptors queued and a thread that waits already; and then the exit."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            scene = Scene(Rigs(folder), "tcp4", threads, {"may_refuse": may_refuse})
            for _ in range(3):
                client, fd = scene.rig.knock()
                scene.send_slow(client, b"!")
                scene.rig.connect(fd)
            scene.until_blocked()
            client, fd = scene.rig.knock()
            scene.send_slow(client, b"!")
            assert scene.rig.relay.close_all() >= 3
            scene.rig.relay.hang_up(fd)
            scene.rig.relay.close_all()
            del scene.rig.relay, scene.rig.gate

    in_child(run, patience=2 * PATIENCE_S)


# ── no thread to be had ──────────────────────────────────────────────────────────────────────────


@forms
def test_no_descriptors_left_for_the_thread(may_refuse):
    """Then the client waits, calmly, and others go on; until there are some."""

    def act(scene):
        client, fd = scene.rig.knock()
        scene.send_slow(client, b"at last")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        scene.rig.connect(fd)
        target = scene.rig.meet()
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        for _ in range(20):
            scene.rig.turn()
        assert scene.rig.is_calm(50)
        scene.other.client.send(b"ping")
        assert scene.rig.read(scene.other.target, 4) == b"ping"
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert scene.rig.read(target, 7) == b"at last"
        scene.until_blocked()
        scene.others_go_on()

    play(act, may_refuse=may_refuse)


def test_no_thread():
    """TasksMax=: the same, also for a socket that is only to be closed."""

    def act(scene):
        user = os.geteuid()
        client, fd = scene.rig.knock()
        scene.send_slow(client, b"!")
        refused, refused_fd = scene.rig.knock()
        scene.send_slow(refused, b"!")
        before = tasks()
        new = scene.rig.link()
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
        if user == 0:  # whom no such limit concerns
            os.setresuid(65534, 65534, 0)
        scene.rig.connect(fd)
        scene.rig.relay.hang_up(refused_fd)
        scene.rig.meet()
        assert scene.rig.is_calm(50)
        assert tasks() == before
        assert scene.rig.read_to_end(refused)[0] == b"", "it sees its end"
        client.close()
        for _ in range(20):
            scene.rig.turn()
        for link in (scene.other, new):
            link.client.send(b"ping")
            assert scene.rig.read(link.target, 4) == b"ping"
        assert scene.rig.is_calm(50)
        assert (scene.rig.relay.connections, scene.rig.relay.in_quarantine) == (3, 1), (
            "both keep their places"
        )
        os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        scene.until_blocked()
        scene.release()
        scene.rig.until(lambda: scene.rig.relay.connections == 2, "the end of the connection")
        scene.rig.until(lambda: scene.rig.relay.in_quarantine == 0, "the close of the other")

    play(act)
