"""Metrics: they equal the traffic exactly, and other programs can read them."""

import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
from kit.differences import differs
from kit.sockets import main_pairs, read_exactly, read_to_end, reset, send_until_stuck
from kit.traffic import in_background
from kit.varlink import METRICS, PROXY, text_of
from kit.waiting import wait_until

pytestmark = differs("original", reason="cannot be inspected", run=False)

threads = pytest.mark.parametrize("threads", ["--threads=1", "--threads=3"])

PROMTOOL = shutil.which("promtool")


def wait_for(caller, **wanted):
    """Wait until the metrics have these values; return all. Keys are NAME or NAME_LABEL."""
    keys = {tuple(name.split("__")): value for name, value in wanted.items()}

    def reached():
        found = caller.metrics()
        return found if all(found[key] == value for key, value in keys.items()) else None

    return wait_until(reached, f"{wanted}; there: {caller.metrics()}")


def histogram(found, name, target):
    """The buckets of a histogram; asserts that they are cumulative and end with its count."""
    buckets = {
        key[-1]: value for key, value in found.items() if key[:2] == (f"{name}Bucket", target)
    }
    values = list(buckets.values())
    assert values == sorted(values)
    assert list(buckets)[-1] == "+Inf"
    assert values[-1] == found[f"{name}Count", target]
    bounds = [float(bound) for bound in buckets]
    assert bounds == sorted(set(bounds))
    return buckets


@main_pairs
@threads
def test_bytes_and_connections(stage, inspected, listen, target, threads):
    backend = stage.backend(target)
    caller = inspected(
        threads, "--hand-over=always", backend.target, listeners=[stage.listener(listen)]
    )
    up = down = 0
    for number in range(12):
        client = stage.connect()
        server = backend.accept()
        sent, replied = 1 + number * 1000, number * 70_000
        client.sendall(bytes(sent))
        assert read_exactly(server, sent) == bytes(sent)
        # More than the buffers between two UNIX sockets hold: send while the client reads.
        replying = in_background(partial(server.sendall, bytes(replied)))
        assert read_exactly(client, replied) == bytes(replied)
        replying.result()
        up, down = up + sent, down + replied
        # Those of connections that are open count, too.
        found = caller.metrics()
        assert (found["BytesToTargets",], found["BytesToClients",]) == (up, down)
        name = backend.target
        assert (found["TargetBytesUp", name], found["TargetBytesDown", name]) == (up, down)
        if number % 3:
            client.close()
            assert read_to_end(server) == (b"", "eof")
            server.close()
    found = wait_for(caller, Ended__ended=8)
    assert found["Accepted",] == found["Served", name] == 12
    assert found["Open",] == 4
    assert found["Up", name] == 1
    for none in ("Refused",), ("Failed", name), ("Held", name), ("Ended", "reset"):
        assert found[none] == 0
    assert found["TargetEnded", name, "ended"] == 8
    assert found["ConnectUSecCount", name] == 12
    histogram(found, "ConnectUSec", name)
    assert found["Threads",] == int(threads[-1])
    assert found["ConnectionsMax",] == 256


def test_what_a_reset_discards_is_not_delivered(stage, inspected):
    """Bytes that the target never took, because it was reset before, are not counted."""
    backend = stage.backend(receive_buffer=4096)
    caller = inspected(backend.target)
    client = stage.connect()
    server = backend.accept()
    sent = send_until_stuck(client, bytes(1 << 16), limit=1 << 22)
    row = caller.connection_of(client)
    assert row["up"]["inFlight"] > 0
    reset(server)
    found = wait_for(caller, Ended__reset=1)
    assert row["up"]["bytes"] <= found["BytesToTargets",] < sent


def test_how_connections_end(stage, inspected):
    backend = stage.backend()
    caller = inspected("--connections-max=3", "--idle-timeout=1s", backend.target)

    def pair():
        client = stage.connect()
        server = backend.accept()
        client.sendall(b"x")
        assert read_exactly(server, 1) == b"x"
        return client, server

    for _ in range(2):
        client, server = pair()
        client.close()
        server.close()
    wait_for(caller, Ended__ended=2)
    for _ in range(3):
        reset(pair()[0])
    wait_for(caller, Ended__reset=3)
    pair()
    wait_for(caller, Ended__idle=1)
    pair()
    caller.terminate(caller.connections()[0]["id"])
    wait_for(caller, Ended__cut=1)
    full = [pair() for _ in range(3)]
    refused = stage.connect()
    assert read_to_end(refused)[0] == b""
    found = wait_for(caller, Refused=1)
    assert found["Open",] <= len(full)
    found = wait_for(caller, Open=0, Ended__idle=4)
    # Each client that was accepted has one end.
    ends = sum(value for key, value in found.items() if key[0] == "Ended")
    assert found["Accepted",] == ends + found["Refused",] == 11
    ended = {key[2]: value for key, value in found.items() if key[0] == "TargetEnded"}
    assert ended == {"ended": 2, "reset": 3, "idle": 4, "cut": 1, "client gone": 0}


def test_failed_clients(stage, inspected):
    absent = stage.absent()
    caller = inspected("--connect-timeout=0", absent.target)
    for _ in range(3):
        assert read_to_end(stage.connect())[0] == b""
    found = wait_for(caller, **{f"Failed__{absent.target}": 3})
    assert found["Accepted",] == 3
    assert found["Open",] == found["Held", absent.target] == found["Served", absent.target] == 0
    assert found["ConnectUSecCount", absent.target] == 0


def test_held_clients(stage, inspected):
    absent = stage.absent()
    caller = inspected("--connect-timeout=1min", absent.target)
    clients = [stage.connect() for _ in range(5)]
    name = absent.target
    found = wait_for(caller, **{f"Held__{name}": 5, f"Up__{name}": 0})
    assert found["HeldUSecCount", name] == found["HeldUSecSum", name] == 0
    reset(clients.pop())
    wait_for(caller, **{"Held__" + name: 4, "Ended__client gone": 1})
    caller.terminate(caller.connections()[-1]["id"])
    clients.pop()
    wait_for(caller, **{f"Held__{name}": 3, "Ended__cut": 1})
    absent.start_listening()
    for client in clients:
        client.sendall(b"x")
        assert read_exactly(absent.accept(), 1) == b"x"
    found = wait_for(caller, **{f"Held__{name}": 0, f"Up__{name}": 1, "Open": 3})
    assert found["HeldUSecCount", name] == 3
    histogram(found, "HeldUSec", name)
    rows = caller.connections()
    assert found["HeldUSecSum", name] == sum(row["heldUSec"] for row in rows)
    assert found["ConnectUSecCount", name] == 3
    assert found["Accepted",] == 5


def test_targets_are_told_apart(stage, inspected):
    first, second = stage.backend(), stage.backend("abstract")
    listeners = [stage.listener(), stage.listener()]
    caller = inspected(f"a={first.target}", f"b={second.target}", listeners=listeners, names="a:b")
    for backend, listener, size in ((first, listeners[0], 10), (second, listeners[1], 33)):
        client = stage.connect(listener)
        server = backend.accept()
        client.sendall(bytes(size))
        assert read_exactly(server, size) == bytes(size)
    found = caller.metrics()
    assert found["TargetBytesUp", first.target] == 10
    assert found["TargetBytesUp", second.target] == 33
    assert found["BytesToTargets",] == 43


def test_counters_never_fall(stage, inspected):
    caller = inspected("--threads=3", "--hand-over=always", stage.echo())
    counters = {
        reply["parameters"]["name"].removeprefix("net.socketproxyd.")
        for reply in caller.call(f"{METRICS}.Describe", more=True)
        if reply["parameters"]["type"] == "counter"
    }
    last = caller.metrics()
    for number in range(40):
        client = stage.connect()
        client.sendall(bytes(5000))
        if number % 2:
            assert len(read_exactly(client, 5000)) == 5000
            client.close()
        else:
            reset(client)
        found = caller.metrics()
        for key in found:
            assert key[0] not in counters or found[key] >= last.get(key, 0), key
        last = found
    assert last["Accepted",] <= 40


def test_every_metric_is_described_once(stage, inspected):
    caller = inspected(stage.echo())
    described = [one["parameters"]["name"] for one in caller.call(f"{METRICS}.Describe", more=True)]
    names = [one["parameters"]["name"] for one in caller.call(f"{METRICS}.List", more=True)]
    assert len(set(described)) == len(described)
    assert set(names) == set(described)
    assert all(name.startswith("net.socketproxyd.") for name in names)


# ── other programs ───────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def exposition(stage, executable, inspected, folder):
    """What socket-proxyctl metrics prints after some traffic, and the metrics themselves."""
    backend, absent = stage.backend(), stage.absent("unix")
    listeners = [stage.listener(), stage.listener()]
    caller = inspected(
        f"a={backend.target}", f"b={absent.target}", listeners=listeners, names="a:b"
    )
    for size in (5, 5000):
        client = stage.connect(listeners[0])
        server = backend.accept()
        client.sendall(bytes(size))
        read_exactly(server, size)
        client.close()
        server.close()
    stage.connect(listeners[1]).sendall(b"x")
    found = wait_for(caller, Ended__ended=2, **{f"Held__{absent.target}": 1})
    command = [Path(executable).parent / "socket-proxyctl", "metrics"]
    done = subprocess.run(
        [*command, f"--socket={folder}/inspect"], check=True, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.stdout, found, backend.target


def test_prometheus_parses_them(exposition):
    parser = pytest.importorskip("prometheus_client.parser")
    text, found, target = exposition
    families = {one.name: one for one in parser.text_string_to_metric_families(text)}
    for one in families.values():
        ending = "_total" if one.type == "counter" else ""
        assert f"# TYPE {one.name}{ending} {one.type}\n" in text
    # Every family has a type and a help text, and no sample is left over.
    assert {one.type for one in families.values()} == {"counter", "gauge", "histogram"}
    assert all(one.documentation for one in families.values())
    assert len(text.splitlines()) == sum(2 + len(one.samples) for one in families.values())

    def value(family, sample="", **labels):
        (one,) = [
            one
            for one in families[f"socketproxyd_{family}"].samples
            if one.name == f"socketproxyd_{family}{sample}" and labels.items() <= one.labels.items()
        ]
        return one.value

    assert value("bytes_to_targets", "_total") == found["BytesToTargets",] == 5005
    assert value("accepted", "_total") == 3
    assert value("ended", "_total", how="ended") == 2
    assert value("open") == 0
    assert value("held", target=target) == 0
    for name, count in (("connect_seconds", 2), ("held_seconds", 0)):
        family = families[f"socketproxyd_{name}"]
        assert family.type == "histogram"
        buckets = [
            (float(one.labels["le"]), one.value)
            for one in family.samples
            if one.name.endswith("_bucket") and one.labels["target"] == target
        ]
        assert buckets == sorted(buckets)
        assert [number for _, number in buckets] == sorted(number for _, number in buckets)
        assert buckets[-1] == (float("inf"), count)
        assert value(name, "_count", target=target) == count
    usec = found["ConnectUSecSum", target]
    assert value("connect_seconds", "_sum", target=target) == usec / 1e6


@pytest.mark.skipif(PROMTOOL is None, reason="no promtool here (Debian: prometheus)")
def test_promtool_finds_nothing(exposition):
    text, _, _ = exposition
    done = subprocess.run(
        [PROMTOOL, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.fixture
def varlink():
    """The package of that name from PyPI."""
    return pytest.importorskip("varlink", reason="no package varlink here")


def test_the_package_varlink_speaks_to_it(varlink, stage, inspected, folder):
    """It reads the description of our interface, and makes methods of it."""
    inspected(stage.echo())
    client = stage.connect()
    client.sendall(b"x")
    assert read_exactly(client, 1) == b"x"
    with varlink.Client.new_with_address(f"unix:{folder}/inspect") as service:
        info = service.get_interfaces() and service.info
        assert info["product"] == "systemd-socket-proxyd"
        assert {PROXY, METRICS} <= set(info["interfaces"])
        with service.open(PROXY) as proxy:
            assert proxy.Status()["open"] == 1
            (reply,) = proxy.List(_more=True)
            assert reply["connection"]["client"] == text_of(client.getsockname())
            with pytest.raises(varlink.VarlinkError) as raised:
                proxy.Terminate(2**40)
            assert raised.value.error() == f"{PROXY}.NoSuchConnection"
            proxy.Terminate(reply["connection"]["id"])
    with pytest.raises(ConnectionResetError):
        client.recv(1)


def test_the_package_varlink_reads_metrics_if_it_is_told_their_type(
    varlink, stage, inspected, folder
):
    """Version 31 does not know the type `any`, which systemd has put into the interface. So the
    caller brings the description, with the type that our values have."""
    from varlink.client import SimpleClientInterfaceHandler

    caller = inspected(stage.echo())
    (reply,) = caller.call("org.varlink.service.GetInterfaceDescription", interface=METRICS)
    description = reply["parameters"]["description"]
    with pytest.raises(SyntaxError):
        varlink.Interface(description)
    interface = varlink.Interface(description.replace("value: any", "value: int"))
    with SimpleClientInterfaceHandler(interface, caller.sock) as metrics:
        told = {one["name"]: one["value"] for one in metrics.List(_more=True)}
        assert told["net.socketproxyd.Accepted"] == 0
        assert told["net.socketproxyd.ConnectionsMax"] == 256
        assert {one["type"] for one in metrics.Describe(_more=True)} == {"counter", "gauge"}
