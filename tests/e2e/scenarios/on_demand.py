"""Backends that the first client starts and that end when nobody needs them."""

import concurrent.futures
import time

from e2e.harness import scenario
from e2e.machine import Machine, check, same

PAIRS = 4
ROUNDS = 3  # of each pair, all pairs at the same time: twelve rounds

SLOW = 'server { listen 127.0.0.1:%d; location / { return 200 "slow\\n"; } }'

NEEDS_BACKEND = "Requires={0}.service\nAfter={0}.service\n"


def slow_pair(m: Machine, number: int) -> None:
    """A backend that listens 2 s after its start, with a proxy on port 9000 + number."""
    conf = m.nginx_conf(f"backend{number}", SLOW % (8000 + number))
    m.unit(
        f"backend{number}.service",
        "[Unit]\nStopWhenUnneeded=yes\n[Service]\n"
        f"ExecStart=/bin/sh -c 'sleep 2; exec /usr/sbin/nginx -c {conf}'\n",
    )
    m.proxy(
        f"proxy{number}",
        f"127.0.0.1:{9000 + number}",
        f"127.0.0.1:{8000 + number}",
        options="--exit-idle-time=2s",
        unit=NEEDS_BACKEND.format(f"backend{number}"),
    )


def rounds(m: Machine, number: int) -> list[float]:
    """ROUNDS times: three requests at once, then idle until both have stopped, or nearly so.

    Returns the seconds that the first request of each round took.
    """
    took = []
    for turn in range(ROUNDS):
        began = time.monotonic()
        url = f"http://127.0.0.1:{9000 + number}/"
        answers = m.sh(f"for i in 1 2 3; do curl -sS --max-time 15 {url} & done; wait")
        took.append(time.monotonic() - began)
        same(f"answers in round {turn}", answers, "slow\n" * 3)
        if turn % 2:
            # The next request comes just as the program gives up waiting for one.
            time.sleep(1.9 + 0.05 * number)
        else:
            m.wait_for("both stop", lambda: stopped(m, number), 15)
    return took


def stopped(m: Machine, number: int) -> bool:
    return not any(m.is_active(f"{unit}{number}.service") for unit in ("proxy", "backend"))


@scenario(original="gives up at the first ECONNREFUSED")
def slow_backend(m: Machine) -> str:
    """Twelve rounds of request, idle stop, request with a backend that needs 2 s to listen"""
    for number in range(PAIRS):
        slow_pair(m, number)
    with concurrent.futures.ThreadPoolExecutor(PAIRS) as pool:
        took = [list(one) for one in pool.map(lambda number: rounds(m, number), range(PAIRS))]
    for number in range(PAIRS):
        same("result", m.show(f"proxy{number}.service", "Result"), "success")
    check(max(map(max, took)) < 5, f"a first request took too long: {took}")
    return f"{PAIRS * ROUNDS} rounds, slowest first answer after {max(map(max, took)):.1f} s"


POSTGRES = """
[Unit]
StopWhenUnneeded=yes
StartLimitIntervalSec=0
[Service]
Type={kind}
User=postgres
ExecStart=/bin/sh -c '{before} exec {bin}/postgres -D {folder}/data -c port=8000 \\
    -c listen_addresses=127.0.0.1 -c unix_socket_directories={folder}'
KillSignal=SIGINT
"""

PSQL = "PGCONNECT_TIMEOUT=15 psql -qAt -h 127.0.0.1 -p 9000 -U postgres"


def on_demand_postgres(m: Machine, kind: str, before: str = "") -> None:
    binaries = m.sh("echo /usr/lib/postgresql/*/bin").strip()
    m.sh(
        f"chown postgres {m.folder}; runuser -u postgres -- {binaries}/initdb -A trust -N "
        f"-D {m.folder}/data"
    )
    m.unit(
        "postgres.service", POSTGRES.format(kind=kind, before=before, bin=binaries, folder=m.folder)
    )
    m.proxy(
        "proxy",
        "127.0.0.1:9000",
        "127.0.0.1:8000",
        options="--exit-idle-time=1s",
        unit=NEEDS_BACKEND.format("postgres"),
    )


@scenario()
def postgres(m: Machine) -> str:
    """PostgreSQL (Type=notify) started by its first client, pgbench, idle stop, and again"""
    on_demand_postgres(m, "notify")
    same("answer", m.sh(f"{PSQL} -c 'select 6 * 7'"), "42\n")
    m.sh("pgbench -q -i -s 1 -h 127.0.0.1 -p 9000 -U postgres postgres")
    bench = m.sh("pgbench -c 10 -T 2 -h 127.0.0.1 -p 9000 -U postgres postgres")
    m.wait_for("both stop", lambda: not m.is_active("postgres.service"), 15)
    same("accounts", m.sh(f"{PSQL} -c 'select count(*) from pgbench_accounts'"), "100000\n")
    return next(line for line in bench.splitlines() if line.startswith("tps")).split(" (")[0]


@scenario(original="gives up at the first ECONNREFUSED")
def postgres_not_ready(m: Machine) -> None:
    """The same with Type=exec: the client waits, or PostgreSQL itself says that it is starting"""
    on_demand_postgres(m, "exec", before="sleep 0.3;")
    for _ in range(5):
        first = m.run(f"{PSQL} -c 'select 6 * 7'")
        if first.returncode:
            check("the database system is starting up" in first.stderr, first.stderr)
            m.wait_for("it has started", lambda: m.run(f"{PSQL} -c 'select 1'").returncode == 0)
        m.wait_for("both stop", lambda: not m.is_active("postgres.service"), 15)
