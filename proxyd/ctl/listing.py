"""What `list` and `status` print."""

import json
import time
from typing import Any

from proxyd.ctl.find import Proxy
from proxyd.ctl.table import Column, Paper, Row, render
from proxyd.ctl.text import escape, short_span
from proxyd.sizes import bytes_text

STATES = ("open", "held", "connecting", "lingering", "header", "flow")

_STYLES = {"header": "warn", "held": "warn", "connecting": "warn", "lingering": "dim"}


def rows_of(answers: list[tuple[Proxy, list[dict[str, Any]]]]) -> list[Row]:
    """Return all connections as rows, each with its proxy; those of one in order of their ids."""
    return [
        {"unit": proxy.unit or None, "socket": proxy.path} | connection
        for proxy, connections in answers
        for connection in sorted(connections, key=lambda one: one["id"])
    ]


def table(rows: list[Row], sheet: Paper) -> list[str]:
    """Return the lines of `list`."""
    several = len({row["socket"] for row in rows}) > 1
    return render(rows, ([UNIT] if several else []) + COLUMNS, sheet)


def in_flight(row: Row) -> int:
    """Return the bytes that the proxy holds, both ways."""
    total: int = row["up"].get("inFlight", 0) + row["down"].get("inFlight", 0)
    return total


def _span_of(key: str) -> "_Text":
    return lambda row: "-" if row.get(key) is None else short_span(row[key])


def _text_of(key: str) -> "_Text":
    return lambda row: "-" if row.get(key) in (None, "") else str(row[key])


def _halves(row: Row) -> str:
    waits = row.get("state") in ("header", "held")
    return "-" if waits else f"{row['up']['state']}/{row['down']['state']}"


_Text = Any

UNIT = Column(
    "UNIT",
    lambda row: str(row["unit"] or row["socket"]).removesuffix(".service"),
    flexible=True,
)
ID = Column("ID", lambda row: str(row.get("id", "")), right=True)
STATE = Column("STATE", _text_of("state"), style=lambda row: _STYLES.get(str(row.get("state")), ""))
CLIENT = Column("CLIENT", _text_of("client"), flexible=True)
TARGET = Column("TARGET", _text_of("target"), flexible=True)
AGE = Column("AGE", _span_of("ageUSec"), right=True)
IDLE = Column("IDLE", _span_of("idleUSec"), right=True, drop=1)
UP = Column("UP", lambda row: bytes_text(row["up"].get("bytes", 0)), right=True)
DOWN = Column("DOWN", lambda row: bytes_text(row["down"].get("bytes", 0)), right=True)
QUEUED = Column("QUEUED", lambda row: bytes_text(in_flight(row)), right=True, drop=2)

COLUMNS = [
    ID,
    STATE,
    CLIENT,
    TARGET,
    AGE,
    IDLE,
    UP,
    DOWN,
    QUEUED,
    Column("HALVES", _halves, drop=4),
    Column("CONNECT", _span_of("connectUSec"), right=True, drop=5),
    Column("LOCAL", _text_of("localAddress"), drop=3),
    Column("LISTENER", _text_of("listener"), drop=6),
    Column("THREAD", lambda row: str(row.get("thread", "")), right=True, drop=7),
]


def as_json(value: object, form: str) -> str:
    """Return JSON, on one line or on several."""
    if form == "pretty":
        return json.dumps(value, indent=4) + "\n"
    return json.dumps(value, separators=(",", ":")) + "\n"


def status_lines(proxy: Proxy, status: dict[str, Any], sheet: Paper) -> list[str]:
    """Return the lines of `status` for one proxy."""
    targets = status.get("targets") or []
    down = any(not one.get("up", True) for one in targets)
    mark = sheet.paint("●", "bad" if down else "good") if sheet.mark == "…" else "*"
    lines = [f"{mark} {escape(proxy.name)}"]
    facts = [
        ("Version", str(status.get("version", ""))),
        ("Main PID", str(status.get("pid", ""))),
        ("Since", _moment(status.get("startedUSec"))),
        ("Status", str(status.get("status", ""))),
        ("Socket", proxy.path),
        ("Clients", _clients(status)),
        ("Limits", _pairs(status.get("limits") or {})),
    ]
    lines += [f"{name:>10}: {escape(text)}" for name, text in facts if text]
    for title, rows, columns in (
        ("Listeners", status.get("listeners") or [], _LISTENERS),
        ("Targets", targets, _TARGETS),
    ):
        if rows:
            narrow = None if sheet.width is None else sheet.width - 4
            inner = Paper(narrow, sheet.colour, sheet.mark)
            lines += ["", f"  {title}:"]
            lines += [f"    {line}" for line in render(rows, columns, inner)]
    return lines


def _clients(status: dict[str, Any]) -> str:
    counts = [(status.get(name), name) for name in ("open", "held")]
    counts += [(status.get("flows", 0), "flows")] if status.get("datagrams") else []
    return ", ".join(f"{count} {name}" for count, name in counts if count is not None)


def _pairs(limits: dict[str, Any]) -> str:
    known = [(name, value) for name, value in limits.items() if value is not None]
    return ", ".join(f"{_words(name)} {value}" for name, value in known)


def _words(name: str) -> str:
    """Return `connectionsMax` as "connections max"."""
    return "".join(f" {char.lower()}" if char.isupper() else char for char in name)


def _target_state(row: Row) -> str:
    if row.get("up", True):
        return "up"
    since = row.get("downSinceUSec")
    why = f" ({row['reason']})" if row.get("reason") else ""
    return ("down" if since is None else f"down since {_moment(since)}") + why


def _moment(usec: int | None) -> str:
    """Format a time of day, with the date unless it is today's."""
    if usec is None:
        return ""
    then = time.localtime(usec / 1_000_000)
    today = then[:3] == time.localtime()[:3]
    return time.strftime("%H:%M:%S" if today else "%Y-%m-%d %H:%M:%S", then)


_LISTENERS = [
    Column("NAME", _text_of("name")),
    Column("ADDRESS", _text_of("address"), flexible=True),
    Column("TARGET", _text_of("target"), flexible=True),
    Column("ACCEPTING", lambda row: "yes" if row.get("accepting", True) else "no"),
]
_TARGETS = [
    Column("TARGET", _text_of("target"), flexible=True),
    Column("HELD", lambda row: str(row.get("held", 0)), right=True),
    Column("SERVED", lambda row: str(row.get("served", 0)), right=True, drop=1),
    Column("FAILED", lambda row: str(row.get("failed", 0)), right=True),
    Column(
        "STATE",
        _target_state,
        flexible=True,
        style=lambda row: "" if row.get("up", True) else "bad",
    ),
]
