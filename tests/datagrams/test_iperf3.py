"""iperf3: a TCP connection that controls the test, and UDP at the same port."""

import json

import pytest
from kit.sockets import quiet_port


@pytest.mark.parametrize("way", [[], ["--reverse"]])
@pytest.mark.parametrize("streams", [1, 4])
def test_a_measurement(datagrams, programs, running, run, way, streams):
    stage = datagrams.stage
    stream = stage.listener()
    listener = datagrams.listener(port=stream.getsockname()[1])
    port = quiet_port()
    server = running.start(
        programs.command(
            "iperf3", "--server", "--one-off", "--forceflush", "--bind=127.0.0.1", f"--port={port}"
        )
    )
    running.wait_for_output(server, "Server listening")
    proxy = datagrams.launch(f"127.0.0.1:{port}", listeners=[stream, listener])
    words = ["--udp", "--bitrate=5M", "--length=1200", "--time=2", f"--parallel={streams}"]
    client = programs.command(
        "iperf3", "--client", "127.0.0.1", f"--port={listener.getsockname()[1]}", "--json"
    )
    report = json.loads(run([*client, *words, *way], 60))
    assert "error" not in report
    total = report["end"]["sum"]
    assert total["bytes"] > 100_000
    assert sum(one["udp"]["out_of_order"] for one in report["end"]["streams"]) == 0
    assert not proxy.log_lines("Failed")
