"""The plot: one panel a quantity, one line a proxy, over the time of the run. As SVG."""

import math
from xml.sax.saxutils import escape

from bench.chart import OTHERS, OURS, STYLE

LEFT, WIDTH, RIGHT = 74, 720, 120
HEAD, PANEL, BETWEEN, FOOT = 62, 110, 42, 46
COLOURS = (OURS, *OTHERS[2:], *OTHERS[:2])

LINES = "polyline { fill: none; stroke-width: 1.2 }"


def draw(title, about, panels, minutes, marks):
    """`panels`: [(heading, {line's name: [(seconds, value)]}, how a value is written)]; `marks`:
    seconds of the checkpoints."""
    height = HEAD + len(panels) * (PANEL + BETWEEN) + FOOT
    width = LEFT + WIDTH + RIGHT
    names = list(dict.fromkeys(name for _, lines, _ in panels for name in lines))
    colours = dict(zip(names, COLOURS * 3, strict=False))
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{escape(title)}">',
        f"<style>{STYLE}{LINES}</style>",
        f'<rect class="panel" width="{width}" height="{height}" rx="8"/>',
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        f'<text class="small" x="16" y="44">{escape(about)}</text>',
    ]
    top = HEAD + 16
    for heading, lines, write in panels:
        parts += panel(heading, lines, write, colours, top, minutes, marks)
        top += PANEL + BETWEEN
    label = f"minutes; dashed: the traffic pauses, and only what lasts is open ({len(marks)} times)"
    parts.append(f'<text class="small" x="{LEFT}" y="{height - 14}">{label}</text></svg>\n')
    return "\n".join(parts)


def panel(heading, lines, write, colours, top, minutes, marks):
    """Frame, scale and lines of one quantity."""
    most = round_up(max((value for points in lines.values() for _, value in points), default=0))
    bottom = top + PANEL
    parts = [f'<text x="{LEFT}" y="{top - 6}">{escape(heading)}</text>']
    for share in (0, 0.5, 1):
        y = bottom - share * PANEL
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{LEFT + WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text class="small" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">'
            f"{escape(write(most * share))}</text>"
        )
    parts += times(minutes, bottom)
    scale = WIDTH / (minutes * 60)
    for at in marks:
        x = round(LEFT + at * scale, 1)
        parts.append(f'<line class="one" x1="{x}" x2="{x}" y1="{top}" y2="{bottom}"/>')
    for number, (name, points) in enumerate(lines.items()):
        places = " ".join(
            f"{LEFT + min(at * scale, WIDTH):.1f},{bottom - value / most * PANEL:.1f}"
            for at, value in thinned(points)
        )
        colour = colours[name]
        parts.append(f'<polyline stroke="{colour}" points="{places}"/>')
        y = top + 10 + 15 * number
        parts.append(f'<rect x="{LEFT + WIDTH + 10}" y="{y - 8}" width="9" height="9" rx="2" '
                     f'fill="{colour}"/>')  # fmt: skip
        parts.append(f'<text class="small" x="{LEFT + WIDTH + 24}" y="{y}">{escape(name)}</text>')
    return parts


def round_up(value):
    """The next of 1, 2, 4, 6, 8 and their tens; in MiB where it is bytes."""
    unit = 1 << 20 if value > 1 << 20 else 1
    size = 10.0 ** math.floor(math.log10(value / unit)) if value else 1.0
    return next(n * size for n in (1, 2, 4, 6, 8, 10) if n * size >= value / unit) * unit


def times(minutes, bottom):
    """Labels of the time axis."""
    step = next(step for step in (0.1, 0.5, 1, 5, 10, 30, 60, 300, 1440) if step * 13 > minutes)
    return [
        f'<text class="small" x="{LEFT + WIDTH * n * step / minutes:.1f}" y="{bottom + 14}" '
        f'text-anchor="middle">{n * step:g}</text>'
        for n in range(int(minutes / step) + 1)
    ]


def thinned(points, most=720):
    """As many points as there are pixels; of each group the highest, so that no peak is lost."""
    size = -(-len(points) // most) if points else 1
    groups = (points[at : at + size] for at in range(0, len(points), size))
    return [max(group, key=lambda point: point[1]) for group in groups]
