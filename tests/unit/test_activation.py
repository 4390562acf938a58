"""LISTEN_ variables and the sockets they announce."""

import contextlib
import errno
import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit.sockets import reset

from proxyd import activation
from proxyd.address import AF_INET, AF_INET6, AF_UNIX
from proxyd.errors import UsageError

START = 400  # far from the fds of the test runner

NOT_A_STREAM = r"^Passed in socket is not a stream socket\.$"

UDPLITE = 136  # IPPROTO_UDPLITE


@pytest.fixture
def passed(monkeypatch):
    """Return a function that leaves sockets to be inherited, from fd START on."""
    monkeypatch.setattr(activation, "_FDS_START", START)
    fds = []

    def leave(*files):
        for fd, file in enumerate(files, START):
            os.dup2(file.fileno(), fd)
            fds.append(fd)
            file.close()
        return {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(files))}

    yield leave
    for fd in fds:
        os.close(fd)


def tcp(family=socket.AF_INET):
    return socket.create_server(("", 0), family=family)


def unix(path, kind=socket.SOCK_STREAM):
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    if kind != socket.SOCK_DGRAM:
        sock.listen()
    return sock


def inherited(environ):
    return activation.inherited(environ, os.getpid())


def test_the_variables_are_consumed(passed):
    environ = passed(tcp()) | {"LISTEN_FDNAMES": "a", "LISTENER": "b"}
    assert len(inherited(environ)) == 1
    assert environ == {"LISTENER": "b"}


@pytest.mark.parametrize(
    "environ",
    [
        {"LISTEN_PID": "x"},
        {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "a:b", "LISTEN_PIDFDID": "1"},
        {"LISTEN_FDS": "x"},
    ],
)
def test_the_variables_are_consumed_even_if_they_are_unusable(environ):
    with contextlib.suppress(UsageError):
        assert inherited(environ) == []
    assert environ == {}


def test_three_families(passed, tmp_path):
    environ = passed(tcp(), tcp(socket.AF_INET6), unix(tmp_path / "s"))
    environ["LISTEN_FDNAMES"] = "a::proxy@web.socket"
    listeners = inherited(environ)
    assert [listener.fd for listener in listeners] == [START, START + 1, START + 2]
    assert [listener.name for listener in listeners] == ["a", "", "proxy@web.socket"]
    assert [listener.family for listener in listeners] == [AF_INET, AF_INET6, AF_UNIX]
    assert listeners[2].text == str(tmp_path / "s")
    for listener in listeners:
        assert not os.get_inheritable(listener.fd)
        assert not os.get_blocking(listener.fd)
        assert not listener.connected
        assert listener.inode is None


def test_without_names(passed):
    assert [listener.name for listener in inherited(passed(tcp(), tcp()))] == ["unknown"] * 2


def test_the_fd_stays_open(passed):
    listeners = inherited(passed(tcp()))
    with socket.socket(fileno=os.dup(listeners[0].fd)) as sock:
        assert listeners[0].text.endswith(f":{sock.getsockname()[1]}")


def test_a_connection(passed):
    left, right = socket.socketpair()
    (listener,) = inherited(passed(left) | {"LISTEN_FDNAMES": "connection"})
    assert (listener.connected, listener.name) == (True, "connection")
    right.close()


def tcp_pair():
    with tcp() as server:
        client = socket.create_connection(server.getsockname())
        return server.accept()[0], client


def test_a_connection_that_has_been_reset(passed):
    accepted, client = tcp_pair()
    reset(client)
    (listener,) = inherited(passed(accepted))
    assert listener.connected


def test_a_connection_that_has_been_closed(passed):
    accepted, client = tcp_pair()
    client.close()
    (listener,) = inherited(passed(accepted))
    assert listener.connected


def test_neither_listening_nor_connected(passed):
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    with pytest.raises(UsageError, match="neither listening nor connected"):
        inherited(passed(sock))


def test_a_connection_must_be_alone(passed):
    left, right = socket.socketpair()
    listeners = inherited(passed(left, tcp()))
    with pytest.raises(UsageError, match="must be the only one, but there are 2 sockets"):
        activation.reject_mixture(listeners)
    activation.reject_mixture(listeners[:1])
    activation.reject_mixture(listeners[1:])
    activation.reject_mixture(listeners[1:] * 2)
    right.close()


def test_not_a_stream_socket(passed, tmp_path):
    with pytest.raises(UsageError, match=NOT_A_STREAM):
        inherited(passed(unix(tmp_path / "s", socket.SOCK_SEQPACKET)))


def udp(family=socket.AF_INET, protocol=0):
    sock = socket.socket(family, socket.SOCK_DGRAM, protocol)
    sock.bind(("", 0))
    return sock


def test_datagram_sockets(passed, tmp_path):
    four, six, local = udp(), udp(socket.AF_INET6), unix(tmp_path / "s", socket.SOCK_DGRAM)
    listeners = inherited(passed(four, six, local, tcp()))
    assert [listener.datagram for listener in listeners] == [True, True, True, False]
    assert [listener.family for listener in listeners] == [AF_INET, AF_INET6, AF_UNIX, AF_INET]
    assert [listener.text.partition(":")[0] for listener in listeners[:3]] == [
        "udp",
        "udp",
        "unix-dgram",
    ]
    for listener in listeners:
        assert not os.get_inheritable(listener.fd)
        assert not os.get_blocking(listener.fd)
        assert not listener.connected


def connected_udp():
    with udp() as peer:
        sock = udp()
        sock.connect(("127.0.0.1", peer.getsockname()[1]))
    return sock


def half_of_a_pair():
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    right.close()
    return left


@pytest.mark.parametrize(
    "make",
    [
        connected_udp,
        lambda: udp(protocol=UDPLITE),
        half_of_a_pair,
        lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM),
    ],
)
def test_datagram_sockets_that_are_connected_or_of_another_protocol(passed, make):
    with pytest.raises(UsageError, match=NOT_A_STREAM):
        inherited(passed(make()))


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6, socket.AF_UNIX])
def test_datagram_sockets_that_are_not_bound(passed, family):
    with pytest.raises(UsageError, match=r"^Passed in datagram socket is not bound\.$"):
        inherited(passed(socket.socket(family, socket.SOCK_DGRAM)))


def test_not_a_socket(passed, tmp_path):
    with pytest.raises(UsageError, match=NOT_A_STREAM):
        inherited(passed((tmp_path / "f").open("w")))


def test_a_stream_socket_of_another_family(passed, monkeypatch):
    def refuse(family, name):
        raise ValueError(f"address family {family} is not supported")

    monkeypatch.setattr(activation.sockaddr, "from_socket_name", refuse)
    with pytest.raises(UsageError, match=f"fd {START} .'unknown'.: address family 2 is not"):
        inherited(passed(tcp()))


def test_a_descriptor_that_is_not_open(passed):
    environ = passed(tcp()) | {"LISTEN_FDS": str(2**64 - 1)}
    with pytest.raises(UsageError, match=f"fd {START + 1} .'unknown'.: Bad file descriptor"):
        inherited(environ)


@pytest.mark.parametrize(
    ("sockets", "value", "names"),
    [
        (1, "web@127.0.0.1:8080.socket", ["web@127.0.0.1:8080.socket"]),
        (1, "a:b", ["a:b"]),
        (1, "", [""]),
        (2, "a", ["unknown", "unknown"]),
        (2, "web@[::1]:80.socket:b", ["unknown", "unknown"]),
        (2, "", ["unknown", "unknown"]),
    ],
)
def test_names_that_do_not_fit_the_sockets(passed, sockets, value, names):
    """The name of a unit may contain a colon, which also separates names."""
    environ = passed(*(tcp() for _ in range(sockets))) | {"LISTEN_FDNAMES": value}
    assert [listener.name for listener in inherited(environ)] == names


def test_names_must_fit_where_they_are_needed(passed):
    environ = passed(tcp(), tcp()) | {"LISTEN_FDNAMES": "a:b:c"}
    with pytest.raises(UsageError, match=r"=a:b:c: 3 names for 2 sockets\. NAME=TARGET needs one"):
        activation.inherited(environ, os.getpid(), by_name=True)


@contextlib.contextmanager
def standard_fds(sock, *fds):
    """Put `sock` on these fds, as a service manager does with StandardInput=socket."""
    saved = {fd: os.dup(fd) for fd in fds}
    for fd in fds:
        os.dup2(sock.fileno(), fd)
    try:
        yield
    finally:
        for fd, copy in saved.items():
            os.dup2(copy, fd)
            os.close(copy)


def test_sockets_on_standard_fds(tmp_path):
    with tcp() as listener, standard_fds(listener, 0):
        assert activation.on_standard_fds() == "StandardInput=socket"
    accepted, client = tcp_pair()
    with accepted, client, standard_fds(accepted, 0):
        assert activation.on_standard_fds() == "StandardInput=socket"
    with unix(tmp_path / "s") as listener, standard_fds(listener, 1):
        assert activation.on_standard_fds() == "StandardOutput=socket"
    left, right = socket.socketpair()  # such as a remote shell's, or the journal's
    with left, right, standard_fds(left, 0, 1):
        assert activation.on_standard_fds() == ""
    fds = os.listdir("/proc/self/fd")
    assert activation.on_standard_fds() == ""
    assert os.listdir("/proc/self/fd") == fds


@pytest.mark.parametrize("name", ["LISTEN_PID", "LISTEN_FDS"])
@pytest.mark.parametrize(
    "text", ["", "x", "0", "-1", "+1", "0x1", " 1", "1 ", "\u0661", "9" * 5000]
)
def test_garbage_names_the_variable(name, text):
    environ = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"} | {name: text}
    with pytest.raises(UsageError, match=f"^Failed to receive sockets from parent: {name}="):
        inherited(environ)


def test_meant_for_another_process(passed):
    environ = passed(tcp())
    assert activation.inherited(dict(environ), os.getpid() + 1) == []
    assert len(activation.inherited(environ, os.getpid())) == 1


@pytest.mark.parametrize("missing", ["LISTEN_PID", "LISTEN_FDS"])
def test_half_of_the_variables_means_no_sockets(passed, missing):
    environ = passed(tcp())
    del environ[missing]
    assert inherited(environ) == []


def pidfd_inode():
    inode = activation._pidfd_inode(os.getpid())
    if inode is None:
        pytest.skip("this kernel's pidfds have no inode of their own")
    return inode


def test_pidfdid(passed):
    environ = passed(tcp())
    mine, other = pidfd_inode(), pidfd_inode() + 1
    assert inherited(environ | {"LISTEN_PIDFDID": str(other)}) == []
    assert len(inherited(environ | {"LISTEN_PIDFDID": str(mine)})) == 1


def test_pidfdid_garbage(passed):
    environ = passed(tcp())
    pidfd_inode()
    with pytest.raises(UsageError, match="LISTEN_PIDFDID=x"):
        inherited(environ | {"LISTEN_PIDFDID": "x"})


def test_without_a_pidfd_there_is_no_inode(monkeypatch):
    """A system call filter may forbid pidfds: then the PID has to be enough."""

    def refused(pid):
        raise PermissionError(errno.EPERM, "")

    monkeypatch.setattr(activation.posix, "pidfd_open", refused)
    assert activation._pidfd_inode(os.getpid()) is None


def test_pidfd_inode_leaks_no_fd():
    before = os.listdir("/proc/self/fd")
    activation._pidfd_inode(os.getpid())
    assert os.listdir("/proc/self/fd") == before


VALUES = st.one_of(st.text(), st.text("0123456789:x -"), st.integers().map(str))


@given(st.dictionaries(st.sampled_from(activation._VARIABLES), VALUES))
def test_any_environment_is_sockets_or_a_usage_error(environ):
    # No descriptor from this number on is open.
    start, activation._FDS_START = activation._FDS_START, 1_000_000
    try:
        assert inherited(environ | {"LISTEN_PID": str(os.getpid())}) == []
    except UsageError:
        pass
    finally:
        activation._FDS_START = start


def test_real_descriptors_begin_at_3():
    code = (
        "import os; from proxyd.activation import inherited;"
        "print([(i.fd, i.name) for i in inherited(os.environ, os.getpid())],"
        " [name for name in os.environ if name.startswith('LISTEN_')])"
    )
    environ = os.environ | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "web"}
    script = f'exec 3<&0; LISTEN_PID=$$ exec "$0" -c "{code}"'
    with tcp() as server:
        out = subprocess.run(
            ["/bin/sh", "-c", script, sys.executable],
            stdin=server,
            env=environ,
            capture_output=True,
            text=True,
            check=True,
        )
    assert out.stdout == "[(3, 'web')] []\n"


# ── the descriptor store ─────────────────────────────────────────────────────────────────────────


def parcel():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.close()
    return theirs


def with_stored(environ):
    """(names of the listeners, the parcels)."""
    stored = {}
    listeners = activation.inherited(environ, os.getpid(), stored=stored)
    return [one.name for one in listeners], stored.get("proxyd-parcel", [])


def test_a_parcel(passed):
    environ = passed(tcp(), parcel())
    environ["LISTEN_FDNAMES"] = "web:proxyd-parcel"
    assert with_stored(environ) == (["web"], [START + 1])


def test_a_parcel_behind_a_name_with_colons(passed):
    environ = passed(tcp(), parcel())
    environ["LISTEN_FDNAMES"] = "web@127.0.0.1:8080.socket:proxyd-parcel"
    assert with_stored(environ) == (["web@127.0.0.1:8080.socket"], [START + 1])


def test_nothing_but_a_parcel(passed):
    """As with --listen=."""
    environ = passed(parcel())
    environ["LISTEN_FDNAMES"] = "proxyd-parcel"
    assert with_stored(environ) == ([], [START])


@pytest.mark.parametrize("names", ["web:stored:proxyd-parcel", "web:proxyd-parcel:stored"])
def test_what_others_have_stored(passed, capfd, names):
    file = open("/dev/null", "rb")  # noqa: SIM115 - closed by passed()
    others = [file, parcel()] if names.endswith("parcel") else [parcel(), file]
    environ = passed(tcp(), *others)
    environ["LISTEN_FDNAMES"] = names
    found, stored = with_stored(environ)
    place = START + names.split(":").index("stored")
    assert (found, len(stored)) == (["web"], 1)
    assert capfd.readouterr().err == (
        f"Ignoring the stored file descriptor {place}, which is no socket to serve.\n"
    )


@pytest.mark.parametrize("names", ["web:other:proxyd-parcel", "web:proxyd-parcel:other"])
def test_what_others_have_stored_by_a_name(passed, capfd, names):
    parts = [tcp(), os.fdopen(os.memfd_create("x"), "rb"), os.fdopen(os.memfd_create("y"), "rb")]
    environ = passed(*parts)
    environ["LISTEN_FDNAMES"] = names
    found, stored = with_stored(environ)
    place = START + names.split(":").index("other")
    assert (found, len(stored)) == (["web"], 1)
    assert f"Ignoring the stored file descriptor {place}" in capfd.readouterr().err


def test_what_another_version_has_stored(passed, capfd):
    environ = passed(tcp(), parcel(), parcel())
    environ["LISTEN_FDNAMES"] = "web:proxyd-parcel:proxyd-later"
    assert with_stored(environ) == (["web"], [START + 1])
    assert f"Ignoring the stored file descriptor {START + 2}" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["stored", "proxyd-web.socket"])
def test_a_listener_that_is_called_like_something_stored(passed, name):
    environ = passed(tcp(), tcp())
    environ["LISTEN_FDNAMES"] = f"web:{name}"
    assert with_stored(environ) == (["web", name], [])


@pytest.mark.parametrize("name", ["proxyd-parcel", "stored"])
def test_a_stored_descriptor_that_cannot_be(passed, name):
    environ = passed() | {"LISTEN_FDS": str(2**64 - 1), "LISTEN_FDNAMES": f"web:{name}"}
    with pytest.raises(UsageError):
        with_stored(environ)
