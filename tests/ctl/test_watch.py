"""The command watch."""

import json
import signal
import subprocess
import threading

from ctl.fake_proxy import PROXY, row
from kit.waiting import patience, wait_until

WATCH = f"{PROXY}.Watch"


def events(number):
    """A connection that begins and ends."""
    return [
        {"event": "begin", "connection": row(number, ageUSec=0), "how": None},
        {"event": "end", "connection": row(number), "how": "reset"},
    ]


def test_a_line_for_each_event(run, proxy):
    one = proxy(**{WATCH: [*events(7), None]})
    done = run("watch", f"--socket={one.path}")
    assert done.stdout.splitlines() == [
        "14:13:20.000 begin 7 192.0.2.7:40007 -> 127.0.0.1:8080",
        (
            "14:14:25.000 end   7 192.0.2.7:40007 -> 127.0.0.1:8080: "
            "reset after 1min 5s, 2.0K up, 3.0G down"
        ),
    ]
    assert done.returncode == 1
    assert "has dropped a watcher" in done.stderr


def test_json_lines(run, proxy):
    one = proxy(**{WATCH: [*events(7), None]})
    lines = run("watch", f"--socket={one.path}", "--json=short").stdout.splitlines()
    about = {"unit": None, "socket": one.path}
    assert list(map(json.loads, lines)) == [about | event for event in events(7)]


def test_several_proxies_are_told_apart_and_one_may_end(start, proxy):
    one, other = proxy("one", **{WATCH: events(1)}), proxy("other", **{WATCH: events(2)})
    process = start(
        "watch",
        f"--socket={one.path}",
        f"--socket={other.path}",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines = [process.stdout.readline() for _ in range(4)]
    assert sum(one.path in line for line in lines) == 2
    one.close()
    assert one.path in process.stderr.readline()
    assert process.poll() is None
    other.close()
    wait_until(lambda: process.poll() is not None, "the end of the command")
    assert process.returncode == 1


def test_an_interrupt_ends_it_without_a_word(start, proxy):
    one = proxy(**{WATCH: events(1)})
    process = start(
        "watch",
        f"--socket={one.path}",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGINT)
    wait_until(lambda: process.poll() is not None, "the end of the command")
    assert (process.returncode, process.stderr.read()) == (-signal.SIGINT, "")


def test_names_are_escaped_and_garbage_is_one_line(run, proxy):
    bad = {"event": "begin", "connection": row(1, client="@\x1b]0;x\a")}
    one = proxy(**{WATCH: [bad, {"event": 7}]})
    done = run("watch", f"--socket={one.path}")
    assert r"@\x1b]0;x\x07 ->" in done.stdout
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)


def test_a_caller_that_may_not_watch(run, proxy):
    one = proxy(**{WATCH: ["org.varlink.service.PermissionDenied"]})
    done = run("watch", f"--socket={one.path}")
    assert (done.returncode, done.stdout) == (1, "")
    assert "only root and the proxy's own user" in done.stderr


def test_a_full_disk_is_not_blamed_on_the_proxy(start, proxy):
    one = proxy(**{WATCH: events(7)})
    with open("/dev/full", "w") as full:
        process = start(
            "watch", f"--socket={one.path}", stdout=full, stderr=subprocess.PIPE, text=True
        )
        errors = process.stderr.read()
    assert process.wait(patience()) == 1
    assert errors == "socket-proxyctl: No space left on device\n"


def test_a_reader_that_has_seen_enough_ends_it(start, proxy):
    more = threading.Event()

    def watch(_):
        yield from events(7)
        more.wait(patience())
        yield from events(8) * 100

    one = proxy(**{WATCH: watch})
    process = start("watch", f"--socket={one.path}", stdout=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    more.set()
    assert process.wait(patience()) == 0
