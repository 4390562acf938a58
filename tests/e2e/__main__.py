"""Run the program under a real systemd with real clients, in a container.

    ci/test e2e
    ci/test e2e -- [OPTION...] [SUITE...] [SCENARIO...] SUITE: bookworm (default), trixie, unstable
    ci/test e2e -- --all [SUITE...]                     the slow scenarios, too: a minute each
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

One run at a time (a lock). Several suites are run side by side, each in a container of its own, as
scenarios wait more than they work; each line then begins with the suite. Scenarios live in
tests/e2e/scenarios/, one function each.

Exit status: 0 all passed, 1 a scenario or the build failed, 2 wrong usage,
77 this machine cannot run it (not root, tools or network missing, no mounts), said on stderr.

The same scenarios run against another program, such as the C original of the suite:
    ci/test e2e -- --contender=original bookworm
There, a scenario that the original is known to fail is reported as "xfail" and must fail.
"""

import argparse
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
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
    return status_of(lambda: run(options))


def status_of(work: Callable[[], int]) -> int:
    """Do it; the exit status, also of what went wrong."""
    try:
        return work()
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
    parser.add_argument("words", nargs="*", metavar="SUITE|SCENARIO")
    parser.add_argument("--list", action="store_true", help="list the scenarios")
    parser.add_argument("--all", action="store_true", help="run the slow scenarios, too")
    parser.add_argument("--contender", choices=("ours", "original"), default="ours")
    parser.add_argument("--executable", help="what ExecStart= runs inside, instead of our wheel")
    parser.add_argument("--sdist", type=Path, help="build the wheel, if it is one, from this sdist")
    parser.add_argument("--deb", type=Path, help="install this package, instead of our wheel")
    parser.add_argument("--shell", action="store_true", help="only boot, and open a shell inside")
    options = parser.parse_args()
    words = options.words
    options.suites = [suite for suite in root.SUITES if suite in words] or [root.SUITES[0]]
    options.words = [word for word in words if word not in root.SUITES]
    unknown = [word for word in options.words if word not in SCENARIOS]
    if unknown:
        parser.error(f"no such suite or scenario: {' '.join(unknown)}")
    for file in filter(None, (options.sdist, options.deb)):
        if not file.is_file():
            parser.error(f"no such file: {file}")
    if options.contender == "original" and not options.executable:
        options.executable = ORIGINAL
    if options.deb and options.executable:
        parser.error("--deb and --executable are two different programs")
    if options.shell and len(options.suites) > 1:
        parser.error("--shell needs one suite")
    return options


def run(options: argparse.Namespace) -> int:
    host.check_host()
    with host.locked(LOCK):  # runs share the CPUs, and each removes what a killed one has left
        cache = cache_folder()
        container.remove_leftovers(cache)
        for suite in options.suites:  # what is kept in the cache is made once, not by each at once
            root.ensure_root(cache, suite)
        if not (options.deb or options.executable):
            project.fetch(project.build_requirements(REPO), cache)
        if len(options.suites) > 1:
            return run_side_by_side(options, cache)
        return run_suite(options, options.suites[0], cache)


def run_side_by_side(options: argparse.Namespace, cache: Path) -> int:
    """Run each suite in a process of its own; 1 if one of them failed."""

    def run_one(suite: str) -> None:
        os.setsid()  # the signals of a terminal are for the parent, which ends the others
        sys.stdout = sys.stderr = Labelled(suite)
        sys.exit(status_of(lambda: run_suite(options, suite, cache)))

    fork = multiprocessing.get_context("fork")
    processes = {suite: fork.Process(target=run_one, args=(suite,)) for suite in options.suites}
    try:
        for process in processes.values():
            process.start()
        for process in processes.values():
            process.join()
    finally:  # after a signal, each has to remove its own container
        for process in processes.values():
            if process.is_alive():
                process.terminate()
        for process in processes.values():
            if process.pid:
                process.join()
    words = {0: "passed", host.EXIT_CANNOT_RUN: "cannot run here"}
    results = {suite: words.get(one.exitcode, "FAILED") for suite, one in processes.items()}
    print(", ".join(f"{suite} {result}" for suite, result in results.items()))
    return 1 if "FAILED" in results.values() else max(one.exitcode for one in processes.values())


class Labelled:
    """A stdout that several processes share: it writes whole lines, with a label before each."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._rest = ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        data = "".join(f"{self._label}: {line}\n" for line in lines).encode()
        while data:
            data = data[os.write(sys.__stdout__.fileno(), data) :]
        return len(text)

    def flush(self) -> None:
        pass


def run_suite(options: argparse.Namespace, suite: str, cache: Path) -> int:
    overlay = container.Overlay(root.ensure_root(cache, suite), cache)
    try:
        shutil.copytree(REPO / "tests/e2e/inside", overlay.merged / TOOLS.lstrip("/"))
        program = options.executable or install(options, suite, overlay.merged, cache)
        machine = container.Container(overlay.merged, cache / f"nspawn-{suite}.log")
        try:
            return use(machine, program, suite, options)
        finally:
            machine.halt()
    finally:
        overlay.remove()


def install(options: argparse.Namespace, suite: str, folder: Path, cache: Path) -> str:
    """Install the project in `folder`, as a package or as a wheel; what ExecStart= runs then."""
    log = cache / f"build-{suite}.log"
    if options.deb:
        return project.install_deb(options.deb, folder, log)
    return project.install_wheel(REPO, options.sdist, folder, cache, log)


def cache_folder() -> Path:
    """Where root folders and overlays live: a folder that git ignores by itself."""
    cache = Path(os.environ.get("E2E_CACHE", REPO / ".cache" / "e2e"))
    cache.mkdir(parents=True, exist_ok=True)
    (cache / ".gitignore").write_text("*\n")
    return cache


def use(booted: container.Container, program: str, suite: str, options: argparse.Namespace) -> int:
    if options.shell:
        print(f"# ExecStart={program}", flush=True)
        return subprocess.run(booted.command(["/bin/bash", "-l"]), check=False).returncode
    machine = Machine(booted, program)
    version = machine.run(f"{program} --version").stdout.partition("\n")[0]
    print(f"# {suite}: {program} ({version})", flush=True)
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
