"""The rules of systemd-socket-proxyd-units: each mistake bites, is found, and its mend mends it.

A Case is the set of healing.py with one mistake in it. It is run twice. With the mistake, what
the rule says has to be seen, and `check`, which asks the service manager itself, has to find it.
Without, a client has to be served, and nothing may be found.
"""

from collections.abc import Callable

from e2e import healing
from e2e.harness import SCENARIOS, scenario
from e2e.healing import BACK, BACKEND, CONTROL, PROXY, UNITS, Subject, datagrams
from e2e.machine import Machine, check, same
from e2e.scenarios.user_manager import USER, UserManager
from e2e.seen import (
    accepted,
    active_without_a_client,
    after_a_failed_start,
    cut_at_a_time,
    cut_by_a_kill,
    cut_by_a_stop,
    dead_socket,
    does_not_start,
    ends_at_a_stop,
    fast_loop,
    goes_on_after_a_kill,
    goes_on_at_once,
    gone_with_the_backend,
    gone_with_the_proxy,
    healed_after_a_failed_start,
    held_when_slow,
    idle_in_spite_of_a_client,
    in_its_own_network,
    in_the_hosts_network,
    inspected_after_a_stop_of_the_other,
    killed_at_a_stop,
    left_in_the_store,
    left_out_at_boot,
    looping,
    lost_when_slow,
    never_idle,
    not_deserialized,
    not_healed,
    not_inspected_after_a_stop_of_the_other,
    not_looping,
    opened,
    protocol,
    refused,
    rests_until_used,
    runs_on,
    served,
    served_by_hand,
    slow_loop,
    started_at_boot,
    started_often,
    starts_again,
    stopped_at_once,
    there_without_the_proxy,
    unserved,
    waits_for_drain,
    wants_a_backend_first,
    without_an_address,
)

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
        since: int = 0,
        name: str = "",
    ):
        self.rule = rule
        self.name = name or rule
        self.broken = broken
        self.mended = mended or {}
        self.bites = bites
        self.heals = heals
        self.since, self.until = since, until
        """The versions of systemd that it bites."""


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
    bites = case.since <= version <= case.until
    found = bite.rules() if bites else bite.rules_of_files()
    check(case.rule in found, f"check finds {sorted(found)}, not {case.rule}")
    if bites:
        case.bites(bite)
    else:
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
STAYS_AND_GIVES_UP = [("20s --exit-idle-time=2s", "3s --exit-idle-time=1min")]
"""On a busy machine, six crashes of the backend take more than 2 s."""

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

TO_PATH = ("127.0.0.1:8000", "/run/back/target")
AT_PATH = [
    ("127.0.0.1 8000", "/run/back/target"),
    ("[Service]", "[Service]\nRuntimeDirectory=back"),
]
OTHER_PROXY = [
    (
        "",
        (
            "[Service]\nRuntimeDirectory=both\n"
            "ExecStart={program} --listen=127.0.0.1:9001 127.0.0.1:8000\n"
        ),
    )
]

REQUIRES = [("Wants=back.service\nUpholds", "Requires")]
RESTARTS = [("[Service]", "[Service]\nRestart=on-failure\nRestartSec=1s")]
DIRECT = [("[Service]", "[Service]\nRestart=on-failure\nRestartSec=1s\nRestartMode=direct")]
STAYS = ("--idle-timeout=2s", "--idle-timeout=1h")
OF_PROXY = "Restart=on-failure\nRestartSec=1s\n"
DRAINS = ("--idle-timeout=2s", "--idle-timeout=1h --drain-timeout=1h")
AT_BOOT = (":9000\n", ":9000\n[Install]\nWantedBy=sockets.target\n")
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
        {P: REQUIRES},
        dead_socket(healing.failing_start, "trigger-limit-hit"),
        healing.failing_start,
        {P: REQUIRES, B: RESTARTS, "sockets.target.d/heal.conf": REVIVES},
        name="socket-revived",
    ),
    Case(
        "failing-start-kills-socket",
        {P: REQUIRES},
        dead_socket(healing.failing_start, "trigger-limit-hit"),
        healing.failing_start,
        {P: REQUIRES, B: DIRECT},
        name="start-goes-on",
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
        {B: [("StartLimitIntervalSec=0\n", "")], P: STAYS_AND_GIVES_UP},
        not_healed(started_often),
        started_often,
        {P: STAYS_AND_GIVES_UP},
    ),
    Case(
        "trigger-limit-off-alone",
        {
            S: [("[Socket]", "[Socket]\nTriggerLimitIntervalSec=0")],
            P: [(OF_PROXY, "")],
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
        stopped_at_once,
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
                AT_BOOT,
            ],
            "other.service": [("", "[Service]\nExecStart=/bin/sleep 600\n")],
        },
        left_out_at_boot,
        started_at_boot,
        {S: [("[Socket]", "[Socket]\nFreeBind=yes"), AT_BOOT]},
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
    Case(
        "drain-delays-restart",
        {P: [DRAINS, *add("FileDescriptorStoreMax=1")]},
        waits_for_drain,
        goes_on_at_once,
        {P: [DRAINS, *add("FileDescriptorStoreMax=1\nRestartKillSignal=SIGUSR2")]},
    ),
    Case(
        "store-preserved",
        {P: [STAYS, *add("FileDescriptorStoreMax=1\nFileDescriptorStorePreserve=yes")]},
        left_in_the_store,
        cut_by_a_stop,
        {P: [STAYS, *add("FileDescriptorStoreMax=1")]},
        since=254,
    ),
    Case(
        "crash-resets",
        {P: [STAYS, (OF_PROXY, "FileDescriptorStoreMax=1\n")]},
        cut_by_a_kill,
        goes_on_after_a_kill,
        {P: [STAYS, (OF_PROXY, f"{OF_PROXY}FileDescriptorStoreMax=1\n")]},
    ),
    Case(
        "wrong-signal",
        {P: add("KillSignal=SIGUSR1\nTimeoutStopSec=1s")},
        killed_at_a_stop,
        ends_at_a_stop,
        {P: add("RestartKillSignal=SIGUSR2\nTimeoutStopSec=1min")},
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
        "runtime-directory-shared",
        {P: [TO_PATH, *add("RuntimeDirectory=back")], B: AT_PATH},
        not_healed(healing.proxy_killed),
        healing.proxy_killed,
        {P: [TO_PATH, *add("RuntimeDirectory=%N")], B: AT_PATH},
    ),
    Case(
        "runtime-directory-shared",
        {P: add("RuntimeDirectory=both"), "other.service": OTHER_PROXY},
        not_inspected_after_a_stop_of_the_other,
        inspected_after_a_stop_of_the_other,
        {P: add("RuntimeDirectory=%N"), "other.service": OTHER_PROXY},
        name="inspection-sockets-collide",
    ),
    Case(
        "runtime-directory-escaped",
        {P: add(r"RuntimeDirectory=a\x5cx2db")},
        not_deserialized,
        served,
        {P: add("RuntimeDirectory=a-b")},
        since=257,
        until=257,
    ),
    Case(
        "not-a-stream",
        {S: [("ListenStream=", "ListenSequentialPacket=/run/heal.packets\nListenStream=")]},
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


@scenario(needs="unix-dgram", original="forwards no datagrams")
def rule_accept_with_datagrams(m: Machine) -> str:
    """accept-with-datagrams: systemd refuses the socket, `check` finds it, its mend mends it"""
    socket = "[Socket]\nListenDatagram=127.0.0.1:9000\n"
    backend = BACK.replace(f"{BACKEND} ", f"{BACKEND} udp ")
    of_each = PROXY.replace("Requires=heal.socket\nAfter=heal.socket\n", "")
    units = {"heal.socket": f"{socket}Accept=yes\n", "heal@.service": of_each}
    address = datagrams(9000)
    broken = Subject(m, units | {"back.service": backend}, proxy="heal@*.service", address=address)
    check(m.run("systemctl start heal.socket").returncode, "the socket has started")
    check("sockets are non-accepting. Refusing." in m.journal(), "not for this reason")
    check(not broken.ask(2), "a client is served")
    same("rules", m.rules("heal@.service"), {"accept-with-datagrams"})
    m.sh("rm /etc/systemd/system/heal@.service")
    mended = Subject(m, {"heal.socket": socket, "heal.service": PROXY}, address=address)
    same("rules", mended.rules(), set())
    mended.served("without Accept=yes")
    return "bites, is found, and is mended"


assert len([name for name in SCENARIOS if name.startswith("rule-")]) == len(CASES) + 2
