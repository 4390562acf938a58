"""Handlers of fds: called when the fd is ready, and never after unwatch()."""

import os

import pytest
from kit.fake_relay import FakeRelay

from proxyd import log
from proxyd._relay import Ended, Ready
from proxyd.event_loop import EPOLLET, EPOLLIN, EventLoop


@pytest.fixture
def loop():
    return EventLoop()


@pytest.fixture
def pipe():
    opened = []

    def make(data=b""):
        reader, writer = os.pipe()
        opened.extend((reader, writer))
        os.write(writer, data)
        return reader, writer

    yield make
    for fd in opened:
        os.close(fd)


def test_a_handler_is_called_with_the_events(loop, pipe):
    reader, _ = pipe(b"x")
    heard = []
    loop.watch(reader, heard.append)
    assert loop.run(-1) == []
    assert heard == [EPOLLIN]


def test_level_and_edge(loop, pipe):
    (level, _), (edge, _) = pipe(b"x"), pipe(b"x")
    heard = []
    loop.watch(level, lambda _: heard.append("level"))
    loop.watch(edge, lambda _: heard.append("edge"), EPOLLIN | EPOLLET)
    loop.run(-1)
    loop.run(-1)
    assert sorted(heard) == ["edge", "level", "level"]


def test_after_unwatch_nothing_is_called(loop, pipe):
    reader, _ = pipe(b"x")
    heard = []
    loop.watch(reader, heard.append)
    loop.unwatch(reader)
    loop.unwatch(reader)
    assert loop.run(0) == []
    assert heard == []
    assert loop._handlers == {}


def test_unwatch_of_an_fd_that_was_never_watched(loop):
    loop.unwatch(-1)
    loop.unwatch(5)
    loop.unwatch(100_000)


def test_a_handler_may_unwatch_another_fd(loop, pipe):
    """Even if the event of that fd is in the same batch."""
    (one, _), (other, _) = pipe(b"x"), pipe(b"x")
    heard = []

    def unwatch_other(fd, rest):
        heard.append(fd)
        loop.unwatch(rest)

    loop.watch(one, lambda _: unwatch_other(one, other))
    loop.watch(other, lambda _: unwatch_other(other, one))
    loop.run(-1)
    assert len(heard) == 1


def test_an_fd_that_cannot_be_watched(loop, tmp_path):
    with (tmp_path / "file").open("w") as file, pytest.raises(OSError):
        loop.watch(file.fileno(), print)
    assert loop._handlers == {}


def test_events_without_a_handler_are_returned_in_order(loop):
    ends = [Ended(number, "ended", 0, 0, 0, 0, 0) for number in (1, 2)]
    heard = []
    loop.relay = FakeRelay()
    loop.relay.at(0, lambda: [ends[0], Ready(7, EPOLLIN), Ready(8, EPOLLIN), ends[1]])
    loop._handlers[7] = heard.append
    assert loop.run(-1) == ends
    assert heard == [EPOLLIN]


@pytest.mark.parametrize(("level", "labels"), [("info", None), ("debug", {})])
def test_connections_have_labels_at_debug_level_only(level, labels):
    log.setup({"SYSTEMD_LOG_LEVEL": level})
    loop = EventLoop()
    assert loop._labels == labels
    assert loop.relay.report_ends == (labels is not None)
