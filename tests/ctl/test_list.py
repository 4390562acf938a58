"""The commands that ask once: list, status, terminate."""

import json
import os
import pty
import signal
import subprocess
import threading

import pytest
from ctl.fake_proxy import COMMAND, METRICS, PROXY, STATUS, deadline, row
from kit.privileges import as_unprivileged_user
from kit.waiting import wait_until


def screen(command, environment, columns):
    """What the command writes to a terminal that is `columns` wide, and its status."""
    pid, fd = pty.fork()
    if pid == 0:
        try:
            os.execve(command[0], list(map(str, command)), environment | {"COLUMNS": str(columns)})
        finally:
            os._exit(127)
    data = everything(fd)
    return data.decode().replace("\r\n", "\n"), os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def everything(fd):
    """What comes from a terminal until its other side is closed; then it is closed, too."""
    data = b""
    try:
        while piece := os.read(fd, 65536):
            data += piece
    except OSError:  # EIO: the other side is closed
        pass
    os.close(fd)
    return data


def test_a_pipe_gets_everything_and_no_escapes(run, proxy):
    client = "2001:db8:1234:5678:9abc:def0:1234:5678"
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7, client=f"[{client}]:40000")}]})
    done = run("list", f"--socket={one.path}")
    title, line = done.stdout.splitlines()
    titles = "ID STATE CLIENT TARGET AGE IDLE UP DOWN QUEUED HALVES CONNECT LOCAL LISTENER THREAD"
    assert " ".join(title.split()) == titles
    assert " ".join(line.split()) == (
        f"7 open [{client}]:40000 127.0.0.1:8080 65s 1.5s 2.0K 3.0G 512B "
        "flowing/flowing 320us 127.0.0.1:50000 0.0.0.0:80 0"
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("columns", [80, 200])
def test_a_terminal_gets_what_fits(proxy, environment, columns):
    client = "[2001:db8:1234:5678:9abc:def0:1234:5678]:40000"
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7, client=client)}] * 3})
    text, status = screen(
        [COMMAND, "list", f"--socket={one.path}"], environment | {"NO_COLOR": "1"}, columns
    )
    lines = text.splitlines()
    assert status == 0
    assert "\x1b" not in text
    assert len(lines) == 4
    assert max(map(len, lines)) <= columns
    assert (client in text) == (columns == 200)
    assert "40000" in lines[1]  # the middle of an address is left out, not its port
    assert ("THREAD" in text) == (columns == 200)


def test_colours_are_for_terminals(proxy, environment):
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7, state="held")}]})
    command = [COMMAND, "list", f"--socket={one.path}"]
    assert "\x1b[33mheld\x1b[0m" in screen(command, environment, 80)[0]
    assert "\x1b" not in screen(command, environment | {"TERM": "dumb"}, 80)[0]


def test_names_that_peers_chose_are_escaped(run, proxy):
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7, client="@a\x1b[2J\u202e\udcff\n")}]})
    done = run("list", f"--socket={one.path}")
    assert r"@a\x1b[2J\u202e\xff\n" in done.stdout
    assert done.stdout.count("\n") == 2


def test_a_locale_without_the_characters(run, proxy):
    if COMMAND.read_bytes().partition(b"\n")[0].endswith((b" -I", b" -IS")):
        pytest.skip("the interpreter is isolated: in the C locale it writes UTF-8 all the same")
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7, client="/run/ä")}]})
    done = run("list", f"--socket={one.path}", LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert r"/run/\xe4" in done.stdout


def test_wide_characters_keep_the_columns_straight(run, proxy):
    rows = [{"connection": row(n, client=name)} for n, name in enumerate(("@日本", "@abcd"))]
    one = proxy(**{f"{PROXY}.List": rows})
    _, wide, narrow = run("list", f"--socket={one.path}").stdout.splitlines()
    assert wide.index("127.0") + 2 == narrow.index("127.0")


def test_what_is_asked_for_is_passed_on(run, proxy):
    one = proxy()
    run("list", f"--socket={one.path}", "--target=web", "--state=held")
    run("list", f"--socket={one.path}")
    assert [call["parameters"] for call in one.calls] == [{"target": "web", "state": "held"}, {}]
    assert all(call["more"] for call in one.calls)


def test_no_connections(run, proxy):
    one = proxy(**{f"{PROXY}.List": [f"{PROXY}.NoSuchConnection"]})
    done = run("list", f"--socket={one.path}")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "No connections.\n")
    assert run("list", f"--socket={one.path}", "--json=short").stdout == "[]\n"


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        (["org.varlink.service.PermissionDenied"], "only root and the proxy's own user"),
        (["com.example.Strange"], "com.example.Strange"),
        ([None], "the proxy closed the connection"),
        ([b"nonsense\0"], "not JSON"),
        ([b"[" * 100000 + b"\0"], "not JSON"),
        ([b"[]\0"], "not an object"),
        ([b'{"parameters":[1]}\0'], "not an object"),
        ([{}], "'connection'"),
        ([{"connection": 7}], "'connection'"),
        ([{"connection": {"id": 7}}], "'state'"),
        ([{"connection": row(1, up=7)}], "'up'"),
        ([{"connection": row(1, up={})}], "'bytes'"),
        ([{"connection": row(1, ageUSec="x")}], "'ageUSec'"),
        ([{"connection": row(1, ageUSec=1 << 80)}], "'ageUSec'"),
        ([b"x" * (1 << 21)], "too long"),
    ],
)
def test_a_reply_that_cannot_be_used_is_one_line(run, proxy, replies, message):
    good, bad = proxy("good"), proxy("bad", **{f"{PROXY}.List": replies})
    done = run("list", f"--socket={bad.path}", f"--socket={good.path}", "--json=short")
    assert done.returncode == 1
    assert len(json.loads(done.stdout)) == 2  # those of the other proxy
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_socket_that_is_not_there_is_one_line(run, place):
    done = run("list", f"--socket={place}/nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"socket-proxyctl: {place}/nothing: no answer: No such file or directory\n"
    )


def test_a_path_that_is_too_long_is_one_line(run, place):
    done = run("list", f"--socket=/{'x' * 200}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_status(run, proxy):
    one = proxy()
    done = run("status", f"--socket={one.path}")
    assert done.returncode == 0
    for text in (
        "Version: 1.2.3",
        "Main PID: 4711",
        "Clients: 2 open, 1 held",
        "connections max 256",
        "down since 2026-09-21 14:13:20 (Connection refused)",
    ):
        assert text in done.stdout
    replies = json.loads(run("status", f"--socket={one.path}", "--json=pretty").stdout)
    assert replies == [{"unit": None, "socket": one.path} | STATUS]


@pytest.mark.parametrize("status", [{"targets": [7]}, {"limits": []}, {"startedUSec": "x"}])
def test_a_status_that_cannot_be_used_is_one_line(run, proxy, status):
    one = proxy(**{f"{PROXY}.Status": [status]})
    done = run("status", f"--socket={one.path}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


def test_an_empty_status_is_shown(run, proxy):
    one = proxy(**{f"{PROXY}.Status": [{}]})
    assert run("status", f"--socket={one.path}").returncode == 0


def test_terminate(run, proxy):
    one = proxy()
    done = run("terminate", f"--socket={one.path}", "7", "-3")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert [call["parameters"] for call in one.calls] == [{"id": 7}, {"id": -3}]


def test_terminate_says_which_connection_was_not_there(run, proxy):
    def reply(parameters):
        return [{}] if parameters["id"] == 7 else [f"{PROXY}.NoSuchConnection"]

    one = proxy(**{f"{PROXY}.Terminate": reply})
    done = run("terminate", f"--socket={one.path}", "7", "8", "--json=short")
    assert (done.returncode, done.stdout) == (1, '{"terminated":[7]}\n')
    assert done.stderr == f"socket-proxyctl: 8: {one.path}: no such connection\n"


def test_terminate_wants_one_proxy(run, proxy):
    one, other = proxy("one"), proxy("other")
    done = run("terminate", f"--socket={one.path}", f"--socket={other.path}", "7")
    assert (done.returncode, one.calls, other.calls) == (1, [], [])
    assert "--unit=" in done.stderr


def test_a_reader_that_has_seen_enough(start, proxy):
    one = proxy(**{f"{PROXY}.List": [{"connection": row(n)} for n in range(5000)]})
    read, write = os.pipe()
    process = start("list", f"--socket={one.path}", stdout=write)
    os.close(write)
    os.read(read, 10)
    os.close(read)
    wait_until(lambda: process.poll() is not None, "the end of the command")
    assert process.returncode == 0


@pytest.mark.parametrize(
    "arguments", [[], ["nothing"], ["list", "--nothing"], ["terminate"], ["terminate", "x"]]
)
def test_what_cannot_be_read_is_status_2(run, arguments):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert "socket-proxyctl" in done.stderr


@pytest.mark.parametrize("span", ["", "x", "1ms", "2h", "infinity"])
def test_an_interval_that_cannot_be_is_one_line(run, proxy, span):
    done = run("top", f"--socket={proxy().path}", f"--interval={span}")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "--interval=" in done.stderr


def test_what_is_not_known_is_a_dash(run, proxy):
    unknown = row(7, state="held", client="", connectUSec=None, localAddress=None)
    one = proxy(**{f"{PROXY}.List": [{"connection": unknown}]})
    assert run("list", f"--socket={one.path}").stdout.splitlines()[1].split() == [
        *("7", "held", "-", "127.0.0.1:8080", "65s", "1.5s", "2.0K", "3.0G", "512B"),
        *("-", "-", "-", "0.0.0.0:80", "0"),
    ]


def test_connections_are_in_the_order_of_their_ids(run, proxy):
    rows = [{"connection": row(number)} for number in (3, 12, 1)]
    one = proxy(**{f"{PROXY}.List": rows})
    lines = run("list", f"--socket={one.path}").stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["1", "3", "12"]


def test_what_a_proxy_could_not_list_is_one_line(run, proxy):
    missing = b'{"error":"net.socketproxyd.Proxy.Incomplete","parameters":{"missing":7}}\0'
    one = proxy(**{f"{PROXY}.List": [{"connection": row(1)}, {"connection": row(2)}, missing]})
    done = run("list", f"--socket={one.path}", "--json=short")
    assert (done.returncode, len(json.loads(done.stdout))) == (1, 2)
    assert done.stderr == f"socket-proxyctl: {one.path}: 7 more could not be listed\n"


@pytest.mark.parametrize("columns", range(8, 120, 4))
def test_no_number_is_cut(run, proxy, environment, columns):
    """Where there is no room for a column, it is left out."""
    one = proxy(**{f"{PROXY}.List": [{"connection": row(1234567)}]})
    text, status = screen(
        [COMMAND, "list", f"--socket={one.path}"], environment | {"NO_COLOR": "1"}, columns
    )
    assert status == 0
    titles, cells = (line.split() for line in text.splitlines())
    whole = run("list", f"--socket={one.path}").stdout.splitlines()
    assert set(titles) <= set(whole[0].split())
    assert all("…" in cell or cell in whole[1].split() for cell in cells)
    assert len(titles) == len(cells)
    assert columns < 80 or "DOWN" in titles


def test_addresses_are_whole_if_that_costs_only_columns(proxy, environment):
    one = proxy(**{f"{PROXY}.List": [{"connection": row(7)}]})
    text, _ = screen([COMMAND, "list", f"--socket={one.path}"], environment, 60)
    assert "192.0.2.7:40007" in text
    assert "127.0.0.1:8080" in text


FAILURES = [
    ["list"],
    ["list", "--json=short"],
    ["status"],
    ["status", "--json=pretty"],
    ["metrics", "--json=short"],
    ["terminate", "7", "--json=short"],
]


@pytest.mark.parametrize("command", [*FAILURES, ["--help"], ["list", "--help"]])
def test_a_full_disk_is_one_line(start, proxy, command):
    metric = [{"name": "x", "value": 1, "description": "X.", "type": "gauge"}]
    one = proxy(**{f"{METRICS}.{name}": metric for name in ("List", "Describe")})
    socket = [] if "--help" in command else [f"--socket={one.path}"]
    with open("/dev/full", "w") as full:
        process = start(*command, *socket, stdout=full, stderr=subprocess.PIPE, text=True)
        errors = process.stderr.read()
    assert process.wait(deadline()) == 1
    assert errors == "socket-proxyctl: No space left on device\n"


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1), (0, 1, 2)])
def test_closed_standard_streams(proxy, environment, place, closed):
    """A socket to the proxy must not become one of them."""
    one = proxy()
    words = " ".join(f"{fd}>&-" for fd in closed)
    command = f"exec {COMMAND} list --socket={one.path} {words}"
    streams = [place / "stdin", place / "stdout", place / "stderr"]
    for path in streams:
        path.touch()
    with streams[0].open() as empty, streams[1].open("w") as out, streams[2].open("w") as errors:
        done = subprocess.run(
            ["/bin/sh", "-c", command],
            env=environment,
            stdin=empty,
            stdout=out,
            stderr=errors,
            timeout=deadline(),
            check=False,
        )
    assert done.returncode == (1 if 1 in closed else 0)
    assert streams[1].read_text().count("\n") == (0 if 1 in closed else 3)
    told = 1 in closed and 2 not in closed
    assert streams[2].read_text() == told * "socket-proxyctl: standard output is closed\n"


@pytest.mark.parametrize("command", ["list", "status", "metrics", "watch", "top"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_at_once_though_a_proxy_hangs(proxy, environment, command, number):
    """In a terminal, as Ctrl-C does: no traceback, and the shell sees the signal."""
    called = threading.Event()

    def hang(_):
        called.set()
        return [b"{"]

    methods = ("List", "Status", "Watch")
    one = proxy(**{f"{PROXY}.{name}": hang for name in methods}, **{f"{METRICS}.Describe": hang})
    pid, fd = pty.fork()
    if pid == 0:
        try:
            words = [str(COMMAND), command, f"--socket={one.path}"]
            os.execve(COMMAND, words, environment)
        finally:
            os._exit(127)
    assert called.wait(deadline())
    os.kill(pid, number)
    data = everything(fd)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -number
    assert b"Traceback" not in data


@pytest.mark.parametrize("command", ["list", "status", "metrics"])
def test_a_proxy_that_hangs_is_one_line(run, proxy, command):
    """After ten seconds; the others are shown."""
    hang = {f"{PROXY}.{name}": [b"{"] for name in ("List", "Status")}
    one, other = proxy("one", **hang, **{f"{METRICS}.Describe": [b"{"]}), proxy("other")
    done = run(command, f"--socket={one.path}", f"--socket={other.path}", "--json=short")
    assert done.returncode == 1
    assert f"socket-proxyctl: {one.path}: no answer: timed out\n" in done.stderr
    assert command == "metrics" or other.path in done.stdout
    assert other.calls


@pytest.mark.parametrize(
    ("error", "message"),
    [
        ("org.varlink.service.InterfaceNotFound", "no proxy, or one of another version"),
        ("org.varlink.service.MethodNotFound", "a proxy of another version"),
    ],
)
def test_another_service_or_version_is_one_line(run, proxy, error, message):
    one = proxy(**{f"{PROXY}.{name}": [error] for name in ("List", "Status", "Watch", "Terminate")})
    for command in (["list"], ["status"], ["watch"], ["terminate", "7"]):
        done = run(*command, f"--socket={one.path}")
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        assert message in done.stderr


def test_a_socket_that_may_not_be_reached_is_one_line(proxy, environment):
    one = proxy()
    os.chmod(one.path, 0o600)
    prefix = as_unprivileged_user(COMMAND)
    os.chmod(os.path.dirname(one.path), 0o755)
    done = subprocess.run(
        [*prefix, COMMAND, "status", f"--socket={one.path}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=deadline(),
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"socket-proxyctl: {one.path}: no answer: Permission denied\n"


def test_a_file_that_is_no_socket_is_one_line(run, place):
    (place / "file").write_text("")
    done = run("list", f"--socket={place}/file")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"socket-proxyctl: {place}/file: no answer: Connection refused\n"
