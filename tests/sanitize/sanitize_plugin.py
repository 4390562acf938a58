"""For pytest in an instrumented build (`-p sanitize_plugin`).

A report of a sanitizer fails the test during which it was written, whichever process wrote it and
whatever its exit status was.

Reports go to files (log_path), so that they are found even if a program's stderr is not read or its
end is not waited for. Each worker of pytest-xdist has a folder of its own, which the programs that
its tests start inherit. A program with an empty environment writes to the common folder, which
`ci/parts/sanitize.sh` checks after the run.

Leaks are searched for when a program of the tests ends, and here at the end of the session, while
the interpreter is still complete. Forked children that end with os._exit() are not searched:
LeakSanitizer looks for their threads by the ids that these have in the parent.
"""

import ctypes
import os
import re
from pathlib import Path

import pytest

VARIABLES = ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
"""The options of the runtimes; each of them reads one."""

REPORTS = Path(os.environ["SANITIZE_REPORTS"])

NO_LEAK_CHECK = {
    "test_calls": "its programs run under strace, and LeakSanitizer needs ptrace(2) for itself",
    "test_datagram_calls": "likewise",
    "test_bundle": (
        "its programs are isolated and ignore PYTHONMALLOC: LeakSanitizer does not see what"
        " pymalloc keeps in its arenas"
    ),
    "test_a_start_without_site_does_not_import_what_site_would_have": "likewise",
    "test_the_exit_does_not_wait_for_a_look_up": (
        "its program does not load the extension, and so not the check in address.h either, which"
        " knows the frames of threads"
    ),
    "test_a_line_is_written_when_no_fd_is_left": (
        "its program cannot open files: LeakSanitizer cannot open its report, and hangs"
    ),
    "test_tasks_max": "its program cannot start a task, and LeakSanitizer needs one",
    "test_threads_that_cannot_be_started": "likewise",
}
"""Tests, and modules of tests, whose programs are not searched for leaks, and why."""

NO_QUARANTINE = {
    "test_load_leaves_nothing_behind": "it measures memory, and freed memory would be kept",
}
"""Tests whose programs reuse freed memory at once, as they do without AddressSanitizer, and why."""

NO_REPORT = re.compile(r"(==\d+==WARNING: AddressSanitizer failed to allocate .*\n)*")
"""The warning that a malloc of too much has returned NULL, which `ci/parts/sanitize.sh` allows."""


def build_functions(name):
    """The C functions of this name that this build has added: one for each extension, or none."""
    from proxyd import _datagram, _relay

    found = [getattr(ctypes.PyDLL(one.__file__), name, None) for one in (_relay, _datagram)]
    return [function for function in found if function is not None]


def new_reports(folder):
    """The texts of the new reports, which are renamed, so that each of them fails only one test."""
    texts = []
    for file in sorted(folder.glob("report.*")):
        text = file.read_text(errors="replace")
        if not NO_REPORT.fullmatch(text):
            texts.append(text)
        file.rename(file.with_name(f"seen-{file.name}-{os.urandom(4).hex()}"))
    return texts


class Reports:
    """Fails a test that has a report."""

    def __init__(self, folder):
        self.folder = folder

    def set_options(self, extra):
        """Set the sanitizer's options for programs that are started from now on."""
        for name in VARIABLES:
            os.environ[name] = f"log_path={self.folder}/report{extra}"

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        names = {item.path.stem, item.originalname}
        extra = ""
        if not names.isdisjoint(NO_LEAK_CHECK):
            extra += ":detect_leaks=0"
        if not names.isdisjoint(NO_QUARANTINE):
            extra += ":quarantine_size_mb=0:thread_local_quarantine_size_kb=0"
        self.set_options(extra)
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item):
        result = yield
        reports = new_reports(self.folder)
        if reports:
            pytest.fail("\n".join(reports), pytrace=False)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, session):
        result = yield
        for find_leaks in build_functions("proxyd_leaks")[:1]:  # in the whole process
            find_leaks()  # ci/parts/sanitize.sh finds the report
        return result


def children_write_their_coverage():
    """Let os._exit() in a forked child write gcov's counts, as a normal exit does."""
    dumps = build_functions("proxyd_coverage_dump")  # each extension has counts of its own
    if not dumps:
        return
    parent, real_exit = os.getpid(), os._exit

    def dump_and_exit(status):
        if os.getpid() != parent:
            for dump in dumps:
                dump()
        real_exit(status)

    os._exit = dump_and_exit


def pytest_configure(config):
    children_write_their_coverage()
    folder = REPORTS / os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # some programs of the tests run as another user
    config.pluginmanager.register(Reports(folder))
