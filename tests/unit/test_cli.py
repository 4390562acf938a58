"""The command line. Messages that the original has too were read off the original."""

import _signal
import contextlib
import errno
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import __version__, address, cli, log
from proxyd.cli import parse_args
from proxyd.errors import UsageError

PROG = "/usr/bin/prog"
UNUSED = f"@proxyd-test-cli-{os.getpid()}"


@pytest.fixture(autouse=True)
def _unchanged_process():
    """Undo what main() does to the process."""
    handler = _signal.getsignal(_signal.SIGINT)
    yield
    _signal.signal(_signal.SIGINT, handler)
    log.setup({})


@pytest.fixture
def served(monkeypatch):
    """Replace the server; return the list of what it was called with."""
    calls = []
    server = types.ModuleType("proxyd.server")
    server.run = lambda *args: calls.append(args) or 0
    monkeypatch.setitem(sys.modules, "proxyd.server", server)
    monkeypatch.setattr(sys.modules["proxyd"], "server", server, raising=False)
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "SYSTEMD_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    return calls


def parse(*args):
    return parse_args([PROG, *args])


def message(*args):
    with pytest.raises(UsageError) as caught:
        parse(*args)
    return str(caught.value)


def test_defaults():
    options = parse("host:8080")
    assert options.connections_max == 256
    assert options.exit_idle_time is None
    assert options.connect_timeout == 10_000_000
    assert options.settle_time == 0
    assert options.idle_timeout is None
    assert options.drain_timeout == 0
    assert options.proxy_protocol == 0
    assert options.listen == []
    assert options.threads == 1
    assert options.always_hand_over is False
    assert [(name, target.text) for name, target in options.targets] == [(None, "host:8080")]


@pytest.mark.parametrize(
    ("args", "attribute", "value"),
    [
        (["-c5", "t"], "connections_max", 5),
        (["-c", "5", "t"], "connections_max", 5),
        (["t", "-c", "5"], "connections_max", 5),
        (["--connections-max=5", "t"], "connections_max", 5),
        (["--connections-max", "5", "t"], "connections_max", 5),
        (["-c4", "t", "-c5"], "connections_max", 5),
        (["--c=5", "t"], "connections_max", 5),
        (["--conn=5", "t"], "connections_max", 5),
        (["--connect=5", "t"], "connections_max", 5),
        (["--connect-=5s", "t"], "connect_timeout", 5_000_000),
        (["--e=5", "t"], "exit_idle_time", 5_000_000),
        (["--exit-idle-time=infinity", "t"], "exit_idle_time", None),
        (["--exit-idle-time=0", "t"], "exit_idle_time", 0),
        (["--connect-timeout=0", "t"], "connect_timeout", 0),
        (["--settle-time=50ms", "t"], "settle_time", 50_000),
        (["--s=0", "t"], "settle_time", 0),
        (["--idle-timeout=1h", "t"], "idle_timeout", 3_600_000_000),
        (["--drain-timeout=1h", "t"], "drain_timeout", 3_600_000_000),
        (["--proxy-protocol=v1", "t"], "proxy_protocol", 1),
        (["--proxy-protocol=v2", "t"], "proxy_protocol", 2),
    ],
)
def test_options(args, attribute, value):
    options = parse(*args)
    assert getattr(options, attribute) == value
    assert [target.text for _, target in options.targets] == ["t"]


@pytest.mark.parametrize(
    ("args", "text"),
    [
        ([], "Not enough parameters."),
        (["--"], "Not enough parameters."),
        (["-c5"], "Not enough parameters."),
        (["a", "b"], "Too many parameters."),
        (["a=b", "c"], "Too many parameters."),
        (["c", "a=b"], "Too many parameters."),
        (["-c0", "t"], "Connection limit is too low."),
        (["-c-0", "t"], "Connection limit is too low."),
        (["-cx", "t"], "Failed to parse --connections-max= argument: x"),
        (["-c", "", "t"], "Failed to parse --connections-max= argument: "),
        (["--c=", "t"], "Failed to parse --connections-max= argument: "),
        (["-c", "--", "t"], "Failed to parse --connections-max= argument: --"),
        (["-c=5", "t"], "Failed to parse --connections-max= argument: =5"),
        (["--exit-idle-time=x", "t"], "Failed to parse --exit-idle-time= argument: x"),
        (["--foo"], f"{PROG}: unrecognized option '--foo'"),
        (["--foo=1"], f"{PROG}: unrecognized option '--foo=1'"),
        (["---"], f"{PROG}: unrecognized option '---'"),
        (["--exit-idle-time"], f"{PROG}: option '--exit-idle-time' requires an argument"),
        (["--c"], f"{PROG}: option '--connections-max' requires an argument"),
        (["--help=1"], f"{PROG}: option '--help' doesn't allow an argument"),
        (["--he="], f"{PROG}: option '--help' doesn't allow an argument"),
        (["-c"], f"{PROG}: option requires an argument -- 'c'"),
        (["-x"], f"{PROG}: invalid option -- 'x'"),
        (["-xh"], f"{PROG}: invalid option -- 'x'"),
        (["-5"], f"{PROG}: invalid option -- '5'"),
        (["-:"], f"{PROG}: invalid option -- ':'"),
    ],
)
def test_the_original_messages(args, text):
    assert message(*args) == text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (
            ["--connect-timeout=x", "t"],
            (
                "Failed to parse --connect-timeout= argument: x: "
                "expected a time span, such as 90, 5min 20s or infinity"
            ),
        ),
        (
            ["--settle-time=x", "t"],
            "Failed to parse --settle-time= argument: x: expected a time span, such as 100ms or 2s",
        ),
        (
            ["--settle-time=infinity", "t"],
            "Settle time is too high, no client would ever be served.",
        ),
        (
            ["--proxy-protocol=v3", "t"],
            "Failed to parse --proxy-protocol= argument: v3: expected v1 or v2",
        ),
        (["--idle-timeout=0", "t"], "Idle timeout is too low, use infinity to switch it off."),
        (
            ["--listen=x", "t"],
            (
                "Failed to parse --listen= argument: x: expected a port, HOST:PORT, "
                "a path, @NAME or vsock:CID:PORT"
            ),
        ),
        (["a=b", "a=c"], "There is more than one target for 'a'."),
        (["h:0"], "Failed to parse target 'h:0': '0' is not a port number from 1 to 65535"),
    ],
)
def test_messages_of_our_own(args, text):
    assert message(*args) == text


def test_ambiguous():
    names = " ".join(f"'--{option.long}'" for option in cli.OPTIONS)
    assert message("--=x") == f"{PROG}: option '--=x' is ambiguous; possibilities: {names}"


def test_abbreviations_of_the_original():
    for long in ("connections-max", "exit-idle-time", "help", "version"):
        for end in range(1, len(long) + 1):
            assert cli._find_long(PROG, "", long[:end]).long == long


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", 0), ("8192", 8192), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("1m", 1 << 20)],
)
def test_buffer_size(text, value):
    options = cli.Options()
    cli._set_buffer_size(options, text)
    assert options.buffer_size == value


@pytest.mark.parametrize("text", ["", "K", "k", "4095", "2048M", "1G", "3k", "-64K", "64kb"])
def test_buffer_size_garbage(text):
    with pytest.raises(ValueError, match="."):
        cli._set_buffer_size(cli.Options(), text)


@pytest.mark.parametrize("option", [option for option in cli.OPTIONS if option.convert])
def test_each_option_says_what_it_allows(option):
    """The original's messages stay as they are there, and --listen= has one for each form."""
    text = message(f"--{option.long}=\x00", "t")
    if option.long in cli._ORIGINAL:
        assert text == f"Failed to parse --{option.long}= argument: \x00"
    else:
        assert text.startswith(f"Failed to parse --{option.long}= argument: \x00: expected ")
        assert text.endswith(option.allowed) or option.long == "listen"


def test_threads():
    options = cli.Options()
    cli._set_threads(options, "4")
    assert options.threads == 4
    cli._set_threads(options, "auto")
    assert options.threads == len(os.sched_getaffinity(0))
    for text in ("0", "1025", "x"):
        with pytest.raises(ValueError, match="."):
            cli._set_threads(options, text)


def test_hand_over():
    assert parse("--hand-over=always", "x:1").always_hand_over is True
    assert parse("--hand-over=always", "--hand-over=busy", "x:1").always_hand_over is False
    for text in ("", "Always", "never"):
        assert message(f"--hand-over={text}", "x:1") == (
            f"Failed to parse --hand-over= argument: {text}: expected busy or always"
        )


@pytest.mark.parametrize(
    "text", ["5", " 5", "\v5", "+5", "05", "0x5", "0X5", "0b101", "0B101", "0o5", "0b+101"]
)
def test_numbers_as_systemd_reads_them(text):
    assert cli._unsigned(text) == 5


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "5 ",
        "-5",
        "--5",
        "+-5",
        "+ 5",
        "08",
        "0x",
        "0b",
        "0b-1",
        "0b2",
        "0o8",
        "0xg",
        "1_0",
        "1e3",
        "\u0665",
        "4294967296",
        "9" * 5000,
        "\x0b0b1",
        "0 5",
    ],
)
def test_not_numbers_to_systemd(text):
    with pytest.raises(ValueError, match="."):
        cli._unsigned(text)


def test_after_two_dashes_everything_is_a_target():
    assert parse("--", "-c5").targets[0][1].text == "-c5"
    assert parse("-").targets[0][1].text == "-"


def test_posixly_correct(monkeypatch):
    monkeypatch.setenv("POSIXLY_CORRECT", "")
    assert message("t", "-c5") == "Too many parameters."
    assert parse("-c5", "t").connections_max == 5


@pytest.mark.parametrize("word", ["-h", "--help", "--he", "--version", "--v", "-hx"])
def test_what_follows_help_is_not_read(word):
    option = parse("-c5", word, "--foo")
    assert option.long in ("help", "version")
    assert message("--foo", word).endswith("unrecognized option '--foo'")


def test_pairs_and_listen():
    options = parse("--listen=a=8080", "a=[::1]:*", "--listen", "/x", "b=/y=z")
    assert [(name, target.text) for name, target in options.targets] == [
        ("a", "[::1]:*"),
        ("b", "/y=z"),
    ]
    assert [(where.name, where.text) for where in options.listen] == [
        ("a", "8080"),
        ("unknown", "/x"),
    ]


def test_arguments_with_undecodable_bytes():
    path = os.fsdecode(b"/\xff")
    assert parse(path).targets[0][1].address == address.pack_unix(b"/\xff")


def test_many_operands_do_not_take_for_ever():
    assert message(*[f"a{n}=b" for n in range(20000)], "a1=b").startswith("There is more than one")


def test_help(capfd):
    assert cli.main([PROG, "--help"]) == 0
    out, err = capfd.readouterr()
    assert err == ""
    assert "Bidirectionally proxy local sockets to another (possibly remote) socket." in out
    for option in cli.OPTIONS:
        assert f"--{option.long}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_version(capfd):
    assert cli.main([PROG, "--version"]) == 0
    assert capfd.readouterr().out == f"systemd-socket-proxyd {__version__}\n"


@pytest.mark.parametrize(
    ("redirect", "status"), [(">&-", 1), (">/dev/full", 1), ("2>&- >/dev/full", 1)]
)
def test_help_that_cannot_be_written(redirect, status):
    code = "import sys; from proxyd.cli import main; sys.exit(main())"
    done = subprocess.run(
        ["/bin/sh", "-c", f'exec "$0" -c "{code}" --help {redirect}', sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "")
    lines = done.stderr.splitlines()
    assert all(line.startswith("Failed to write to standard output: ") for line in lines)
    assert len(lines) == (0 if "2>" in redirect else 1)


def test_help_whose_reader_has_gone(monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    saved = os.dup(1)
    os.dup2(writer, 1)
    try:
        assert cli.main([PROG, "--help"]) == 0
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(writer)


def test_closed_standard_fds_are_not_given_to_sockets():
    code = (
        "import sys, os; from proxyd import cli;"
        "cli.main(['prog', '--foo']);"
        "sys.exit({os.readlink(f'/proc/self/fd/{n}') for n in range(3)} != {'/dev/null'})"
    )
    script = f'exec "$0" -c "{code}" <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", script, sys.executable], check=False).returncode == 0


def test_a_standard_fd_of_which_nothing_can_be_told_is_not_closed(monkeypatch):
    def fstat(fd):
        raise OSError(errno.EIO, "")

    opened = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fstat)
        patch.setattr(os, "open", lambda *names: opened.append(names))
        cli._open_standard_fds()
    assert opened == []


def test_no_sockets(served, capfd):
    assert cli.main([PROG, "t"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert first == "Didn't get any sockets passed in."
    assert "--listen=" in second
    assert ".socket" in second
    assert served == []


def test_main_serves(served, tmp_path):
    path = str(tmp_path / "s")
    assert cli.main([PROG, f"--listen={path}", "--listen=a=127.0.0.1:0", "host:*"]) == 1
    assert served == []
    assert cli.main([PROG, f"--listen={path}", "--listen=a=127.0.0.1:0", "/t"]) == 0
    ((options, listeners, environ),) = served
    assert options.connections_max == 256
    assert [(listener.name, listener.target.text) for listener in listeners] == [
        ("unknown", "/t"),
        ("a", "/t"),
    ]
    assert environ is os.environ
    assert [listener.fd for listener in listeners] == [-1, -1]  # closed by now
    assert not os.path.exists(path)


def test_a_listener_that_cannot_be_had_takes_the_others_along(served, tmp_path, capfd):
    path = str(tmp_path / "s")
    assert cli.main([PROG, f"--listen={path}", f"--listen={path}", "/t"]) == 1
    assert capfd.readouterr().err == f"Failed to listen on {path}: Address already in use\n"
    assert not os.path.exists(path)
    assert served == []


def test_a_pair_without_a_listener_is_a_warning(served, capfd):
    assert cli.main([PROG, f"--listen=a={UNUSED}", "a=/t", "b=/u"]) == 0
    assert capfd.readouterr().err == (
        "No listener has the name 'b', its target is not used. Listeners: 'a'.\n"
    )


def test_a_listener_without_a_pair_is_an_error(served, capfd):
    assert cli.main([PROG, f"--listen=c={UNUSED}", "a=/t"]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line == f"No target for listener 'c' ({UNUSED}): the targets are for 'a'."


def test_the_trace_of_our_own_faults_is_for_debugging(served, monkeypatch, capfd):
    monkeypatch.setattr(sys.modules["proxyd.server"], "run", lambda *_: {}["x"])
    monkeypatch.setenv("SYSTEMD_LOG_LEVEL", "debug")
    assert cli.main([PROG, f"--listen={UNUSED}", "/t"]) == 1
    lines = capfd.readouterr().err.splitlines()
    (at,) = [n for n, line in enumerate(lines) if line.startswith("Internal error in <lambda>")]
    assert lines[at + 1] == "Traceback (most recent call last):"
    assert lines[-1] == "KeyError: 'x'"


def test_the_package_can_be_run():
    command = [sys.executable, "-m", "proxyd", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("systemd-socket-proxyd ")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(24, "Too many open files"), "Failed: Too many open files"),
        (MemoryError(), "Out of memory."),
        (UsageError("No."), "No."),
        (ImportError("no relay"), "Failed to start: no relay"),
        (KeyError("x"), "Internal error in fail, test_cli.py:{}: KeyError: 'x'"),
    ],
)
def test_failures_are_one_line(served, monkeypatch, capfd, error, line):
    def fail(*_):
        raise error

    monkeypatch.setattr(sys.modules["proxyd.server"], "run", fail)
    assert cli.main([PROG, f"--listen={UNUSED}", "/t"]) == 1
    assert capfd.readouterr().err == line.format(fail.__code__.co_firstlineno + 1) + "\n"


def interrupt_handler(handler, monkeypatch):
    """SIGINT's handler when the installed command calls main(), if it was `handler` before."""
    command = os.path.join(os.path.dirname(sys.executable), "systemd-socket-proxyd")
    seen = []
    monkeypatch.setattr(cli, "main", lambda: seen.append(signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, handler)
    with pytest.raises(SystemExit):
        runpy.run_path(command)
    return seen[0]


def test_no_keyboard_interrupt(monkeypatch):
    assert interrupt_handler(signal.default_int_handler, monkeypatch) is signal.SIG_DFL


def test_an_ignored_sigint_stays_ignored(monkeypatch):
    assert interrupt_handler(signal.SIG_IGN, monkeypatch) is signal.SIG_IGN


@contextlib.contextmanager
def stderr_file():
    """Send fd 2 to a file and yield that file."""
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield file
        finally:
            os.dup2(saved, 2)
            os.close(saved)


WORDS = st.one_of(
    st.text(st.characters(min_codepoint=1)),
    st.text("-=c:h5\udcff\n"),
    st.sampled_from([f"--{option.long}" for option in cli.OPTIONS if option.convert]),
    st.sampled_from(["--", "-", "-c", "-c5", "a=/b", "/x", "h:*", "--listen=x", "--connect=5"]),
)


@given(st.lists(WORDS, max_size=5))
def test_any_command_line_is_options_or_one_line(words):
    with stderr_file() as file:
        try:
            parse_args([PROG, *words])
        except UsageError as error:
            log.error(str(error))
            file.seek(0)
            line = file.read()
            assert line.endswith(b"\n")
            assert line.count(b"\n") == 1


@given(st.lists(WORDS, max_size=3))
def test_any_option_argument(words):
    for option in cli.OPTIONS:
        if option.convert:
            for word in words:
                with contextlib.suppress(ValueError, UsageError):
                    option.convert(cli.Options(), word)


def test_an_empty_argv():
    with pytest.raises(UsageError, match="Not enough parameters"):
        parse_args([])


def test_a_connection_and_a_listener_do_not_mix(served, monkeypatch, capfd):
    left, right = socket.socketpair()
    listener = cli.Listener(left.detach(), "connection", address.pack_unix("@x"), connected=True)
    monkeypatch.setattr(cli, "inherited", lambda *_, **__: [listener])
    assert cli.main([PROG, "--listen=127.0.0.1:0", "/t"]) == 1
    assert "must be the only one" in capfd.readouterr().err
    right.close()


def test_sockets_of_an_earlier_process_of_the_same_id():
    options = parse_args(["x", "a:1"])
    passed = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    assert "an earlier process of the same id" in cli._why_no_sockets(options, passed)
