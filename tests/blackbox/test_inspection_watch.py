"""Watch: connections that begin and end."""

import socket
import struct

import pytest
from kit.differences import differs
from kit.socket_state import hung_up
from kit.sockets import read_exactly, read_to_end, reset
from kit.varlink import text_of
from kit.waiting import wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)

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
    """Each client is told to begin once and to end once, whatever it waits for and however long."""
    backend = stage.absent()
    caller = inspected("--connect-timeout=1min", backend.target)
    events = watched(callers, folder)
    served, gone = stage.connect(), stage.connect()
    rows = wait_until(
        lambda: len(rows := caller.connections(state="held")) == 2 and rows, "two held clients"
    )
    reset(gone)
    wait_until(lambda: len(caller.connections()) == 1, "the reset")
    backend.start_listening()
    served.sendall(b"x")
    read_exactly(backend.accept(), 1)
    served.close()
    backend.connections[0].close()
    ids = sorted(row["id"] for row in rows)
    told = events.until(
        lambda events: [e for e in events if e["event"] == "end" and e["connection"]["id"] == ids[0]],
        "the end of the one that was served",
    )
    seen = [(event["connection"]["id"], event["event"]) for event in told]
    assert seen.count((ids[0], "begin")) == 1
    assert seen.count((ids[0], "end")) == 1
    assert seen.index((ids[0], "begin")) < seen.index((ids[0], "end"))
    end = next(e for e in told if (e["connection"]["id"], e["event"]) == (ids[0], "end"))
    assert end["connection"]["heldUSec"] > 0


def test_a_watcher_that_does_not_read_is_dropped_and_harms_nobody(
    stage, inspected, callers, folder
):
    inspected(stage.echo())
    stuck, reader = watched(callers, folder), watched(callers, folder)
    stuck.caller.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    address = stage.proxy.listeners[0].getsockname()
    count = 0

    def dropped():
        nonlocal count
        for _ in range(50):
            with socket.create_connection(address, timeout=15) as client:
                client.sendall(b"x")
                assert read_exactly(client, 1) == b"x"
                if count % 2:
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            count += 1
        reader.ends(count)
        return hung_up(stuck.caller.sock)

    while not dropped():
        assert count < 20_000
    assert len(reader.list) == 2 * count
    assert sorted(e["connection"]["id"] for e in reader.list if e["event"] == "begin") == sorted(
        e["connection"]["id"] for e in reader.list if e["event"] == "end"
    )


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
    assert end["connection"]["up"] == {"bytes": 1, "inFlight": 0, "state": "shut"}


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
