"""The command metrics, and the Varlink service of all metrics."""

import json
import os
import socket
import subprocess

import pytest
from ctl.fake_proxy import COMMAND, METRICS, running
from kit.waiting import patience

DOMAIN = "net.socketproxyd"

DESCRIBED = [
    {"name": f"{DOMAIN}.{name}", "description": f"About {name}.", "type": kind}
    for name, kind in (
        ("Accepted", "counter"),
        ("BytesToTargets", "counter"),
        ("Open", "gauge"),
        ("Version", "string"),
        ("ConnectUSecBucket", "counter"),
        ("ConnectUSecCount", "counter"),
        ("ConnectUSecSum", "counter"),
        ("UptimeUSec", "gauge"),
    )
]


def value(name, number, **fields):
    return {"name": f"{DOMAIN}.{name}", "object": None, "fields": fields or None, "value": number}


VALUES = [
    value("Accepted", 2**53 + 1),
    value("BytesToTargets", 10, target='a"\\\x1b'),
    value("BytesToTargets", 20, target="b"),
    value("Open", 3),
    value("Version", "1.2.3"),
    value("ConnectUSecBucket", 1, target="b", le="1000"),
    value("ConnectUSecBucket", 4, target="b", le="+Inf"),
    value("ConnectUSecBucket", 2, target="b", le="10000"),
    value("ConnectUSecCount", 4, target="b"),
    value("ConnectUSecSum", 1_500_000, target="b"),
    value("UptimeUSec", 2_000_000),
]

REPLIES = {f"{METRICS}.Describe": DESCRIBED, f"{METRICS}.List": VALUES}


@pytest.fixture
def two(proxy, manager):
    """Two running proxies with metrics."""
    manager({f"{name}.service": running(RuntimeDirectory=name) for name in ("web", "mail")})
    return [proxy(name, **REPLIES) for name in ("web", "mail")]


def test_the_text_format(run, two):
    done = run("metrics", "--user", "--unit=web")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (
        "# HELP socketproxyd_accepted_total About Accepted.\n"
        "# TYPE socketproxyd_accepted_total counter\n"
        'socketproxyd_accepted_total{unit="web.service"} 9007199254740993\n'
        "# HELP socketproxyd_bytes_to_targets_total About BytesToTargets.\n"
        "# TYPE socketproxyd_bytes_to_targets_total counter\n"
        'socketproxyd_bytes_to_targets_total{unit="web.service",target="a\\"\\\\\\\\x1b"} 10\n'
        'socketproxyd_bytes_to_targets_total{unit="web.service",target="b"} 20\n'
        "# HELP socketproxyd_open About Open.\n"
        "# TYPE socketproxyd_open gauge\n"
        'socketproxyd_open{unit="web.service"} 3\n'
        "# HELP socketproxyd_version_info About Version.\n"
        "# TYPE socketproxyd_version_info gauge\n"
        'socketproxyd_version_info{unit="web.service",value="1.2.3"} 1\n'
        "# HELP socketproxyd_connect_seconds About ConnectUSecSum.\n"
        "# TYPE socketproxyd_connect_seconds histogram\n"
        'socketproxyd_connect_seconds_bucket{unit="web.service",target="b",le="0.001"} 1\n'
        'socketproxyd_connect_seconds_bucket{unit="web.service",target="b",le="0.01"} 2\n'
        'socketproxyd_connect_seconds_bucket{unit="web.service",target="b",le="+Inf"} 4\n'
        'socketproxyd_connect_seconds_sum{unit="web.service",target="b"} 1.5\n'
        'socketproxyd_connect_seconds_count{unit="web.service",target="b"} 4\n'
        "# HELP socketproxyd_uptime_seconds About UptimeUSec.\n"
        "# TYPE socketproxyd_uptime_seconds gauge\n"
        'socketproxyd_uptime_seconds{unit="web.service"} 2.0\n'
    )


def test_a_family_is_described_once_for_all_proxies(run, two):
    text = run("metrics", "--user").stdout
    assert text.count("# TYPE socketproxyd_accepted_total counter") == 1
    for unit in ("web", "mail"):
        assert f'socketproxyd_accepted_total{{unit="{unit}.service"}} 9007199254740993' in text


def test_prometheus_understands_it(run, two):
    parser = pytest.importorskip("prometheus_client.parser")
    families = {
        one.name: one
        for one in parser.text_string_to_metric_families(run("metrics", "--user").stdout)
    }
    assert families["socketproxyd_accepted"].type == "counter"
    histogram = families["socketproxyd_connect_seconds"]
    assert histogram.type == "histogram"
    counts = [one.value for one in histogram.samples if one.name.endswith("_count")]
    assert counts == [4, 4]


def test_the_bucket_of_everything_is_added(run, proxy):
    values = [one for one in VALUES if (one["fields"] or {}).get("le") != "+Inf"]
    one = proxy(**REPLIES | {f"{METRICS}.List": values})
    text = run("metrics", f"--socket={one.path}").stdout
    assert f'_bucket{{socket="{one.path}",target="b",le="+Inf"}} 4\n' in text


def test_json(run, two):
    found = json.loads(run("metrics", "--user", "--unit=web", "--json=short").stdout)
    assert found == [{"unit": "web.service", "socket": two[0].path} | one for one in VALUES]


def test_without_proxies_there_is_no_text(run, manager):
    done = run("metrics", "--user")
    assert (done.returncode, done.stdout) == (0, "")
    assert "no proxy is running" in done.stderr


@pytest.mark.parametrize(
    "metric",
    [{}, {"name": 7}, {"name": "x", "fields": 7}, {"name": "x", "description": 7}],
)
def test_metrics_that_cannot_be_used_are_one_line(run, proxy, metric):
    one = proxy(**REPLIES | {f"{METRICS}.List": [metric]})
    done = run("metrics", f"--socket={one.path}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)


@pytest.mark.parametrize("odd", ["", ".", "x", "net.", "a.B.1", "net.socketproxyd.Bucket"])
def test_odd_names_do_no_harm(run, proxy, odd):
    metric = {"name": odd, "value": 1, "fields": {"": "x", "9": "y", "aB-c": None}}
    one = proxy(**REPLIES | {f"{METRICS}.List": [metric, {"name": odd}]})
    done = run("metrics", f"--socket={one.path}")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture(params=["varlink", "connection"])
def service(environment, request):
    """Start the command as a service manager or varlinkctl does: with a connected socket."""
    ours, theirs = socket.socketpair()
    ours.settimeout(patience())
    # The pid must be the command's, so it replaces the shell that knows it.
    process = subprocess.Popen(
        ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" --user 3<&0 </dev/null', COMMAND],
        env=environment | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": request.param},
        stdin=theirs,
        stderr=subprocess.PIPE,
    )
    theirs.close()
    yield Service(ours, process)
    ours.close()
    process.kill()
    process.wait()
    process.stderr.close()


class Service:
    """The caller's side."""

    def __init__(self, sock, process):
        self.socket = sock
        self.process = process

    def send(self, data):
        self.socket.sendall(data)

    def replies(self, count):
        """The next replies."""
        data = b""
        while data.count(b"\0") < count:
            piece = self.socket.recv(65536)
            assert piece, data
            data += piece
        return [json.loads(one) for one in data.split(b"\0")[:-1]]

    def call(self, method, count=1, **call):
        self.send(json.dumps({"method": method} | call).encode() + b"\0")
        return self.replies(count)

    def status(self):
        """The exit status after the caller has gone."""
        self.socket.shutdown(socket.SHUT_WR)
        return self.process.wait(patience())


def test_the_service_has_the_metrics_of_all(two, service):
    replies = service.call(f"{METRICS}.List", 2 * len(VALUES), more=True)
    assert [one.get("continues", False) for one in replies] == [True] * (len(replies) - 1) + [False]
    assert [one["parameters"] for one in replies] == [
        one | {"object": f"{unit}.service"} for unit in ("web", "mail") for one in VALUES
    ]
    replies = service.call(f"{METRICS}.Describe", len(DESCRIBED), more=True)
    assert [one["parameters"] for one in replies] == DESCRIBED
    assert service.status() == 0


def test_the_service_leaves_out_what_would_fail_a_report(service, proxy, manager):
    manager({f"{name}.service": running(RuntimeDirectory=name) for name in ("a", "b", "c")})
    values = [VALUES[0], {"name": "io.example.Other", "value": 1}]
    proxy("a", **REPLIES | {f"{METRICS}.List": values})
    proxy("b", **{f"{METRICS}.Describe": [b"garbage\0"]})
    (reply,) = service.call(f"{METRICS}.List", more=True)
    assert reply["parameters"] == VALUES[0] | {"object": "a.service"}


@pytest.fixture
def streams(environment):
    """Start the command as `varlinkctl call ssh-exec:` does, and send it calls."""

    def call(*calls, **more):
        done = subprocess.run(
            [COMMAND, "--user"],
            env=environment | {"SYSTEMD_VARLINK_LISTEN": "-"} | more,
            input="".join(json.dumps(one) + "\0" for one in calls),
            capture_output=True,
            text=True,
            timeout=patience(),
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, "")
        return [json.loads(one) for one in done.stdout.split("\0")[:-1]]

    return call


def test_the_service_on_standard_streams(two, streams):
    info, *metrics = streams(
        {"method": "org.varlink.service.GetInfo"}, {"method": f"{METRICS}.List", "more": True}
    )
    assert info["parameters"]["product"] == "socket-proxyctl"
    assert [one["parameters"]["object"] for one in metrics] == [
        f"{unit}.service" for unit in ("web", "mail") for _ in VALUES
    ]
    assert not metrics[-1].get("continues")


def test_the_service_without_a_service_manager(streams, place):
    (place / "bin/systemctl").unlink()
    (reply,) = streams({"method": f"{METRICS}.List", "more": True}, PATH=str(place / "bin"))
    assert reply["error"] == f"{METRICS}.NoSuchMetric"


def test_other_values_of_the_variable_mean_nothing_here(run):
    assert run(SYSTEMD_VARLINK_LISTEN="/run/socket").returncode == 2


def test_the_service_without_proxies(service):
    assert service.call(f"{METRICS}.List", more=True)[0]["error"] == f"{METRICS}.NoSuchMetric"


@pytest.mark.parametrize(
    ("call", "error"),
    [
        ({"method": f"{METRICS}.List"}, "org.varlink.service.ExpectedMore"),
        ({"method": f"{METRICS}.Nothing"}, "org.varlink.service.MethodNotFound"),
        ({"method": "org.varlink.service.Nothing"}, "org.varlink.service.MethodNotFound"),
        ({"method": "com.example.X"}, "org.varlink.service.InterfaceNotFound"),
        ({"method": ""}, "org.varlink.service.InterfaceNotFound"),
        (
            {"method": "org.varlink.service.GetInterfaceDescription"},
            "org.varlink.service.InvalidParameter",
        ),
        (
            {
                "method": "org.varlink.service.GetInterfaceDescription",
                "parameters": {"interface": "x"},
            },
            "org.varlink.service.InterfaceNotFound",
        ),
    ],
)
def test_calls_that_are_refused(service, call, error):
    assert service.call(**call)[0]["error"] == error
    assert service.status() == 0


def test_the_service_describes_itself(service):
    # Several calls without waiting, as varlinkctl sends them; a oneway call has no reply.
    service.send(b'{"method":"org.varlink.service.GetInfo","oneway":true}\0')
    service.send(b'{"method":"org.varlink.service.GetInfo"}\0')
    (info,) = service.call(
        "org.varlink.service.GetInterfaceDescription",
        2,
        parameters={"interface": METRICS},
    )[:1]
    assert info["parameters"]["interfaces"] == [METRICS, "org.varlink.service"]
    assert service.status() == 0


@pytest.mark.parametrize("data", [b"x\0", b"[]\0", b'{"method":7}\0', b"y" * 70000])
def test_what_is_no_call_ends_the_service(service, data):
    service.send(data)
    assert service.process.wait(patience()) == 1
    assert service.process.stderr.read() == b""


def test_a_listener_is_no_caller(environment, place):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "listener"))
        listener.listen()
        done = subprocess.run(
            ["/bin/sh", "-c", 'LISTEN_PID=$$ exec "$0" 3<&0 </dev/null', COMMAND],
            env=environment | {"LISTEN_FDS": "1", "LISTEN_FDNAMES": "varlink"},
            stdin=listener,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("socket-proxyctl: varlink is not a connected socket")


def test_variables_for_another_process_are_ignored(run):
    done = run(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1", LISTEN_FDNAMES="varlink")
    assert done.returncode == 2
