"""Metrics of proxies in Prometheus's text format, for the textfile collector of node_exporter.

The names follow from those of the proxy, by rules: net.socketproxyd.BytesToTargets becomes
socketproxyd_bytes_to_targets_total; microseconds become seconds; XBucket, XCount and XSum are a
histogram.
"""

import re
from collections.abc import Iterable
from typing import Any

from proxyd.ctl.find import Proxy
from proxyd.ctl.text import escape

PREFIX = "socketproxyd"

_WORD = re.compile(r"USec|[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+")
_USEC_PER_SEC = 1_000_000
_NO_LABEL = re.compile(r"[^a-zA-Z0-9_]")

Answer = tuple[Proxy, tuple[list[dict[str, Any]], list[dict[str, Any]]]]
Labels = tuple[tuple[str, str], ...]


class Family:
    """All samples of one name."""

    __slots__ = ("help", "kind", "name", "samples")

    def __init__(self, name: str, kind: str, text: str) -> None:
        self.name = name
        self.kind = kind
        self.help = text
        self.samples: list[tuple[str, Labels, float]] = []
        """(suffix of the name, labels, value)"""


def text(answers: Iterable[Answer]) -> str:
    """Return the metrics of all proxies: a family once, with the samples of each proxy."""
    families: dict[str, Family] = {}
    for proxy, (described, values) in answers:
        source = _Source(proxy, described, families)
        for metric in values:
            source.add(metric)
        source.complete()
    return "".join(_rendered(family) for family in families.values() if family.samples)


class _Source:
    """The metrics of one proxy, on their way into the families of all."""

    __slots__ = ("_bounds", "_families", "_histograms", "_proxy", "_types")

    def __init__(
        self, proxy: Proxy, described: list[dict[str, Any]], families: dict[str, Family]
    ) -> None:
        self._proxy = proxy
        self._types = {one["name"]: one for one in described}
        self._families = families
        bases = {name.removesuffix("Bucket") for name in self._types if name.endswith("Bucket")}
        self._histograms = {base for base in bases if f"{base}Count" in self._types}
        self._bounds: dict[tuple[str, Labels], set[str]] = {}
        """The upper bounds of each histogram."""

    def add(self, metric: dict[str, Any]) -> None:
        """Add one value."""
        name = metric["name"]
        bases = [name.removesuffix(part) for part in _PARTS if name.endswith(part)]
        base = next((one for one in bases if one in self._histograms), None)
        if base is None:
            self._add_scalar(metric)
        elif isinstance(metric.get("value"), int | float):
            self._add_to_histogram(base, metric)

    def _add_scalar(self, metric: dict[str, Any]) -> None:
        described = self._types.get(metric["name"], {})
        kind = described.get("type", "gauge")
        name, in_usec = _name(metric["name"])
        labels = _labels(metric, self._proxy)
        value = metric.get("value")
        if kind == "string" or isinstance(value, str):
            labels = (*labels, ("value", str(value)))
            name, kind, value = f"{name}_info", "gauge", 1
        elif not isinstance(value, int | float):
            return  # an object, which this format does not have
        elif in_usec:
            value /= _USEC_PER_SEC
        if kind == "counter":
            name += "_total"
        self._family(name, kind, described).samples.append(("", labels, value))

    def _add_to_histogram(self, base: str, metric: dict[str, Any]) -> None:
        name, in_usec = _name(base)
        if f"{base}SumUSec" in self._types and not in_usec:
            name, in_usec = f"{name}_seconds", True
        scale = _USEC_PER_SEC if in_usec else 1
        # What is said of the sum tells what is measured; that of a bucket speaks of its bound.
        described = self._types.get(f"{base}Sum") or self._types[f"{base}Bucket"]
        family = self._family(name, "histogram", described)
        labels, value = _labels(metric, self._proxy), metric["value"]
        part = metric["name"].removeprefix(base)
        if part == "Bucket":
            le = _le(dict(labels).get("le", "+Inf"), scale)
            plain = _without_le(labels)
            self._bounds.setdefault((name, plain), set()).add(le)
            family.samples.append(("_bucket", (*plain, ("le", le)), value))
        elif part == "Count":
            self._bounds.setdefault((name, labels), set())
            family.samples.append(("_count", labels, value))
        else:
            family.samples.append(("_sum", labels, value / scale))

    def _family(self, name: str, kind: str, described: dict[str, Any]) -> Family:
        return self._families.setdefault(
            name, Family(name, kind, str(described.get("description", "")))
        )

    def complete(self) -> None:
        """Add the bucket of everything, which the format demands, where the proxy has none."""
        for (name, labels), bounds in self._bounds.items():
            if "+Inf" in bounds:
                continue
            samples = self._families[name].samples
            samples += [
                ("_bucket", (*labels, ("le", "+Inf")), value)
                for suffix, others, value in samples
                if (suffix, others) == ("_count", labels)
            ]


_PARTS = ("Bucket", "Count", "SumUSec", "Sum")


def _le(bound: str, scale: int) -> str:
    try:
        value = float(bound) / scale
    except ValueError:
        return "+Inf"
    return "+Inf" if value == float("inf") else _number(value)


def _without_le(labels: Labels) -> Labels:
    return tuple(one for one in labels if one[0] != "le")


def _name(metric: str) -> tuple[str, bool]:
    """Return the name in this format, and whether the value is in microseconds."""
    parts = metric.split(".")
    own = [part for part in parts if part[:1].isupper()] or parts[-1:]
    words = [word for part in own for word in _WORD.findall(part)]
    if len(words) > 1 and words[0] == "Proxy":
        words = words[1:]
    in_usec = "USec" in words
    words = [word for word in words if word != "USec"] + (["seconds"] if in_usec else [])
    return "_".join([PREFIX, *(word.lower() for word in words)]), in_usec


def _labels(metric: dict[str, Any], proxy: Proxy) -> Labels:
    unit = proxy.unit or metric.get("object")
    place = ("unit", str(unit)) if unit else ("socket", proxy.path)
    fields = metric.get("fields") or {}
    return (place, *((_label(name), str(value)) for name, value in fields.items()))


def _label(name: str) -> str:
    snake = "_".join(_WORD.findall(name)).lower() or "label"
    clean = _NO_LABEL.sub("_", snake)
    return f"_{clean}" if clean[0].isdigit() else clean


def _rendered(family: Family) -> str:
    lines = []
    if family.help:
        lines.append(f"# HELP {family.name} {_escaped(family.help, quotes=False)}")
    lines.append(f"# TYPE {family.name} {family.kind}")
    for suffix, labels, value in _ordered(family.samples):
        shown = ",".join(f'{name}="{_escaped(value)}"' for name, value in labels)
        lines.append(f"{family.name}{suffix}{{{shown}}} {_number(value)}")
    return "".join(f"{line}\n" for line in lines)


def _ordered(samples: list[tuple[str, Labels, float]]) -> list[tuple[str, Labels, float]]:
    """Put the samples of a histogram together, its buckets in ascending order."""

    def key(sample: tuple[str, Labels, float]) -> tuple[Labels, int, float]:
        suffix, labels, _ = sample
        bound = float(dict(labels).get("le", "inf"))
        return _without_le(labels), ("", "_bucket", "_sum", "_count").index(suffix), bound

    return sorted(samples, key=key) if any(one[0] for one in samples) else samples


def _number(value: float) -> str:
    """Return a number: whole ones without a point, so that counters are exact."""
    if isinstance(value, int):
        return str(value)
    return str(int(value)) + ".0" if value.is_integer() and abs(value) < 1e15 else repr(value)


def _escaped(value: str, quotes: bool = True) -> str:
    r"""Return text as the format has it. What cannot be printed is escaped before: \x1b."""
    value = escape(value).replace("\\", r"\\")
    return value.replace('"', r"\"") if quotes else value
