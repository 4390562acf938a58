"""Print the README's tables of what was measured, as Markdown.

    ci/bench table RESULTS.json    what `ci/bench --long --json RESULTS.json` has written

A cell has three ratios, of this program to the column's: CPU time in the proxy with its quartiles,
CPU time of the whole machine, and the rate.
"""

import argparse
import json
from pathlib import Path

STREAMS = {
    "pingpong-64Bx1/tcp-tcp": "64 B messages on one connection",
    "pingpong-64Bx64/tcp-tcp": "64 B messages on 64 connections",
    "connect/tcp-tcp": "short connections, TCP→TCP",
    "connect/unix-unix": "short connections, UNIX→UNIX",
    "bulk-up-1-256K/tcp-tcp": "one stream to the target, TCP→TCP",
    "bulk-down-1-256K/tcp-tcp": "one stream to the client, TCP→TCP",
    "bulk-up-8-256K/tcp-tcp": "eight streams to the target, TCP→TCP",
    "bulk-up-8-16K/tcp-tcp": "… in writes of 16 KiB",
    "bulk-up-1-256K/unix-tcp": "one stream, UNIX→TCP",
    "bulk-up-1-16K/unix-tcp": "… in writes of 16 KiB",
    "bulk-up-8-16K/unix-tcp": "eight streams in writes of 16 KiB, UNIX→TCP",
    "bulk-up-1-256K/tcp-unix": "one stream, TCP→UNIX",
    "bulk-up-1-256K/unix-unix": "one stream, UNIX→UNIX",
}
DATAGRAMS = {
    "pingpong-64Bx1/udp-udp": "64 B there and back, 1 flow",
    "pingpong-64Bx64/udp-udp": "64 B there and back, 64 flows",
    "flow/udp1-udp": "a new flow: one question, one answer",
    "datagrams-up-64Bx1/udp-udp": "64 B to the target",
    "datagrams-up-1200Bx1/udp-udp": "1200 B to the target",
    "datagrams-up-1200Bx1-gso/udp-udp": "1200 B to the target, sent with GSO",
    "datagrams-down-64Bx1/udp-udp": "64 B to the client",
    "datagrams-down-1200Bx1/udp-udp": "1200 B to the client",
    "datagrams-down-1200Bx16-gso/udp-udp": "1200 B to 16 clients, sent with GSO",
}
COLUMNS = {
    "control": "control",
    "original-262": "original 262",
    "haproxy": "HAProxy",
    "nginx": "nginx",
    "socat": "socat",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="ci/bench table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    try:
        summary = json.loads(options.results.read_text())["summary"]
        rows = {(one["work"], one["contender"]): one for one in summary}
        tables = [
            streams(rows, ["control", "original-262", "haproxy", "nginx"]),
            datagrams(rows, ["control", "nginx", "socat"]),
        ]
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except (ValueError, LookupError, TypeError) as error:
        parser.error(f"{options.results} was not written by ci/bench: {error!r}")
    print("\n\n".join(table for table in tables if table))


def streams(rows: dict, names: list[str]) -> str:
    """Return the table of streams, with two other figures below; empty if there is none."""
    lines = measured(rows, STREAMS, names)
    if ("mixed/tcp-tcp", "ours") in rows:
        tails = [tail(rows.get(("mixed/tcp-tcp", name))) for name in names]
        lines.append(("messages alongside eight streams: 99th percentile", tails))
    if ("idle/tcp-tcp", "ours") in rows:
        memory = [memory_ratio(rows, name) for name in names]
        lines.append(("kernel memory per idle connection", memory))
    return markdown(lines, names)


def datagrams(rows: dict, names: list[str]) -> str:
    return markdown(measured(rows, DATAGRAMS, names), names)


def measured(rows: dict, works: dict[str, str], names: list[str]) -> list[tuple[str, list[str]]]:
    return [
        (text, [cell(rows.get((work, name))) for name in names])
        for work, text in works.items()
        if (work, "ours") in rows
    ]


def cell(row: dict | None) -> str:
    """Return the three ratios of one contender; a dash if it did not do this work."""
    if row is None or row["ratio"] is None:
        return "–"
    spread = " ({:.2f}–{:.2f})".format(*row["spread"]) if row["spread"] else ""
    return f"{row['ratio']:.2f}{spread} · {row['machine_ratio']:.2f} · {row['rate_ratio']:.2f}"


def tail(row: dict | None) -> str:
    return f"{row['tail_ratio']:.2f}" if row and row["tail_ratio"] is not None else "–"


def memory_ratio(rows: dict, name: str) -> str:
    other = rows.get(("idle/tcp-tcp", name))
    if other is None:
        return "–"
    own = rows["idle/tcp-tcp", "ours"]
    return f"{own['extra']['kernel KB'] / other['extra']['kernel KB']:.2f}"


def markdown(lines: list[tuple[str, list[str]]], names: list[str]) -> str:
    if not lines:
        return ""
    head = ["work", *[COLUMNS[name] for name in names]]
    body = [[text, *cells] for text, cells in lines]
    return "\n".join(f"| {' | '.join(one)} |" for one in [head, ["---"] * len(head), *body])


if __name__ == "__main__":
    main()
