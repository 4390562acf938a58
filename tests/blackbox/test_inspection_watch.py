"""Watch: connections that begin and end."""

import socket

import pytest
from kit.differences import differs
from kit.socket_state import hung_up
from kit.sockets import read_exactly, read_to_end, reset
from kit.varlink import text_of
from kit.waiting import wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)

KINDS = ("begin", "end")

threads = pytest.mark.parametrize("threads", ["--threads=1", "--threads=3"])


class Events:
    """The events that a watcher has got."""

    def __init__(self, caller):
        self.caller = caller
        self.list = []

    def until(self, condition, what):
        """Wait until `condition(events)` is true; return the events."""

        def look():
            for message in self.caller.messages():
                assert message["continues"], message
                self.list.append(message["parameters"])
            return condition(self.list)

        wait_until(look, f"{what}; there: {[(e['event'], e.get('how')) for e in self.list]}")
        return self.list

    def ends(self, count):
        """Wait for that number of ends; return all events."""
        return self.until(
            lambda events: sum(event["event"] == "end" for event in events) >= count,
            f"{count} ends",
        )


def watched(callers, folder):
    caller = callers(f"{folder}/inspect")
    caller.watch()
    return Events(caller)


@threads
def test_events_are_complete_and_in_order(stage, inspected, callers, folder, threads):
    inspected(threads, "--hand-over=always", stage.echo())
    events = watched(callers, folder)
    names = []
    for size in range(1, 61):
        with stage.connect() as client:
            names.append(text_of(client.getsockname()))
            client.sendall(bytes(size))
            read_exactly(client, size)
    told = events.ends(60)
    assert len(told) == 120
    begins = [event["connection"] for event in told if event["event"] == "begin"]
    assert [row["client"] for row in begins] == names
    assert [row["id"] for row in begins] == sorted({row["id"] for row in begins})
    ends = {event["connection"]["id"]: event for event in told if event["event"] == "end"}
    for size, row in enumerate(begins, 1):
        end = ends[row["id"]]
        assert end["how"] == "ended"
        assert end["connection"]["client"] == row["client"]
        for way in ("up", "down"):
            assert end["connection"][way]["bytes"] == size
            assert row[way]["bytes"] <= size
        begin = next(e for e in told if e["connection"]["id"] == row["id"])
        assert begin["event"] == "begin"
    # Each ends after it has begun, and is told of twice.
    assert sorted(ends) == [row["id"] for row in begins]


def test_how_they_end(stage, inspected, callers, folder):
    backend = stage.backend()
    caller = inspected("--idle-timeout=1s", backend.target)
    events = watched(callers, folder)

    def ended(end):
        client = stage.connect()
        server = backend.accept()
        client.sendall(b"x")
        read_exactly(server, 1)
        count = sum(event["event"] == "end" for event in events.list)
        end(client, server)
        return events.ends(count + 1)[-1]["how"]

    def close(client, server):
        client.close()
        server.close()

    assert ended(close) == "ended"
    assert ended(lambda client, server: reset(client)) == "reset"
    assert ended(lambda client, server: reset(server)) == "reset"
    assert ended(lambda client, server: None) == "idle"
    assert ended(lambda *_: caller.terminate(caller.connections()[0]["id"])) == "cut"


def test_held_clients(stage, inspected, callers, folder):
    """Each is told to begin once and to end once: the first one is being connected when it begins,
    the others are held at once."""
    backend = stage.absent()
    caller = inspected("--connect-timeout=1min", backend.target)
    events = watched(callers, folder)
    clients = {}
    for how in ("ended", "client gone", "cut"):
        client = stage.connect()
        name = text_of(client.getsockname())
        found = wait_until(
            lambda name=name: [row for row in caller.connections() if row["client"] == name],
            "the held client",
        )
        clients[how] = client, found[0]["id"]
    reset(clients["client gone"][0])
    caller.terminate(clients["cut"][1])
    backend.start_listening()
    clients["ended"][0].sendall(b"x")
    read_exactly(backend.accept(), 1)
    clients["ended"][0].close()
    backend.connections[0].close()
    told = events.ends(3)
    seen = {}
    for event in told:
        seen.setdefault(event["connection"]["id"], []).append(event)
    assert sorted(seen) == sorted(number for _, number in clients.values())
    for how, (_, number) in clients.items():
        begin, end = seen[number]
        assert (begin["event"], end["event"], end["how"]) == ("begin", "end", how)
        assert begin["connection"]["client"] == end["connection"]["client"]
    assert seen[clients["ended"][1]][1]["connection"]["heldUSec"] > 0


def test_clients_that_are_given_up(stage, inspected, callers, folder):
    inspected("--connect-timeout=200ms", stage.absent().target)
    events = watched(callers, folder)
    for _ in range(3):
        assert read_to_end(stage.connect())[0] == b""
    told = events.ends(3)
    assert sorted(event["event"] for event in told) == ["begin"] * 3 + ["end"] * 3
    assert {event["how"] for event in told if event["event"] == "end"} == {"failed"}


@pytest.mark.parametrize("taken", [0, 1024], ids=["stuck", "too slow"])
def test_a_watcher_that_does_not_keep_up_is_dropped_and_harms_nobody(
    stage, inspected, callers, folder, taken
):
    inspected(stage.echo())
    slow, reader = watched(callers, folder), watched(callers, folder)
    count = 0

    def dropped():
        nonlocal count
        for _ in range(50):
            with stage.connect() as client:
                client.sendall(b"x")
                assert read_exactly(client, 1) == b"x"
            count += 1
        reader.ends(count)
        if taken:
            slow.caller.sock.recv(taken)
        return hung_up(slow.caller.sock)

    while not dropped():
        assert count < 5000
    assert len(reader.list) == 2 * count
    ids = {
        kind: [e["connection"]["id"] for e in reader.list if e["event"] == kind] for kind in KINDS
    }
    assert len(set(ids["begin"])) == count
    assert sorted(ids["begin"]) == sorted(ids["end"])


def test_a_watcher_that_has_left_costs_nothing_more(stage, inspected, callers, folder):
    caller = inspected(stage.echo())
    events = watched(callers, folder)
    with stage.connect() as client:
        client.sendall(b"x")
        read_exactly(client, 1)
    events.ends(1)
    events.caller.close()
    with stage.connect() as client:
        client.sendall(b"x")
        read_exactly(client, 1)
    wait_until(lambda: caller.metrics()["Ended", "ended"] == 2, "the end of the second")


def test_watch_says_nothing_of_what_was_before(stage, inspected, callers, folder):
    inspected(stage.echo())
    before = stage.connect()
    before.sendall(b"x")
    read_exactly(before, 1)
    events = watched(callers, folder)
    before.close()
    (end,) = events.ends(1)
    assert (end["event"], end["how"]) == ("end", "ended")
    assert end["connection"]["up"] == {
        "bytes": 1,
        "inFlight": 0,
        "state": "shut",
        "datagrams": None,
    }


def test_watchers_are_told_the_same(stage, inspected, callers, folder):
    inspected(stage.echo())
    both = [watched(callers, folder), watched(callers, folder)]
    for _ in range(5):
        with stage.connect() as client:
            client.sendall(b"x")
            assert read_exactly(client, 1) == b"x"
            client.shutdown(socket.SHUT_WR)
            assert read_to_end(client) == (b"", "eof")
    first, second = (one.ends(5) for one in both)
    assert first == second
