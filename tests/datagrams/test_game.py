"""The server of a game, Minetest: it takes its time to start, and answers who asks for an id."""

import os
import select
from pathlib import Path

from kit.waiting import wait_until

HELLO = b"\x4f\x45\x74\x03\x00\x00\x00\x01"
"""The protocol's number, no id yet, and channel 0 of a client that wants one."""


def test_the_first_datagram_waits_for_the_game(datagrams, programs, running):
    target, listener = datagrams.absent(), datagrams.listener()
    proxy = datagrams.launch("--connect-timeout=2min", target.text, listeners=[listener], wait=True)
    client = datagrams.client(listener)
    client.send(HELLO)
    proxy.wait_for_log("holding datagrams until it answers.")
    world = Path(datagrams.stage.path("world"))
    world.mkdir()
    (world / "world.mt").write_text("gameid = minetest\nbackend = sqlite3\n")
    configuration = Path(datagrams.stage.path("minetest.conf"))
    configuration.write_text("bind_address = 127.0.0.1\nserver_announce = false\n")
    port = target._address[1]
    server = running.start(
        programs.command(
            "minetestserver",
            "--port",
            str(port),
            "--world",
            str(world),
            "--config",
            str(configuration),
            "--logfile",
            datagrams.stage.path("log"),
        ),
        env=os.environ | {"HOME": datagrams.stage.directory},
    )
    wait_until(
        lambda: select.select([client], [], [], 0)[0] or server.poll() is not None,
        "an answer of the game",
        120,
    )
    assert server.poll() is None, running.output(server)
    answer = client.recv(1000)
    assert answer.startswith(HELLO[:4])
    identity = answer[12:14]
    client.send(HELLO[:4] + identity + b"\x00\x00\x03")  # leave again
    assert proxy.log_lines("answers after")
