"""The chart: CPU per unit of work as a share of the newest original's, as SVG.

It brings its own panel, so that it reads well on a light and on a dark page; a viewer that tells
its colour scheme gets the matching panel.
"""

from collections.abc import Sequence
from xml.sax.saxutils import escape

from bench import report
from bench.report import Run

CHOSEN = {
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
OURS = "#d9480f"
OTHERS = ("#8a98a8", "#5c6b7a", "#4c6ef5", "#2b8a3e", "#9c36b5", "#b08900")
LEFT, WIDTH, RIGHT = 250, 460, 70
BAR, GAP, GROUP_GAP = 11, 2, 14
HEAD, FOOT = 64, 44
SCALE_END = 2.0  # times the original; longer bars are cut and say how long they are

STYLE = """
  .panel { fill: #fbfbfa } text { fill: #24292f; font: 12px system-ui, sans-serif }
  .title { font-size: 15px; font-weight: 600 } .small { font-size: 10.5px; fill: #57606a }
  .grid { stroke: #d8dee4 } .one { stroke: #57606a; stroke-dasharray: 3 3 }
  @media (prefers-color-scheme: dark) {
    .panel { fill: #161b22 } text { fill: #e6edf3 } .small { fill: #9198a1 }
    .grid { stroke: #30363d } .one { stroke: #9198a1 }
  }
"""


def draw(runs: Sequence[Run], about: str) -> str:
    """The chart of ``runs``, with ``about`` as its last line. Needs an original to compare with."""
    names = [name for name in dict.fromkeys(run.contender for run in runs) if name != "direct"]
    originals = sorted(name for name in names if name.startswith("original-"))
    if not originals:
        raise ValueError("a chart needs an original among the contenders")
    groups = grouped(runs, names, originals[-1])
    others = [name for name in names if name != "ours"]
    colour = {"ours": OURS} if "ours" in names else {}
    colour |= dict(zip(others, OTHERS, strict=False))
    body, bottom = bars(groups, colour)
    height = bottom + FOOT
    width = LEFT + WIDTH + RIGHT
    title = f"CPU time in the proxy per unit of work, {said(originals[-1])} = 1 (shorter is better)"
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    label = f'role="img" aria-label="{escape(title)}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} {label}>',
            f"<style>{STYLE}</style>",
            f'<rect class="panel" width="{width}" height="{height}" rx="8"/>',
            f'<text class="title" x="16" y="26">{escape(title)}</text>',
            *legend(colour),
            *grid(bottom),
            *body,
            f'<text class="small" x="16" y="{height - 14}">{escape(about)}</text>',
            "</svg>\n",
        ]
    )


def grouped(
    runs: Sequence[Run], names: Sequence[str], original: str
) -> list[tuple[str, dict[str, float]]]:
    """For each work of the chart its label and the shares by contender, pairwise per round."""
    groups = []
    for title, label in CHOSEN.items():
        of_work = [run for run in runs if run.work.title == title]
        base = report.by_round(of_work, original)
        shares = {}
        for name in names:
            own = report.by_round(of_work, name)
            pairs = [(own[number].cpu, base[number].cpu) for number in own if number in base]
            share = report.ratio(pairs)
            if share is not None:
                shares[name] = share
        if shares:
            groups.append((label, shares))
    return groups


def legend(colour: dict[str, str]) -> list[str]:
    """One line of colours and names."""
    parts, x = [], 16
    for name, fill in colour.items():
        parts.append(f'<rect x="{x}" y="40" width="11" height="11" rx="2" fill="{fill}"/>')
        parts.append(f'<text x="{x + 16}" y="50">{escape(said(name))}</text>')
        x += 34 + 7 * len(said(name))
    return parts


def said(name: str) -> str:
    """A contender's name as readers know it."""
    known = {"ours": "this program", "haproxy": "HAProxy"}
    return known.get(name, name.replace("original-", "systemd "))


def position(share: float) -> float:
    """The x coordinate of a share."""
    return LEFT + min(share, SCALE_END) / SCALE_END * WIDTH


def grid(bottom: int) -> list[str]:
    """Vertical lines every half, the one of the original dashed."""
    parts = []
    for half in range(int(SCALE_END * 2) + 1):
        x, kind = position(half / 2), "one" if half == 2 else "grid"
        label = f'x="{x}" y="{bottom + 14}" text-anchor="middle">{half / 2:g}'
        parts.append(f'<line class="{kind}" x1="{x}" x2="{x}" y1="{HEAD}" y2="{bottom}"/>')
        parts.append(f'<text class="small" {label}</text>')
    return parts


def bars(
    groups: Sequence[tuple[str, dict[str, float]]], colour: dict[str, str]
) -> tuple[list[str], int]:
    """The groups of bars from the top, and where they end."""
    parts, y = [], HEAD + GROUP_GAP // 2
    for label, shares in groups:
        middle = y + len(shares) * (BAR + GAP) // 2 + 3
        parts.append(f'<text x="{LEFT - 10}" y="{middle}" text-anchor="end">{escape(label)}</text>')
        for name, fill in colour.items():
            if name in shares:
                parts += bar(shares[name], y, fill)
                y += BAR + GAP
        y += GROUP_GAP
    return parts, y - GROUP_GAP // 2


def bar(share: float, y: int, fill: str) -> list[str]:
    """A bar with its number."""
    end = position(share)
    number = f"{share:.2f}{' →' if share > SCALE_END else ''}"
    return [
        f'<rect x="{LEFT}" y="{y}" width="{end - LEFT:.1f}" height="{BAR}" rx="2" fill="{fill}"/>',
        f'<text class="small" x="{end + 5:.1f}" y="{y + BAR - 1.5}">{number}</text>',
    ]
