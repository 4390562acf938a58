"""logger(1) to rsyslogd, over UNIX datagrams and UDP."""

from pathlib import Path

import pytest
from kit.waiting import wait_until

UDP = """
module(load="imudp")
input(type="imudp" port="{port}" address="127.0.0.1")
action(type="omfile" file="{out}" template="plain")
"""

UNIX = """
module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket="{path}" CreatePath="off" RateLimit.Interval="0")
action(type="omfile" file="{out}" template="plain")
"""

TEMPLATE = 'template(name="plain" type="string" string="%msg%\\n")\n'

LINES = [f"line {number} ü" for number in range(50)]


@pytest.fixture
def serve(programs, running, datagrams):
    """Start rsyslogd with an input; returns the file of its lines."""

    def start(text, **values):
        out = Path(datagrams.stage.path("lines"))
        configuration = datagrams.stage.path("rsyslog.conf")
        Path(configuration).write_text(TEMPLATE + text.format(out=out, **values))
        pid = datagrams.stage.path("rsyslog.pid")
        running.start(programs.command("rsyslogd", "-n", "-f", configuration, "-i", pid))
        return out

    return start


def received(out):
    """The lines that rsyslogd has written."""
    return [line.strip() for line in out.read_text().splitlines()] if out.exists() else []


def wait_for_lines(out, wanted):
    wait_until(lambda: len(received(out)) >= len(wanted), f"lines; there: {received(out)[-3:]}")
    assert received(out) == wanted


@pytest.mark.parametrize("before", [True, False])
def test_lines_over_udp(datagrams, serve, programs, run, before):
    """With rsyslogd there before the first line, and only after all of them."""
    target, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch(target.text, listeners=[listener])
    host, port = listener.getsockname()
    if before:
        out = serve(UDP, port=target._address[1])
        wait_until(lambda: answers(datagrams, target), "rsyslogd")
    for line in LINES:
        run(programs.command("logger", "--udp", f"--server={host}", f"--port={port}", line))
    if not before:
        proxy.wait_for_log("holding datagrams until it answers.")
        out = serve(UDP, port=target._address[1])
    wait_for_lines(out, LINES)


def answers(datagrams, target):
    """Whether a socket is bound to the target's address: then another one cannot be."""
    try:
        datagrams.target(port=target._address[1]).close()
    except OSError:
        return True
    return False


@pytest.mark.parametrize("before", [True, False])
def test_lines_over_unix_datagrams(datagrams, serve, programs, run, before):
    """As /dev/log has them."""
    path, listener = datagrams.stage.path("target"), datagrams.listener("unix")
    proxy = datagrams.launch(path, listeners=[listener])
    if before:
        out = serve(UNIX, path=path)
    logger = programs.command("logger", "--socket", listener.getsockname())
    for line in LINES[:8]:  # the queue of a UNIX listener has room for eleven
        run([*logger, line])
    if not before:
        proxy.wait_for_log("holding datagrams until it answers.")
        out = serve(UNIX, path=path)
    wait_for_lines(out, LINES[:8])
