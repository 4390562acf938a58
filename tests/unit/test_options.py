"""The command line. Messages that the original has too were copied from its output."""

import contextlib
import os
import posix
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address, command_line, log, options
from proxyd.command_line import parse_args
from proxyd.errors import UsageError
from proxyd.options import OPTIONS, Options

PROG = "/usr/bin/prog"


def parse(*args):
    return parse_args([PROG, *args])


def message(*args):
    with pytest.raises(UsageError) as caught:
        parse(*args)
    return str(caught.value)


def test_defaults():
    made = parse("host:8080")
    assert made.connections_max == 256
    assert made.exit_idle_time is None
    assert made.connect_timeout == 10_000_000
    assert made.settle_time == 0
    assert made.idle_timeout is None
    assert made.drain_timeout == 0
    assert made.proxy_protocol == 0
    assert made.listen == []
    assert made.threads == 1
    assert made.always_hand_over is False
    assert [(name, target.text) for name, target in made.targets] == [(None, "host:8080")]


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
        (["--se=0", "t"], "settle_time", 0),
        (["--idle-timeout=1h", "t"], "idle_timeout", 3_600_000_000),
        (["--drain-timeout=1h", "t"], "drain_timeout", 3_600_000_000),
        (["t"], "crash_recovery", "tcp"),
        (["--crash-recovery=all", "t"], "crash_recovery", "all"),
        (["--crash-recovery=no", "t"], "crash_recovery", "no"),
        (["--proxy-protocol=v1", "t"], "proxy_protocol", 1),
        (["--proxy-protocol=v2", "t"], "proxy_protocol", 2),
        (["--connections-max-per-source=9", "t"], "connections_max_per_source", 9),
        (["--connections-max-p", "9", "t"], "connections_max_per_source", 9),
        (["--conn=9", "t"], "connections_max", 9),
    ],
)
def test_options(args, attribute, value):
    made = parse(*args)
    assert getattr(made, attribute) == value
    assert [target.text for _, target in made.targets] == ["t"]


def test_networks_add_up():
    made = parse("--accept-proxy-protocol=10.0.0.0/8", "--acc=unix,::1", "t")
    ten, one = (bytes([10, 0, 0, 0]), 8), (bytes(15) + b"\1", 128)
    assert made.accept_proxy_protocol == ([ten, one], True)
    assert parse("t").accept_proxy_protocol is None


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
            ["--accept-proxy-protocol=10.0.0.0/8,x", "t"],
            (
                "Failed to parse --accept-proxy-protocol= argument: 10.0.0.0/8,x: "
                "expected an address, a network such as 192.0.2.0/24, or unix, not 'x'"
            ),
        ),
        (
            ["--connections-max-per-source=0", "t"],
            (
                "Failed to parse --connections-max-per-source= argument: 0: "
                "expected a number of connections from 1 to 2147483647"
            ),
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


def test_an_ambiguous_option():
    names = " ".join(f"'--{option.long}'" for option in OPTIONS)
    assert message("--=x") == f"{PROG}: option '--=x' is ambiguous; possibilities: {names}"


def test_abbreviations_of_the_original():
    for long in ("connections-max", "exit-idle-time", "help", "version"):
        for end in range(1, len(long) + 1):
            assert command_line._find_long(PROG, "", long[:end]).long == long


@pytest.mark.parametrize(
    ("text", "value"),
    [("auto", 0), ("8192", 8192), ("64K", 65536), ("64k", 65536), ("1M", 1 << 20), ("1m", 1 << 20)],
)
def test_buffer_size(text, value):
    made = Options()
    options._set_buffer_size(made, text)
    assert made.buffer_size == value


@pytest.mark.parametrize("text", ["", "K", "k", "4095", "2048M", "1G", "3k", "-64K", "64kb"])
def test_buffer_size_garbage(text):
    with pytest.raises(ValueError, match="."):
        options._set_buffer_size(Options(), text)


OWN_WORDS = ("listen", "accept-proxy-protocol", "source")
"""Options that say what exactly they do not understand."""


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.convert])
def test_each_option_says_what_it_allows(option):
    """The original's messages stay as they are there."""
    text = message(f"--{option.long}=\x00", "t")
    if option.long in options.ORIGINAL:
        assert text == f"Failed to parse --{option.long}= argument: \x00"
    else:
        assert text.startswith(f"Failed to parse --{option.long}= argument: \x00: expected ")
        assert text.endswith(option.allowed) or option.long in OWN_WORDS


def test_threads():
    made = Options()
    options._set_threads(made, "4")
    assert made.threads == 4
    options._set_threads(made, "auto")
    assert made.threads == len(os.sched_getaffinity(0))
    for text in ("0", "1025", "x"):
        with pytest.raises(ValueError, match="."):
            options._set_threads(made, text)


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
    assert options._unsigned(text) == 5


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
        options._unsigned(text)


def test_two_dashes_end_the_options():
    assert parse("--", "-c5").targets[0][1].text == "-c5"
    assert parse("-").targets[0][1].text == "-"


def test_posixly_correct(monkeypatch):
    monkeypatch.setitem(posix.environ, b"POSIXLY_CORRECT", b"")
    assert message("t", "-c5") == "Too many parameters."
    assert parse("-c5", "t").connections_max == 5


@pytest.mark.parametrize("word", ["-h", "--help", "--he", "--version", "--v", "-hx"])
def test_what_follows_help_is_not_read(word):
    option = parse("-c5", word, "--foo")
    assert option.long in ("help", "version")
    assert message("--foo", word).endswith("unrecognized option '--foo'")


def test_pairs_and_listen():
    made = parse("--listen=a=8080", "a=[::1]:*", "--listen", "/x", "b=/y=z")
    assert [(name, target.text) for name, target in made.targets] == [
        ("a", "[::1]:*"),
        ("b", "/y=z"),
    ]
    assert [(where.name, where.text) for where in made.listen] == [
        ("a", "8080"),
        ("unknown", "/x"),
    ]


def test_arguments_with_undecodable_bytes():
    path = os.fsdecode(b"/\xff")
    assert parse(path).targets[0][1].address == address.pack_unix(b"/\xff")


def test_many_operands_do_not_take_long():
    assert message(*[f"a{n}=b" for n in range(20000)], "a1=b").startswith("There is more than one")


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
    st.sampled_from([f"--{option.long}" for option in OPTIONS if option.convert]),
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
    for option in OPTIONS:
        if option.convert:
            for word in words:
                with contextlib.suppress(ValueError, UsageError):
                    option.convert(Options(), word)


def test_an_empty_argv():
    with pytest.raises(UsageError, match="Not enough parameters"):
        parse_args([])
