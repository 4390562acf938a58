"""--listen=: addresses, sockets, and socket files that are replaced or left alone."""

import _socket
import errno
import fcntl
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxyd import address, bind, listen
from proxyd.bind import open_listener, parse_listen
from proxyd.errors import UsageError
from proxyd.listen import close_listener


@pytest.fixture
def opened():
    """Return a function that opens what --listen= says, and closes it at the end."""
    listeners = []

    def open_address(text):
        listeners.append(open_listener(parse_listen(text)))
        return listeners[-1]

    yield open_address
    for listener in listeners:
        close_listener(listener)


@pytest.mark.parametrize(
    ("text", "name", "packed"),
    [
        ("8080", "unknown", address.pack_inet("::", 8080)),
        ("0", "unknown", address.pack_inet("::", 0)),
        ("web=8080", "web", address.pack_inet("::", 8080)),
        ("127.0.0.1:8080", "unknown", address.pack_inet("127.0.0.1", 8080)),
        ("[::1]:8080", "unknown", address.pack_inet("::1", 8080)),
        ("::1:8080", "unknown", address.pack_inet("::1", 8080)),
        ("[fe80::1%lo]:8080", "unknown", address.pack_inet("fe80::1%lo", 8080)),
        ("/run/a=b", "unknown", address.pack_unix("/run/a=b")),
        ("a@b.socket=/run/x", "a@b.socket", address.pack_unix("/run/x")),
        ("@x", "unknown", address.pack_unix("@x")),
        ("web=vsock:2:80", "web", address.pack_vsock(2, 80)),
        ("vsock::80", "unknown", address.pack_vsock(2**32 - 1, 80)),
        ("udp=80", "udp", address.pack_inet("::", 80)),
    ],
)
def test_addresses(text, name, packed):
    where = parse_listen(text)
    assert (where.name, where.address) == (name, packed)
    assert where.text in text
    assert not where.datagram


@pytest.mark.parametrize(
    ("text", "name", "packed"),
    [
        ("udp:53", "unknown", address.pack_inet("::", 53)),
        ("dns=udp:53", "dns", address.pack_inet("::", 53)),
        ("udp:127.0.0.1:0", "unknown", address.pack_inet("127.0.0.1", 0)),
        ("udp:[::1]:53", "unknown", address.pack_inet("::1", 53)),
        ("unix-dgram:/run/a=b", "unknown", address.pack_unix("/run/a=b")),
        ("log=unix-dgram:@x", "log", address.pack_unix("@x")),
    ],
)
def test_addresses_of_datagram_sockets(text, name, packed):
    where = parse_listen(text)
    assert (where.name, where.address) == (name, packed)
    assert where.datagram
    assert where.any_family == text.endswith("udp:53")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "web=",
        "65536",
        "localhost:80",
        "localhost",
        "127.0.0.1",
        "127.0.0.1:",
        "127.0.0.1:http",
        "[::1]",
        "[::1",
        ":80",
        "*:80",
        "@",
        "/" + "a" * 107,
        "vsock:1",
        "-1",
        "[fe80::1%]:80",
        "udp:",
        "udp:127.0.0.1",
        "udp:localhost:53",
        "udp:/run/x",
        "udp:@x",
        "udp:unix:/run/x",
        "udp:vsock:2:53",
        "udp://0.0.0.0:53",
        "unix-dgram:",
        "unix-dgram:53",
        "unix-dgram:run/x",
        "unix-dgram:unix:/run/x",
        "unix-dgram:@",
    ],
)
def test_garbage(text):
    with pytest.raises(ValueError, match="."):
        parse_listen(text)


def test_an_interface_that_is_not_there():
    with pytest.raises(UsageError, match=r"^Failed to listen on \[fe80::1%nope\]:80: there is no"):
        parse_listen("web=[fe80::1%nope]:80")


def test_an_address_that_is_not_there():
    with pytest.raises(OSError, match=r"Cannot assign requested address\. .* FreeBind=") as caught:
        open_listener(parse_listen("192.0.2.1:0"))
    assert caught.value.errno == errno.EADDRNOTAVAIL


@given(st.one_of(st.text(), st.text("ab:/@[]%*=.1\udcff")))
def test_anything_is_an_address_or_a_value_error(text):
    try:
        where = parse_listen(text)
    except (ValueError, UsageError):
        return
    assert address.family(where.address) in (1, 2, 10, 40)


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_tcp(opened, host):
    listener = opened(f"web={host}:0")
    assert listener.name == "web"
    assert listener.text == f"{host}:{address.port(listener.address)}"
    assert not os.get_inheritable(listener.fd)
    assert not os.get_blocking(listener.fd)
    assert listener.inode is None
    with socket.create_connection((host.strip("[]"), address.port(listener.address))):
        pass


@pytest.mark.parametrize("text", ["0", "[::]:0"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_serves_both_families(opened, text, host):
    with socket.create_connection((host, address.port(opened(text).address))):
        pass


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_udp(opened, host):
    listener = opened(f"dns=udp:{host}:0")
    port = address.port(listener.address)
    assert (listener.name, listener.datagram) == ("dns", True)
    assert listener.text == f"udp:{host}:{port}"
    assert not os.get_inheritable(listener.fd)
    assert not os.get_blocking(listener.fd)
    with pytest.raises(OSError, match="already in use"):  # else another could take the datagrams
        opened(f"udp:{host}:{port}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_udp_port_serves_both_families(opened, host):
    listener = opened("udp:0")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as client:
        client.sendto(b"hello", (host, address.port(listener.address)))
        assert os.read(listener.fd, 10) == b"hello"


def test_a_udp_port_and_a_tcp_port_may_have_one_number(opened):
    port = address.port(opened("0").address)
    assert opened(f"udp:{port}").text == f"udp:[::]:{port}"


def test_unix_datagrams(opened, tmp_path):
    listener = opened(f"unix-dgram:{tmp_path}/s")
    assert listener.text == f"unix-dgram:{tmp_path}/s"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as client:
        client.sendto(b"hello", f"{tmp_path}/s")
        assert os.read(listener.fd, 10) == b"hello"
    close_listener(listener)
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
@pytest.mark.parametrize("wanted", ["", "unix-dgram:"])
def test_stale_files_are_replaced_and_live_ones_are_not(opened, tmp_path, kind, wanted):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(path)
        if kind == socket.SOCK_STREAM:
            other.listen()
        with pytest.raises(OSError, match="already in use"):
            opened(f"{wanted}{path}")
    listener = opened(f"{wanted}{path}")
    assert listener.inode is not None


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
def test_a_port_without_ipv6(opened, monkeypatch, code):
    real = bind._open

    def no_ipv6(where, packed):
        if address.family(packed) == address.AF_INET6:
            raise OSError(code, "no IPv6")
        return real(where, packed)

    monkeypatch.setattr(bind, "_open", no_ipv6)
    assert opened("0").text.startswith("0.0.0.0:")
    with pytest.raises(OSError, match="no IPv6"):
        opened("[::]:0")


def test_a_port_in_use(opened):
    port = address.port(opened("0").address)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="in use"):
        opened(str(port))
    assert os.listdir("/proc/self/fd") == before


def test_a_port_in_time_wait_is_bound_again(opened):
    first = opened("127.0.0.1:0")
    where = ("127.0.0.1", address.port(first.address))
    with socket.create_connection(where) as client:
        with socket.socket(fileno=os.dup(first.fd)) as listening:
            listening.setblocking(True)
            listening.accept()[0].close()  # the side that closes first keeps the port in TIME_WAIT
        assert client.recv(1) == b""
    close_listener(first)
    opened(f"127.0.0.1:{where[1]}")


def test_abstract(opened):
    listener = opened(f"@proxyd-test-{os.getpid()}")
    assert listener.inode is None
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(f"\0proxyd-test-{os.getpid()}")


def test_a_socket_file_is_unlinked_at_the_end(opened, tmp_path):
    path = tmp_path / "s"
    listener = opened(str(path))
    assert listener.inode
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close_listener(listener)
    assert not path.exists()
    close_listener(listener)


def test_undecodable_paths(opened, tmp_path):
    path = os.fsencode(tmp_path) + b"/\xff"
    listener = opened(os.fsdecode(path))
    assert os.path.exists(path)
    close_listener(listener)
    assert not os.path.exists(path)


def test_a_socket_file_of_another_process_stays(opened, tmp_path):
    path = tmp_path / "s"
    listener = opened(str(path))
    os.rename(path, tmp_path / "old")  # keeps the inode in use
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        close_listener(listener)
        assert path.exists()


def test_a_stale_socket_file_is_replaced(opened, tmp_path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    assert opened(str(path)).inode
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


@pytest.mark.parametrize("backlog", [8, 0])
def test_a_live_socket_file_is_an_error(opened, tmp_path, backlog):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as client:
        live.bind(str(path))
        live.listen(backlog)
        client.connect(str(path))  # with a backlog of 0 it is full now
        inode = path.stat().st_ino
        with pytest.raises(OSError, match="in use"):
            opened(str(path))
        assert path.stat().st_ino == inode


# ── two at the same moment ────────────────────────────────────────────────────────────────────────


class Slow(_socket.socket):
    """A socket whose listen() waits until another process has had its chance."""

    bound = threading.Event()
    tried = threading.Event()

    def listen(self, backlog):
        self.bound.set()
        self.tried.wait(0.5)  # the other one must not succeed meanwhile
        super().listen(backlog)


@pytest.mark.parametrize("stale", [False, True])
def test_a_socket_that_is_about_to_listen_is_not_stale(opened, tmp_path, monkeypatch, stale):
    """Of two programs that start at the same moment with one path, one serves and one fails."""
    path = tmp_path / "s"
    if stale:
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
    shim = SimpleNamespace(**vars(_socket))
    shim.socket = Slow
    monkeypatch.setattr(bind, "_socket", shim)
    Slow.bound.clear()
    Slow.tried.clear()
    with ThreadPoolExecutor(1) as other:
        first = other.submit(opened, str(path))
        assert Slow.bound.wait(20)
        monkeypatch.setattr(bind, "_socket", _socket)
        try:
            with pytest.raises(OSError, match="in use"):
                opened(str(path))
        finally:
            Slow.tried.set()
        listener = first.result()
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        with socket.socket(fileno=os.dup(listener.fd)) as listening:
            listening.accept()[0].close()
    assert os.listdir(tmp_path) == ["s"]


@pytest.fixture(params=["held", "unreadable"])
def no_lock(request, tmp_path, monkeypatch):
    """Keep the folder from being locked; return the reason that the message gives."""
    if request.param == "held":  # by a process that does not release it
        monkeypatch.setattr(bind, "LOCK_S", 0.05)
        fd = os.open(tmp_path, os.O_RDONLY)
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield "another process holds it"
        os.close(fd)
        return

    def refuse(path, flags):
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patch:
        shim = SimpleNamespace(**vars(os))
        shim.open = refuse
        patch.setattr(bind, "posix", shim)
        yield "Permission denied"


def test_without_the_lock_a_new_file_is_made(opened, tmp_path, no_lock):
    path = tmp_path / "s"
    listener = opened(str(path))
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    close_listener(listener)
    assert not path.exists()


def test_without_the_lock_no_file_is_replaced(opened, tmp_path, no_lock):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with pytest.raises(OSError, match="cannot be replaced safely") as caught:
        opened(str(path))
    assert caught.value.strerror.endswith(f"failed to lock its folder: {no_lock}")
    assert path.exists()


def test_without_the_lock_a_live_socket_file_is_in_use(opened, tmp_path, no_lock):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(OSError, match="in use"):
            opened(str(path))


def test_a_socket_file_is_unlinked_before_its_socket_is_closed(opened, tmp_path, monkeypatch):
    """Once it has stopped listening, another program may replace the file and get its inode."""
    path = tmp_path / "s"
    listener = opened(str(path))
    seen = []
    shim = SimpleNamespace(**vars(os))

    def close(fd):
        if fd == listening:
            seen.append(path.exists())
        os.close(fd)

    shim.close, listening = close, listener.fd
    monkeypatch.setattr(listen, "posix", shim)
    close_listener(listener)
    assert seen == [False]


def test_the_lock_is_released_afterwards(opened, tmp_path):
    close_listener(opened(str(tmp_path / "one")))
    opened(str(tmp_path / "other"))
    fd = os.open(tmp_path, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(fd)


def test_a_path_without_a_folder(opened, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    opened("unix:./s")
    assert os.listdir(tmp_path) == ["s"]


# ── what is not ours to replace ───────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("make", ["write", "mkdir", "symlink"])
def test_what_is_not_a_socket_file_stays(opened, tmp_path, make):
    path = tmp_path / "s"
    if make == "write":
        path.write_text("precious")
    elif make == "mkdir":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="in use"):
        opened(str(path))
    assert path.is_symlink() or path.exists()


def test_no_such_directory(opened, tmp_path):
    with pytest.raises(FileNotFoundError):
        opened(str(tmp_path / "no" / "s"))


def test_a_socket_file_does_not_outlive_a_failed_listen(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(bind.sockaddr, "from_socket_name", fail)
    with pytest.raises(OSError, match="no"):
        open_listener(parse_listen(str(tmp_path / "s")))
    assert list(tmp_path.iterdir()) == []
