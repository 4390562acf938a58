"""NAME=TARGET pairs: one program for several listeners, each with its own target."""

import socket

import pytest
from kit.differences import differs
from kit.sockets import read_exactly

pytestmark = differs("original", reason="has one target only", run=False)


def leads_to(stage, listener, backend):
    """Whether a client of `listener` is forwarded to `backend`."""
    client = stage.connect(listener)
    client.sendall(b"hello")
    return read_exactly(backend.accept(), 5) == b"hello"


def assert_refused(outcome, *words):
    """Assert exit status 1 and one line that contains all `words`."""
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1
    for word in words:
        assert word in outcome.stderr


def test_each_listener_has_its_target(stage):
    """Listeners find their targets by name, in whatever order both are given."""
    backends = {name: stage.backend() for name in ("web", "ssh", "db")}
    listeners = {name: stage.listener() for name in ("db", "web", "ssh")}
    pairs = [f"{name}={backend.target}" for name, backend in backends.items()]
    stage.launch(*pairs, listeners=list(listeners.values()), names=":".join(listeners))
    for name, backend in backends.items():
        assert leads_to(stage, listeners[name], backend)


def test_listeners_with_the_same_name(stage):
    """A unit with several ListenStream= lines gives all of them one name, and so one target."""
    backend, other = stage.backend(), stage.backend("unix")
    listeners = [stage.listener(), stage.listener("unix"), stage.listener("tcp6")]
    pairs = [f"web={backend.target}", f"other={other.target}"]
    stage.launch(*pairs, listeners=listeners, names="web:web:other")
    assert leads_to(stage, listeners[0], backend)
    assert leads_to(stage, listeners[1], backend)
    assert leads_to(stage, listeners[2], other)


@pytest.mark.parametrize("name", ["proxy@web.socket", "connection", "a.b-c_d", "é", "8080"])
def test_names_as_systemd_makes_them(stage, name):
    """A NAME is the name of a socket unit, the default, or another text without `:` and `=`."""
    backend, listener = stage.backend(), stage.listener()
    stage.launch(f"{name}={backend.target}", listeners=[listener], names=name)
    assert leads_to(stage, listener, backend)


def test_listener_without_a_target(stage):
    """A listener without a pair is an error at the start, which names it."""
    listeners = [stage.listener(), stage.listener()]
    outcome = stage.run("web=127.0.0.1:1", listeners=listeners, names="web:forgotten")
    assert_refused(outcome, "forgotten")


def test_target_without_a_listener(stage):
    """A pair without a listener is a warning, which names it, and the rest is served."""
    backend, listener = stage.backend(), stage.listener()
    pairs = [f"web={backend.target}", "unused=127.0.0.1:1"]
    stage.launch(*pairs, listeners=[listener], names="web")
    assert leads_to(stage, listener, backend)
    assert len(stage.proxy.log_lines()) == 1
    assert "unused" in stage.proxy.log()


def test_pair_among_plain_targets(stage):
    """A plain target alongside pairs is an error."""
    outcome = stage.run("web=127.0.0.1:1", "127.0.0.1:2", listeners=[stage.listener()], names="web")
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1


def test_same_name_twice(stage):
    """Two targets for one name are an error."""
    arguments = ["web=127.0.0.1:1", "web=127.0.0.1:2"]
    assert_refused(stage.run(*arguments, listeners=[stage.listener()], names="web"), "web")


@pytest.mark.parametrize(
    "path", ["a=b", "a=b:c", "=x"], ids=["pair in a path", "colon too", "first"]
)
def test_path_with_an_equals_sign(stage, path):
    """A target that begins with a slash is a path, whatever else it contains."""
    path = stage.path(path)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        server.settimeout(10)
        stage.launch(path, listeners=[stage.listener()])
        client = stage.connect()
        client.sendall(b"hello")
        with server.accept()[0] as connection:
            assert read_exactly(connection, 5) == b"hello"


def test_connected_socket_by_its_name(stage):
    """With Accept=yes the connection has the name `connection`, which a pair may use."""
    listener, backend = stage.listener(), stage.backend()
    client = stage.connect(listener)
    connection, _ = listener.accept()
    stage.launch(
        f"connection={backend.target}", listeners=[connection], names="connection", wait=False
    )
    connection.close()
    client.sendall(b"hello")
    assert read_exactly(backend.accept(), 5) == b"hello"


def backend_and_listener(stage):
    """A target at 127.0.0.2, and a listener on the same port."""
    return stage.on_one_port(
        lambda: stage.backend(host="127.0.0.2"), lambda port: stage.listener(port=port)
    )


def test_port_that_the_client_connected_to(stage):
    """`HOST:*`: one service for several ports, each led to the same port of the target."""
    pairs = [backend_and_listener(stage) for _ in range(3)]
    stage.launch("127.0.0.2:*", listeners=[listener for _, listener in pairs])
    for backend, listener in pairs:
        assert leads_to(stage, listener, backend)


def test_port_of_the_client_in_a_pair(stage):
    """`NAME=HOST:*` for some listeners, another target for the rest."""
    backend, listener = backend_and_listener(stage)
    fixed = stage.backend("unix")
    listeners = [listener, stage.listener("unix")]
    pairs = ["ports=127.0.0.2:*", f"rest={fixed.target}"]
    stage.launch(*pairs, listeners=listeners, names="ports:rest")
    assert leads_to(stage, listeners[0], backend)
    assert leads_to(stage, listeners[1], fixed)


def test_any_port_needs_a_tcp_listener(stage):
    """`HOST:*` with a UNIX listener, which has no port, is an error at the start."""
    outcome = stage.run("127.0.0.2:*", listeners=[stage.listener("unix")])
    assert outcome.status == 1
    assert len(outcome.stderr.splitlines()) == 1


@pytest.mark.parametrize("form", ["path", "port"])
def test_listen_with_a_name(stage, form):
    """--listen=NAME=ADDRESS gives a listener of its own the name that a pair refers to."""
    first, second = stage.backend(), stage.backend()
    one = stage.path("one")
    # Nothing else uses this address, so the port stays free.
    with socket.create_server(("127.0.0.3", 0)) as probe:
        port = probe.getsockname()[1]
    two = stage.path("two") if form == "path" else f"127.0.0.3:{port}"
    stage.launch(
        f"--listen=one={one}",
        f"--listen=two={two}",
        f"two={second.target}",
        f"one={first.target}",
    )
    client = stage.connect_to(one, socket.AF_UNIX)
    client.sendall(b"1")
    assert read_exactly(first.accept(), 1) == b"1"
    if form == "path":
        client = stage.connect_to(two, socket.AF_UNIX)
    else:
        client = stage.connect_to(("127.0.0.3", port), socket.AF_INET)
    client.sendall(b"2")
    assert read_exactly(second.accept(), 1) == b"2"


def test_one_target_waits_while_the_other_serves(stage):
    """An outage of one target does not affect the clients of another."""
    absent, backend = stage.absent(), stage.backend()
    listeners = [stage.listener(), stage.listener()]
    pairs = [f"away={absent.target}", f"here={backend.target}"]
    stage.launch(*pairs, listeners=listeners, names="away:here")
    held = stage.connect(listeners[0])
    for _ in range(5):
        assert leads_to(stage, listeners[1], backend)
    held.sendall(b"x")
    absent.start_listening()
    assert read_exactly(absent.accept(), 1) == b"x"
