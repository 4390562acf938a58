"""How many connections fit into RLIMIT_NOFILE. Each case runs in a process of its own."""

import resource
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import limits, log

PROGRAM = """
import resource, sys
soft, hard, wanted, listeners, threads, names, kept = map(int, sys.argv[1:])
from proxyd.limits import fit_connections
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(fit_connections(wanted, listeners, threads, names=names, kept=bool(kept)))
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


def fit(soft, hard, wanted, listeners=1, threads=1, names=0, kept=False):
    """(connections that fit, soft limit afterwards, what was logged)."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < hard:
        pytest.skip(f"SKIPPED LOUDLY: the hard limit here is below {hard} open files")
    arguments = [str(int(one)) for one in (soft, hard, wanted, listeners, threads, names, kept)]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    fitting, soft_now, hard_now = map(int, done.stdout.split())
    assert hard_now == hard
    return fitting, soft_now, done.stderr


def test_the_soft_limit_is_raised_to_what_the_connections_need():
    fitting, soft, logged = fit(256, 4096, 256)
    assert fitting == 256
    assert 256 * 2 < soft < 4096  # for pipes too, but no more
    assert logged == ""


def test_it_is_never_lowered():
    assert fit(4000, 4096, 1) == (1, 4000, "")


def test_it_is_raised_to_the_hard_limit_at_most():
    fitting, soft, logged = fit(64, 1024, 256)
    assert (fitting, soft, logged) == (256, 1024, "")


def test_a_hard_limit_that_is_too_small_costs_connections_and_one_warning():
    fitting, soft, logged = fit(32, 32, 256)
    assert soft == 32
    assert 4 <= fitting <= 11  # two fds each, and stdio, epoll and the like
    (line,) = logged.splitlines()
    assert line == (
        f"The limit of 32 open files allows {fitting} connections, not 256: raise LimitNOFILE=."
    )


@pytest.mark.parametrize("limit", [5, 8, 12])
def test_one_connection_always_remains(limit):
    fitting, _, logged = fit(limit, limit, 256)
    assert fitting == 1
    assert len(logged.splitlines()) == 1


def test_listeners_and_look_ups_need_fds_too():
    base, _, _ = fit(64, 64, 256)
    assert fit(64, 64, 256, listeners=11)[0] == base - 5
    assert fit(64, 64, 256, names=1)[0] == base - 2
    assert fit(64, 64, 256, names=4)[0] == base - 8


def test_threads_need_fds_too():
    base, _, _ = fit(64, 64, 256)
    assert fit(64, 64, 256, threads=3)[0] == base - 3  # six fds
    assert fit(64, 64, 256, threads=11)[0] == base - 11  # sixteen more


def test_what_is_kept_in_case_of_a_kill_needs_fds_too():
    assert fit(64, 64, 256, kept=True)[0] == fit(64, 64, 256)[0] - 1
    assert 470 < fit(1024, 1024, 1000, kept=True)[0] < fit(1024, 1024, 1000)[0] - 15
    assert fit(256, 4096, 256, kept=True)[0] == 256


def test_the_largest_number_of_connections():
    fitting, soft, logged = fit(1024, 4096, 2**32 - 1)
    assert soft == 4096
    assert 1900 < fitting < 2048
    assert len(logged.splitlines()) == 1


@given(
    st.integers(1, 2**32 - 1),
    st.integers(0, 100),
    st.integers(1, 1024),
    st.integers(0, 20),
    st.integers(3, 1 << 30),
    st.booleans(),
)
def test_what_fits_never_needs_more_fds_than_there_are(
    wanted, listeners, threads, names, hard, kept
):
    asked, logged = [], []

    def raise_fd_limit(number):
        asked.append(number)
        return min(number, hard)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "raise_fd_limit", raise_fd_limit)
        patch.setattr(log, "_log", lambda level, text, fields=None: logged.append(text))
        fitting = limits.fit_connections(wanted, listeners, threads, names=names, kept=kept)
    assert 1 <= fitting <= wanted
    needed = listeners + 2 * (threads - 1) + 4 * names + 2 * fitting
    pages = 2 * (fitting // 32) if kept else 0
    assert fitting == 1 or needed + pages < hard
    assert len(logged) == (fitting < wanted)
    assert asked[0] > 2 * wanted
