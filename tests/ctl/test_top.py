"""The command top, in a real terminal."""

import os
import pty
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from ctl.fake_proxy import COMMAND, PROXY, row
from ctl.tmux import Tmux
from kit.waiting import wait_until

from proxyd.ctl.table import Paper
from proxyd.ctl.top import Sample, View, add_rates, frame

NORMAL = "0 1 1"
"""No alternate screen, a cursor, and lines that wrap."""

pytestmark = pytest.mark.skipif(not shutil.which("tmux"), reason="no tmux here")


@pytest.fixture
def terminal(place, environment):
    """Open a terminal of a size."""
    opened = []

    def call(columns=80, rows=24, **more):
        one = Tmux(place, environment | more, columns, rows)
        opened.append(one)
        return one

    yield call
    for one in opened:
        one.close()


def settings(screen, path):
    """The settings of the terminal."""
    screen.start("/bin/sh", "-c", f"stty -g >{path}")
    return wait_until(lambda: path.exists() and path.read_text().strip(), "the settings")


def many(count):
    """Connections that have moved more the greater their number is."""
    half = {"bytes": 0, "inFlight": 0, "state": "flowing"}
    return [
        {"connection": row(n, up=half | {"bytes": n << 20}, down=half | {"bytes": 0})}
        for n in range(1, count + 1)
    ]


def ids(screen):
    """The numbers of the connections on the screen, in order."""
    found = [re.match(r" *(\d+)  (?:open|held)", line) for line in screen.lines()]
    return [int(one[1]) for one in found if one]


def the_top(place):
    """The pid of the command that runs in the terminal of this test."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
        except OSError:  # it has just ended
            continue
        mine = any(os.fsencode(place) in word for word in words)
        if mine and b"top" in words and any(word.endswith(b"socket-proxyctl") for word in words):
            return int(folder.name)
    return None


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_it_fits_the_terminal(proxy, terminal, columns):
    one = proxy(**{f"{PROXY}.List": many(100)})
    screen = terminal(columns)
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("q quit")
    lines = screen.lines()
    assert len(lines) == 24
    assert lines[0].startswith("socket-proxyctl - ")
    assert lines[1].startswith("Clients: 100 total, 100 open")
    assert ids(screen) == list(range(100, 100 - len(ids(screen)), -1))
    assert len(ids(screen)) == 24 - 6
    titles = lines[4].split()
    assert ("UP" in titles) == (columns == 200)
    assert ("DOWN/S" in titles) == (columns >= 80)


@pytest.mark.parametrize("columns", range(72, 84))
def test_the_last_column_is_shown(proxy, terminal, columns):
    """Whatever is cleared behind a line as wide as the terminal must not be its last character."""
    client = "[2001:db8:1234:5678:9abc:def0:1234:5678]:40000"
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7, client=client, target=client)}]})
    screen = terminal(columns)
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("q quit")
    titles = screen.lines()[4]
    assert titles.split()[-1] in {"IDLE", "DOWN/S", "QUEUED"}
    assert len(titles) >= columns - 1


def test_the_foot_says_how_many_there_are(proxy, terminal):
    one = proxy(**{f"{PROXY}.List": many(100)})
    screen = terminal(100, 20)
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("1-14 of 100")
    screen.press("End")
    screen.shows("87-100 of 100")
    screen.resize(100, 120)
    screen.wait_for(lambda: "of 100" not in screen.lines()[-1], "all")


def test_keys(proxy, terminal):
    one = proxy(**{f"{PROXY}.List": many(100)})
    screen = terminal(120)
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("q quit")
    screen.press("s")  # by bytes: rates are all 0 from the second sample on
    screen.shows("sort: bytes")
    screen.wait_for(lambda: ids(screen)[:2] == [100, 99], "the order")
    screen.press("Down", "Down", "k", "NPage")
    screen.wait_for(lambda: ids(screen)[0] == 100 - 1 - 16, "the second page")
    screen.press("End")
    screen.wait_for(lambda: ids(screen)[-1] == 1, "the end")
    screen.press("Home")
    screen.wait_for(lambda: ids(screen)[0] == 100, "the beginning")
    screen.press("Space")
    screen.shows("paused")
    screen.press("q")
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")


def test_another_size(proxy, terminal):
    one = proxy(**{f"{PROXY}.List": many(100)})
    screen = terminal()
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=1h")
    screen.shows("q quit")
    screen.resize(100, 40)
    screen.wait_for(lambda: len(ids(screen)) == 40 - 6, "more connections")
    screen.resize(20, 3)
    screen.wait_for(lambda: len(screen.lines()) == 3, "a small screen")
    screen.press("q")
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")


@pytest.mark.parametrize(
    "end",
    [
        "q",
        "C-c",
        "C-\\",
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGINT,
        signal.SIGQUIT,
    ],
)
def test_the_terminal_is_restored(place, proxy, terminal, end):
    one = proxy(**{f"{PROXY}.List": many(3)})
    screen = terminal()
    before = settings(screen, place / "before")
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("q quit")
    assert screen.modes() == "1 0 0"
    if isinstance(end, str):
        screen.press(end)
    else:
        os.kill(wait_until(lambda: the_top(place), "the command"), end)
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")
    screen.wait_for(lambda: "socket-proxyctl - " not in "\n".join(screen.lines()), "no top")
    assert "before" in screen.lines()[0]  # what was there before is there again
    assert settings(screen, place / "after") == before


def test_it_may_be_stopped_and_continued(place, proxy, terminal):
    one = proxy(**{f"{PROXY}.List": many(3)})
    screen = terminal()
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("q quit")
    for _ in range(2):
        screen.press("C-z")
        screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")
        screen.shows("top")  # the shell names the job
        screen.start("fg")
        screen.wait_for(lambda: screen.modes() == "1 0 0", "the alternate screen")
        screen.shows("q quit")
    screen.press("q")
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")


def test_a_terminal_that_goes_away_ends_it(place, proxy, environment):
    one = proxy()
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.execve(COMMAND, [str(COMMAND), "top", f"--socket={one.path}"], environment)
        finally:
            os._exit(127)
    data = b""
    while b"q quit" not in data:
        data += os.read(fd, 4096)
    os.close(fd)
    ended = wait_until(lambda: os.waitpid(pid, os.WNOHANG)[0], "the end of the command")
    assert ended == pid


def test_a_proxy_that_ends_is_told(proxy, terminal):
    one = proxy(**{f"{PROXY}.List": many(3)})
    screen = terminal()
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("Clients: 3 total")
    one.close()
    screen.shows("no answer")
    screen.shows("Clients: 0 total")


def test_a_proxy_that_hangs_does_not_delay_keys(proxy, terminal):
    one = proxy(**{f"{PROXY}.List": many(3)})
    screen = terminal()
    screen.start(COMMAND, "top", f"--socket={one.path}", "--interval=100ms")
    screen.shows("Clients: 3 total")
    one.replies[f"{PROXY}.List"] = [b"{"]
    screen.shows("timed out")
    screen.press("q")
    screen.wait_for(lambda: screen.modes() == NORMAL, "the normal screen")


@pytest.mark.parametrize("more", [{}, {"TERM": "dumb"}])
def test_what_is_no_terminal_is_one_line(run, proxy, more):
    done = run("top", f"--socket={proxy().path}", **more)
    assert (done.returncode, done.stdout) == (1, "")
    assert "top needs a terminal" in done.stderr


def test_no_color(proxy, environment):
    """No colours; the bold and reverse ones are none."""
    one = proxy(**{f"{PROXY}.List": [{"connection": row(1, state="held")}]})
    script = shutil.which("script")
    if script is None:
        pytest.skip("no script here")
    command = f"stty cols 100 rows 24; {COMMAND} top --socket={one.path}"
    with subprocess.Popen(
        [script, "-qec", command, "/dev/null"],
        env=environment | {"NO_COLOR": "1", "SHELL": "/bin/sh"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        data = b""
        while b"q quit" not in data:
            data += process.stdout.read1()
        process.stdin.write(b"q")
        process.stdin.flush()
        data += process.stdout.read()
    assert b"held" in data
    assert set(re.findall(rb"\x1b\[[0-9;]*m", data)) <= {b"\x1b[0m", b"\x1b[7m"}


def sample(rows, when=0.0):
    for one in rows:
        one |= {"socket": "/x", "unit": None}
    return Sample(rows, [], 1, when)


def test_rates():
    half = {"bytes": 0, "inFlight": 0, "state": "flowing"}
    first = sample([row(1, up=half | {"bytes": 100})])
    add_rates(first.rows, Sample([], [], 0, 0.0), 1.0)
    later = sample(
        [row(1, up=half | {"bytes": 1100}), row(2, ageUSec=500_000, up=half | {"bytes": 50})]
    )
    add_rates(later.rows, first, 2.0)
    assert [one["upRate"] for one in later.rows] == [500.0, 100.0]
    again = sample([row(1, up=half | {"bytes": 5})])  # another connection of this number
    add_rates(again.rows, later, 3.0)
    assert again.rows[0]["upRate"] == 0.0


@pytest.mark.parametrize("height", [1, 2, 5, 8, 24])
def test_a_frame_is_as_high_as_the_screen(height):
    rows = sample([row(n) for n in range(50)])
    add_rates(rows.rows, Sample([], [], 0, 0.0), 1.0)
    rows.errors = ["one\x1b[2J", "two"]
    lines = frame(rows, View(), Paper(80, colour=False), height)
    assert len(lines) == height
    assert not any("\x1b[2J" in line for line in lines)
