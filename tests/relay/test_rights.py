"""File descriptors that a peer sends over a UNIX socket, and whose last close(2) waits for as long
as the peer likes. A thread that other connections wait for must not be the one to close them.

Most tests run in a process of their own, which hangs if a thread of the relay does.
"""

import errno
import os
import resource
import socket
import tempfile

import pytest
from kit.child import in_child
from kit.rig import PATIENCE_S, Rigs
from kit.rights import kernel_refuses, send_slow, thread_ids, waits_in_close
from kit.socket_state import write_error
from kit.sockets import reset
from kit.stepped import Incoming, Outgoing, half_close, open_client
from kit.traffic import payload
from kit.workers import Workers

from proxyd._relay import Refused, SnapshotRows, Terminated, peer_pid, refuse_rights

ORPHAN_SOCKETS_MAX = 4
"""As in relay/quarantine.pxd: sockets without a connection that may wait to be closed."""


class Scene:
    """A rig with a UNIX listener, another connection that must continue, and slow sockets."""

    def __init__(self, rigs, target, workers, options):
        self.rig = rigs("unix", target, **options)
        self.threads_before = thread_ids()
        if workers:
            self.workers = Workers(self.rig, workers)
        self.other = self.rig.link()
        self.slow = []

    def send_slow(self, connection, data, flags=0):
        self.slow.append(send_slow(connection, data, flags))

    def others_go_on(self):
        """Check an existing connection and a new one, in both directions."""
        for link in (self.other, self.rig.link()):
            link.client.send(b"ping")
            assert self.rig.read(link.target, 4) == b"ping"
            link.target.send(b"pong")
            assert self.rig.read(link.client, 4) == b"pong"

    def release(self):
        for slow in self.slow:
            slow.release()

    def until_blocked(self):
        """Wait until a thread of the relay blocks in close(2)."""
        before = self.threads_before

        def blocked():
            return any(waits_in_close(thread) for thread in thread_ids() - before)

        self.rig.until(blocked, "a close that waits")


def play(act, target="tcp4", workers=0, **options):
    """Run `act(scene)` in a process of its own, and check that no fd is left open."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            rigs = Rigs(folder)
            scene = Scene(rigs, target, workers, options)
            act(scene)
            scene.release()
            del scene
            rigs.close()
            assert not rigs.leaked()

    in_child(run, patience=2 * PATIENCE_S)


targets = pytest.mark.parametrize("target", ["tcp4", "unix"])
worker_counts = pytest.mark.parametrize("workers", [0, 2])
forms = pytest.mark.parametrize("may_refuse", [True, False], ids=["refused", "taken"])


# ── inspection ───────────────────────────────────────────────────────────────────────────────────


def snapshot(rig):
    """The rows of a snapshot, and how many are missing."""
    number = rig.relay.start_snapshot()

    def events():
        return [one for one in rig.of_kind(SnapshotRows) if one.number == number]

    rig.until(lambda: any(one.last for one in events()), "the snapshot")
    return [row for one in events() for row in one.rows], events()[-1].missing


@worker_counts
def test_a_snapshot_does_not_wait_for_a_thread_that_blocks(workers):
    """The connection is missing, and is told of again once the thread goes on."""

    def act(scene):
        client, fd = scene.rig.new_client()
        scene.send_slow(client, b"one")
        number = scene.rig.connect(fd)
        scene.rig.accept_at_backend()
        scene.until_blocked()
        for _ in range(2):
            rows, missing = snapshot(scene.rig)
            assert [row.connection for row in rows] == [scene.other.id]
            assert missing == 1
        scene.release()
        scene.rig.until(lambda: snapshot(scene.rig)[1] == 0, "the thread to go on")
        rows, missing = snapshot(scene.rig)
        assert {row.connection: row.thread == -1 for row in rows} == {
            scene.other.id: False,
            number: True,
        }
        scene.rig.relay.terminate(number)
        scene.rig.until_ended(number)
        scene.rig.until(lambda: scene.rig.of_kind(Terminated), "the answer")
        assert scene.rig.of_kind(Terminated)[0].found

    play(act, workers=workers, may_refuse=False)


@worker_counts
def test_a_relay_that_is_dropped_during_a_snapshot_that_its_quarantine_has_missed(workers):
    def act(scene):
        client, fd = scene.rig.new_client()
        scene.send_slow(client, b"one")
        scene.rig.connect(fd)
        scene.rig.accept_at_backend()
        scene.until_blocked()
        assert snapshot(scene.rig)[1] == 1
        scene.rig.relay.start_snapshot()
        scene.release()

    play(act, workers=workers, may_refuse=False)


# ── descriptors that arrive with bytes ───────────────────────────────────────────────────────────


@worker_counts
@targets
@forms
def test_descriptors_that_were_queued_before(way, target, workers, may_refuse):
    """Everything that a client sent before it was accepted arrives, in order."""

    def act(scene):
        client, fd = scene.rig.new_client()
        client.send(b"one ")
        scene.send_slow(client, b"two ")
        client.send(b"three")
        scene.rig.connect(fd)
        target = scene.rig.accept_at_backend()
        assert scene.rig.read(target, 8) == b"one two "
        scene.until_blocked()
        scene.others_go_on()
        scene.release()
        assert scene.rig.read(target, 5) == b"three"
        half_close(client)
        assert scene.rig.read_to_end(target) == (b"", "eof")

    play(act, target, workers, may_refuse=may_refuse, **way)


@targets
def test_descriptors_between_bytes(way, target):
    """They may come at any time if the kernel cannot refuse them. Nothing is read before the test
    has closed its copy, whose close would wait otherwise."""

    def act(scene):
        link = scene.rig.link()
        block = payload(700_000)
        incoming = Incoming(link.target, limit=len(block) + 1)
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
    """If the kernel can refuse them. The connection continues, and is spliced."""
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
    """A listener's SO_PASSCRED is inherited; credentials arrive as descriptors do."""
    rig = rigs("unix", "unix", may_refuse=False)
    before = thread_ids()
    client, fd = rig.new_client()
    borrowed = socket.socket(fileno=os.dup(fd))
    borrowed.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    borrowed.close()
    client.send(b"one")
    rig.connect(fd)
    target = rig.accept_at_backend()
    assert rig.read(target, 3) == b"one"
    client.send(b"two")
    assert rig.read(target, 3) == b"two"
    assert not thread_ids() - before, "nothing was in quarantine"


# ── descriptors that are unread when the socket is closed ────────────────────────────────────────


@forms
def test_refused_clients(may_refuse):
    """Clients over the limit, however many: no more are accepted than can be closed."""

    def act(scene):
        rig = scene.rig
        rig.relay.connections_max = 0
        rig.listener.auto_connect(rig.address)
        clients = [open_client(rig.listen_socket) for _ in range(2 * ORPHAN_SOCKETS_MAX)]
        for client in clients:
            scene.send_slow(client, b"!")
        rig.until(lambda: len(rig.of_kind(Refused)) == ORPHAN_SOCKETS_MAX, "as many as may wait")
        scene.until_blocked()
        assert scene.rig.is_calm(100)
        assert len(rig.of_kind(Refused)) == ORPHAN_SOCKETS_MAX
        scene.other.client.send(b"ping")
        assert rig.read(scene.other.target, 4) == b"ping"
        scene.release()
        rig.until(lambda: len(rig.of_kind(Refused)) == len(clients), "the others")
        for client in clients:
            assert rig.read_to_end(client)[0] == b""
            client.close()
        rig.listener.auto_connect(None)

    play(act, may_refuse=may_refuse)


@worker_counts
def test_a_client_that_the_policy_hangs_up(workers):
    def act(scene):
        client, fd = scene.rig.new_client()
        scene.send_slow(client, b"!")
        scene.rig.relay.hang_up(fd)
        assert scene.rig.read_to_end(client)[0] == b""
        scene.until_blocked()
        scene.others_go_on()
        assert scene.rig.relay.in_quarantine == 1, "it counts towards the limit"
        assert scene.rig.relay.connections == 2, "it is no longer a connection"
        scene.release()
        scene.rig.until(lambda: scene.rig.relay.in_quarantine == 0, "its close")

    play(act, workers=workers)


@worker_counts
def test_a_socket_without_a_place_in_the_limit(workers):
    """A caller of the policy: it takes no place, and only few are left to the quarantine."""

    def act(scene):
        relay = scene.rig.relay
        fds = []
        for number in range(ORPHAN_SOCKETS_MAX + 2):
            client, fd = scene.rig.new_client()
            scene.send_slow(client, b"!")
            closed = relay.discard(fd)
            assert closed == (number < ORPHAN_SOCKETS_MAX)
            assert scene.rig.read_to_end(client)[0] == b""
            fds += [] if closed else [fd]
        scene.until_blocked()
        assert relay.in_quarantine == 0
        scene.others_go_on()
        assert not relay.discard(fds[0])
        plain, fd = scene.rig.new_client()
        assert relay.discard(fd), "what has no descriptors needs no quarantine"
        assert scene.rig.read_to_end(plain)[0] == b""
        scene.release()
        scene.rig.until(lambda: relay.discard(fds[0]), "room in the quarantine")
        scene.rig.until(lambda: relay.discard(fds[1]), "room for the other")
        assert relay.in_quarantine == 0

    play(act, workers=workers)


def test_the_policy_can_do_without_credentials(rigs):
    """refuse_rights() asks for none, whatever the listener had."""
    rig = rigs("unix", "tcp4")
    client, fd = rig.new_client()
    with socket.socket(socket.AF_UNIX, fileno=os.dup(fd)) as served:
        served.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        client.send(b"x")
        assert served.recvmsg(1, 0, socket.MSG_PEEK)[2] & socket.MSG_CTRUNC
        refuse_rights(fd)
        assert served.recvmsg(1, 0, socket.MSG_PEEK)[2] == 0
        assert peer_pid(fd) == os.getpid()
    if kernel_refuses():
        with pytest.raises(PermissionError):
            send_slow(client, b"!")
    rig.relay.hang_up(fd)


@pytest.mark.parametrize("data", [b"", b"unread"])
def test_what_a_client_sees_of_a_close(rigs, data):
    """What close(2) alone would show: ECONNRESET if there was unread data."""
    rig = rigs("unix", "tcp4")
    client, fd = rig.new_client()
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
    """It ends a peek at the queue; what is behind it must be examined too."""
    rig = rigs("unix", "tcp4")
    client, fd = rig.new_client()
    threads = thread_ids()
    for data, flags in [(before, 0), (b"!", socket.MSG_OOB), (after, 0)]:
        if data:
            client.send(data, flags)
    rig.relay.hang_up(fd)
    assert rig.relay.in_quarantine == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert not thread_ids() - threads


@pytest.mark.parametrize("place", ["before", "with", "behind"])
def test_descriptors_and_an_urgent_byte(place):
    def act(scene):
        client, fd = scene.rig.new_client()
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
    """Longer than one peek can show."""
    rig = rigs("unix", "tcp4", client_buffers={"send_buffer": 4 << 20})
    client, fd = rig.new_client()
    outgoing = Outgoing(client, payload(1_500_000))
    outgoing.step()
    assert len(outgoing.rest) < 1_000_000, "the queue is longer than one peek can show"
    rig.relay.hang_up(fd)
    assert rig.relay.in_quarantine == 0
    with pytest.raises(ConnectionResetError):
        client.recv(1)


@worker_counts
@forms
def test_a_connection_that_ends_before_they_are_read(workers, may_refuse):
    """The target resets while the client's stream stalls, with descriptors at its end."""

    def act(scene):
        client, fd = scene.rig.new_client()
        incoming = Outgoing(client, payload(100_000))
        incoming.step()
        scene.send_slow(client, b"!")
        number = scene.rig.connect(fd)
        target = scene.rig.accept_at_backend()
        reset(target)
        scene.rig.until(lambda: scene.rig.ended(number), "the end")
        scene.until_blocked()
        scene.others_go_on()

    play(act, workers=workers, may_refuse=may_refuse)


@worker_counts
@forms
def test_the_end_of_the_program(workers, may_refuse):
    """close_all() with descriptors queued and a thread that blocks already; then the exit."""

    def run():
        with tempfile.TemporaryDirectory() as folder:
            scene = Scene(Rigs(folder), "tcp4", workers, {"may_refuse": may_refuse})
            for _ in range(3):
                client, fd = scene.rig.new_client()
                scene.send_slow(client, b"!")
                scene.rig.connect(fd)
            scene.until_blocked()
            client, fd = scene.rig.new_client()
            scene.send_slow(client, b"!")
            assert scene.rig.relay.close_all() >= 3
            scene.rig.relay.hang_up(fd)
            scene.rig.relay.close_all()
            del scene.rig.relay, scene.rig.listener

    in_child(run, patience=2 * PATIENCE_S)


# ── the quarantine's thread cannot be started ────────────────────────────────────────────────────


@forms
def test_no_descriptors_left_for_the_thread(may_refuse):
    """The client waits until there are some, at no CPU time, while other connections continue."""

    def act(scene):
        client, fd = scene.rig.new_client()
        scene.send_slow(client, b"at last")
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        scene.rig.connect(fd)
        target = scene.rig.accept_at_backend()
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
    """TasksMax=: the same, and for a socket that is only to be closed."""

    def act(scene):
        user = os.geteuid()
        client, fd = scene.rig.new_client()
        scene.send_slow(client, b"!")
        refused, refused_fd = scene.rig.new_client()
        scene.send_slow(refused, b"!")
        before = thread_ids()
        new = scene.rig.link()
        soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (0, hard))
        if user == 0:  # the limit does not apply to root
            os.setresuid(65534, 65534, 0)
        scene.rig.connect(fd)
        scene.rig.relay.hang_up(refused_fd)
        scene.rig.accept_at_backend()
        assert scene.rig.is_calm(50)
        assert not thread_ids() - before
        assert scene.rig.read_to_end(refused)[0] == b"", "it sees its end"
        client.close()
        for _ in range(20):
            scene.rig.turn()
        for link in (scene.other, new):
            link.client.send(b"ping")
            assert scene.rig.read(link.target, 4) == b"ping"
        assert scene.rig.is_calm(50)
        assert (scene.rig.relay.connections, scene.rig.relay.in_quarantine) == (3, 1), (
            "both count towards the limit"
        )
        os.setresuid(user, user, user)
        resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard))
        scene.until_blocked()
        scene.release()
        scene.rig.until(lambda: scene.rig.relay.connections == 2, "the end of the connection")
        scene.rig.until(lambda: scene.rig.relay.in_quarantine == 0, "the close of the other")

    play(act)
