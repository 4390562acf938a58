"""dnsmasq behind the program, asked by dig."""

import re

import pytest
from kit.waiting import wait_until

LONG = "x" * 200


@pytest.fixture
def serve(programs, running):
    """Start dnsmasq at a port; it serves a.test and, as one large answer, long.test."""

    def start(port):
        return running.start(
            programs.command(
                "dnsmasq",
                "--keep-in-foreground",
                "--conf-file=/dev/null",
                "--no-resolv",
                "--no-hosts",
                "--user=root",
                "--pid-file=",
                "--listen-address=127.0.0.1",
                "--bind-interfaces",
                f"--port={port}",
                "--log-facility=-",
                "--address=/a.test/10.0.0.1",
                *[f"--txt-record=long.test,{number}{LONG}" for number in range(8)],
                "--edns-packet-max=4096",
            )
        )

    return start


def dig(programs, listener, *words):
    port = listener.getsockname()[1]
    return programs.command("dig", "@127.0.0.1", f"-p{port}", "+tries=1", "+time=15", *words)


@pytest.fixture
def listeners(datagrams):
    """A stream and a datagram listener at one port."""
    while True:
        stream = datagrams.stage.listener()
        try:
            return stream, datagrams.listener(port=stream.getsockname()[1])
        except OSError:
            continue


@pytest.fixture
def backend(datagrams):
    """A port where dnsmasq can listen."""
    absent = datagrams.absent()
    return absent.text, absent._address[1]


def test_questions_over_both_kinds(datagrams, serve, programs, run, listeners, backend):
    target, port = backend
    serve(port)
    datagrams.launch(target, listeners=listeners)
    for words in (["+short"], ["+short", "+tcp"], ["+short", "+nocookie"]):
        assert run(dig(programs, listeners[1], *words, "a.test")) == "10.0.0.1\n"


def test_a_question_waits_for_the_server(datagrams, serve, programs, running, listeners, backend):
    """One question, and no second: it is answered when dnsmasq is there."""
    target, port = backend
    proxy = datagrams.launch(target, listeners=listeners)
    asked = running.start(dig(programs, listeners[1], "+short", "a.test"))
    proxy.wait_for_log("holding datagrams until it answers.")
    serve(port)
    running.wait_for_output(asked, "10.0.0.1")
    assert proxy.log_lines("answers after")


def test_a_large_answer(datagrams, serve, programs, run, listeners, backend):
    """More than a datagram over Ethernet has room for."""
    target, port = backend
    serve(port)
    datagrams.launch(target, listeners=listeners)
    answer = run(
        dig(programs, listeners[1], "+bufsize=4096", "+notcp", "+ignore", "TXT", "long.test")
    )
    assert sum(f'"{number}{LONG}"' in answer for number in range(8)) == 8
    assert int(re.search(r"MSG SIZE\s+rcvd: (\d+)", answer)[1]) > 1600


def test_a_thousand_questions_of_twenty_clients(
    datagrams, serve, programs, running, listeners, backend
):
    """With room for fifty flows: each question is a flow, and those that are over make room."""
    target, port = backend
    serve(port)
    proxy = datagrams.launch("-c50", target, listeners=listeners)
    questions = datagrams.stage.path("questions")
    with open(questions, "w", encoding="ascii") as file:
        file.write("+short a.test\n" * 50)
    # Each has an address of its own: digs at one address share a port now and then, and an answer.
    clients = [
        running.start(dig(programs, listeners[1], f"-b{own}", "+short", "-f", questions))
        for own in (f"127.0.0.{number}" for number in range(10, 30))
    ]
    for client in clients:
        wait_until(lambda one=client: one.poll() is not None, "the end of dig", 120)
        assert running.output(client) == "10.0.0.1\n" * 50
    assert not proxy.log_lines("Hit connection limit")


def test_the_server_is_restarted(datagrams, serve, programs, running, run, listeners, backend):
    """Questions between two starts are answered by the second one."""
    target, port = backend
    first = serve(port)
    datagrams.launch(target, listeners=listeners)
    assert run(dig(programs, listeners[1], "+short", "+retry=5", "a.test")) == "10.0.0.1\n"
    running.stop(first)
    # The first question may be what the proxy learns from; dig asks again after 1 s.
    again = ["+short", "+tries=8", "+time=1"]
    asked = running.start(dig(programs, listeners[1], *again, "a.test"))
    datagrams.stage.proxy.wait_for_log("holding datagrams until it answers.")
    serve(port)
    running.wait_for_output(asked, "10.0.0.1")
