"""The limit per source: to whom it does not apply, and what is said of that."""

import socket
from types import SimpleNamespace

import pytest

from proxyd import sources, user_namespace

TCP = SimpleNamespace(family=socket.AF_INET, datagram=False, text="127.0.0.1:80")
UNIX = SimpleNamespace(family=socket.AF_UNIX, datagram=False, text="/run/x")
DATAGRAMS = SimpleNamespace(family=socket.AF_UNIX, datagram=True, text="/run/d")


class FakeAcceptor:
    """Takes limits."""

    def __init__(self, *listeners):
        self.listeners = list(listeners)
        self.limits = []

    def limit_sources(self, places_max, unknown_uid):
        self.limits.append((places_max, unknown_uid))


@pytest.fixture
def logged_lines(monkeypatch):
    lines = []
    monkeypatch.setattr(sources.log, "warning", lines.append)
    return lambda: lines


@pytest.fixture
def namespace(monkeypatch):
    """Sets whether every user has a name here."""

    def set_whether(has_all, uid=65534):
        monkeypatch.setattr(sources, "has_all_users", lambda: has_all)
        monkeypatch.setattr(sources, "overflow_uid", lambda: uid)

    return set_whether


def test_nobody_is_left_out(namespace, logged_lines):
    namespace(True)
    acceptor = FakeAcceptor(TCP, UNIX)
    sources.limit_sources(acceptor, None, 7)
    assert acceptor.limits == [(7, -1)]
    assert logged_lines() == []


def test_users_without_a_name(namespace, logged_lines):
    namespace(False, 99)
    acceptor = FakeAcceptor(TCP, UNIX)
    sources.limit_sources(acceptor, None, 7)
    assert acceptor.limits == [(7, 99)]
    assert logged_lines() == [
        (
            "--connections-max-per-source= does not apply to UNIX clients of users that are not "
            "known here, as with PrivateUsers=: all of them have the uid 99."
        )
    ]


def test_without_a_unix_listener_there_is_nothing_to_say(namespace, logged_lines):
    namespace(False)
    acceptor = FakeAcceptor(TCP)
    sources.limit_sources(acceptor, None, 7)
    assert acceptor.limits == [(7, -1)]
    assert logged_lines() == []


def test_datagrams(namespace, logged_lines):
    namespace(False)
    limits = []
    policy = SimpleNamespace(relay_part=SimpleNamespace(limit_sources=limits.append))
    sources.limit_sources(FakeAcceptor(DATAGRAMS), policy, 7)
    assert limits == [7]
    assert logged_lines() == [
        (
            "--connections-max-per-source= does not apply to UNIX datagrams, which do not tell "
            "their user: '/run/d'."
        )
    ]


# ── the user namespace ────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def kernel_says(monkeypatch, tmp_path):
    """What the files in /proc contain; None: they do not exist."""
    real_open = open

    def set_text(text):
        def opened(path, mode):
            assert path.startswith("/proc/")
            if text is None:
                raise FileNotFoundError
            (tmp_path / "file").write_text(text)
            return real_open(tmp_path / "file", mode)

        monkeypatch.setattr("builtins.open", opened)

    return set_text


@pytest.mark.parametrize(
    ("text", "all_users"),
    [
        ("         0          0 4294967295\n", True),
        ("0 1000 1\n1 100000 65536\n", False),
        ("0 0 2147483647\n2147483647 2147483647 2147483648\n", True),
        (None, True),
        ("garbage\n", False),
        ("", False),
    ],
)
def test_which_users_have_a_name(kernel_says, text, all_users):
    kernel_says(text)
    assert user_namespace.has_all_users() == all_users


def test_the_overflow_uid(kernel_says):
    assert user_namespace.overflow_uid() > 0
    kernel_says("99\n")
    assert user_namespace.overflow_uid() == 99
    kernel_says(None)  # ProcSubset=pid
    assert user_namespace.overflow_uid() == 65534
