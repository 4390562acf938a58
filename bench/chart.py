"""Draw what was measured, as SVG.

    ci/bench chart RESULTS.json FILE.svg    what `ci/bench --json RESULTS.json` has written
    ci/bench chart FOLDER FILE.svg          what a soak run has left in FOLDER, .cache/soak

The first shows the CPU time in the proxy per unit of work as a share of the newest original's, the
second memory, descriptors and CPU time of the proxies over the time of the run.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from bench import machine, report

WORKS = {
    "pingpong-64Bx64/tcp-tcp": "64 B messages, 64 connections",
    "pingpong-64Bx1/tcp-tcp": "64 B messages, 1 connection",
    "connect/tcp-tcp": "short connections, TCP to TCP",
    "connect/unix-tcp": "short connections, UNIX to TCP",
    "connect/tcp-unix": "short connections, TCP to UNIX",
    "connect/unix-unix": "short connections, UNIX to UNIX",
    "bulk-up-1-256K/tcp-tcp": "bulk, TCP to TCP",
    "bulk-up-8-256K/tcp-tcp": "bulk, TCP to TCP, 8 streams",
    "bulk-up-1-256K/unix-tcp": "bulk, UNIX to TCP",
    "bulk-up-1-256K/tcp-unix": "bulk, TCP to UNIX",
    "bulk-up-1-256K/unix-unix": "bulk, UNIX to UNIX",
}
SHARE_MAX = 2.0
"""Longer bars are cut off; the number at their end is their true length."""

PROXIES = ("main", "header", "idle", "few", "shaky")
MB = 1 << 20

STYLE = {
    "axes.prop_cycle": mpl.cycler(color=["#d9480f", "#4c6ef5", "#2b8a3e", "#9c36b5", "#b08900"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": "medium",
    "axes.facecolor": "#fbfbfa",
    "figure.facecolor": "#fbfbfa",
    "figure.labelsize": "small",
    "font.family": "sans-serif",
    "grid.color": "#d8dee4",
    "legend.frameon": False,
    "lines.linewidth": 1,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "",  # the same data make the same file
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="ci/bench chart",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("svg", type=Path)
    options = parser.parse_args()
    mpl.rcParams.update(STYLE)
    figure = Figure(figsize=(9, 8), layout="constrained")
    try:
        (draw_soak if options.source.is_dir() else draw_bench)(figure, options.source)
        figure.savefig(options.svg, metadata={"Date": None})
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except (ValueError, LookupError) as error:
        parser.error(f"{options.source} was not written by ci/bench or ci/test soak: {error!r}")


def draw_bench(figure: Figure, source: Path) -> None:
    results = json.loads(source.read_text())
    names, works, shares = shares_of(results["runs"])
    axes = figure.subplots()
    height = 0.8 / len(names)
    for number, (name, values) in enumerate(zip(names, shares, strict=True)):
        places = np.arange(len(works)) + number * height
        bars = axes.barh(places, np.minimum(values, SHARE_MAX), height, label=label_of(name))
        numbers = [
            f"{value:.2f}{' →' if value > SHARE_MAX else ''}" if value > 0 else ""
            for value in values
        ]
        axes.bar_label(bars, numbers, padding=3, fontsize="x-small")
    axes.axvline(1, color="#57606a", linestyle="dashed", linewidth=0.8)
    axes.set_yticks(np.arange(len(works)) + 0.4 - height / 2, [WORKS[work] for work in works])
    axes.set_ylim(len(works), -0.5)
    axes.set_xlim(0, SHARE_MAX * 1.05)
    figure.suptitle(f"CPU time in the proxy per unit of work, {label_of(original(names))} = 1")
    figure.supxlabel(f"shorter is better; {machine.line(results['machine'])}")
    figure.legend(loc="outside right upper")


def shares_of(runs: list) -> tuple[list[str], list[str], list[list[float]]]:
    """Return contenders, works, and each contender's share in each work; 0 if it has none."""
    cpu: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        if run["sample"] and run["contender"] != "direct":
            rounds = cpu.setdefault((run["contender"], run["work"]), {})
            rounds[run["round"]] = run["sample"]["cpu"]
    names = list(dict.fromkeys(name for name, _ in cpu))
    works = [work for work in WORKS if (original(names), work) in cpu]
    shares = [[share(cpu, name, work, original(names)) for work in works] for name in names]
    return names, works, shares


def share(cpu: dict, name: str, work: str, reference: str) -> float:
    """Return the median over the rounds of the quotient in each."""
    own, base = cpu.get((name, work), {}), cpu[reference, work]
    return report.ratio([(own[n], base[n]) for n in own if n in base]) or 0.0


def original(names: list[str]) -> str:
    originals = sorted(name for name in names if name.startswith("original-"))
    if not originals:
        raise SystemExit("a chart needs an original among the contenders")
    return originals[-1]


def label_of(name: str) -> str:
    """A contender's name as readers know it."""
    known = {"ours": "this program", "haproxy": "HAProxy"}
    return known.get(name, name.replace("original-", "systemd "))


def draw_soak(figure: Figure, folder: Path) -> None:
    result = json.loads((folder / "result.json").read_text())
    with (folder / "samples.csv").open(encoding="ascii") as file:
        rows = list(csv.DictReader(file))
    column = {name: np.array([float(row[name]) for row in rows]) for name in rows[0]}
    seconds = column["seconds"]
    panels = {
        "private memory, MiB": {name: column[f"{name}.private"] / MB for name in PROXIES},
        "resident memory, MiB": {name: column[f"{name}.rss"] / MB for name in PROXIES},
        "open descriptors": {name: column[f"{name}.fds"] for name in PROXIES},
        "CPU time per second": {
            name: np.gradient(column[f"{name}.cpu"], seconds) for name in PROXIES
        },
        "kernel memory of the whole machine, including other programs', MiB": {
            "slab": column["sunreclaim"] / MB,
            "TCP buffers": column["tcp_memory"] / MB,
        },
    }
    all_axes = figure.subplots(len(panels), sharex=True)
    for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
        for name, values in lines.items():
            axes.plot(seconds / 60, values, label=name)
        for at in result["checkpoints"]:
            axes.axvline(at / 60, color="#57606a", linestyle="dashed", linewidth=0.6)
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(axis="y")
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    count = len(result["checkpoints"])
    all_axes[-1].set_xlabel(
        f"minutes; dashed: {count} pauses, in which only lasting connections are open"
    )
    figure.suptitle(f"{result['minutes']:.3g} minutes of mixed traffic")
    figure.supxlabel(f"{result['about']}; {len(result['faults'])} faults")


if __name__ == "__main__":
    main()
