"""Signals: counted by handlers, taken through an fd."""

import errno
import os
import select
import signal

import pytest
from kit.child import in_child

from proxyd._relay import signal_fd, take_signals


def test_signals_are_taken_as_often_as_they_came():
    def scenario():
        fd = signal_fd((signal.SIGUSR1, signal.SIGUSR2))
        assert take_signals() == []
        for number in (signal.SIGUSR2, signal.SIGUSR1, signal.SIGUSR2):
            os.kill(os.getpid(), number)
        assert select.select([fd], [], [], 0)[0] == [fd]
        assert take_signals() == [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR2]
        assert select.select([fd], [], [], 0)[0] == []
        assert take_signals() == []

    in_child(scenario)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_was_ignored_stays_ignored(number):
    """As nohup(1) wants it; SIGTERM does not."""

    def scenario():
        for each in (number, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        signal_fd((number, signal.SIGTERM))
        for each in (number, signal.SIGTERM):
            os.kill(os.getpid(), each)
        assert take_signals() == [signal.SIGTERM]

    in_child(scenario)


def test_a_signal_that_cannot_be_caught():
    def scenario():
        with pytest.raises(OSError) as refusal:
            signal_fd((signal.SIGKILL,))
        assert refusal.value.errno == errno.EINVAL
        for number in (-1, 0, 65):
            with pytest.raises(ValueError, match="no such signal"):
                signal_fd((number,))

    in_child(scenario)
