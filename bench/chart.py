"""Draw what was measured, as SVG.

    ci/bench chart RESULTS.json FILE.svg    what `ci/bench --json RESULTS.json` has written
    ci/bench chart FOLDER FILE.svg          what a soak run has left in FOLDER, .cache/soak

The first shows the CPU time in the proxy per unit of work as a share of the newest original's, or
with datagrams, which that does not forward, of nginx's; the second memory, descriptors and CPU time
of the proxies over the time of the run.
"""

import argparse
import csv
import json
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
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
DATAGRAM_WORKS = {
    "pingpong-64Bx64/udp-udp": "64 B datagrams, 64 flows",
    "pingpong-64Bx1/udp-udp": "64 B datagrams, 1 flow",
    "flow/udp1-udp": "a new flow: question and answer",
    "datagrams-up-64Bx1/udp-udp": "64 B to the target",
    "datagrams-up-1200Bx1/udp-udp": "1200 B to the target",
    "datagrams-up-1200Bx1-gso/udp-udp": "1200 B to the target, from QUIC (GSO)",
    "datagrams-down-1200Bx1/udp-udp": "1200 B to the client",
    "datagrams-down-1200Bx16-gso/udp-udp": "1200 B to 16 clients, from QUIC (GSO)",
}
SHARE_MAX = 2.0
"""Longer bars are cut off; the number at their end is their true length."""

COLORS = ["#d9480f", "#4c6ef5", "#2b8a3e", "#9c36b5", "#b08900", "#0b7285"]
PROXIES = ("main", "header", "idle", "few", "shaky")
MB = 1 << 20

STYLE = {
    "axes.prop_cycle": mpl.cycler(color=COLORS),
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
    figure = Figure(figsize=(9, 11), layout="constrained")
    try:
        (draw_soak if options.source.is_dir() else draw_bench)(figure, options.source)
        figure.savefig(options.svg, metadata={"Date": None})
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}")
    except (ValueError, LookupError) as error:
        parser.error(f"{options.source} was not written by ci/bench or ci/test soak: {error!r}")


def draw_bench(figure: Figure, source: Path) -> None:
    results = json.loads(source.read_text())
    cpu = cpu_of(results["runs"])
    names = list(dict.fromkeys(name for name, _ in cpu))
    panels = [
        (reference, {work: text for work, text in works.items() if (reference, work) in cpu})
        for reference, works in ((original(names), WORKS), (nginx(names), DATAGRAM_WORKS))
    ]
    panels = [panel for panel in panels if panel[1]]
    if not panels:
        raise SystemExit("a chart needs an original among the contenders, or nginx for datagrams")
    heights = [len(works) for _, works in panels]
    colors = dict(zip(names, COLORS, strict=False))
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, (reference, works) in zip(all_axes, panels, strict=True):
        draw_panel(axes, cpu, works, reference, colors)
    figure.suptitle("CPU time in the proxy per unit of work")
    figure.supxlabel(f"shorter is better; {machine.line(results['machine'])}")
    labels = {}
    for axes in all_axes:
        handles, texts = axes.get_legend_handles_labels()
        labels.update(zip(texts, handles, strict=True))
    figure.legend(labels.values(), labels, loc="outside right upper")


def draw_panel(
    axes: Axes, cpu: dict, works: dict[str, str], reference: str, colors: dict[str, str]
) -> None:
    """Draw the contenders' shares of the reference's CPU time, in those works that it did."""
    names = [name for name in colors if any((name, work) in cpu for work in works)]
    height = 0.8 / len(names)
    for number, name in enumerate(names):
        values = [share(cpu, name, work, reference) for work in works]
        places = np.arange(len(works)) + number * height
        lengths = np.minimum(values, SHARE_MAX)
        bars = axes.barh(places, lengths, height, label=label_of(name), color=colors[name])
        numbers = [
            f"{value:.2f}{' →' if value > SHARE_MAX else ''}" if value > 0 else ""
            for value in values
        ]
        axes.bar_label(bars, numbers, padding=3, fontsize="x-small")
    axes.axvline(1, color="#57606a", linestyle="dashed", linewidth=0.8)
    axes.set_yticks(np.arange(len(works)) + 0.4 - height / 2, list(works.values()))
    axes.set_ylim(len(works), -0.5)
    axes.set_xlim(0, SHARE_MAX * 1.05)
    axes.set_title(f"{label_of(reference)} = 1")


def cpu_of(runs: list) -> dict[tuple[str, str], dict[int, float]]:
    """Return the CPU time per unit of each contender in each work, by round."""
    cpu: dict[tuple[str, str], dict[int, float]] = {}
    for run in runs:
        if run["sample"] and run["contender"] not in ("direct", "control"):
            rounds = cpu.setdefault((run["contender"], run["work"]), {})
            rounds[run["round"]] = run["sample"]["cpu"]
    return cpu


def share(cpu: dict, name: str, work: str, reference: str) -> float:
    """Return the median over the rounds of the quotient in each; 0 if there is none."""
    own, base = cpu.get((name, work), {}), cpu[reference, work]
    return report.ratio([(own[n], base[n]) for n in own if n in base]) or 0.0


def original(names: list[str]) -> str:
    """The newest of the originals; empty if there is none."""
    return max((name for name in names if name.startswith("original-")), default="")


def nginx(names: list[str]) -> str:
    """What datagrams are compared with; empty if it is not there."""
    return "nginx" if "nginx" in names else ""


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
