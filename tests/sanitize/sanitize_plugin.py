"""For pytest in an instrumented build (`-p sanitize_plugin`).

A report of a sanitizer fails the test during which it was written, whoever wrote it and whatever
became of its exit status.

Reports go to files (log_path): a program whose stderr nobody reads, or whose end nobody waits for,
hides nothing. Each worker of pytest-xdist has a folder of its own, which the programs that its
tests start inherit; a program with a bare environment writes to the common one, where
`ci/parts/sanitize.sh` looks after the run.

Lost memory is looked for when a program of the tests ends, and here at the end of the session,
while the interpreter is still whole. Not in forked children that end with os._exit():
LeakSanitizer looks for their threads by the numbers that those have in the mother.
"""

import ctypes
import os
import re
from pathlib import Path

import pytest

VARIABLES = ("ASAN_OPTIONS", "UBSAN_OPTIONS", "TSAN_OPTIONS")
"""Each runtime reads one of them."""

REPORTS = Path(os.environ["SANITIZE_REPORTS"])

NO_LEAK_CHECK = {
    "test_calls": "its programs run under strace, and LeakSanitizer needs ptrace(2) for itself",
    "test_the_exit_does_not_wait_for_a_look_up": (
        "its program does without the extension, and so without the look in address.h that knows"
        " the frames of threads"
    ),
    "test_a_line_is_written_when_no_fd_is_left": (
        "its program may open no file: LeakSanitizer cannot open its report then, and hangs"
    ),
    "test_tasks_max": "its program may have no task more, and LeakSanitizer needs one",
    "test_threads_that_cannot_be_started": "likewise",
}
"""Modules of tests, and tests, whose programs are not searched for leaks, and why."""

NO_QUARANTINE = {
    "test_load_leaves_nothing_behind": "it measures memory, and freed memory would be kept",
}
"""Tests whose programs reuse freed memory at once, as they do without AddressSanitizer, and why."""

NO_REPORT = re.compile(r"(==\d+==WARNING: AddressSanitizer failed to allocate .*\n)*")
"""A malloc of too much has returned NULL, as `ci/parts/sanitize.sh` has asked."""


def of_the_build(name):
    """A C function that the build has added to the extension, or None."""
    import proxyd._relay as relay

    return getattr(ctypes.PyDLL(relay.__file__), name, None)


def new_reports(folder):
    """The text of each report, which is then moved away: it fails one test."""
    texts = []
    for file in sorted(folder.glob("report.*")):
        text = file.read_text(errors="replace")
        if not NO_REPORT.fullmatch(text):
            texts.append(text)
        file.rename(file.with_name(f"seen-{file.name}-{os.urandom(4).hex()}"))
    return texts


class Reports:
    """Fails what has a report."""

    def __init__(self, folder):
        self.folder = folder

    def tell(self, extra):
        """The sanitizer's options for programs that are started from now on."""
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
        self.tell(extra)
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
        look = of_the_build("proxyd_leaks")
        if look is not None:
            look()  # ci/parts/sanitize.sh finds the report
        return result


def children_write_their_coverage():
    """os._exit() in a forked child skips what a program does at its end, gcov's part included."""
    dump = of_the_build("proxyd_coverage_dump")
    if dump is None:
        return
    mother, leave = os.getpid(), os._exit

    def dump_and_leave(status):
        if os.getpid() != mother:
            dump()
        leave(status)

    os._exit = dump_and_leave


def pytest_configure(config):
    children_write_their_coverage()
    folder = REPORTS / os.environ.get("PYTEST_XDIST_WORKER", "main")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o777)  # some programs of the tests run as another user
    config.pluginmanager.register(Reports(folder))
