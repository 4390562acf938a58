"""The rules of systemd-socket-proxyd-units: each mistake bites, is found, and its mend mends it.

A Case is the set of healing.py with one mistake in it. It is run twice. With the mistake, what
the rule says has to be seen, and `check`, which asks the service manager itself, has to find it.
Without, a client has to be served, and nothing may be found.
"""

import time
from collections.abc import Callable

from e2e import healing
from e2e.harness import SCENARIOS, scenario
from e2e.healing import BACK, BACKEND, CONTROL, PROXY, UNITS, Subject
from e2e.machine import Failure, Machine, check
from e2e.scenarios.user_manager import USER, UserManager

Units = dict[str, str]


class Case:
    """`broken` and `mended` are edits of the set: {file: [(old, new)]}; a file may be new."""

    def __init__(
        self,
        rule: str,
        broken: dict[str, list[tuple[str, str]]],
        bites: Callable[[Subject], object],
        heals: Callable[[Subject], object],
        mended: dict[str, list[tuple[str, str]]] | None = None,
        until: int = 9999,
        name: str = "",
    ):
        self.rule = rule
        self.name = name or rule
        self.broken = broken
        self.mended = mended or {}
        self.bites = bites
        self.heals = heals
        self.until = until
        """The last version of systemd that it bites. Later ones tell what mends it."""


def edited(edits: dict[str, list[tuple[str, str]]]) -> Units:
    units = dict(UNITS)
    for name, pairs in edits.items():
        text = units.get(name, "")
        for old, new in pairs:
            check(old in text, f"{name} has no {old!r}")
            text = text.replace(old, new) if old else new
        units[name] = text
    return units


def run(m: Machine, case: Case) -> str:
    bite = Subject(m, edited(case.broken))
    version = int(m.sh("systemctl --version").split()[1].partition("~")[0])
    bites = version <= case.until
    found = bite.rules() if bites else bite.rules_of_files()
    check(case.rule in found, f"check finds {sorted(found)}, not {case.rule}")
    if bites:
        case.bites(bite)
    else:
        check(case.rule not in bite.rules(), "check finds what does not bite here")
        case.heals(bite)
    m.run(f"systemctl stop {bite.sockets} {bite.proxy} {bite.backend} other.socket other.service")
    for name in case.broken:
        if name not in case.mended and name not in UNITS:
            m.sh(f"rm -f /etc/systemd/system/{name}")
    mended = Subject(m, edited(case.mended))
    left = mended.rules()
    check(not left, f"check finds {sorted(left)} in what is mended")
    case.heals(mended)
    return f"bites{'' if bites else ' not here'}, is found, and is mended"


# What is to be seen of a mistake.


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
        s.machine.run(f"systemctl kill --signal=KILL {s.backend}")
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


def ends_at_once(s: Subject) -> None:
    unserved(s)


def cycle(s: Subject) -> None:
    """The units of a boot, started anew in one transaction."""
    s.machine.sh("systemctl stop other.service heal.socket sockets.target basic.target")
    s.machine.run("systemctl enable heal.socket; systemctl start basic.target")
    found = "ordering cycle" in s.machine.journal()
    s.machine.run("systemctl disable heal.socket; systemctl start basic.target")
    check(found, "there is no ordering cycle")


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


P, B, S = "heal.service", "back.service", "heal.socket"
JOIN_P = [
    ("StartLimit", "JoinsNamespaceOf=back.service\nStartLimit"),
    ("RestartSec=1s", "RestartSec=1s\nPrivateNetwork=yes"),
]
JOIN_B = [
    ("StopWhen", "JoinsNamespaceOf=heal.service\nStopWhen"),
    ("[Service]", "[Service]\nPrivateNetwork=yes"),
]
JOINED = {P: JOIN_P, B: JOIN_B}
OTHER = {
    "other.service": [
        ("", "[Unit]\nRequires={0}\nAfter={0}\n[Service]\nExecStart=/bin/sleep 600\n")
    ]
}


def other(unit: str) -> dict[str, list[tuple[str, str]]]:
    ((name, ((_, text),)),) = OTHER.items()
    return {name: [("", text.format(unit))]}


def add(line: str) -> list[tuple[str, str]]:
    """Add a line to [Service] of the proxy."""
    return [("RestartSec=1s", f"RestartSec=1s\n{line}")]


ONESHOT = f"/bin/sh -c '{BACKEND} 127.0.0.1 8000 &'"
SECOND = "[Socket]\nListenStream=127.0.0.1:9001\nService=heal.service\n"

REQUIRES = [("Wants=back.service\nUpholds", "Requires")]
RESTARTS = [("[Service]", "[Service]\nRestart=on-failure\nRestartSec=1s")]
REVIVES = [("", "[Unit]\nUpholds=heal.socket\n")]

CASES = (
    Case(
        "crash-not-healed",
        {P: [("Upholds=back.service\n", "")]},
        not_healed(healing.crash),
        healing.crash,
    ),
    Case(
        "failing-start-kills-socket",
        {P: [("Wants=back.service\nUpholds", "Requires")]},
        dead_socket(healing.failing_start, "trigger-limit-hit"),
        healing.failing_start,
    ),
    Case(
        "failing-start-kills-socket",
        {P: REQUIRES, B: RESTARTS},
        dead_socket(healing.failing_start, "trigger-limit-hit"),
        healing.failing_start,
        {P: REQUIRES, B: RESTARTS, "sockets.target.d/heal.conf": REVIVES},
        name="socket-revived",
    ),
    Case(
        "start-limit-kills-socket",
        {P: [("StartLimitIntervalSec=0\n", "")]},
        dead_socket(healing.proxy_killed_often, "service-start-limit-hit"),
        healing.proxy_killed_often,
    ),
    Case(
        "proxy-cannot-start",
        {P: [("Restart=on-failure\nRestartSec=1s\n", "")]},
        dead_socket(healing.proxy_cannot_start, "trigger-limit-hit"),
        healing.proxy_cannot_start,
    ),
    Case(
        "backend-start-limit",
        {
            B: [("StartLimitIntervalSec=0\n", "")],
            P: [("connect-timeout=20s", "connect-timeout=3s")],
        },
        not_healed(started_often),
        started_often,
        {P: [("connect-timeout=20s", "connect-timeout=3s")]},
    ),
    Case(
        "trigger-limit-off-alone",
        {
            S: [("[Socket]", "[Socket]\nTriggerLimitIntervalSec=0")],
            P: [("Restart=on-failure\nRestartSec=1s\n", "")],
        },
        fast_loop,
        slow_loop,
    ),
    Case(
        "socket-restart-refused",
        {P: [("Requires=heal.socket\nAfter=heal.socket\n", "")]},
        refused(S),
        accepted(S),
    ),
    Case(
        "no-order",
        {P: [("After=back.service\n", "")]},
        not_healed(healing.slow_stop),
        healing.slow_stop,
    ),
    Case("backend-never-stops", {B: [("StopWhenUnneeded=yes\n", "")]}, runs_on, healing.idle_stop),
    Case(
        "backend-pinned",
        {
            B: [("[Service]", "[Install]\nWantedBy=basic.target\n[Service]")],
            "basic.target.wants/back.service": [("", "-> ../back.service")],
        },
        runs_on,
        healing.idle_stop,
    ),
    Case(
        "stop-when-unneeded-on-proxy",
        {P: [("[Unit]", "[Unit]\nStopWhenUnneeded=yes")]},
        ends_at_once,
        served,
    ),
    Case(
        "restart-always-on-proxy",
        {P: [("on-failure", "always")]},
        starts_again,
        healing.idle_stop,
    ),
    Case(
        "condition-on-proxy",
        {P: [("[Unit]", f"[Unit]\nConditionPathExists=!{CONTROL}/refuse")]},
        dead_socket(healing.refused_start, "trigger-limit-hit"),
        healing.refused_start,
    ),
    Case("private-network-alone", {P: add("PrivateNetwork=yes")}, unserved, served, JOINED),
    Case(
        "join-without-requirement",
        {
            P: [*JOIN_P, ("Wants=back.service\nUpholds=back.service\n", "")],
            B: [JOIN_B[1], ("StopWhenUnneeded=yes\n", "")],
        },
        lambda s: (s.ask(2), s.machine.sh("systemctl start back.service"), unserved(s)),
        served_by_hand,
        JOINED,
        until=252,
    ),
    Case(
        "join-one-sided",
        {P: JOIN_P, B: [JOIN_B[1]]},
        after_a_failed_start,
        healed_after_a_failed_start,
        JOINED,
        until=252,
    ),
    Case(
        "join-cancels-isolation",
        {P: JOIN_P, B: [JOIN_B[0], ("[Service]", "[Service]\nPrivateTmp=yes")]},
        in_the_hosts_network,
        in_its_own_network,
        JOINED,
    ),
    Case(
        "private-tmp-hides-target",
        {
            P: [("127.0.0.1:8000", "/tmp/heal-target")],
            B: [("127.0.0.1 8000", "/tmp/heal-target"), ("[Service]", "[Service]\nPrivateTmp=yes")],
        },
        unserved,
        served,
        {
            P: [("127.0.0.1:8000", "/run/back/target")],
            B: [
                ("127.0.0.1 8000", "/run/back/target"),
                ("[Service]", "[Service]\nPrivateTmp=yes\nRuntimeDirectory=back"),
            ],
        },
    ),
    Case(
        "families-without-unix",
        {P: add("RestrictAddressFamilies=AF_INET AF_INET6")},
        protocol,
        served,
        {P: add("RestrictAddressFamilies=AF_UNIX AF_INET AF_INET6")},
    ),
    Case(
        "socket-ordered-after-service",
        {
            S: [
                ("[Socket]", "[Unit]\nWants=other.service\nAfter=other.service\n[Socket]"),
                (
                    "ListenStream=127.0.0.1:9000\n",
                    "ListenStream=127.0.0.1:9000\n[Install]\nWantedBy=sockets.target\n",
                ),
            ],
            "other.service": [("", "[Service]\nExecStart=/bin/sleep 600\n")],
        },
        cycle,
        served,
        {S: [("[Socket]", "[Socket]\nFreeBind=yes")]},
    ),
    Case(
        "address-without-freebind",
        {
            S: [
                (
                    "ListenStream=127.0.0.1:9000",
                    "ListenStream=127.0.0.1:9000\nListenStream=192.0.2.7:9000",
                )
            ]
        },
        without_an_address,
        opened,
        {
            S: [
                (
                    "ListenStream=127.0.0.1:9000",
                    "ListenStream=127.0.0.1:9000\nListenStream=192.0.2.7:9000\nFreeBind=yes",
                )
            ]
        },
    ),
    Case(
        "second-socket-not-required",
        {"other.socket": [("", SECOND)]},
        refused("other.socket"),
        accepted("other.socket"),
        {
            "other.socket": [("", SECOND)],
            P: [
                (
                    "Requires=heal.socket\nAfter=heal.socket",
                    "Requires=heal.socket other.socket\nAfter=heal.socket other.socket",
                )
            ],
        },
    ),
    Case(
        "oneshot-not-remaining",
        {B: [(f"ExecStart={BACKEND} 127.0.0.1 8000", f"Type=oneshot\nExecStart={ONESHOT}")]},
        looping,
        not_looping,
        {
            B: [
                (
                    f"ExecStart={BACKEND} 127.0.0.1 8000",
                    f"Type=oneshot\nRemainAfterExit=yes\nExecStart={ONESHOT}",
                )
            ]
        },
    ),
    Case(
        "proxy-enabled",
        {P: [("[Service]", "[Install]\nWantedBy=basic.target\n[Service]")]},
        active_without_a_client,
        served,
    ),
    Case(
        "others-require-proxy",
        other("heal.service"),
        wants_a_backend_first,
        rests_until_used,
        other("heal.socket"),
    ),
    Case(
        "socket-partof-proxy",
        {S: [("[Socket]", "[Unit]\nPartOf=heal.service\n[Socket]")]},
        gone_with_the_proxy,
        there_without_the_proxy,
    ),
    Case(
        "socket-partof-proxy",
        {S: [("[Socket]", "[Unit]\nPartOf=back.service\n[Socket]")]},
        gone_with_the_backend,
        healing.idle_stop,
        name="socket-partof-backend",
    ),
    Case(
        "backend-pinned",
        {S: [("[Socket]", "[Unit]\nWants=back.service\n[Socket]")]},
        runs_on,
        healing.idle_stop,
        name="socket-pins-backend",
    ),
    Case(
        "same-address",
        {
            "other.socket": [("", "[Socket]\nListenStream=9000\n")],
            "other.service": [("", "[Service]\nExecStart=/bin/sleep 600\n")],
        },
        lambda s: check(
            s.machine.run("systemctl start other.socket").returncode, "both have started"
        ),
        lambda s: s.machine.sh("systemctl start other.socket"),
        {
            "other.socket": [("", "[Socket]\nListenStream=9001\n")],
            "other.service": [("", "[Service]\nExecStart=/bin/sleep 600\n")],
        },
    ),
    Case(
        "runtime-max-on-proxy",
        {P: [("--idle-timeout=2s", "--idle-timeout=1h"), *add("RuntimeMaxSec=2s")]},
        cut_at_a_time,
        served,
    ),
    Case("bad-command", {P: [("--idle-timeout=2s", "--idle-timeouts=2s")]}, does_not_start, served),
    Case(
        "idle-never",
        {P: [(" --idle-timeout=2s", "")]},
        never_idle,
        idle_in_spite_of_a_client,
    ),
    Case(
        "timeout-too-short",
        {P: [("--connect-timeout=20s ", "")]},
        lost_when_slow,
        held_when_slow,
    ),
    Case(
        "not-a-stream",
        {S: [("ListenStream=", "ListenDatagram=127.0.0.1:9002\nListenStream=")]},
        does_not_start,
        served,
    ),
)


def add_scenario(case: Case) -> None:
    def body(m: Machine) -> str:
        return run(m, case)

    body.__name__ = f"rule_{case.name.replace('-', '_')}"
    body.__doc__ = f"{case.name}: it bites, `check` finds it, and its mend mends it"
    scenario(needs="--connect-timeout", original="has no --connect-timeout=")(body)


for one in CASES:
    add_scenario(one)

USERS_SOCKET = "[Socket]\nListenStream=%t/heal\n[Install]\nWantedBy={target}\n"


@scenario(needs="--connect-timeout", original="has no --connect-timeout=")
def rule_user_unit_wanted_by_multi_user(m: Machine) -> str:
    """user-unit-wanted-by-multi-user: enabled, it is not there after a start of the manager"""
    for target, there in (("multi-user.target", False), ("sockets.target", True)):
        user = UserManager(m)
        try:
            user.unit("heal.socket", USERS_SOCKET.format(target=target))
            user.unit("heal.service", PROXY.replace("{program}", m.program))
            user.unit("back.service", BACK)
            m.sh(f"chown -R {USER} /home/{USER}")
            user.sh("systemctl --user daemon-reload; systemctl --user enable heal.socket")
            user.restart()
            check((user.show("heal.socket", "ActiveState") == "active") == there, f"with {target}")
            folder = f"/home/{USER}/.config/systemd/user"
            found = m.run(f"{m.program}-units check --json=short {folder}").stdout
            check(("user-unit-wanted-by-multi-user" in found) != there, f"check says {found}")
        finally:
            user.end()
    return "bites, is found, and is mended"


assert len([name for name in SCENARIOS if name.startswith("rule-")]) == len(CASES) + 1
