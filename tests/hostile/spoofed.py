"""Datagrams with forged sources, by the hundred thousand, and two of each some time apart.

Two datagrams with an answer in between make a flow established, which is all that can be forged. A
client that talks all the time and a connection must be served meanwhile, with the right bytes.
"""

import contextlib
import os
import signal
import socket
import struct
import subprocess
import threading
import time

from kit.datagrams import Echo
from kit.logs import too_many_lines
from kit.notify import NotifySocket
from kit.privileges import WITH_PARENT
from kit.proxy import Proxy
from kit.traffic import EchoServer

from bench import memory

LIMIT = 256
BLOCK = 500
"""Sources that send their first datagram before the first of them sends its second."""
ROUTE = "ip route add local 10.0.0.0/8 dev lo"
"""Answers to forged sources come back as errors, as they would from hosts that exist."""
ALLOWANCE = 4 << 20
"""What the program may take for 256 flows, late imports, and what malloc(3) rounds up."""
TRIES = 50
TRY_S = 0.2
"""A question may be lost in a receive queue that the flood has filled: it is asked again."""


def run(executable, sources):
    """Send from that many sources; return (note, faults)."""
    subprocess.run(["sh", "-c", ROUTE], check=True)
    scene = Scene(executable)
    try:
        return scene.run(sources)
    finally:
        scene.close()


class Scene:
    """A proxy for both kinds, its targets, a client of each kind that talks, and the flood."""

    def __init__(self, executable):
        self.faults = []
        self.listener, stream = bound(socket.SOCK_DGRAM), bound(socket.SOCK_STREAM)
        backend = bound(socket.SOCK_STREAM)
        for one in (stream, backend):
            one.listen(64)
        self.stream = stream
        self.echo, self.stream_echo = Echo(bound(socket.SOCK_DGRAM)), EchoServer(backend)
        host, port = backend.getsockname()
        self.notify = NotifySocket()
        self.proxy = Proxy(
            [*WITH_PARENT, executable, f"--connections-max={LIMIT}",
             f"a={self.echo.text}", f"b={host}:{port}"],
            inherit=[self.listener, stream],
            names="a:b",
            notify=self.notify,
        )  # fmt: skip
        self.proxy.wait_until_ready()
        self.started = time.monotonic()
        self.ended = threading.Event()
        self.asked = self.again = self.streamed = 0

    def run(self, sources):
        before = memory.private([self.proxy.pid])
        sockets = self.proxy.socket_count()
        threads = [threading.Thread(target=one) for one in (self.talk, self.stay)]
        for thread in threads:
            thread.start()
        while self.asked < 3 or self.streamed < 3:
            time.sleep(0.01)
        seconds = self.flood(sources)
        most = self.proxy.socket_count() - sockets
        grown = memory.private([self.proxy.pid]) - before
        self.ended.set()
        for thread in threads:
            thread.join()
        if most > LIMIT + 1:  # the stream client has two sockets
            self.faults.append(f"{most} sockets more, with a limit of {LIMIT}")
        if grown > ALLOWANCE:
            self.faults.append(f"{grown} bytes of memory more, at most {ALLOWANCE} expected")
        self.end()
        note = (
            f"{sources} sources in {seconds:.1f} s, {most} sockets, {grown >> 10} KiB more; "
            f"{self.asked} questions answered, {self.again} of them asked again; "
            f"{self.streamed} over the connection"
        )
        return note, self.faults

    def flood(self, sources):
        """Two datagrams of each source; returns how long it took."""
        began = time.monotonic()
        with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
            for start in range(0, sources, BLOCK):
                packets = [self.packet(number) for number in range(start, start + BLOCK)]
                for packet in packets * 2:
                    with contextlib.suppress(OSError):  # the send buffer is full
                        raw.sendto(packet, ("127.0.0.1", 0))
        return time.monotonic() - began

    def packet(self, number):
        """An IP packet from a source of its own to the listener."""
        source = socket.inet_aton(f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}")
        port = self.listener.getsockname()[1]
        data = b"forged %d" % number
        udp = struct.pack("!HHHH", 1024 + number % 60000, port, 8 + len(data), 0)
        size = 20 + len(udp) + len(data)
        head = struct.pack("!BBHHHBBH", 0x45, 0, size, 0, 0, 64, socket.IPPROTO_UDP, 0)
        return head + source + socket.inet_aton("127.0.0.1") + udp + data

    def talk(self):
        """Ask all the time, and want every answer."""
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
            client.connect(self.listener.getsockname())
            client.settimeout(TRY_S)
            while not self.ended.is_set():
                question = b"question %d" % self.asked
                for turn in range(TRIES):
                    client.send(question)
                    if answered(client, question):
                        self.again += turn > 0
                        break
                else:
                    self.faults.append(f"{question.decode()} was not answered")
                    return
                self.asked += 1

    def stay(self):
        """Keep a connection, and want every byte back."""
        with socket.create_connection(self.stream.getsockname()) as client:
            client.settimeout(TRIES * TRY_S)
            while not self.ended.is_set():
                message = os.urandom(64)
                try:
                    client.sendall(message)
                    received = b""
                    while len(received) < len(message):
                        received += client.recv(64) or b"the end"
                except OSError as error:
                    self.faults.append(f"the connection: {error!r}")
                    return
                if received != message:
                    self.faults.append("wrong bytes over the connection")
                    return
                self.streamed += 1

    def end(self):
        took = time.monotonic() - self.started
        self.proxy.send_signal(signal.SIGUSR1)
        self.proxy.wait_for_log("flows begun")
        self.counted = self.proxy.log_lines("flows begun")[0]
        if not self.proxy.end() or self.proxy.status != 0:
            self.faults.append(f"SIGTERM ended it with {self.proxy.status}")
        self.faults += too_many_lines(self.proxy.log(), took)

    def close(self):
        self.ended.set()
        self.proxy.release()
        self.echo.close()
        self.stream_echo.close()
        for one in (self.listener, self.stream, self.notify):
            one.close()


def bound(kind):
    sock = socket.socket(socket.AF_INET, kind)
    sock.bind(("127.0.0.1", 0))
    return sock


def answered(client, question):
    """Whether this answer comes; late ones of earlier questions are skipped."""
    try:
        while client.recv(100) != question:
            pass
    except OSError:
        return False
    return True
