"""Tests of the extension module: a relay in this process, between sockets of the test's own."""

import pytest
from kit.rig import MODES, Rigs


@pytest.fixture
def rigs(tmp_path):
    """Makes rigs; none of them may leave an fd behind."""
    rigs = Rigs(str(tmp_path))
    yield rigs
    rigs.close()
    assert not rigs.leaked()


@pytest.fixture(params=list(MODES))
def mode(request):
    """How the relay may move bytes, and in which units."""
    return MODES[request.param]


@pytest.fixture(params=["splice", "copy"])
def way(request):
    """How the relay may move bytes."""
    return MODES[request.param]


@pytest.fixture(
    params=[("tcp4", "tcp4"), ("tcp4", "unix"), ("unix", "tcp6"), ("unix", "unix")],
    ids="-".join,
)
def pair(request):
    """(family of the client, family of the target)."""
    return request.param
