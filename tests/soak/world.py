"""The proxies, the load processes around them, and how they are connected."""

import os
import queue
import random
import signal
import socket
import time

from kit.load import Load
from kit.manager import Manager
from kit.privileges import WITH_PARENT
from kit.proxy import Proxy
from kit.sockets import open_listener
from kit.waiting import wait_until
from soak import datagrams

FIRST_PORT = 701  # not ephemeral, so that no socket takes it while a target is down

IDLE_MS = 3000
STOP_MS = 1200
"""Too short for the idle timeout to cut a connection in use while a process is stopped."""


GO_ON = ("new", "killed")
"""Proxies that end all the time; another process goes on with their connections."""

LOST = (
    "Failed to keep the connections",
    "No store for connections",
    "Failed to go on",
    "Had to reset",
    "parcel is bad",
    "Not reloaded",
)
"""Lines that tell that connections were lost between two processes, or might have been."""


class Served:
    """A proxy under test, and what the clients are told about its listeners."""

    def __init__(self, name, start, listeners):
        """`start(stored)` starts it with (name, fd) of what the last one has stored."""
        self.name = name
        self._start = start
        self.proxy = start([])
        self.listeners = listeners
        self.sockets_at_start = 0
        self.last_log = ""
        self.carried = 0
        """Connections that went from one process to the next."""
        self.reset = 0
        """Connections that were kept, and could not go on after a kill."""

    def reload(self):
        """Have it execute itself again; return what is wrong."""
        self.proxy.notify.clear()
        self.proxy.send_signal(signal.SIGHUP)
        self.proxy.notify.wait_for("READY=1")
        return self._lost()

    def kill(self):
        """Kill it, and start it with what it has stored; return what is wrong."""
        last, manager = self.proxy, self.proxy.notify
        last.kill()
        manager.settle()  # as a service manager, which reads what was sent before it sees the end
        manager.drop_hung_up()
        manager.clear()
        self.proxy = self._start(manager.stored)
        self.proxy.wait_until_ready()
        last.release()
        self.reset += sum(map(_number, self.proxy.log_lines("Had to reset")))
        return [line for line in self._lost() if "Had to reset" not in line]

    def restart(self):
        """Stop it, and start it with what it has stored; return what is wrong."""
        last, manager = self.proxy, self.proxy.notify
        last.send_signal(signal.SIGTERM)
        faults = [] if last.wait() == 0 else [f"SIGTERM ended it with status {last.status}"]
        manager.drop_hung_up()
        manager.clear()
        self.proxy = self._start(manager.stored)
        self.proxy.wait_until_ready()
        wait_until(lambda: not manager.has("proxyd-parcel"), "FDSTOREREMOVE=1")
        faults += [line for line in last.log_lines() if any(word in line for word in LOST)]
        last.release()
        return faults + self._lost()

    def _lost(self):
        going_on = self.proxy.log_lines("Going on with ")
        self.carried += _number(going_on[-1]) if going_on else 0
        return [line for line in self.proxy.log_lines() if any(word in line for word in LOST)]


def _number(line):
    """The number in a line of the log."""
    return next(int(word) for word in line.split() if word.isdigit())


class World:
    """Everything that runs. `close()` ends it all."""

    def __init__(self, executable, folder, threads, rate, seed):
        self.executable = executable
        self.folder = folder
        self.threads = threads
        self.rate = rate
        self.dice = random.Random(seed)
        self.reports = queue.Queue()
        self.loads = []
        self.served = []
        self.listening_sockets = []
        self.datagram_names = []
        """What the clients of datagrams call their listeners."""
        self.ipv6 = _has_ipv6()
        self._port = FIRST_PORT

    # ── making ───────────────────────────────────────────────────────────────────────────────

    def build(self):
        """Start targets, proxies and clients, in this order."""
        steady = self._backend("steady targets", strict=True)
        shaky = self._backend("shaky targets", strict=False)
        self.shaky = shaky
        pairs = [(a, b) for a in ("tcp", "unix") for b in ("tcp", "unix")]
        main_pairs = pairs + ([("tcp6", "tcp6")] if self.ipv6 else [])
        threads = [f"--threads={self.threads}", "--hand-over=always"] if self.threads else []
        last = {
            ("tcp", "tcp"): ["stream", "drip", "ping"],
            ("unix", "unix"): ["drip", "ping"],
        }
        self._proxy("main", threads, main_pairs, steady, last=last, strict=True, rate=30)
        self._proxy(
            "header",
            ["--proxy-protocol=v2"],
            [("tcp", "tcp"), ("unix", "tcp")],
            steady,
            strict=True,
            header=True,
            rate=8,
        )
        self._proxy(
            "idle",
            [f"--idle-timeout={IDLE_MS}ms"],
            [("tcp", "tcp"), ("unix", "unix")],
            steady,
            rate=8,
            stall_ms=2 * IDLE_MS,
            sleeps_ms=IDLE_MS - 100,
        )
        self._proxy(
            "few",
            ["--connections-max=1000"],
            [("tcp", "tcp"), ("unix", "unix")],
            steady,
            rate=24,
            open_max=24,
            stall_ms=3000,
            prefix=["prlimit", "--nofile=80:80"],
        )
        self._proxy("shaky", ["--connect-timeout=5s"], pairs, shaky, rate=16)
        self._proxy(
            "new",
            ["--threads=3", "--hand-over=always"],
            pairs,
            steady,
            last={("tcp", "tcp"): ["drip", "ping"], ("unix", "unix"): ["drip", "ping"]},
            strict=True,
            rate=16,
            prefix=["setsid"],  # with a terminal, SIGHUP would end it
        )
        self._proxy(
            "killed",
            ["--threads=2", "--hand-over=always", "--crash-recovery=all"],
            pairs,
            steady,
            last={pair: ["drip", "ping"] for pair in pairs},
            only_resets=True,
            rate=16,
        )
        self._flows(steady, shaky)
        self._clients("steady clients", ["main", "header", "new", "killed"])
        self._clients("other clients", ["idle", "few", "shaky", "flows"])
        self._inspectors()

    def _next_port(self):
        self._port += 1
        return self._port

    def _backend(self, name, *, strict):
        listen = []
        for header in (0, 2):
            for family in ("tcp", "unix", "tcp6") if self.ipv6 else ("tcp", "unix"):
                if family == "unix":
                    address = f"{self.folder}/{name.split()[0]}-{header}"
                else:
                    address = ["127.0.0.1" if family == "tcp" else "::1", self._next_port()]
                listen.append({"family": family, "address": address, "header": header})
        grams = [
            {"family": "udp", "address": ["127.0.0.1", self._next_port()]},
            {"family": "unixgram", "address": f"{self.folder}/{name.split()[0]}-datagrams"},
        ]
        settings = {"name": name, "strict": strict, "listen": listen, "datagrams": grams}
        load = Load("soak.backend", settings, self.reports)
        self.loads.append(load)
        self.wait_ready([load])
        return load

    def _proxy(
        self, name, options, pairs, backend, *, rate, prefix=(), header=False, last=None, **traffic
    ):
        listeners = [self._listener(pair[0]) for pair in pairs]
        names = [f"{one}-to-{two}" for one, two in pairs]
        targets = {
            label: _target(backend, pair[1], header)
            for label, pair in zip(names, pairs, strict=True)
        }
        told = [
            self._told(
                f"{name} {label}", *pair, listener, rate=rate * self.rate / len(pairs),
                header=header, last=(last or {}).get(pair, ["ping"] if last else []), **traffic,
            )
            for label, pair, listener in zip(names, pairs, listeners, strict=True)
        ]  # fmt: skip
        self._serve(name, [*options], listeners, targets, told, prefix)

    def _serve(self, name, options, listeners, targets, told, prefix=()):
        """Start a proxy. `targets`: {name of a listener: target}; `told`: what the clients of
        streams are told of the listeners."""
        manager = Manager()

        def start(stored):
            return Proxy(
                [*WITH_PARENT, *prefix, str(self.executable), *options,
                 f"--inspect={self._inspection_path(name)}",
                 *(f"{label}={target}" for label, target in targets.items())],
                inherit=[*listeners, *[fd for _, fd in stored]],
                names=":".join([*targets, *[name for name, _ in stored]]),
                notify=manager,
            )  # fmt: skip

        served = Served(name, start, told)
        self.served.append(served)
        served.proxy.wait_until_ready()
        served.sockets_at_start = served.proxy.socket_count()

    def _told(self, name, family, backend, listener, *, rate, header=False, last=(), **traffic):
        address = listener.getsockname()
        return {
            "name": name, "family": family, "backend": backend,
            "address": address if family == "unix" else address[:2],
            "rate": rate, "header": header,
            "open_max": traffic.get("open_max", 24), "strict": traffic.get("strict", False),
            "only_resets": traffic.get("only_resets", False),
            "stall_ms": traffic.get("stall_ms", 1500),
            "sleeps_ms": traffic.get("sleeps_ms", 0),
            "last": list(last),
        }  # fmt: skip

    def _flows(self, steady, shaky):
        """The proxy of datagrams, with a stream, and the clients of its datagrams."""
        places = [
            (backend, one) for backend in (steady, shaky) for one in backend.settings["datagrams"]
        ]
        listeners, targets, told = [self._listener("tcp")], {}, []
        targets["streams"] = _target(steady, "tcp", header=False)
        for family in ("udp", "unixgram"):
            for backend, place in places:
                label = f"{family}-to-{backend.name.split()[0]}-{place['family']}"
                address = ["0.0.0.0", 0] if family == "udp" else f"{self.folder}/{label}"
                listeners.append(datagrams.bind(family, address))
                self.listening_sockets.append(listeners[-1])
                targets[label] = _datagram_target(place)
                told.append(
                    {
                        "name": f"flows {label}", "family": family,
                        "address": listeners[-1].getsockname(),
                        "rate": 2 * self.rate, "open_max": 24,
                    }
                )  # fmt: skip
        self._serve(
            "flows",
            [f"--idle-timeout={IDLE_MS}ms", "--connect-timeout=5s"],
            listeners,
            targets,
            [self._told("flows streams", "tcp", "tcp", listeners[0], rate=2 * self.rate)],
        )
        self.datagram_names = [one["name"] for one in told]
        settings = {
            "name": "clients of datagrams", "seed": self.dice.random(), "listeners": told,
            "first_number": self.dice.randrange(1 << 40),
        }  # fmt: skip
        self.loads.append(Load("soak.datagram_client", settings, self.reports))
        self.wait_ready(self.loads[-1:])

    def _listener(self, family):
        kind = "tcp4" if family == "tcp" else family
        self.listening_sockets.append(open_listener(kind, self.folder, backlog=256))
        return self.listening_sockets[-1]

    def _clients(self, name, proxies):
        listeners = [
            listener for one in self.served if one.name in proxies for listener in one.listeners
        ]
        settings = {
            "name": name, "seed": self.dice.random(), "listeners": listeners,
            "first_number": self.dice.randrange(1 << 40),
        }  # fmt: skip
        self.loads.append(Load("soak.client", settings, self.reports))
        self.wait_ready(self.loads[-1:])

    def _inspection_path(self, name):
        return f"{self.folder}/{name}-inspect"

    def _inspectors(self):
        proxies = [
            {
                "name": f"{one.name} inspected",
                "path": self._inspection_path(one.name),
                "strict": one.name not in ("few", *GO_ON),  # short of fds, and often away
                "terminates": one.name == "shaky",
            }
            for one in self.served
        ]
        settings = {
            "name": "clients of the inspection",
            "seed": self.dice.random(),
            "proxies": proxies,
        }
        self.loads.append(Load("soak.inspector", settings, self.reports))
        self.wait_ready(self.loads[-1:])

    def wait_ready(self, loads):
        """Wait until each load process reports that it is ready. Other reports are put back."""
        missing, others = set(loads), []
        deadline = time.monotonic() + 30
        while missing:
            load, report = self.reports.get(timeout=max(deadline - time.monotonic(), 0.1))
            if report["event"] == "ready":
                missing.discard(load)
            elif report["event"] == "ended" and load in missing:
                raise SystemExit(f"{load.name} did not start")
            else:
                others.append((load, report))
        for item in others:
            self.reports.put(item)

    # ── looking ──────────────────────────────────────────────────────────────────────────────

    def clients(self):
        return [load for load in self.loads if "clients" in load.name]

    def lasting(self, served):
        """Return the number of lasting connections through a proxy."""
        return sum(len(listener["last"]) for listener in served.listeners)

    # ── ending ───────────────────────────────────────────────────────────────────────────────

    def close(self):
        for load in self.loads:
            load.kill()
        for one in self.served:
            one.last_log = one.proxy.log()
            one.proxy.release()
            one.proxy.notify.close()
        for sock in self.listening_sockets:
            sock.close()


def _target(backend, family, header):
    wanted = 2 if header else 0
    for one in backend.settings["listen"]:
        if one["family"] == family and one["header"] == wanted:
            address = one["address"]
            if family == "unix":
                return address
            host = f"[{address[0]}]" if family == "tcp6" else address[0]
            return f"{host}:{address[1]}"
    raise AssertionError(family)


def _datagram_target(place):
    address = place["address"]
    return address if place["family"] == "unixgram" else f"{address[0]}:{address[1]}"


def _has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return os.path.exists("/proc/net/if_inet6")
