"""Real clients and large payloads through a socket unit."""

from e2e.harness import scenario
from e2e.machine import TOOLS, Machine, check, same

GIGABYTE = 1 << 30
GIGABYTE_FILE = "/srv/e2e-gigabyte"  # made once a run, with its checksum beside it

# A stream cipher makes a gigabyte without a pattern faster than /dev/urandom does.
MAKE_FILE = """
head -c {size} /dev/zero | openssl enc -aes-128-ctr -K 00 -iv 00 2>/dev/null >{path}
"""

# Several times as fast as sha256sum, and so the transfer is what takes the time.
SHA256 = "openssl dgst -sha256 -r"

DAV_SERVER = """
server {{
    listen 127.0.0.1:8000;
    listen unix:{folder}/socket;
    root {folder}/files;
    dav_methods PUT;
}}
"""


def sha256(m: Machine, path: str) -> str:
    return m.sh(f"{SHA256} <{path}", timeout=120).split()[0]


def gigabyte_each_way(m: Machine, listen: str, target: str) -> None:
    """1 GiB down and up at once, with listener and target in `m.folder` or on TCP."""
    wanted = gigabyte(m)
    m.sh(f"install -d -o www-data {m.folder}/files; ln {GIGABYTE_FILE} {m.folder}/files/down")
    start_dav(m)
    m.proxy("proxy", listen, target)
    curl = "curl -sS" + (f" --unix-socket {listen}" if listen.startswith("/") else "")
    upload = m.client(f"exec {curl} -T {m.folder}/files/down http://127.0.0.1:9000/up")
    got = m.sh(f"{curl} http://127.0.0.1:9000/down | {SHA256}", timeout=120).split()[0]
    same("output of the upload", upload.communicate(timeout=120)[0], "")
    same("downloaded", got, wanted)
    same("uploaded", sha256(m, f"{m.folder}/files/up"), wanted)


def gigabyte(m: Machine) -> str:
    """The checksum of GIGABYTE_FILE, which is there then."""
    if m.run(f"test -e {GIGABYTE_FILE}.sum").returncode:
        m.sh(MAKE_FILE.format(size=GIGABYTE, path=GIGABYTE_FILE))
        m.sh(f"{SHA256} <{GIGABYTE_FILE} >{GIGABYTE_FILE}.sum")
    return m.sh(f"cat {GIGABYTE_FILE}.sum").split()[0]


def start_dav(m: Machine) -> None:
    """nginx that gives and takes the files of `m.folder`/files."""
    m.nginx("backend", DAV_SERVER.format(folder=m.folder))
    m.start("backend.service")
    m.wait_for("nginx listens", lambda: m.listens(8000))


@scenario()
def gigabyte_tcp(m: Machine) -> None:
    """1 GiB down and up at once by curl and nginx, TCP to TCP"""
    gigabyte_each_way(m, "127.0.0.1:9000", "127.0.0.1:8000")


@scenario()
def gigabyte_unix(m: Machine) -> None:
    """1 GiB down and up at once by curl and nginx, TCP to UNIX"""
    gigabyte_each_way(m, "127.0.0.1:9000", f"{m.folder}/socket")


@scenario()
def gigabyte_from_unix(m: Machine) -> None:
    """1 GiB down and up at once by curl and nginx, UNIX to TCP"""
    gigabyte_each_way(m, f"{m.folder}/listener", "127.0.0.1:8000")


@scenario()
def gigabyte_unix_unix(m: Machine) -> None:
    """1 GiB down and up at once by curl and nginx, UNIX to UNIX"""
    gigabyte_each_way(m, f"{m.folder}/listener", f"{m.folder}/socket")


# In units of 4 KiB the proxy has the most to do of all, and it comes last: so work piles up before
# it. Where it cannot see /proc/stat it believes that a CPU is idle.
BUSY = """
ProcSubset=pid
Nice=19
"""


@scenario(needs="--threads --buffer-size")
def gigabytes_in_threads(m: Machine) -> None:
    """Six times 1 GiB down at once; a second and a third thread start in the middle"""
    gigabyte(m)
    m.sh(f"mkdir {m.folder}/files; ln {GIGABYTE_FILE} {m.folder}/files/down")
    start_dav(m)
    m.proxy(
        "proxy",
        "127.0.0.1:9000",
        "127.0.0.1:8000",
        options="--threads=3 --buffer-size=4K",
        service=BUSY,
    )
    m.sh("curl -sS http://127.0.0.1:9000/ >/dev/null")
    count_tasks = f"ls /proc/{m.main_pid('proxy.service')}/task | wc -l"
    same("threads before", m.sh(count_tasks).strip(), "1")
    get = f"curl -sS http://127.0.0.1:9000/down | cmp - {GIGABYTE_FILE} || echo differs"
    m.sh(f"for i in 1 2 3 4 5 6; do ({get}) & done >{m.folder}/said; wait", timeout=120)
    same("differences", m.sh(f"cat {m.folder}/said"), "")
    same("threads then", m.sh(count_tasks).strip(), "3")


# Mostly holes, so that it costs no disk; a mark at each 64 MiB tells the places apart.
MAKE_LARGE = """
truncate -s 4200M {path}
for i in $(seq 0 65); do
    echo "mark $i" | dd of={path} bs=64M seek=$i conv=notrunc status=none
done
"""


@scenario()
def past_4_gib(m: Machine) -> None:
    """4.1 GiB on one connection: counters of 32 bits would have gone round"""
    m.sh(f"mkdir {m.folder}/files")
    m.sh(MAKE_LARGE.format(path=f"{m.folder}/files/large"))
    start_dav(m)
    m.proxy("proxy", "127.0.0.1:9000", f"{m.folder}/socket")
    m.sh(f"curl -sS http://127.0.0.1:9000/large | cmp - {m.folder}/files/large", timeout=300)


@scenario(original="drops the reply that follows a half-close", until=259)
def netcat_half_close(m: Machine) -> None:
    """nc -N sends 64 MiB, half-closes, and gets the server's answer"""
    m.unit("backend.service", f"[Service]\nExecStart=python3 {TOOLS}/digest_server.py 8000\n")
    m.start("backend.service")
    m.wait_for("the server listens", lambda: m.listens(8000))
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    m.sh(MAKE_FILE.format(size=64 << 20, path=f"{m.folder}/file"))
    answer = m.sh(f"nc -N 127.0.0.1 9000 <{m.folder}/file")
    same("answer", answer.strip(), sha256(m, f"{m.folder}/file"))


SSHD = """
[Service]
RuntimeDirectory=sshd
ExecStart=/usr/sbin/sshd -D -e -f {folder}/sshd_config
"""

SSHD_CONFIG = """
ListenAddress 127.0.0.1:8000
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/key.pub
StrictModes no
PidFile none
"""

SSH = (
    "ssh -q -p 9000 -i {folder}/key -o BatchMode=yes -o StrictHostKeyChecking=no "
    "-o UserKnownHostsFile=/dev/null"
)


def start_ssh(m: Machine) -> str:
    """sshd behind the proxy; the client's command line."""
    for key in ("host_key", "key"):
        m.sh(f"ssh-keygen -q -t ed25519 -N '' -f {m.folder}/{key}")
    m.write(f"{m.folder}/sshd_config", SSHD_CONFIG.format(folder=m.folder))
    m.unit("backend.service", SSHD.format(folder=m.folder))
    m.start("backend.service")
    m.wait_for("sshd listens", lambda: m.listens(8000))
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    return SSH.format(folder=m.folder)


@scenario()
def ssh(m: Machine) -> None:
    """ssh: a command's status, and 100 MB through it both ways"""
    command = start_ssh(m)
    same("exit status", m.run(f"{command} 127.0.0.1 'exit 42'").returncode, 42)
    m.sh(MAKE_FILE.format(size=100_000_000, path=f"{m.folder}/file"))
    back = m.sh(f"{command} 127.0.0.1 'tee {m.folder}/copy' <{m.folder}/file | {SHA256}")
    wanted = sha256(m, f"{m.folder}/file")
    same("there", sha256(m, f"{m.folder}/copy"), wanted)
    same("and back", back.split()[0], wanted)


@scenario()
def ssh_over_unix(m: Machine) -> None:
    """ssh through a UNIX socket (ProxyCommand=), and a forwarded port inside of it"""
    command = start_ssh(m)
    m.proxy("unix", f"{m.folder}/socket", "127.0.0.1:8000")
    through = f"{command} -o 'ProxyCommand=nc -U {m.folder}/socket'"
    m.sh(MAKE_FILE.format(size=20_000_000, path=f"{m.folder}/file"))
    back = m.sh(f"{through} e2e cat <{m.folder}/file | {SHA256}")
    same("and back", back.split()[0], sha256(m, f"{m.folder}/file"))
    # -W: sshd connects to its own port, and the greeting comes all the way.
    greeting = m.sh(f"{through} -W 127.0.0.1:8000 e2e </dev/null | head -n 1")
    check(greeting.startswith("SSH-2.0-"), f"greeting: {greeting!r}")


@scenario()
def rsync_over_ssh(m: Machine) -> None:
    """rsync over ssh of a few thousand files, twice"""
    command = start_ssh(m)
    for _ in range(2):
        m.sh(f"rsync -a -e '{command}' /usr/lib/python3.*/ 127.0.0.1:{m.folder}/copy/")
    m.sh(f"diff -r --no-dereference /usr/lib/python3.*/ {m.folder}/copy/")


@scenario()
def rsync_daemon(m: Machine) -> None:
    """rsync from and to an rsync daemon"""
    m.write(
        f"{m.folder}/rsyncd.conf",
        f"use chroot = no\nuid = root\n[files]\npath = {m.folder}/files\nread only = no\n",
    )
    m.sh(f"mkdir {m.folder}/files")
    m.unit(
        "backend.service",
        "[Service]\nExecStart=rsync --daemon --no-detach --address=127.0.0.1 "
        f"--port=8000 --config={m.folder}/rsyncd.conf\n",
    )
    m.start("backend.service")
    m.wait_for("rsync listens", lambda: m.listens(8000))
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    m.sh("rsync -a /usr/lib/python3.*/ rsync://127.0.0.1:9000/files/")
    m.sh(f"rsync -a rsync://127.0.0.1:9000/files/ {m.folder}/copy/")
    m.sh(f"diff -r --no-dereference /usr/lib/python3.*/ {m.folder}/copy/")


MAKE_REPOSITORY = """
export GIT_AUTHOR_NAME=e2e GIT_AUTHOR_EMAIL=e2e@example.com
export GIT_COMMITTER_NAME=e2e GIT_COMMITTER_EMAIL=e2e@example.com
cd $FOLDER
git init -q -b main work
cp -r /usr/lib/python3.*/asyncio /usr/lib/python3.*/encodings /usr/lib/git-core/git work/
git -C work add .
git -C work commit -q -m first
git clone -q --bare work served.git
touch served.git/git-daemon-export-ok
"""


def check_clone_and_push(m: Machine, environment: str = "") -> None:
    """The clone in `m.folder` is whole, and a commit gets back to where it is from."""
    m.sh(f"git -C {m.folder}/clone fsck --full")
    m.sh(f"diff -r --no-dereference --exclude=.git {m.folder}/work {m.folder}/clone")
    m.sh(
        f"git -C {m.folder}/clone -c user.name=e2e -c user.email=e2e@example.com "
        "commit -q --allow-empty -m second"
    )
    m.sh(f"{environment} git -C {m.folder}/clone push -q origin main")
    heads = m.sh(
        f"git -C {m.folder}/clone rev-parse main; git -C {m.folder}/served.git rev-parse main"
    ).split()
    same("pushed", heads[1], heads[0])


@scenario()
def git(m: Machine) -> None:
    """git clone from git daemon, and a push back"""
    m.sh(f"FOLDER={m.folder}\n{MAKE_REPOSITORY}")
    m.unit(
        "backend.service",
        "[Service]\nExecStart=git daemon --reuseaddr --listen=127.0.0.1 --port=8000 "
        f"--enable=receive-pack --base-path={m.folder} {m.folder}\n",
    )
    m.start("backend.service")
    m.wait_for("git listens", lambda: m.listens(8000))
    m.proxy("proxy", "127.0.0.1:9000", "127.0.0.1:8000")
    m.sh(f"git clone -q git://127.0.0.1:9000/served.git {m.folder}/clone")
    check_clone_and_push(m)


@scenario()
def git_over_ssh(m: Machine) -> None:
    """git clone and push over ssh"""
    command = start_ssh(m)
    m.sh(f"FOLDER={m.folder}\n{MAKE_REPOSITORY}")
    by_ssh = f"export GIT_SSH_COMMAND='{command}'\n"
    m.sh(f"{by_ssh} git clone -q ssh://root@127.0.0.1:9000{m.folder}/served.git {m.folder}/clone")
    check_clone_and_push(m, by_ssh)
