"""Tests of the extension module: a relay in this process, with both peers played by the test."""

import pytest
from kit.datagram_rig import DatagramRigs
from kit.privileges import skip_unix_unless_kept
from kit.rig import MODES, Rigs

OF_WHAT_IS_KEPT = ("test_kill.py", "test_pages.py", "test_slate.py")


def pytest_collection_modifyitems(items):
    skip_unix_unless_kept([item for item in items if item.path.name in OF_WHAT_IS_KEPT])


@pytest.fixture
def rigs(tmp_path):
    """Makes rigs; none of them may leave an fd open."""
    rigs = Rigs(str(tmp_path))
    yield rigs
    rigs.close()
    assert not rigs.leaked()


@pytest.fixture
def datagram_rigs(tmp_path):
    """Makes rigs of datagrams; none of them may leave an fd open."""
    rigs = DatagramRigs(str(tmp_path))
    yield rigs
    rigs.close()
    assert not rigs.leaked()


@pytest.fixture(params=list(MODES))
def mode(request):
    """How the relay may move bytes, and in units of which size."""
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
