"""`top`: the live connections of all proxies, again and again."""

import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable

from proxyd.ctl import ask, listing
from proxyd.ctl.client import PATIENCE
from proxyd.ctl.find import Found
from proxyd.ctl.screen import Screen
from proxyd.ctl.table import Column, Paper, Row, paper, render
from proxyd.ctl.text import clip, escape, width
from proxyd.errors import UsageError
from proxyd.sizes import bytes_text

_FIND_SECONDS = 5.0
"""How often proxies that have started or ended are looked for."""

_PATIENCE_MIN = 2.0
"""Seconds for a proxy to answer, even if samples are taken more often."""

_ERRORS_MAX = 3

_TICK_SECONDS = 60.0
"""How long to wait for a key or a sample; both wake it."""


class Sample:
    """The connections at one moment, with their rates since the last one."""

    __slots__ = ("errors", "proxies", "rows", "when")

    def __init__(self, rows: list[Row], errors: list[str], proxies: int, when: float) -> None:
        self.rows = rows
        self.errors = errors
        self.proxies = proxies
        self.when = when
        """On the monotonic clock."""


class View:
    """What the keys have chosen."""

    __slots__ = ("offset", "paused", "sort")

    def __init__(self) -> None:
        self.sort = 0
        self.offset = 0
        self.paused = False

    def press(self, key: str, page: int) -> bool:
        """Take a key; tell whether to go on."""
        if key in ("q", "Q"):
            return False
        moves = {"up": -1, "down": 1, "page up": -page, "page down": page}
        if key in moves:
            self.offset = max(self.offset + moves[key], 0)
        elif key in ("home", "end"):
            self.offset = 0 if key == "home" else 1 << 30
        elif key == "s":
            self.sort = (self.sort + 1) % len(SORTS)
            self.offset = 0
        elif key in (" ", "p"):
            self.paused = not self.paused
        return True


def top(find: Callable[[], Found], interval: float) -> int:
    """Run until q is pressed; return the exit status."""
    screen = Screen()
    sampler = Sampler(find, interval)
    sampler.refresh_once()  # what cannot work at all is one line, before the screen changes
    view = View()
    with screen:
        sampler.start()
        shown = sampler.sample
        while True:
            columns, height = shutil.get_terminal_size()
            if not view.paused:
                shown = sampler.sample
            terminal = paper()
            sheet = Paper(columns, terminal.colour, terminal.mark)
            screen.paint(frame(shown, view, sheet, height), height)
            keys = screen.wait(sampler.fd, _TICK_SECONDS)
            sampler.clear()
            if keys is None or not all(view.press(key, max(height - 8, 1)) for key in keys):
                return 0


class Sampler(threading.Thread):
    """Asks the proxies in a thread of its own, so that keys are answered at once."""

    def __init__(self, find: Callable[[], Found], interval: float) -> None:
        super().__init__(daemon=True)
        self._find = find
        self._interval = interval
        self._found = Found()
        self._found_at = float("-inf")
        self.sample = Sample([], [], 0, time.monotonic())
        self.fd, self._written = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        """Readable when there is a new sample."""

    def run(self) -> None:
        """Sample for ever."""
        while True:
            time.sleep(self._interval)
            try:
                self.refresh_once()
            except UsageError as error:
                old = self.sample
                self.sample = Sample(old.rows, [str(error)], old.proxies, old.when)
            try:
                os.write(self._written, b"x")
            except BlockingIOError:  # nobody has looked at the last ones yet
                pass

    def refresh_once(self) -> None:
        """Take a sample. Raises UsageError."""
        now = time.monotonic()
        if now - self._found_at >= _FIND_SECONDS:
            self._found, self._found_at = self._find(), now
        proxies = self._found.proxies
        patience = min(max(self._interval, _PATIENCE_MIN), PATIENCE)
        answers = ask.connections(proxies, None, None, patience)
        rows = listing.rows_of(answers.results)
        when = time.monotonic()
        add_rates(rows, self.sample, when)
        errors = [*answers.errors, *map(escape, self._found.notes)]
        self.sample = Sample(rows, errors, len(proxies), when)

    def clear(self) -> None:
        """Forget that there was a new sample."""
        try:
            os.read(self.fd, 512)
        except BlockingIOError:
            pass


def add_rates(rows: list[Row], last: Sample, when: float) -> None:
    """Add the bytes per second since the last sample; of new connections, since they began."""
    before = {(row["socket"], row["id"]): row for row in last.rows}
    elapsed = max(when - last.when, 0.001)
    for row in rows:
        old = before.get((row["socket"], row["id"]))
        age = max(row.get("ageUSec", 0) / 1_000_000, 0.001)
        for way in ("up", "down"):
            if old is not None:
                per_second = (row[way]["bytes"] - old[way]["bytes"]) / elapsed
            else:
                per_second = row[way]["bytes"] / age if age <= elapsed or last.rows else 0.0
            row[f"{way}Rate"] = max(per_second, 0.0)


def frame(sample: Sample, view: View, sheet: Paper, height: int) -> list[str]:
    """Return the lines of the screen, `height` at most."""
    columns = sheet.width or 80
    head = [clip(line, columns) for line in _head(sample, view)]
    errors = [clip(escape(line), columns) for line in sample.errors[:_ERRORS_MAX]]
    head += [sheet.paint(line, "bad") for line in errors]
    room = max(height - len(head) - 3, 0)  # an empty line, the titles, the keys
    order = SORTS[view.sort][1]
    rows = sorted(sample.rows, key=lambda row: (order(row), _total(row)), reverse=True)
    view.offset = max(min(view.offset, len(rows) - room), 0)
    several = len({row["socket"] for row in rows}) > 1
    chosen = ([listing.UNIT] if several else []) + COLUMNS
    body = render(rows[view.offset : view.offset + room], chosen, sheet)
    body += [""] * (room + 1 - len(body))
    lines = [*head, "", *body]
    shown = f"{view.offset + 1}-{view.offset + room} of {len(rows)}" if len(rows) > room else ""
    return [*lines[: max(height - 1, 0)], _foot(view, shown, columns)]


def _head(sample: Sample, view: View) -> list[str]:
    states = Counter(str(row.get("state")) for row in sample.rows)
    shown = [one for one in listing.STATES if one not in ("header", "flow") or states[one]]
    counts = ", ".join(f"{states[state]} {state}" for state in shown)
    up, down = (sum(row[f"{way}Rate"] for row in sample.rows) for way in ("up", "down"))
    proxies = f"{sample.proxies} prox{'y' if sample.proxies == 1 else 'ies'}"
    paused = ", paused" if view.paused else ""
    return [
        f"socket-proxyctl - {time.strftime('%H:%M:%S')}, {proxies}{paused}",
        f"Clients: {len(sample.rows)} total, {counts}",
        f"Traffic: {bytes_text(round(up))}/s up, {bytes_text(round(down))}/s down",
    ]


def _foot(view: View, shown: str, columns: int) -> str:
    text = f" q quit   s sort: {SORTS[view.sort][0]}   space pause   up/down scroll   {shown}"
    text = clip(text.rstrip(), columns)
    return f"\x1b[7m{text}{' ' * (columns - width(text))}\x1b[0m"


def _total(row: Row) -> int:
    total: int = row["up"]["bytes"] + row["down"]["bytes"]
    return total


SORTS: list[tuple[str, Callable[[Row], float]]] = [
    ("rate", lambda row: row["upRate"] + row["downRate"]),
    ("bytes", _total),
    ("queued", listing.in_flight),
    ("age", lambda row: row.get("ageUSec", 0)),
    ("idle", lambda row: row.get("idleUSec", 0)),
]

COLUMNS = [
    listing.ID,
    listing.STATE,
    listing.CLIENT,
    listing.TARGET,
    listing.AGE,
    listing.IDLE,
    Column("UP/S", lambda row: bytes_text(round(row["upRate"])), right=True),
    Column("DOWN/S", lambda row: bytes_text(round(row["downRate"])), right=True),
    Column("UP", listing.UP.text, right=True, drop=3),
    Column("DOWN", listing.DOWN.text, right=True, drop=3),
    listing.QUEUED,
]
