"""Run part of a test in a process of its own, where it may crash, hang, or run out of resources."""

import faulthandler
import os
import signal
import sys
import traceback

import pytest

from kit.waiting import wait_until

SKIPPED = 77


def in_child(function, patience=10.0):
    """Run `function` in a forked child; fails unless it returns in time."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        faulthandler.enable(file=2)
        try:
            function()
            status = 0
        except pytest.skip.Exception as reason:
            status = SKIPPED
            print(f"skipped: {reason}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    status = wait_for(child, patience)
    assert not os.WIFSIGNALED(status), signal.Signals(os.WTERMSIG(status)).name
    if os.waitstatus_to_exitcode(status) == SKIPPED:
        pytest.skip("not possible here; see what the child said")
    assert os.waitstatus_to_exitcode(status) == 0, "failed; see its traceback"


def wait_for(child, patience):
    """The wait status of a child. One that hangs tells where and is killed: AssertionError."""
    found = []

    def has_ended():
        pid, status = os.waitpid(child, os.WNOHANG)
        found.append(status)
        return pid

    try:
        wait_until(has_ended, "the end of the child", patience)
    except AssertionError:
        os.kill(child, signal.SIGABRT)  # faulthandler writes its stacks to stderr
        try:
            wait_until(has_ended, "the end of the child", 5)
        except AssertionError:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        raise
    return found[-1]
