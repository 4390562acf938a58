"""Real clients of other protocols, each with a check that what arrived is right."""

import json

from e2e.harness import scenario
from e2e.machine import TOOLS, Machine, check, same
from e2e.scenarios.transfers import sha256

# --- HTTP/2 ---------------------------------------------------------------------------------------

HTTP2 = """
server {{
    listen 127.0.0.1:8000 ssl http2;
    listen unix:{folder}/target ssl http2;
    ssl_certificate {folder}/cert;
    ssl_certificate_key {folder}/key;
    root {folder}/files;
    dav_methods PUT;
}}
"""

MAKE_FILES = """
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 \
    -subj /CN=localhost -keyout $FOLDER/key -out $FOLDER/cert 2>/dev/null
install -d -o www-data $FOLDER/files $FOLDER/got
for i in $(seq 100); do head -c $((i * 7919)) /dev/urandom >$FOLDER/files/$i; done
"""

# One connection, all transfers at the same time on it.
FETCH_ALL = """
curl -sS --max-time 60 -Z --parallel-max 100 --no-progress-meter --http2 --cacert $FOLDER/cert \
    -w '%{http_version} %{http_code} %{num_connects}\\n' \
    'https://localhost:9000/[1-100]' -o $FOLDER/got/#1
"""


@scenario()
def http2(m: Machine) -> str:
    """curl and nginx by HTTP/2 over TLS: 100 streams on one connection, TCP and UNIX"""
    m.sh(f"FOLDER={m.folder}\n{MAKE_FILES}")
    m.nginx("backend", HTTP2.format(folder=m.folder))
    m.start("backend.service")
    m.wait_for("nginx listens", lambda: m.listens(8000))
    m.proxy("tcp", "127.0.0.1:9000", "127.0.0.1:8000")
    m.proxy("unix", f"{m.folder}/socket", f"{m.folder}/target")
    for how in ("", f" --unix-socket {m.folder}/socket"):
        answers = m.sh(f"FOLDER={m.folder}\n{FETCH_ALL.rstrip()}{how}").splitlines()
        versions = {tuple(line.split()[:2]) for line in answers}
        same("versions and statuses", versions, {("2", "200")})
        same("connections", sum(int(line.split()[2]) for line in answers), 1)
        m.sh(f"diff -r {m.folder}/files {m.folder}/got; rm {m.folder}/got/*")
        put = f"curl -sS --http2 --cacert {m.folder}/cert{how} -T {m.folder}/upload"
        m.sh(f"seq 2000000 >{m.folder}/upload; {put} https://localhost:9000/up")
        m.sh(f"cmp {m.folder}/upload {m.folder}/files/up; rm {m.folder}/files/up")
    return "200 streams"


# --- Redis ----------------------------------------------------------------------------------------

REDIS = """
[Service]
ExecStart=/usr/bin/redis-server --bind 127.0.0.1 --port 8000 --unixsocket {folder}/redis \\
    --dir {folder} --save ""
"""

KEYS = 50_000
REQUESTS = 50_000


def set_and_get_back(m: Machine, client: str) -> None:
    """KEYS values, written in one stream and read back, are what was written."""
    commands = f"seq {KEYS} | sed 's/.*/{{}} key& value&&&/'"
    m.sh(f"{client} flushall")
    m.sh(f"{commands.format('SET')} | {client} --pipe")
    same("keys", m.sh(f"{client} dbsize").split()[-1], str(KEYS))
    got = m.sh(f"seq {KEYS} | sed 's/.*/GET key&/' | {client} | sha256sum")
    same("values", got, m.sh(f"seq {KEYS} | sed 's/.*/value&&&/' | sha256sum"))


def benchmark(m: Machine, client: str, where: str) -> str:
    """redis-benchmark with 50 clients, pipelined or not: the server counts every command once."""
    for pipeline in (1, 16):
        m.sh(f"{client} config resetstat")
        report = m.sh(
            f"redis-benchmark {where} -c 50 -n {REQUESTS} -P {pipeline} -d 100 -t set,get --csv"
        )
        counted = m.sh(f"{client} info commandstats")
        for command in ("set", "get"):
            line = next(one for one in counted.splitlines() if f"cmdstat_{command}:" in one)
            same(f"{command}s counted", line.split("calls=")[1].split(",")[0], str(REQUESTS))
    return report.splitlines()[-1].split(",")[1].strip('"')


@scenario()
def redis(m: Machine) -> str:
    """redis-cli and redis-benchmark, TCP to TCP and UNIX to UNIX"""
    m.unit("backend.service", REDIS.format(folder=m.folder))
    m.start("backend.service")
    m.wait_for("redis listens", lambda: m.listens(8000))
    m.proxy("tcp", "127.0.0.1:9000", "127.0.0.1:8000")
    m.proxy("unix", f"{m.folder}/socket", f"{m.folder}/redis")
    rates = []
    for where in ("-p 9000", f"-s {m.folder}/socket"):
        set_and_get_back(m, f"redis-cli {where}")
        rates.append(benchmark(m, f"redis-cli {where}", where))
    return f"{rates[0]} and {rates[1]} pipelined GET/s"


# --- PostgreSQL by UNIX sockets -------------------------------------------------------------------

POSTGRES = """
[Service]
User=postgres
ExecStart={binaries}/postgres -D {folder}/data -c port=8000 -c listen_addresses= \\
    -c unix_socket_directories={folder}
KillSignal=SIGINT
"""

# Every transaction adds one amount to a row of each of three tables, and notes it in a fourth.
BALANCES = """
select count(distinct sum) from (
    select sum(abalance) from pgbench_accounts union all
    select sum(tbalance) from pgbench_tellers union all
    select sum(bbalance) from pgbench_branches union all
    select sum(delta) from pgbench_history
) as sums
"""

ROWS = """copy (
    select i, md5(i::text), repeat('x', i % 3000) from generate_series(1, 50000) as i
) to stdout"""


@scenario()
def postgres_unix(m: Machine) -> str:
    """psql and pgbench through a UNIX socket: COPY both ways by checksum, balances add up"""
    binaries = m.sh("echo /usr/lib/postgresql/*/bin").strip()
    m.sh(
        f"chown postgres {m.folder}; runuser -u postgres -- {binaries}/initdb -A trust -N "
        f"-D {m.folder}/data"
    )
    m.unit("backend.service", POSTGRES.format(binaries=binaries, folder=m.folder))
    m.start("backend.service")
    m.proxy("proxy", f"{m.folder}/.s.PGSQL.9000", f"{m.folder}/.s.PGSQL.8000")
    where = f"-h {m.folder} -p 9000 -U postgres"
    psql, direct = f"psql -qAt {where}", f"psql -qAt {where.replace('9000', '8000')}"
    same("first answer", m.sh(f"{psql} -c 'select 6 * 7'"), "42\n")
    m.sh(f'{psql} -c "{ROWS}" >{m.folder}/rows')
    rows = sha256(m, f"{m.folder}/rows")
    same("rows received", rows, m.sh(f'{direct} -c "{ROWS}" | sha256sum').split()[0])
    m.sh(f"{psql} -c 'create table rows (i int, m text, x text)'")
    m.sh(f"{psql} -c 'copy rows from stdin' <{m.folder}/rows")
    sent = m.sh(
        f"{direct} -c 'copy (select * from rows order by i) to stdout' | sha256sum"
    ).split()[0]
    same("rows sent", sent, rows)
    m.sh(f"pgbench -q -i -s 2 {where} postgres")
    bench = m.sh(
        f"pgbench -n -c 10 -t 50 -C {where} postgres; pgbench -n -c 20 -T 2 {where} postgres"
    )
    done = sum(
        int(line.split(":")[1].split("/")[0])
        for line in bench.splitlines()
        if line.startswith("number of transactions actually processed")
    )
    check(done > 500, f"{done} transactions")
    history = m.sh(f"{direct} -c 'select count(*) from pgbench_history'")
    same("transactions in the history", int(history), done)
    same("sums of balances", m.sh(f'{direct} -c "{BALANCES}"'), "1\n")
    return f"{done} transactions"


# --- iperf3 ---------------------------------------------------------------------------------------

SENT = 256 << 20  # bytes by each stream that iperf3 is told to send
STREAMS = 4
PIPE = 1 << 20


def under_way(m: Machine) -> int:
    """Bytes of a stream that may be in buffers when iperf3 stops counting: of two connections,
    as large as the kernel lets them become, and the proxy's pipe."""
    limits = m.sh("cat /proc/sys/net/ipv4/tcp_wmem /proc/sys/net/ipv4/tcp_rmem")
    return PIPE + 2 * sum(int(line.split()[2]) for line in limits.splitlines())


@scenario()
def iperf3(m: Machine) -> str:
    """iperf3: one and four streams, both ways and both at once"""
    command = "iperf3 -s -B 127.0.0.1 -p 8000 --forceflush"
    m.unit("backend.service", f"[Service]\nExecStart={command}\n")
    m.start("backend.service")
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    rates, most = [], under_way(m)
    for how in (f"-n {SENT}", f"-n {SENT} -R", f"-n {SENT} -P {STREAMS}", "-t 2 --bidir"):
        # It has a listener for each test: one that comes to the last one is reset.
        listens = f"Server listening on 8000 (test #{len(rates) + 1})"
        m.wait_for("iperf3 listens", lambda line=listens: line in m.journal("backend.service"))
        report = json.loads(m.run(f"iperf3 -c 127.0.0.1 -p 9000 -J {how}").stdout)
        check("error" not in report, f"{how}: {report.get('error')}")
        end = report["end"]
        # With --bidir the way back has sums of its own.
        for suffix in ("", "_bidir_reverse") if "bidir" in how else ("",):
            sent = end[f"sum_sent{suffix}"]["bytes"]
            received = end[f"sum_received{suffix}"]["bytes"]
            check(sent >= SENT or "-n" not in how, f"{how}: sent {sent}")
            lost = sent - received - most * (STREAMS if "-P" in how else 1)
            check(0 < received <= sent and lost <= 0, f"{how}: {received} of {sent}")
        rates.append(f"{end['sum_received']['bits_per_second'] / 1e9:.1f}")
    return f"{' '.join(rates)} Gbit/s"


# --- WebSocket ------------------------------------------------------------------------------------


@scenario()
def websocket(m: Machine) -> str:
    """WebSocket clients and server: every message comes back as it was, TCP and UNIX"""
    m.unit(
        "backend.service",
        f"[Service]\nExecStart=python3 {TOOLS}/websocket.py serve 8000 {m.folder}/target\n",
    )
    m.start("backend.service")
    m.wait_for("it listens", lambda: m.listens(8000))
    m.proxy("tcp", "127.0.0.1:9000", f"{m.folder}/target")
    m.proxy("unix", f"{m.folder}/socket", "127.0.0.1:8000")
    notes = [
        m.sh(f"python3 {TOOLS}/websocket.py check {at}") for at in ("9000", f"{m.folder}/socket")
    ]
    return f"twice {notes[0].strip()}"
