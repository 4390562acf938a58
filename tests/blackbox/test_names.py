"""Names as targets, with name servers that answer, fail, are silent or change their answer."""

import pytest
from kit.differences import differs
from kit.name_server import AAAA, NO_ERROR, NXDOMAIN, SERVFAIL, SILENCE, A, NameServer
from kit.namespaces import with_hosts, with_name_server
from kit.privileges import as_unprivileged_user
from kit.socket_state import is_quiet
from kit.sockets import read_exactly
from kit.traffic import talk
from kit.waiting import never_within, wait_until

FRESH = 1.1
"""Seconds after which an answer is not used any more."""

pytestmark = differs("original", reason="looks each name up for each client, once", run=False)


@pytest.fixture
def names():
    """A name server."""
    server = NameServer()
    yield server
    server.close()


def age(stage, seconds=FRESH):
    """Let the last answer expire."""
    never_within(seconds, stage.proxy.has_ended, "the end")


def start(stage, names, target, **options):
    """Start the program with this target and name server."""
    prefix = with_name_server(stage.directory, names.address, **options)
    stage.launch(target, listeners=[stage.listener()], prefix=prefix)


def two_backends(stage):
    """Two targets with one port at two addresses."""
    return stage.on_one_port(
        lambda: stage.backend(host="127.0.0.2"),
        lambda port: stage.backend(host="127.0.0.3", port=port),
    )


# ── clients are not held for known addresses ──────────────────────────────────────────────────────


@pytest.mark.parametrize("host", ["localhost", "known.test"])
def test_a_unix_client_that_sends_and_closes_is_served(stage, names, host):
    """It sends a message and closes before the look-up has ended: nothing is lost."""
    backend = stage.backend()
    names.zone["known.test"] = ["127.0.0.1"]
    prefix = with_name_server(stage.directory, names.address)
    listener = stage.listener("unix")
    stage.launch(f"{host}:{backend.port()}", listeners=[listener], prefix=prefix)
    for _ in range(3):
        with stage.connect() as client:
            client.sendall(b"a message")
        assert read_exactly(backend.accept(), 9) == b"a message"
        age(stage)
    assert stage.proxy.log() == ""


def test_clients_that_come_keep_the_answer_fresh(stage, names):
    """While clients come, none waits for the name servers, although they have become slow."""
    backend = stage.backend()
    names.zone["known.test"] = ["127.0.0.1"]
    start(stage, names, f"known.test:{backend.port()}")
    talk(stage.connect(), backend.accept())
    names.zone["known.test"] = SILENCE
    before = names.count("known.test")
    while names.count("known.test") == before:  # the answer has not expired meanwhile
        with stage.connect() as client, backend.accept() as server:
            talk(client, server)
    assert stage.proxy.log() == ""  # if one had waited, it would say: no answer yet
    assert stage.proxy.end()  # without the look-up that still goes on


def test_an_address_that_changes_is_followed(stage, names):
    """After a second at the latest, for clients that come all the time and for a late one."""
    first, second = two_backends(stage)
    names.zone["moves.test"] = ["127.0.0.2"]
    start(stage, names, f"moves.test:{first.port()}")
    talk(stage.connect(), first.accept())
    names.zone["moves.test"] = ["127.0.0.3"]

    def moved():
        stage.connect()
        second.listener.settimeout(0.05)
        try:
            second.listener.accept()[0].close()
        except TimeoutError:
            return False
        return True

    wait_until(moved, "a client at the new address")
    names.zone["moves.test"] = ["127.0.0.2"]
    age(stage)
    first.listener.setblocking(False)
    while True:  # connections from before the move
        try:
            first.listener.accept()[0].close()
        except BlockingIOError:
            break
    talk(stage.connect(), first.accept())


# ── name servers that fail ───────────────────────────────────────────────────────────────────────

FAILURES = {
    "servfail": SERVFAIL,
    "silence": SILENCE,
    "no data of one family, servfail for the other": {A: SERVFAIL, AAAA: NO_ERROR},
    "servfail for one family, no data of the other": {A: NO_ERROR, AAAA: SERVFAIL},
}


@pytest.mark.parametrize("failure", FAILURES)
def test_the_last_good_answer_serves_when_name_servers_fail(stage, names, failure):
    """RFC 8767: a failure is not an answer. The first client to meet it waits 1.8 s at most."""
    backend = stage.backend()
    names.zone["flaky.test"] = ["127.0.0.1"]
    start(stage, names, f"flaky.test:{backend.port()}")
    talk(stage.connect(), backend.accept())
    names.zone["flaky.test"] = FAILURES[failure]
    age(stage)
    for _ in range(3):
        talk(stage.connect(), backend.accept(timeout=8))
        age(stage)
    assert stage.proxy.log_lines()
    for line in stage.proxy.log_lines():
        assert line.startswith("Failed to resolve host: ")
        assert "(flaky.test); using its last addresses." in line
    assert stage.proxy.end()  # without the look-up that may still go on


@pytest.mark.parametrize("answer", [NXDOMAIN, NO_ERROR], ids=["nxdomain", "nodata"])
def test_a_name_that_is_gone_loses_its_last_addresses(stage, names, answer):
    """Its address may belong to another service by now: clients are held, and it gets nothing."""
    first, second = two_backends(stage)
    names.zone["gone.test"] = ["127.0.0.2"]
    start(stage, names, f"gone.test:{first.port()}")
    talk(stage.connect(), first.accept())
    names.zone["gone.test"] = answer
    age(stage)
    clients = [stage.connect() for _ in range(3)]
    for client in clients:
        client.sendall(b"secret")
    stage.proxy.wait_for_log("Failed to resolve host: ")
    names.zone["gone.test"] = SERVFAIL  # a failure does not bring it back
    never_within(2.5, lambda: not all(map(is_quiet, clients)), "the end of a held client")
    assert len(stage.proxy.log_lines()) == 1
    first.listener.setblocking(False)
    with pytest.raises(BlockingIOError):
        first.listener.accept()
    names.zone["gone.test"] = ["127.0.0.3"]
    for _ in clients:
        assert read_exactly(second.accept(), 6) == b"secret"


def test_a_name_that_is_gone_from_the_hosts_file(stage):
    """The same without name servers; it is looked up again once per second."""
    prefix = with_hosts(stage.directory, ["127.0.0.1 gone.test"])
    backend = stage.backend()
    stage.launch(f"gone.test:{backend.port()}", listeners=[stage.listener()], prefix=prefix)
    talk(stage.connect(), backend.accept())
    with open(stage.path("hosts"), "w") as hosts:
        hosts.write("127.0.0.1 localhost\n")
    age(stage)
    client = stage.connect()
    stage.proxy.wait_for_log("(gone.test), holding clients until it answers.")
    assert is_quiet(client)
    with open(stage.path("hosts"), "a") as hosts:
        hosts.write("127.0.0.1 gone.test\n")
    talk(client, backend.accept())


# ── look-ups that hang ───────────────────────────────────────────────────────────────────────────


def test_look_ups_that_hang_delay_no_other_name(stage, names):
    """Ten names whose servers are silent, and a name from /etc/hosts with clients."""
    slow = [f"slow{number}.test" for number in range(10)]
    names.zone.update(dict.fromkeys(slow, SILENCE))
    backend = stage.backend()
    listeners = [stage.listener() for _ in range(11)]
    stage.launch(
        *[f"l{number}={host}:80" for number, host in enumerate(slow)],
        f"l10=here.test:{backend.port()}",
        listeners=listeners,
        names=":".join(f"l{number}" for number in range(11)),
        prefix=with_name_server(stage.directory, names.address, ["127.0.0.1 here.test"]),
    )
    waiting = [stage.connect(listener) for listener in listeners[:10] for _ in range(3)]
    for host in slow:
        names.wait_asked(host)
    for _ in range(3):
        talk(stage.connect(listeners[10]), backend.accept())
        age(stage)
    assert all(map(is_quiet, waiting))
    assert stage.proxy.end()  # without waiting for any of them


def test_look_up_threads_that_cannot_be_started(stage, names):
    """With TasksMax= for one look-up the names share a thread, and one line says so."""
    prefix = with_name_server(stage.directory, names.address, timeout=1)
    prefix += [*as_unprivileged_user(stage.executable), "prlimit", "--nproc=2"]
    backend = stage.backend()
    names.zone.update({"slow.test": SILENCE, "slower.test": SILENCE, "known.test": ["127.0.0.1"]})
    listeners = [stage.listener() for _ in range(3)]
    stage.launch(
        "a=slow.test:80",
        "b=slower.test:80",
        f"c=known.test:{backend.port()}",
        listeners=listeners,
        names="a:b:c",
        prefix=prefix,
    )
    for listener in listeners:
        client = stage.connect(listener)
    talk(client, backend.accept())
    (line,) = stage.proxy.log_lines("No further thread can be started for name look-ups")
    assert "all names share 1" in line
