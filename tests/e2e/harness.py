"""The list of scenarios; runs and reports them."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from e2e.machine import Failure, Machine


@dataclass(frozen=True)
class Scenario:
    """`body` returns a note for the report, or raises Failure.

    `needs` are words of the program's --help without which there is nothing to test. `original`
    says why the C original, of the systemd versions `since` to `until`, is to fail. One that is
    `slow` runs where it is named, or with --all.
    """

    name: str
    title: str
    body: Callable[[Machine], str | None]
    needs: tuple[str, ...]
    original: str
    since: int
    until: int
    slow: bool

    def to_fail(self, original_version: int) -> str:
        """Why this version of the original is expected to fail, or empty; 0: our program."""
        return self.original if self.since <= original_version <= self.until else ""


class CannotRun(Exception):
    """The scenario cannot run on this machine; str() says why."""


SCENARIOS: dict[str, Scenario] = {}


def scenario(
    *, needs: str = "", original: str = "", since: int = 1, until: int = 9999, slow: bool = False
):
    """Decorator: add a function to the scenarios; its docstring's first line is the title."""

    def add(body):
        name = body.__name__.replace("_", "-")
        title = (body.__doc__ or "").strip().splitlines()[0]
        words = tuple(needs.split())
        SCENARIOS[name] = Scenario(name, title, body, words, original, since, until, slow)
        return body

    return add


def run_all(machine: Machine, names: list[str], original_version: int) -> dict[str, int]:
    """Run scenarios one by one and print a line each; return the number of each outcome.

    `original_version` is the systemd version of the C original that is being run, or 0.
    """
    counts = {"ok": 0, "FAIL": 0, "skip": 0, "xfail": 0}
    for name in names:
        one = SCENARIOS[name]
        counts[run_one(machine, one, one.to_fail(original_version))] += 1
    return counts


def run_one(machine: Machine, one: Scenario, expected: str) -> str:
    """Run and report one scenario; `expected` says why it must fail, if it must."""
    missing = [word for word in one.needs if word not in machine.help]
    if missing:
        print(f"skip {one.name} (its --help has no {' '.join(missing)})", flush=True)
        return "skip"
    began = time.monotonic()
    try:
        machine.begin(one.name)
        note, failure = one.body(machine) or "", ""
    except CannotRun as error:
        print(f"skip {one.name} CANNOT RUN HERE: {error}", flush=True)
        return "skip"
    except Failure as error:
        note, failure = "", str(error) or "failed"
    except Exception as error:  # such as a client that takes too long: never an expected failure
        note, failure, expected = "", f"{type(error).__name__}: {error}", ""
    finally:
        journal = end_of_journal(machine)
        machine.end()
    seconds = f"{time.monotonic() - began:.1f}"
    if failure and expected:
        print(f"xfail {one.name} {seconds} ({expected}): {failure.splitlines()[0]}", flush=True)
        return "xfail"
    if not failure and not expected:
        print(f"ok {one.name} {seconds} {note}".rstrip(), flush=True)
        return "ok"
    print(f"FAIL {one.name} {seconds} {failure or 'passes, expected was: ' + expected}")
    print("".join(f"    {line}\n" for line in journal[-40:]), end="", flush=True)
    return "FAIL"


def end_of_journal(machine: Machine) -> list[str]:
    try:
        return machine.journal().splitlines()
    except Failure as error:
        return [f"(no journal: {error})"]
