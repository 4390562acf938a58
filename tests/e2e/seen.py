"""What is to be seen of a mistake in units, and of its mend: each takes the set, or fails."""

import subprocess
import time
from collections.abc import Callable

from e2e import healing
from e2e.healing import Subject
from e2e.machine import Failure, check


def dead_socket(step: Callable[[Subject], None], result: str) -> Callable[[Subject], None]:
    """The socket has failed with `result` after a step."""

    def seen(s: Subject) -> None:
        not_healed(step)(s)
        check(result in s.socket_failed(), f"the socket did not fail with {result}: {s.states()}")

    return seen


def not_healed(step: Callable[[Subject], None]) -> Callable[[Subject], None]:
    """The step is not healed: no client is served after it."""

    def seen(s: Subject) -> None:
        serve, s.served = s.served, lambda what: once(s, what)
        try:
            step(s)
        except Failure:
            return
        finally:
            s.served = serve
        raise Failure(f"{step.__name__} is healed in spite of the mistake: {s.states()}")

    return seen


def once(s: Subject, what: str) -> None:
    if not s.ask(5) and not s.ask(5):
        raise Failure(f"{what}: no client is served")


def unserved(s: Subject) -> None:
    check(not s.ask(4), f"a client is served in spite of the mistake: {s.states()}")


def served(s: Subject) -> None:
    s.served("without the mistake")


def refused(*units: str) -> Callable[[Subject], None]:
    """These cannot be started or restarted while the proxy runs."""

    def seen(s: Subject) -> None:
        s.ask()
        for unit in units:
            done = s.machine.run(f"systemctl restart {unit}")
            check(done.returncode, f"{unit} could be restarted")

    return seen


def accepted(*units: str) -> Callable[[Subject], None]:
    def seen(s: Subject) -> None:
        s.ask()
        for unit in units:
            s.machine.sh(f"systemctl restart {unit}")
        s.served("after the restart")

    return seen


def runs_on(s: Subject) -> None:
    s.served("at first")
    s.wait_idle()
    time.sleep(1)  # a stop would have been ordered with the end of the proxy
    check(s.show("ActiveState", s.backend) == "active", "the backend has stopped")


def starts_again(s: Subject) -> None:
    s.served("at first")
    s.wait("it is started again", lambda: int(s.show("NRestarts")) > 0)


def fast_loop(s: Subject) -> None:
    s.machine.sh(f"rm {healing.PROGRAM}")
    s.ask(2)
    count = s.machine.journal(s.proxy).count("Failed with result")
    check(count > 30, f"only {count} starts that failed in 2 s")


def slow_loop(s: Subject) -> None:
    s.machine.sh(f"rm {healing.PROGRAM}")
    before = s.machine.journal(s.proxy).count("Failed with result")
    s.ask(2)
    count = s.machine.journal(s.proxy).count("Failed with result") - before
    check(count < 10, f"{count} starts that failed in 2 s")


def same_network(s: Subject) -> bool:
    s.ask()
    pid = s.machine.main_pid(s.proxy)
    return len(set(s.machine.sh(f"readlink /proc/1/ns/net /proc/{pid}/ns/net").split())) == 1


def in_the_hosts_network(s: Subject) -> None:
    check(same_network(s), "the proxy has a network of its own")


def in_its_own_network(s: Subject) -> None:
    s.served("at first")
    check(not same_network(s), "the proxy is in the network of the host")


def not_deserialized(s: Subject) -> None:
    unserved(s)
    check("Failed to deserialize" in s.machine.journal(), "the start has not failed so")


def inspected_after_a_stop_of_the_other(s: Subject) -> None:
    check(_inspected(s), "socket-proxyctl gets no answer")


def not_inspected_after_a_stop_of_the_other(s: Subject) -> None:
    check(not _inspected(s), "socket-proxyctl gets an answer")


def _inspected(s: Subject) -> bool:
    m = s.machine
    m.client("exec socat -u TCP:127.0.0.1:9000 -")
    s.wait("it runs", lambda: s.show("ActiveState") == "active")
    check(m.run(f"{m.ctl} status --unit={s.proxy}").returncode == 0, "no answer at first")
    m.sh("systemctl start other.service; systemctl stop other.service")
    return m.run(f"{m.ctl} status --unit={s.proxy}").returncode == 0


def protocol(s: Subject) -> None:
    s.ask(4)
    check(s.show("ActiveState") != "active", "the start has succeeded")
    s.wait("the start fails", lambda: "'protocol'" in s.machine.journal(s.proxy))


def wants_a_backend_first(s: Subject) -> None:
    s.machine.sh("systemctl start other.service")
    check(s.show("ActiveState", s.backend) == "active", "the backend was not started")


def rests_until_used(s: Subject) -> None:
    s.machine.run("systemctl start other.service")
    check(s.show("ActiveState", s.backend) != "active", "the backend was started")
    s.served("then")


def gone_with_the_proxy(s: Subject) -> None:
    s.served("at first")
    s.machine.sh(f"systemctl stop {s.proxy}")
    check(s.show("ActiveState", s.sockets) != "active", "the socket is still there")


def gone_with_the_backend(s: Subject) -> None:
    s.served("at first")
    s.wait_idle()
    s.wait("the socket is gone", lambda: s.show("ActiveState", s.sockets) == "inactive")
    check(not s.ask(2), "a client is served")


def there_without_the_proxy(s: Subject) -> None:
    s.served("at first")
    s.machine.sh(f"systemctl stop {s.proxy}")
    s.served("after a stop of the proxy")


def cut_at_a_time(s: Subject) -> None:
    held = s.machine.client("exec socat -u TCP:127.0.0.1:9000 -")
    s.wait("it is cut", lambda: held.poll() is not None, 15)
    check("timeout" in s.machine.journal(s.proxy), "not by RuntimeMaxSec=")


def never_idle(s: Subject) -> None:
    s.machine.client("exec socat -u TCP:127.0.0.1:9000 -")
    s.wait("it runs", lambda: s.show("ActiveState") == "active")
    time.sleep(4)  # twice the idle span
    check(s.show("ActiveState") == "active", "it has ended")


def idle_in_spite_of_a_client(s: Subject) -> None:
    s.machine.client("exec socat -u TCP:127.0.0.1:9000 -")
    s.wait("it runs", lambda: s.show("ActiveState") == "active")
    s.wait_idle()


def lost_when_slow(s: Subject) -> None:
    s.order("start-delay", "12")
    check(not s.ask(18), "a client is served in spite of the mistake")


def held_when_slow(s: Subject) -> None:
    s.order("start-delay", "12")
    check(s.ask(18), f"the client of a slow start is lost ({s.states()})")


def started_often(s: Subject) -> None:
    """Six crashes within the interval, then a client that is held for 3 s."""
    s.served("at first")
    for _ in range(6):
        before = s.machine.main_pid(s.backend)
        s.machine.run(f"systemctl kill --signal=KILL {s.backend}")
        s.wait("its end", lambda pid=before: pid == 0 or s.machine.main_pid(s.backend) != pid)
        active = s.machine.run(
            f"for i in $(seq 20); do systemctl -q is-active {s.backend} && exit; sleep .05; done"
        )
        check(active.returncode in (0, 1), active.stderr)
    check(s.ask(8), f"the client is lost ({s.states()})")


def looping(s: Subject) -> None:
    s.ask(3)
    count = s.machine.journal(s.backend).count("Finished")
    check(count > 2, f"the oneshot was started {count} times")


def not_looping(s: Subject) -> None:
    s.served("at first")


def active_without_a_client(s: Subject) -> None:
    s.machine.sh(f"systemctl enable {s.proxy}; systemctl start basic.target")
    s.wait("the proxy is active", lambda: s.show("ActiveState") == "active")
    s.machine.sh(f"systemctl disable {s.proxy}")


def stopped_at_once(s: Subject) -> None:
    """The service manager stops it, once or more often: as long as it comes before the client.

    A proxy that ends by itself is not logged as being stopped.
    """
    s.ask(4)
    s.wait("it is stopped", lambda: f"Stopping {s.proxy}" in s.machine.journal(s.proxy))


def left_out_at_boot(s: Subject) -> None:
    """A unit that was to start at boot was left out, which breaks the ordering cycle."""
    left = not_started_at_boot(s, "heal.socket", "other.service", "sockets.target")
    s.restart_all()  # the others of a sockets.target that was left out are needed again
    check(left, "all have started at boot")


def started_at_boot(s: Subject) -> None:
    left = not_started_at_boot(s, "heal.socket", "sockets.target")
    check(not left, f"not started at boot: {left}")
    s.served("after a boot")


def not_started_at_boot(s: Subject, *units: str) -> list[str]:
    """Boot with the socket enabled; those of the units that are not active then."""
    s.machine.sh("systemctl enable heal.socket")
    s.restart_all()
    left = [unit for unit in units if s.show("ActiveState", unit) != "active"]
    s.machine.sh("systemctl disable heal.socket")
    return left


def without_an_address(s: Subject) -> None:
    check(s.machine.run("systemctl restart heal.socket").returncode, "the socket has started")


def opened(s: Subject) -> None:
    s.machine.sh("systemctl restart heal.socket")


def does_not_start(s: Subject) -> None:
    unserved(s)
    check(s.show("ExecMainStatus") == "1", "the proxy has started")


def after_a_failed_start(s: Subject) -> None:
    s.order("fail")
    s.ask(3)
    s.cancel("fail")
    s.wait("the backend runs", lambda: s.show("ActiveState", s.backend) == "active")
    check(not s.ask(4), "a client is served")


def served_by_hand(s: Subject) -> None:
    s.ask(2)
    s.machine.sh(f"systemctl start {s.backend}")
    s.served("once both run")


def healed_after_a_failed_start(s: Subject) -> None:
    s.order("fail")
    s.ask(3)
    s.cancel("fail")
    s.served("after the repair")


def waits_for_drain(s: Subject) -> None:
    """A restart does not come to an end while a client is there."""
    client = restart_with_a_client(s)
    check(s.show("SubState") == "stop-sigterm", f"it does not drain: {s.states()}")
    client.kill()
    s.wait("the restart", lambda: s.show("ActiveState") == "active")


def goes_on_at_once(s: Subject) -> None:
    client = restart_with_a_client(s)
    s.wait("the next process goes on", lambda: "Going on with" in s.machine.journal(s.proxy))
    client.kill()


def restart_with_a_client(s: Subject) -> subprocess.Popen:
    client = connected(s)
    s.machine.sh(f"{s.systemctl} restart --no-block {s.proxy}; {s.systemctl} daemon-reload")
    return client


def connected(s: Subject) -> subprocess.Popen:
    """A client that stays, and is connected to the backend."""
    client = s.machine.client("exec socat -u TCP:127.0.0.1:9000 -")
    s.wait("it is served", lambda: s.machine.sh("ss -Htn state established dport = 8000"))
    return client


def left_in_the_store(s: Subject) -> None:
    """A client hangs after a stop: its connection is kept for nobody."""
    client = connected(s)
    s.machine.stop(s.proxy)
    stored = s.show("NFileDescriptorStore")
    s.machine.sh(f"systemctl clean --what=fdstore {s.proxy}")
    check(stored == "1", f"{stored} descriptors are stored")
    s.wait("it is cut at last", lambda: client.poll() is not None)


def cut_by_a_stop(s: Subject) -> None:
    client = connected(s)
    s.machine.stop(s.sockets, s.proxy)
    s.wait("it is cut", lambda: client.poll() is not None)


def cut_by_a_kill(s: Subject) -> None:
    client = killed_with_a_client(s)
    s.wait("it is cut", lambda: client.poll() is not None)


def goes_on_after_a_kill(s: Subject) -> None:
    client = killed_with_a_client(s)
    s.wait("the next process goes on", lambda: "Going on with" in s.machine.journal(s.proxy))
    check(client.poll() is None, "the client was cut")
    client.kill()


def killed_with_a_client(s: Subject) -> subprocess.Popen:
    client = connected(s)
    s.wait("its connection is kept", lambda: s.show("NFileDescriptorStore") == "1")
    s.machine.sh(f"{s.systemctl} kill --signal=KILL {s.proxy}")
    return client


def killed_at_a_stop(s: Subject) -> None:
    s.served("at first")
    s.machine.run(f"{s.systemctl} stop {s.sockets} {s.proxy}")
    check(s.show("Result") == "timeout", f"it has ended in order: {s.states()}")


def ends_at_a_stop(s: Subject) -> None:
    s.served("at first")
    s.machine.stop(s.sockets, s.proxy)
    check(s.show("Result") == "success", f"it was killed: {s.states()}")
