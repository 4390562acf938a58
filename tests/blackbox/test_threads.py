"""--threads=: when further threads start, and what they change."""

import os
import time

import pytest
from kit.differences import differs
from kit.flows import MIB, Flow, at_lowest_priority, handed_over
from kit.privileges import as_unprivileged_user
from kit.sockets import read_exactly
from kit.traffic import Payload, expected, receive_digest, send_payload
from kit.waiting import patience

pytestmark = differs("original", reason="has no --threads=", run=False)

STREAMS = 8
THREE = ("--threads=3", "--hand-over=busy")
SLOW = "--buffer-size=4096"
"""Makes each byte more work for the program than for its peers."""


def tasks(proxy):
    """The number of threads of the program."""
    return len(os.listdir(f"/proc/{proxy.worker}/task"))


def keep_busy(stage, backend, until):
    """Let bytes flow until a condition is true, and check a payload alongside."""
    flows = [Flow(stage.connect(), backend.accept()) for _ in range(STREAMS)]
    try:
        number = 0
        client, server = stage.connect(), backend.accept()
        deadline = time.monotonic() + patience()
        while not until():
            assert time.monotonic() < deadline
            payload = Payload(MIB, seed=number)
            sending = send_payload(client, payload, half_close=False)
            assert receive_digest(server, MIB).result() == expected(payload)
            sending.result()
            number += 1
    finally:
        for flow in flows:
            flow.stopped.set()
    for flow in flows:
        flow.stop()


def test_threads_start_when_one_is_too_busy(stage):
    """Transfers continue, in one thread or another."""
    prefix = at_lowest_priority(stage, "")  # without figures a CPU counts as idle
    backend = stage.forward("tcp4", "tcp4", *THREE, SLOW, prefix=prefix)
    before = tasks(stage.proxy)
    keep_busy(stage, backend, lambda: handed_over(stage.proxy)[1] >= 1)
    assert handed_over(stage.proxy)[0] == 3
    assert tasks(stage.proxy) == before + 2


def test_no_thread_starts_while_no_cpu_is_idle(stage):
    prefix = at_lowest_priority(stage, "cpu  1 1 1 1000 1000 1 1 0 0 0\n")
    backend = stage.forward("tcp4", "tcp4", *THREE, SLOW, prefix=prefix)
    before = tasks(stage.proxy)
    keep_busy(stage, backend, lambda: stage.proxy.cpu_seconds() > 0.5)
    assert tasks(stage.proxy) == before
    assert handed_over(stage.proxy) == (1, 0)


def test_all_threads_start_at_once_with_hand_over_always(stage):
    stage.launch("--threads=3", "--hand-over=always", stage.echo(), listeners=[stage.listener()])
    assert tasks(stage.proxy) >= 3
    for _ in range(6):
        client = stage.connect()
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
    assert handed_over(stage.proxy) == (3, 4)


@pytest.mark.parametrize("threads", [2, 8])
def test_threads_that_cannot_be_started(stage, threads):
    """As with TasksMax=1: one warning, and the program continues with one thread."""
    prefix = ["prlimit", "--nproc=1", *as_unprivileged_user(stage.executable)]
    stage.launch(
        f"--threads={threads}",
        "--hand-over=always",
        stage.echo(),
        listeners=[stage.listener()],
        prefix=prefix,
    )
    (warning,) = stage.proxy.log_lines()
    assert warning.endswith(
        "Failed to start a relay thread: Resource temporarily unavailable. "
        f"Going on with 1 of {threads}."
    )
    for _ in range(5):
        client = stage.connect()
        client.sendall(b"hello")
        assert read_exactly(client, 5) == b"hello"
