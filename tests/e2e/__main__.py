"""Run the program under a real systemd with real clients, in a container.

    ci/test e2e
    ci/test e2e -- [OPTION...] [SUITE] [SCENARIO...]    SUITE: bookworm (default), trixie, unstable
    ci/test e2e -- --all [SUITE]                        the slow scenarios, too: a minute each
    ci/test e2e -- --list

What happens, in this order:
 1. A root folder of the suite is made with debootstrap, from the mirror that this machine's apt
    uses, and kept in .cache/e2e (E2E_CACHE overrides): about a minute and 1 GB, once per suite.
 2. In a throw-away overlay of it, the container's own Python makes the sdist of this working tree
    (or takes --sdist=, as ci/test does), builds the wheel from the sdist and installs it in a venv
    at /opt/proxyd. With --deb=FILE, dpkg installs that package instead, and nothing else of ours.
 3. systemd-nspawn boots the overlay, without a network: half a second.
 4. Each scenario writes units, starts real servers and clients, and is undone. It prints one line:
    "ok NAME SECONDS NOTE", or "FAIL NAME SECONDS REASON" with the end of the journal.
 5. The container is halted, the overlay unmounted and removed, also on SIGINT and SIGTERM.

One run at a time (a lock). Scenarios live in tests/e2e/scenarios/, one function each.

Exit status: 0 all passed, 1 a scenario or the build failed, 2 wrong usage,
77 this machine cannot run it (not root, tools or network missing, no mounts), said on stderr.

The same scenarios run against another program, such as the C original of the suite:
    ci/test e2e -- --contender=original bookworm
There, a scenario that the original is known to fail is reported as "xfail" and must fail.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

import e2e.scenarios  # noqa: F401  (fills SCENARIOS)
from e2e.harness import SCENARIOS, run_all
from e2e.machine import TOOLS, Machine
from kit.containers import container, host, project, root

REPO = Path(__file__).resolve().parents[2]
LOCK = "/run/lock/systemd-socket-proxyd-e2e"
ORIGINAL = "/lib/systemd/systemd-socket-proxyd"


def main() -> int:
    options = parse_arguments()
    if options.list:
        for one in SCENARIOS.values():
            print(f"{one.name:28} {one.title}")
        return 0
    host.end_on_signals()
    try:
        host.check_host()
        with host.locked(LOCK):  # containers share a group of the host, and its CPUs
            return run(options)
    except root.Unavailable as error:
        print(f"CANNOT RUN HERE: {error}", file=sys.stderr)
        return host.EXIT_CANNOT_RUN
    except (project.BuildFailed, container.ContainerError) as error:
        print(f"FAIL {error}")
        return 1


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="ci/test e2e --", description="See the head of this file."
    )
    parser.add_argument("words", nargs="*", metavar="SUITE SCENARIO")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--all", action="store_true", help="run the slow scenarios, too")
    parser.add_argument("--contender", choices=("ours", "original"), default="ours")
    parser.add_argument("--executable", help="what ExecStart= runs inside, instead of our wheel")
    parser.add_argument("--sdist", type=Path, help="build the wheel, if it is one, from this sdist")
    parser.add_argument("--deb", type=Path, help="install this package, instead of our wheel")
    parser.add_argument("--shell", action="store_true", help="only boot, and open a shell inside")
    options = parser.parse_args()
    words = options.words
    options.suite = words.pop(0) if words and words[0] in root.SUITES else root.SUITES[0]
    unknown = [word for word in words if word not in SCENARIOS]
    if unknown:
        parser.error(f"no such suite or scenario: {' '.join(unknown)}")
    for file in filter(None, (options.sdist, options.deb)):
        if not file.is_file():
            parser.error(f"no such file: {file}")
    if options.contender == "original" and not options.executable:
        options.executable = ORIGINAL
    if options.deb and options.executable:
        parser.error("--deb and --executable are two different programs")
    return options


def run(options: argparse.Namespace) -> int:
    cache = cache_folder()
    container.remove_leftovers(cache)
    overlay = container.Overlay(root.ensure_root(cache, options.suite), cache)
    try:
        shutil.copytree(REPO / "tests/e2e/inside", overlay.merged / TOOLS.lstrip("/"))
        program = options.executable or install(options, overlay.merged, cache)
        machine = container.Container(overlay.merged, cache / "nspawn.log")
        try:
            return use(machine, program, options)
        finally:
            machine.halt()
    finally:
        overlay.remove()


def install(options: argparse.Namespace, folder: Path, cache: Path) -> str:
    """Install the project in `folder`, as a package or as a wheel; what ExecStart= runs then."""
    if options.deb:
        return project.install_deb(options.deb, folder, cache)
    return project.install_wheel(REPO, options.sdist, folder, cache)


def cache_folder() -> Path:
    """Where root folders and overlays live: a folder that git ignores by itself."""
    cache = Path(os.environ.get("E2E_CACHE", REPO / ".cache" / "e2e"))
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    return cache


def use(booted: container.Container, program: str, options: argparse.Namespace) -> int:
    if options.shell:
        print(f"# ExecStart={program}", flush=True)
        return subprocess.run(booted.command(["/bin/bash", "-l"]), check=False).returncode
    machine = Machine(booted, program)
    version = machine.run(f"{program} --version").stdout.partition("\n")[0]
    print(f"# {options.suite}: {program} ({version})", flush=True)
    # The original says "systemd 252 (252.39-1~deb12u2)".
    original_version = int(version.split()[1]) if options.contender == "original" else 0
    default = [name for name, one in SCENARIOS.items() if options.all or not one.slow]
    counts = run_all(machine, options.words or default, original_version)
    if counts["xfail"]:
        print(f"# {counts['xfail']} failed as expected of the {options.contender}")
    print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
