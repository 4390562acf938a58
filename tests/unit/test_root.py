"""Root's queue: which generation counts, and that looking takes nothing out."""

import os
import socket

import pytest
from kit.child import in_child

from proxyd.continuity import fd_queue, root
from proxyd.continuity.root import Root


def open_fds():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture(autouse=True)
def no_leak():
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def ours():
    one = root.make()
    yield one
    one.close()


def file_of(name):
    fd = os.memfd_create(name)
    os.write(fd, name.encode())
    return fd


def add(one, *messages):
    """Send (data, number of descriptors); each of them is a file with the data as its content."""
    for data, count in messages:
        fds = [file_of(f"{data} {n}") for n in range(count)]
        fd_queue.send(one.sender, [(data.encode(), fds)])
        for fd in fds:
            os.close(fd)


def content(fd):
    return os.pread(fd, 100, 0).decode()


def begin(one):
    """Begin a generation, whose slate tells its number."""
    slate = file_of(f"slate {one.generation + 1}")
    one.begin(slate)
    os.close(slate)


def heir(one):
    """What the next process has of it."""
    return Root(socket.socket(fileno=os.dup(one.receiver.fileno())), None)


def found(one):
    """(number, slate, pages) of the generation that counts; None without one. Looked at twice, by
    two processes."""
    results = []
    for _ in range(2):
        other = heir(one)
        generation = other.read()
        result = None
        if generation is not None:
            pages = [content(fd) for fd in generation.pages]
            result = generation.number, content(generation.slate), pages
            generation.close()
        results.append(result)
        other.close()
    assert results[0] == results[1]
    return results[0]


def test_nothing(ours):
    assert found(ours) is None


def test_a_generation(ours):
    begin(ours)
    add(ours, ("P 1 1", 2), ("P 1 2", 2))
    assert found(ours) is None
    ours.commit()
    assert found(ours) == (1, "slate 1", ["P 1 1 0", "P 1 2 0"])
    add(ours, ("P 1 3", 2))
    assert found(ours) == (1, "slate 1", ["P 1 1 0", "P 1 2 0", "P 1 3 0"])


def test_the_next_one(ours):
    """It counts once it is complete, and then the one before is taken out."""
    begin(ours)
    ours.commit()
    add(ours, ("P 1 1", 2))
    other = heir(ours)
    other.read().close()
    begin(other)
    add(other, ("P 2 1", 2))
    assert found(ours) == (1, "slate 1", ["P 1 1 0"])
    other.commit()
    assert found(ours) == (2, "slate 2", ["P 2 1 0"])
    assert ours.receiver.recv(100) == b"S 2"
    other.close()


def test_one_that_was_never_completed(ours):
    """Its process was killed while it recovered, and the one after it begins once more."""
    begin(ours)
    ours.commit()
    for number in (2, 3):
        other = heir(ours)
        other.read().close()
        begin(other)
        assert other.generation == number
        add(other, (f"P {number} 1", 2))
        assert found(ours) == (1, "slate 1", [])
        other.close()
    last = heir(ours)
    last.read().close()
    begin(last)
    last.commit()
    assert found(ours) == (4, "slate 4", [])
    last.close()


def test_killed_while_the_old_one_is_taken_out(ours):
    begin(ours)
    ours.commit()
    add(ours, ("P 1 1", 2))
    begin(ours)
    fd_queue.send(ours.sender, [(b"C 2 0", [])])
    fd_queue.drop(ours.receiver, 2)
    assert found(ours) == (2, "slate 2", [])


def attempts(one):
    """As the next process finds them."""
    other = heir(one)
    generation = other.read()
    if generation is not None:
        generation.close()
    other.close()
    return other.attempts


def test_attempts(ours):
    """They are counted, whether or not they got as far as a generation, until one has lasted."""
    begin(ours)
    ours.commit()
    for number in range(6):
        assert attempts(ours) == number
        other = heir(ours)
        other.read().close()
        other.attempt()
        if number % 2:
            begin(other)
        if number % 3 == 2:
            begin(other)
            other.commit()
        assert other.attempts == number + 1
        other.close()
    other = heir(ours)
    other.read().close()
    other.attempt()
    begin(other)
    other.commit()
    assert attempts(ours) == 7
    other.last()
    assert attempts(ours) == other.attempts == 0
    other.close()
    assert ours.receiver.recv(100) == b"S 7"


def test_attempts_at_what_is_given_up(ours):
    begin(ours)
    ours.commit()
    ours.attempt()
    ours.empty()
    assert ours.attempts == attempts(ours) == 0


def test_empty(ours):
    begin(ours)
    ours.commit()
    ours.empty()
    assert found(ours) is None
    begin(ours)
    ours.commit()
    assert found(ours) == (2, "slate 2", [])


GARBAGE = ["x", "S", "S 1 2", "S x", "P 1", "P 1 x", "C", "C 1", "C -1 0", "C 9 0", "A 1", "L 1"]


@pytest.mark.parametrize("data", GARBAGE)
def test_garbage_is_skipped(ours, data):
    begin(ours)
    ours.commit()
    add(ours, (data, 3), (data, 0))
    assert found(ours) is not None


def test_a_page_of_another_generation(ours):
    begin(ours)
    ours.commit()
    add(ours, ("P 7 1", 2))
    assert found(ours) == (1, "slate 1", [])


@pytest.mark.parametrize("looks", range(7))
def test_a_look_that_fails(ours, monkeypatch, looks):
    """Nothing stays open: as long as any process has what is there, its peers see no end."""
    begin(ours)
    add(ours, ("P 1 1", 2))
    ours.commit()
    begin(ours)
    add(ours, ("P 2 1", 2))
    left = iter(range(looks))
    look = fd_queue.look

    def fail_in_the_end(*arguments):
        if next(left, None) is None:
            raise OSError
        return look(*arguments)

    monkeypatch.setattr(fd_queue, "look", fail_in_the_end)
    other = heir(ours)
    if looks < 6:
        with pytest.raises(OSError, match="^$"):
            other.read()
    else:
        other.read().close()
    other.close()


def test_a_sending_end_that_is_none(ours):
    slate = file_of("slate")
    fd_queue.send(ours.sender, [(b"S 1", [slate, slate])])
    os.close(slate)
    other = heir(ours)
    with pytest.raises(OSError, match="not a socket|non-socket|Socket operation"):
        other.read()
    other.close()


def test_the_sending_end_is_found(ours):
    begin(ours)
    ours.commit()
    other = heir(ours)
    other.read().close()
    add(other, ("P 1 5", 2))
    assert found(ours) == (1, "slate 1", ["P 1 5 0"])
    other.close()


def test_without_a_sending_end(ours):
    other = heir(ours)
    with pytest.raises(OSError, match="not connected"):
        other.begin(0)
    assert other.sender_fd == -1
    other.close()


# ── where it is found ────────────────────────────────────────────────────────────────────────────


def test_a_stored_one(ours):
    sender, receiver = fd_queue.pair()
    fd_queue.send(sender, [(b"proxyd-pages", [ours.receiver.fileno()])])
    sender.close()
    begin(ours)
    ours.commit()
    for _ in range(2):
        other = root.stored(os.dup(receiver.fileno()))
        generation = other.read()
        assert content(generation.slate) == "slate 1"
        generation.close()
        other.close()
    receiver.close()


def test_what_is_stored_is_none(capfd):
    sender, receiver = fd_queue.pair()
    assert root.stored(os.dup(receiver.fileno())) is None
    fd_queue.send(sender, [(b"x", [0])])
    assert root.stored(receiver.detach()) is None
    sender.close()
    one, other = socket.socketpair()
    assert root.stored(one.detach()) is None
    assert root.stored(os.open("/dev/null", os.O_RDONLY)) is None
    other.close()
    assert capfd.readouterr().err.count("Cannot use what the last process has left: ") == 4


@pytest.mark.parametrize("text", ["", "5", "5:", "x:1", ":1", "-1:1", "5:2"])
def test_one_of_another_process(text):
    assert root.inherited(text, 1) is None


def test_an_inherited_one(ours):
    other = root.inherited(f"{os.dup(ours.receiver.fileno())}:7", 7)
    assert other.read() is None
    assert not os.get_inheritable(other.receiver.fileno())
    other.close()


def descriptors_do_not_fit():
    import resource

    one = root.make()
    begin(one)
    one.commit()
    add(one, *[(f"P 1 {n}", 2) for n in range(20)])
    used = open_fds()
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 10, used + 10))
    generation = one.read()
    assert len(generation.pages) + generation.lost == 20
    assert generation.lost > 0
    generation.close()
    one.close()


def test_descriptors_that_do_not_fit():
    in_child(descriptors_do_not_fit)
