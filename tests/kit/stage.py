"""Everything that a test needs: listeners, the program, its targets and its clients."""

import errno
import os
import shutil
import tempfile

from kit.notify import NotifySocket
from kit.proxy import SIGNS_OF_A_CRASH, Proxy
from kit.sockets import (
    fill_backlog,
    open_connection,
    open_listener,
    reset,
    send_at_once,
    target_text,
)
from kit.traffic import EchoServer
from kit.waiting import patience, wait_until


class Backend:
    """A target of the program, for which the test plays the server."""

    def __init__(self, listener):
        self.listener = listener
        self.target = target_text(listener.getsockname(), listener.family)
        self.connections = []
        listener.settimeout(patience())

    def accept(self, timeout=None):
        """Accept the next connection that the program opens to this target."""
        timeout = timeout or patience()
        self.listener.settimeout(timeout)
        try:
            connection, _ = self.listener.accept()
        except TimeoutError:
            raise AssertionError(f"no connection at the target within {timeout:g} s") from None
        connection.settimeout(patience())
        send_at_once(connection)
        self.connections.append(connection)
        return connection

    def start_listening(self):
        """Let a target that was made by `absent()` listen."""
        self.listener.listen(512)

    def port(self):
        """The port number of a TCP target."""
        return self.listener.getsockname()[1]

    def close(self):
        """Close the listener and every connection it accepted."""
        self.listener.close()
        for connection in self.connections:
            connection.close()


class Outcome:
    """The result of a run that ended by itself."""

    def __init__(self, status, stdout, stderr):
        self.status = status
        self.stdout = stdout
        self.stderr = stderr

    def __repr__(self):
        return f"exit {self.status}, stdout {self.stdout!r}, stderr {self.stderr!r}"


class Stage:
    """Everything that a test has started. `close()` ends it and checks that nothing is left."""

    def __init__(self, executable, contender, *, arguments=(), environment=None):
        """`arguments` and `environment` are given to every launch of the program."""
        self.executable = executable
        self.arguments = list(arguments)
        self.environment = environment or {}
        self.contender = contender
        self.is_ours = contender == "ours"
        self.directory = tempfile.mkdtemp(prefix="proxyd-")  # short: a UNIX path has 107 bytes
        os.chmod(self.directory, 0o755)
        self.proxies = []
        self.listeners = []
        self._clients = []
        self._servers = []
        self._notify_sockets = []

    # Around the program

    def path(self, name):
        """A path for a socket or file in this test's own directory."""
        return os.path.join(self.directory, name)

    def listener(self, family="tcp4", **options):
        """A listening socket, as the service manager would open it."""
        listener = open_listener(family, self.directory, **options)
        self.listeners.append(listener)
        return listener

    def backend(self, family="tcp4", **options):
        """A target for which the test plays the server, one `accept()` at a time."""
        server = Backend(open_listener(family, self.directory, **options))
        self._servers.append(server)
        return server

    def echo(self, family="tcp4", **options):
        """A target that echoes every byte; its TARGET argument."""
        listener = open_listener(family, self.directory, **options)
        text = target_text(listener.getsockname(), listener.family)
        self._servers.append(EchoServer(listener))
        return text

    def absent(self, family="tcp4"):
        """A target that is bound but does not listen yet: connections to it are refused."""
        server = Backend(open_listener(family, self.directory, backlog=None))
        self._servers.append(server)
        return server

    def fill_backlog(self, backend):
        """Fill the backlog of a target; returns the connections in it."""
        waiting = fill_backlog(backend.listener.getsockname(), backend.listener.family)
        self._clients += waiting
        return waiting

    def on_one_port(self, make, other):
        """(a backend from `make()`, what `other(port)` returns): both use the same port, at two
        addresses; tries until it finds one that is free at both."""
        while True:
            backend = make()
            try:
                return backend, other(backend.port())
            except OSError as error:
                backend.close()
                if error.errno != errno.EADDRINUSE:
                    raise

    def notify_socket(self, path=None):
        """A NOTIFY_SOCKET; without a `path` its name is abstract."""
        notify = NotifySocket(path)
        self._notify_sockets.append(notify)
        return notify

    # The program

    def launch(self, *arguments, listeners=(), prefix=(), wait=True, **options):
        """Start the program with the inherited `listeners`, and wait until it serves.

        Ours then sends READY=1; the others then wait for events.
        """
        notify = options.pop("notify", None) or self.notify_socket()
        options["environment"] = self.environment | options.get("environment", {})
        command = [*prefix, self.executable, *self.arguments, *arguments]
        proxy = Proxy(command, inherit=listeners, notify=notify, **options)
        proxy.listeners = list(listeners)
        proxy.sockets_at_start = None
        self.proxies.append(proxy)
        if wait and self.is_ours:
            proxy.wait_until_ready()
            proxy.sockets_at_start = proxy.socket_count()
        elif wait:
            wait_until(lambda: proxy.has_ended() or proxy.waits_for_events(), "the program's start")
        return proxy

    def run(self, *arguments, listeners=(), prefix=(), timeout=None, **options):
        """Run the program until it ends by itself."""
        proxy = Proxy([*prefix, self.executable, *arguments], inherit=listeners, **options)
        self.proxies.append(proxy)
        proxy.sockets_at_start = None
        proxy.wait(timeout)
        return Outcome(proxy.status, proxy.output(), proxy.log())

    @property
    def one_attempt(self):
        """Options with which ours gives up at the first refusal, like the originals."""
        return ["--connect-timeout=0"] if self.is_ours else []

    @property
    def proxy(self):
        """The program that was launched last."""
        return self.proxies[-1]

    # In front of the program

    def connect(self, listener=None, **options):
        """A client's connection to `listener`, by default the first one of the last program."""
        listener = listener or self.proxy.listeners[0]
        return self.connect_to(listener.getsockname(), listener.family, **options)

    def connect_to(self, address, family, **options):
        """A client's connection to any address."""
        client = open_connection(address, family, **options)
        self._clients.append(client)
        return client

    def forward(
        self, listen, target, *arguments, listen_buffer=None, target_buffer=None, **options
    ):
        """Launch the program between a listener and a target of these families; the target.

        `listen_buffer` and `target_buffer` are receive buffers, which accepted connections inherit.
        """
        backend = self.backend(target, receive_buffer=target_buffer)
        listener = self.listener(listen, receive_buffer=listen_buffer)
        self.launch(*arguments, backend.target, listeners=[listener], **options)
        return backend

    def pair(self, listen, target, *arguments, **options):
        """(client's end, server's end) of one connection through a newly started program."""
        backend = self.forward(listen, target, *arguments, **options)
        client = self.connect()
        return client, backend.accept()

    # Afterwards

    def close(self, *, checked=True):
        """Close everything. If `checked`, ours must have no socket left and exit with status 0."""
        troubles = []
        try:
            for client in self._clients:
                if client.fileno() >= 0:
                    reset(client)  # a clean end would leave a held client waiting
            for server in self._servers:
                server.close()
            for proxy in self.proxies:
                if checked and self.is_ours:
                    troubles += _leftovers(proxy)
                if checked:
                    troubles += _end_well(proxy)
        finally:
            for thing in self.proxies:
                thing.release()
            for thing in [*self._notify_sockets, *self.listeners]:
                thing.close()
            shutil.rmtree(self.directory, ignore_errors=True)
        assert not (troubles and self.is_ours and checked), "; ".join(troubles)


def _leftovers(proxy):
    """What is wrong if it still has sockets although every peer has gone (pipes may be pooled)."""
    if proxy.has_ended() or proxy.sockets_at_start is None:
        return []
    try:
        wait_until(
            lambda: proxy.has_ended() or proxy.socket_count() <= proxy.sockets_at_start, "", 8.0
        )
        return []
    except AssertionError:
        return [f"leaks sockets: {proxy.sockets_at_start} at start, {proxy.socket_count()} now"]


def _end_well(proxy):
    """End it unless it has ended; what is wrong with its end and its stderr."""
    log = proxy.log()
    found = [f"{sign} on stderr:\n{log}" for sign in SIGNS_OF_A_CRASH if sign in log]
    if proxy.has_ended():
        return found  # the test has checked its exit status
    if not proxy.end():
        return [*found, "SIGTERM did not end it within 5 s"]
    if proxy.status != 0:
        found.append(f"exit status {proxy.status}, stderr:\n{proxy.log()}")
    return found
