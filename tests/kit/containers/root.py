"""The cached root folder: a Debian suite with the real clients and servers that scenarios use.

Made once per suite and recipe with debootstrap (about a minute and 1.3 GB), then only ever read:
every run works in an overlay of it.
"""

import hashlib
import os
import shutil
import subprocess
from contextlib import contextmanager
from pathlib import Path

SUITES = ("bookworm", "trixie", "unstable")

PACKAGES = """
    systemd systemd-sysv dbus ca-certificates netbase procps iproute2
    python3 python3-venv python3-dev gcc libc6-dev
    nginx curl socat netcat-openbsd haproxy
    openssh-server openssh-client rsync git postgresql
    redis-server iperf3 python3-websockets dnsmasq-base strace
    libpam-systemd dbus-user-session
    podman crun netavark aardvark-dns iptables nftables slirp4netns passt uidmap busybox-static
"""

MORE_PACKAGES = {"unstable": "systemd-report"}
"""What only some suites have."""

# Installing a server package must not start the server in the chroot.
POLICY_RC_D = "#!/bin/sh\nexit 101\n"

# The folder is thrown away when the installation fails: no need to sync it, nor for manuals.
DPKG_OPTIONS = "force-unsafe-io\npath-exclude=/usr/share/doc/*\npath-exclude=/usr/share/man/*\n"

HOSTS = "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 e2e\n"


class Unavailable(Exception):
    """This machine cannot run the suite; str() says why."""


class CommandFailed(Exception):
    """A command of the preparation failed; str() has the end of its output."""


def ensure_root(cache: Path, suite: str, packages: str = "") -> Path:
    """Return the root folder of `suite` under `cache`, made now if it is missing or outdated.

    It has `packages`, or those of the scenarios. Unavailable when it cannot be made, most often for
    want of a network.
    """
    packages = packages or packages_of(suite)
    root = cache / suite
    recipe = root / ".e2e-recipe"
    if recipe.is_file() and recipe.read_text() == recipe_id(packages):
        return root
    print(f"# making {root} (debootstrap and packages)", flush=True)
    part = cache / f"{suite}.part"
    log = cache / f"{suite}.log"
    log.unlink(missing_ok=True)
    remove_tree(root)
    remove_tree(part)
    try:
        logged(["debootstrap", "--variant=minbase", suite, str(part), mirror()], log)
        customise(part, log, packages)
    except CommandFailed as error:
        raise Unavailable(f"no root folder of {suite}: {error}") from error
    (part / ".e2e-recipe").write_text(recipe_id(packages))
    part.rename(root)
    return root


def packages_of(suite: str) -> str:
    """The packages that scenarios need in `suite`."""
    return f"{PACKAGES} {MORE_PACKAGES.get(suite, '')}"


def recipe_id(packages: str) -> str:
    """A short hash of what is put into the root folder: a change of it makes a new folder."""
    recipe = repr((packages.split(), POLICY_RC_D, DPKG_OPTIONS, HOSTS))
    return hashlib.sha256(recipe.encode()).hexdigest()[:16]


def mirror() -> str:
    """The Debian mirror that this machine's apt uses, or E2E_MIRROR."""
    chosen = os.environ.get("E2E_MIRROR")
    if chosen:
        return chosen
    command = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"]
    uris = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    for uri in uris:
        if "security" not in uri and uri.rstrip("/").endswith("debian"):
            return uri
    raise Unavailable("apt is configured with no Debian mirror: set E2E_MIRROR")


def customise(folder: Path, log: Path, packages: str) -> None:
    """Install `packages` in `folder` and settle what minbase leaves open."""
    write(folder / "etc/hosts", HOSTS)
    write(folder / "etc/hostname", "e2e\n")
    write(folder / "usr/sbin/policy-rc.d", POLICY_RC_D, mode=0o755)
    write(folder / "etc/dpkg/dpkg.cfg.d/e2e", DPKG_OPTIONS)
    write(folder / "etc/apt/apt.conf.d/90e2e", host_apt_settings())
    with network_files(folder), mounted_proc(folder):
        chroot(folder, ["apt-get", "update"], log)
        chroot(
            folder, ["apt-get", "install", "-y", "--no-install-recommends", *packages.split()], log
        )
        chroot(folder, ["apt-get", "clean"], log)


def host_apt_settings() -> str:
    """How this machine's apt reaches its mirror (proxies, timeouts), as apt.conf lines."""
    dump = subprocess.run(["apt-config", "dump"], capture_output=True, text=True, check=True)
    wanted = ("Acquire::http", "Acquire::Check-", "Acquire::Retries")
    return "".join(f"{line}\n" for line in dump.stdout.splitlines() if line.startswith(wanted))


@contextmanager
def network_files(folder: Path):
    """The machine's resolver configuration inside `folder`, for as long as the block runs."""
    resolv = folder / "etc/resolv.conf"
    resolv.unlink(missing_ok=True)
    shutil.copyfile("/etc/resolv.conf", resolv)
    try:
        yield
    finally:
        resolv.unlink(missing_ok=True)


@contextmanager
def mounted_proc(folder: Path):
    """/proc inside `folder`: package scripts look there."""
    subprocess.run(["mount", "-t", "proc", "proc", folder / "proc"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder / "proc"], check=False)


def chroot(folder: Path, command: list[str], log: Path, **environment: str) -> None:
    """Run `command` in `folder` with a clean environment; its output goes to `log`."""
    clean = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": "/root",
        "LC_ALL": "C.UTF-8",
        "DEBIAN_FRONTEND": "noninteractive",
        **environment,
    }
    logged(["chroot", str(folder), *command], log, env=clean)


def logged(command: list[str], log: Path, env: dict[str, str] | None = None) -> None:
    """Run `command` with its output appended to `log`; CommandFailed with the end of it."""
    with log.open("a") as output:
        output.write(f"\n$ {' '.join(command)}\n")
        output.flush()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=env, check=False
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        raise CommandFailed(f"{command[0]} ended with {done.returncode}, see {log}\n{tail}")


def write(path: Path, text: str, mode: int = 0o644) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(mode)


def remove_tree(folder: Path) -> None:
    """Remove a root folder, but never through a mount that is still in it."""
    if not folder.exists():
        return
    for mount in mounts_below(folder):
        subprocess.run(["umount", "--lazy", mount], check=True)
    shutil.rmtree(folder)


def mounts_below(folder: Path) -> list[str]:
    """Mount points at or below `folder`, the innermost first."""
    prefix = str(folder.resolve())
    with open("/proc/self/mounts", encoding="utf-8") as table:
        points = [line.split()[1].encode().decode("unicode_escape") for line in table]
    return sorted((p for p in points if p == prefix or p.startswith(prefix + "/")), reverse=True)
