"""The command line: options as getopt_long(3) reads them, messages word for word, exit status."""

import os
import re
import socket
import subprocess

import pytest
from kit.differences import differs
from kit.sockets import open_connection, quiet_port, read_exactly
from kit.waiting import wait_until

NO_SOCKETS = "Didn't get any sockets passed in."


def is_accepted(outcome):
    """Whether the command line was accepted, so that only the sockets are missing."""
    return outcome.status == 1 and outcome.stderr.splitlines()[0] == NO_SOCKETS


def fails_with(outcome, line):
    """Assert exit status 1, nothing on stdout and exactly this line on stderr."""
    assert (outcome.status, outcome.stdout, outcome.stderr) == (1, "", line + "\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Not enough parameters."),
        (["-c5"], "Not enough parameters."),
        (["127.0.0.1:80", "127.0.0.1:81"], "Too many parameters."),
        (["-c0", "a:1"], "Connection limit is too low."),
        (["--connections-max=0", "a:1"], "Connection limit is too low."),
        (["--connections-max=x", "a:1"], "Failed to parse --connections-max= argument: x"),
        (["--connections-max=-1", "a:1"], "Failed to parse --connections-max= argument: -1"),
        (["--connections-max=", "a:1"], "Failed to parse --connections-max= argument: "),
        (["-c", "3.0", "a:1"], "Failed to parse --connections-max= argument: 3.0"),
        (["-c", "5x", "a:1"], "Failed to parse --connections-max= argument: 5x"),
        (
            ["-c", "4294967296", "a:1"],
            "Failed to parse --connections-max= argument: 4294967296",
        ),
        (["--exit-idle-time=x", "a:1"], "Failed to parse --exit-idle-time= argument: x"),
        (["--exit-idle-time=", "a:1"], "Failed to parse --exit-idle-time= argument: "),
        (["--exit-idle-time", "-5", "a:1"], "Failed to parse --exit-idle-time= argument: -5"),
    ],
)
def test_message_of_the_original(stage, arguments, message):
    """Bad parameters are one line on stderr, with the original's message, and exit status 1."""
    fails_with(stage.run(*arguments), message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--foo", "a:1"], "unrecognized option '--foo'"),
        (["--foo=bar", "a:1"], "unrecognized option '--foo=bar'"),
        (["-x", "a:1"], "invalid option -- 'x'"),
        (["-5", "a:1"], "invalid option -- '5'"),
        (["-c"], "option requires an argument -- 'c'"),
        (["a:1", "--connections-max"], "option '--connections-max' requires an argument"),
        (["--exit-idle-time"], "option '--exit-idle-time' requires an argument"),
        (["--help=3"], "option '--help' doesn't allow an argument"),
        (["--version=x"], "option '--version' doesn't allow an argument"),
    ],
)
def test_message_of_getopt(stage, arguments, message):
    """Messages of getopt_long(3) begin with the name that the program was called by."""
    fails_with(stage.run(*arguments), f"{stage.executable}: {message}")


@pytest.mark.parametrize(
    "arguments",
    [
        ["-c5", "a:1"],
        ["-c", "5", "a:1"],
        ["-c", "0x10", "a:1"],
        ["-c", " 5", "a:1"],
        ["-c", "+5", "a:1"],
        ["-c", "4294967295", "a:1"],
        ["--connections-max=5", "a:1"],
        ["--connections-max", "5", "a:1"],
        ["--conn", "5", "a:1"],
        ["--conn=5", "a:1"],
        ["--co", "5", "a:1"],
        ["--c=5", "a:1"],
        ["--exit=5", "a:1"],
        ["--e", "5", "a:1"],
        ["a:1", "-c", "5"],
        ["a:1", "--exit-idle-time=5"],
        ["-c5", "a:1", "--exit-idle-time=5"],
        ["--", "a:1"],
        ["-c5", "--", "a:1"],
        ["a:1", "--"],
    ],
)
def test_accepted_by_getopt(stage, arguments):
    """Abbreviations, joined and separate arguments, options after the target, and `--`."""
    assert is_accepted(stage.run(*arguments))


def test_two_dashes_end_the_options(stage):
    """After `--` a dash begins a target, not an option."""
    assert is_accepted(stage.run("--", "-c"))
    fails_with(stage.run("--", "a:1", "-c5"), "Too many parameters.")


def test_posixly_correct(stage):
    """With POSIXLY_CORRECT the first target ends the options."""
    outcome = stage.run("a:1", "-c5", environment={"POSIXLY_CORRECT": "1"})
    fails_with(outcome, "Too many parameters.")


@pytest.mark.parametrize("arguments", [["-h"], ["--help"], ["--he"], ["-hc0"], ["a", "b", "-h"]])
def test_help(stage, arguments):
    """--help writes every option to stdout and exits 0, whatever else is on the command line."""
    outcome = stage.run(*arguments)
    assert (outcome.status, outcome.stderr) == (0, "")
    for option in ("--connections-max=", "--exit-idle-time=", "--help", "--version"):
        assert option in outcome.stdout


@differs("original", reason="does not have these options")
def test_help_names_the_new_options(stage):
    """--help names every option, and no line is wider than a terminal."""
    outcome = stage.run("--help")
    names = "proxy-protocol connect-timeout idle-timeout drain-timeout listen"
    for name in names.split():
        assert f"--{name}=" in outcome.stdout
    assert all(len(line) < 81 for line in outcome.stdout.splitlines())


@pytest.mark.parametrize("arguments", [["--version"], ["--v"]])
def test_version(stage, arguments):
    """--version writes a number to stdout and exits 0."""
    outcome = stage.run(*arguments)
    assert (outcome.status, outcome.stderr) == (0, "")
    assert re.match(r"\S+ \d+(\.\d+)*", outcome.stdout)


def test_help_that_cannot_be_written(stage):
    """--help into a full device causes no traceback."""
    outcome = stage.run("--help", prefix=["sh", "-c", 'exec "$@" >/dev/full', "sh"])
    assert "Traceback" not in outcome.stderr
    assert outcome.status in (0, 1)


SPANS = (
    "5|5s|5 s|5min 20s|1.5h|500ms|infinity| infinity |1y 12month|55s500ms|5us|5µs|5μs|2 h|2hours"
    "|48hr|300ms20s 5day|  5  |0|0.5|.5|+5|5m|5M|1w|5d|1h30|3 4|5seconds|5sec|5second|5minute"
    "|1minutes|1months|1month|1years|1msec|1usec|584541y|5 5 5s|1y1y"
)
NOT_SPANS = (
    "| |x|s|-5|+-5|5 -3|5 parsecs|5s-3|1.2.3|5.|1.s|1.5.s|.|.s|infinity 5|INFINITY|5S|5H|5ns|5µ"
    "|1e3|0x5|5,5|١|18446744073709551615us|18446744073709551616us|99999999999999999999"
)


@pytest.mark.parametrize("span", SPANS.split("|"))
def test_span_accepted(stage, span):
    """Time spans as systemd.time(7) has them."""
    assert is_accepted(stage.run(f"--exit-idle-time={span}", "a:1"))


@pytest.mark.parametrize("span", NOT_SPANS.split("|"))
def test_span_refused(stage, span):
    """Anything else is refused, with the text as it was given."""
    outcome = stage.run(f"--exit-idle-time={span}", "a:1")
    fails_with(outcome, f"Failed to parse --exit-idle-time= argument: {span}")


@differs("original", reason="says it on one line, without a hint")
def test_a_hint_says_how_to_pass_sockets(stage):
    """Without sockets a second line names the two ways to pass some."""
    outcome = stage.run("127.0.0.1:80")
    first, second = outcome.stderr.splitlines()
    assert (outcome.status, first) == (1, NO_SOCKETS)
    assert "--listen=" in second
    assert ".socket" in second


@pytest.mark.parametrize(
    "target", ["127.0.0.1:80", "127.0.0.1", "localhost", "::1:80", "/run/x", "@x", "a:http"]
)
def test_target_accepted(stage, target):
    """The forms of a target that the original knows; the default port is 80."""
    assert is_accepted(stage.run(target))


@differs("original", reason="knows none of these options")
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--connect-timeout=x", "a:1"], "connect-timeout"),
        (["--idle-timeout=-1", "a:1"], "idle-timeout"),
        (["--drain-timeout=5 parsecs", "a:1"], "drain-timeout"),
        (["--proxy-protocol=v3", "a:1"], "proxy-protocol"),
        (["--proxy-protocol=", "a:1"], "proxy-protocol"),
        (["--listen=host.example:80", "a:1"], "host.example"),
        (["--listen=99999", "a:1"], "99999"),
        (["--listen=", "a:1"], "listen"),
        (["a:99999"], "99999"),
        (["a:nosuchservice"], "nosuchservice"),
        (["[::1"], "[::1"),
        (["/" + "x" * 200], "xxx"),
        (["@" + "x" * 200], "xxx"),
        (["vsock:x:y"], "vsock"),
        (["--listen=127.0.0.1:0", "one=a:1", "one=a:2"], "one"),
    ],
)
def test_bad_value_of_a_new_option(stage, arguments, named):
    """A bad value is one line that names the option or shows the value, and exit status 1."""
    outcome = stage.run(*arguments)
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert f"--{named}=" in outcome.stderr or named in outcome.stderr
    assert not outcome.stderr.startswith(f"{stage.executable}: unrecognized")


@pytest.mark.parametrize("target", ["\x80\xff", "a\nb:1x", "é:1", " ", ":", "::", ":80", "a:b:c:1"])
def test_strange_target_causes_no_traceback(stage, target):
    """Whatever the target, there are at most two lines on stderr, and exit status 1."""
    outcome = stage.run(os.fsencode(target) if "\x80" not in target else b"\x80\xff")
    assert outcome.status == 1
    assert "Traceback" not in outcome.stderr
    assert 1 <= len(outcome.stderr.splitlines()) <= 2


clear_error = differs("original", reason="says only: Failed to receive sockets from parent.")


@clear_error
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("LISTEN_PID", "garbage"),
        ("LISTEN_PID", "-1"),
        ("LISTEN_PID", ""),
        ("LISTEN_FDS", "x"),
        ("LISTEN_FDS", "-3"),
        ("LISTEN_FDS", ""),
    ],
)
def test_garbage_in_the_activation(stage, variable, value):
    """Garbage in LISTEN_* is one line that names the variable, and exit status 1."""
    listener = stage.listener()
    if variable == "LISTEN_PID":
        outcome = stage.run("127.0.0.1:1", listeners=[listener], listen_pid=value)
    else:
        outcome = stage.run("127.0.0.1:1", listeners=[listener], environment={variable: value})
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1
    assert variable in outcome.stderr


@pytest.mark.parametrize("names", ["web@127.0.0.1:8080.socket", "one:two:three", ""])
def test_names_that_do_not_fit(stage, names):
    """A colon in the name of a unit makes more names than sockets, which are not needed here."""
    stage.launch(stage.echo(), listeners=[stage.listener()], names=names)
    client = stage.connect()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    assert stage.proxy.log() == ""


@differs("original", reason="does not look at the names")
def test_names_that_do_not_fit_where_they_are_needed(stage):
    """NAME=TARGET needs a name for each socket: one line, exit status 1."""
    listeners = [stage.listener(), stage.listener()]
    outcome = stage.run("one=127.0.0.1:1", listeners=listeners, names="one:two:three")
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    assert "LISTEN_FDNAMES=one:two:three: 3 names for 2 sockets" in line
    assert "FileDescriptorName=" in line


def test_sockets_of_another_process(stage):
    """With the LISTEN_PID of another process there are no sockets for us."""
    outcome = stage.run("127.0.0.1:1", listeners=[stage.listener()], listen_pid="1")
    assert is_accepted(outcome)


@differs("original", reason="says it on one line, without a hint")
@pytest.mark.parametrize(
    ("arguments", "environment", "redirect", "hint"),
    [
        (["a:1"], {}, "<&3", "StandardInput=socket passes the socket where"),
        (["a:1"], {}, ">&3", "StandardOutput=socket passes the socket where"),
        (["a:1"], {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, "", "process 1, not to this one"),
        (["a:1"], {"LISTEN_FDS": "1"}, "", "LISTEN_FDS=1 is set, but LISTEN_PID"),
        (["help"], {}, "", "did you mean --help?"),
        (["version"], {}, "", "did you mean --version?"),
    ],
)
def test_a_hint_says_why_there_are_no_sockets(stage, arguments, environment, redirect, hint):
    """The original's line comes first; a second one says what is wrong."""
    outcome = stage.run(
        *arguments,
        listeners=[stage.listener()],
        listen_pid=None,
        environment={"LISTEN_FDS": None} | environment,
        prefix=["sh", "-c", f'exec "$@" {redirect}', "sh"],
    )
    assert outcome.status == 1
    first, second = outcome.stderr.splitlines()
    assert first == NO_SOCKETS
    assert hint in second


def test_accepted_socket_as_standard_input(stage):
    """Accept=yes with StandardInput=socket, as with inetd: no socket was passed."""
    listener = stage.listener()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    outcome = stage.run(
        "a:1",
        listeners=[connection],
        listen_pid=None,
        environment={"LISTEN_FDS": None},
        prefix=["sh", "-c", 'exec "$@" <&3', "sh"],
    )
    connection.close()
    assert is_accepted(outcome)
    if stage.is_ours:
        assert "StandardInput=socket" in outcome.stderr
    client.close()


WRONG_INPUTS = [
    (["--buffer-size=256q", "a:1"], ["256q", "4096", "2047M", "K or M", "auto"]),
    (["--buffer-size=1k", "a:1"], ["1k", "4096"]),
    (["--buffer-size=", "a:1"], ["4096"]),
    (["--connect-timeout=soon", "a:1"], ["soon", "5min 20s", "infinity"]),
    (["--drain-timeout=-1", "a:1"], ["-1", "5min 20s", "infinity"]),
    (["--idle-timeout=1 fortnight", "a:1"], ["fortnight", "5min 20s", "infinity"]),
    (["--idle-timeout=0", "a:1"], ["too low", "infinity"]),
    (["--hand-over=sometimes", "a:1"], ["sometimes", "busy or always"]),
    (["--listen=127.0.0.1", "a:1"], ["a port, HOST:PORT, a path, @NAME or vsock:CID:PORT"]),
    (["--listen=http://localhost:80", "a:1"], ["a URL is not an address", "localhost:80"]),
    (["--listen=localhost:80", "a:1"], ["'localhost' is not an IP address"]),
    (["--listen=we:b=8080", "a:1"], ["a NAME in front", "contains no colon"]),
    (["--listen=99999", "a:1"], ["from 0 to 65535"]),
    (["--listen=vsock:x:1", "a:1"], ["CID from 0 to 4294967295"]),
    (["--proxy-protocol=2", "a:1"], ["v1 or v2"]),
    (["--threads=0", "a:1"], ["from 1 to 1024, or auto"]),
    (["--threads=two", "a:1"], ["from 1 to 1024, or auto"]),
    (["http://localhost:80"], ["a URL is not an address", "write localhost:80"]),
    (["https://[::1]/x"], ["write [::1]:443"]),
    (["web=http://host/"], ["write host:80"]),
    (["a:"], ["expected HOST:PORT"]),
    ([":80"], ["expected HOST:PORT"]),
    (["a:99999"], ["from 1 to 65535"]),
    (["a:nosuchservice"], ["port number, nor a TCP service"]),
    (["run/x"], ["a path begins with a slash, or with unix:"]),
    (["we:b=a:1"], ["contains no colon"]),
    (["=a:1"], ["is not empty"]),
    (["::1"], ["[ADDRESS]:PORT"]),
    (["[::1"], ["[IPV6-ADDRESS]:PORT"]),
    (["vsock:x:1"], ["CID from 0 to 4294967295"]),
    (["wbe=a:1"], ["'web'", "'wbe'", "is 'wbe' meant for it?"]),
]
"""Arguments, and what the message about them contains: what was given, and what is allowed."""


@differs("original", reason="knows none of these options, and takes any text for a target")
@pytest.mark.parametrize(("arguments", "words"), WRONG_INPUTS)
def test_the_message_about_a_wrong_input_says_what_is_allowed(stage, arguments, words):
    """One line that is enough for a first-time user."""
    outcome = stage.run(*arguments, listeners=[stage.listener()], names="web")
    assert outcome.status == 1
    (line,) = outcome.stderr.splitlines()
    for word in words:
        assert word in line


@differs("original", reason="takes the port for a host name without a warning", run=False)
def test_a_port_alone_is_a_host_name(stage):
    """As in the original; but this is hardly ever meant, so there is a warning."""
    proxy = stage.launch("8080", listeners=[stage.listener()])
    (line,) = proxy.log_lines()
    assert "localhost:8080" in line


@pytest.mark.parametrize("count", ["5", "99999999999"])
def test_more_sockets_announced_than_passed(stage, count):
    """LISTEN_FDS counts fds that are not open: one line, exit status 1."""
    environment = {"LISTEN_FDS": count}
    outcome = stage.run("127.0.0.1:1", listeners=[stage.listener()], environment=environment)
    assert outcome.status == 1
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        pytest.param(variable, value, marks=differs("original", reason="ignores it silently"))
        for variable, value in [
            ("NOTIFY_SOCKET", "garbage"),
            ("NOTIFY_SOCKET", "@"),
            ("NOTIFY_SOCKET", "/" + "x" * 200),
            ("NOTIFY_SOCKET", "vsock:x"),
            ("WATCHDOG_USEC", "garbage"),
            ("WATCHDOG_USEC", "-1"),
            ("WATCHDOG_PID", "garbage"),
            ("SYSTEMD_LOG_LEVEL", "garbage"),
            ("SYSTEMD_LOG_LEVEL", "8"),
            ("JOURNAL_STREAM", "garbage"),
        ]
    ],
)
def test_garbage_in_the_environment(stage, variable, value):
    """Garbage in other variables is one line that names the variable, and clients are served."""
    listener = stage.listener()
    environment = {variable: value}
    if variable == "WATCHDOG_PID":
        environment["WATCHDOG_USEC"] = "1000000"
    proxy = stage.launch(stage.echo(), listeners=[listener], environment=environment, wait=False)
    client = stage.connect()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    assert len(proxy.log_lines()) == 1
    assert variable in proxy.log()


@pytest.mark.parametrize("value", ["", None])
def test_empty_variables_are_ignored(stage, value):
    """An empty variable is the same as none."""
    names = ("NOTIFY_SOCKET", "JOURNAL_STREAM")
    environment = dict.fromkeys(names, value)
    proxy = stage.launch(
        stage.echo(), listeners=[stage.listener()], environment=environment, wait=False
    )
    client = stage.connect()
    client.sendall(b"hello")
    assert read_exactly(client, 5) == b"hello"
    assert proxy.log() == ""


@differs("original", reason="has no --listen=", run=False)
class TestListen:
    """--listen= lets the program run without a service manager."""

    def served_at(self, stage, address, family=socket.AF_INET):
        """True if an echo is behind `address`."""
        client = stage.connect_to(address, family)
        client.sendall(b"hello")
        return read_exactly(client, 5) == b"hello"

    def test_host_and_port(self, stage):
        """HOST:PORT."""
        port = quiet_port()
        stage.launch(f"--listen=127.0.0.1:{port}", stage.echo())
        assert self.served_at(stage, ("127.0.0.1", port))

    def test_listening_is_logged(self, stage):
        """One line for each, at info level, once it is up, with the port that the kernel chose."""
        path = stage.path("one")
        proxy = stage.launch(f"--listen={path}", "--listen=127.0.0.1:0", stage.echo())
        first, second = proxy.log_lines()
        assert first == f"Listening on {path}."
        port = int(re.fullmatch(r"Listening on 127\.0\.0\.1:(\d+)\.", second)[1])
        assert self.served_at(stage, ("127.0.0.1", port))

    def test_bracketed_ipv6_and_port(self, stage):
        """[V6]:PORT."""
        port = quiet_port()
        stage.launch(f"--listen=[::1]:{port}", stage.echo())
        assert self.served_at(stage, ("::1", port), socket.AF_INET6)

    def test_port_alone_is_both_protocols(self, stage):
        """PORT listens on every address, IPv6 and IPv4."""
        port = quiet_port()
        stage.launch("--listen", str(port), stage.echo())
        assert self.served_at(stage, ("127.0.0.1", port))
        assert self.served_at(stage, ("::1", port), socket.AF_INET6)

    def test_path(self, stage):
        """/PATH makes a socket file and removes it at the exit."""
        path = stage.path("ours")
        proxy = stage.launch(f"--listen={path}", stage.echo())
        assert self.served_at(stage, path, socket.AF_UNIX)
        assert proxy.end()
        assert not os.path.exists(path)

    def test_abstract_name(self, stage):
        """@NAME listens in the abstract namespace."""
        name = f"proxyd-test-{os.getpid()}"
        stage.launch(f"--listen=@{name}", stage.echo())
        assert self.served_at(stage, f"\0{name}", socket.AF_UNIX)

    def test_several(self, stage):
        """The option may be repeated, and mixed with inherited sockets."""
        path, port, inherited = stage.path("one"), quiet_port(), stage.listener("unix")
        stage.launch(
            f"--listen={path}", f"--listen=127.0.0.1:{port}", stage.echo(), listeners=[inherited]
        )
        assert self.served_at(stage, path, socket.AF_UNIX)
        assert self.served_at(stage, ("127.0.0.1", port))
        assert self.served_at(stage, inherited.getsockname(), socket.AF_UNIX)

    def test_stale_socket_file_is_replaced(self, stage):
        """A socket file without a listener is replaced."""
        path = stage.path("stale")
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(path)
        stale.close()
        stage.launch(f"--listen={path}", stage.echo())
        assert self.served_at(stage, path, socket.AF_UNIX)

    def test_live_socket_file_is_an_error(self, stage):
        """A socket file with a listener is left alone: one line, exit status 1."""
        live = stage.listener("unix")
        path = live.getsockname()
        outcome = stage.run(f"--listen={path}", "127.0.0.1:1")
        assert outcome.status == 1
        assert len(outcome.stderr.splitlines()) == 1
        assert path in outcome.stderr
        open_connection(path, socket.AF_UNIX).close()

    @pytest.mark.parametrize("round_", range(3))
    def test_many_starts_at_the_same_moment(self, stage, round_):
        """With one stale path, one program serves and all others end with one clear line."""
        path, target = stage.path("stale"), stage.echo()
        with socket.socket(socket.AF_UNIX) as stale:
            stale.bind(path)
        command = [stage.executable, *stage.arguments, f"--listen={path}", target]
        starts = [
            subprocess.Popen(command, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True)
            for _ in range(16)
        ]
        try:
            wait_until(
                lambda: [start.poll() is None for start in starts].count(True) <= 1,
                "all but one have ended",
            )
            assert [start.poll() is None for start in starts].count(True) == 1
            assert self.served_at(stage, path, socket.AF_UNIX)
            for start in starts:
                if start.poll() is None:
                    continue
                assert start.returncode == 1
                assert start.stderr.read() == (
                    f"Failed to listen on {path}: Address already in use\n"
                )
        finally:
            for start in starts:
                start.terminate()
                start.wait()
                start.stderr.close()
        assert not os.path.exists(path)
        assert os.listdir(stage.directory) == []

    def test_other_file_is_left_alone(self, stage):
        """A file that is not a socket is not replaced: one line, exit status 1."""
        path = stage.path("precious")
        with open(path, "w") as file:
            file.write("data")
        outcome = stage.run(f"--listen={path}", "127.0.0.1:1")
        assert outcome.status == 1
        assert path in outcome.stderr
        with open(path) as file:
            assert file.read() == "data"

    def test_file_of_another_process_survives_our_exit(self, stage):
        """A socket file that has replaced ours is not unlinked at our exit."""
        path = stage.path("ours")
        proxy = stage.launch(f"--listen={path}", stage.echo())
        os.unlink(path)
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(path)
            assert proxy.end()
            assert os.path.exists(path)

    def test_port_in_use_is_an_error(self, stage):
        """A port in use is one line that names it, and exit status 1."""
        port = stage.listener().getsockname()[1]
        outcome = stage.run(f"--listen=127.0.0.1:{port}", "127.0.0.1:1")
        assert outcome.status == 1
        assert len(outcome.stderr.splitlines()) == 1
        assert str(port) in outcome.stderr

    def test_port_can_be_bound_again_at_once(self, stage):
        """A restart can bind its port although old connections are in TIME_WAIT."""
        port = quiet_port()
        target = stage.echo()
        first = stage.launch(f"--listen=127.0.0.1:{port}", target)
        assert self.served_at(stage, ("127.0.0.1", port))
        assert first.end()
        stage.launch(f"--listen=127.0.0.1:{port}", target)
        assert self.served_at(stage, ("127.0.0.1", port))

    def test_missing_folder_is_an_error(self, stage):
        """A path in a folder that does not exist is one line, and exit status 1."""
        outcome = stage.run("--listen=/nonexistent/folder/socket", "127.0.0.1:1")
        assert outcome.status == 1
        assert len(outcome.stderr.splitlines()) == 1

    def test_socket_file_is_gone_after_an_error(self, stage):
        """If the second address fails, the socket file of the first one is removed."""
        path = stage.path("first")
        outcome = stage.run(f"--listen={path}", "--listen=/nonexistent/socket", "127.0.0.1:1")
        assert outcome.status == 1
        wait_until(lambda: not os.path.exists(path), "the file is removed")
