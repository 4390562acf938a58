"""Medians over rounds, ratios and the readable table."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles

from bench.measure import Sample
from bench.works import Work


@dataclass(frozen=True)
class Run:
    """A sample with where it came from; ``failure`` instead of a sample says why there is none."""

    work: Work
    contender: str
    round: int
    sample: Sample | None
    failure: str = ""


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum over the rounds."""

    median: float
    minimum: float
    maximum: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Row:
    """One work with one contender.

    ``ratio`` is the reference's CPU per unit divided by this contender's, taken in each round and
    then the median: what disturbs a round disturbs both; ``spread`` is from the lower to the upper
    quartile of these quotients. ``machine_ratio`` is the same of the CPU of the whole machine,
    ``tail_ratio`` of the p99, and ``rate_ratio`` of the rate.
    """

    work: Work
    contender: str
    cpu: Spread
    rate: Spread
    p50: Spread
    p99: Spread
    load: float
    machine: float
    ratio: float | None
    spread: tuple[float, float] | None
    machine_ratio: float | None
    tail_ratio: float | None
    rate_ratio: float | None
    extra: dict[str, float]


def rows(runs: Sequence[Run], works: Sequence[Work], names: Sequence[str]) -> list[Row]:
    """One row per work and contender that has a sample, in the order given."""
    made = []
    for work in works:
        of_work = [run for run in runs if run.work == work]
        for name in names:
            samples = by_round(of_work, name)
            if samples:
                reference = by_round(of_work, names[0]) if name != names[0] else {}
                made.append(row(work, name, samples, reference))
    return made


def by_round(runs: Sequence[Run], name: str) -> dict[int, Sample]:
    """The samples of one contender."""
    return {run.round: run.sample for run in runs if run.contender == name and run.sample}


def row(work: Work, name: str, samples: dict[int, Sample], reference: dict[int, Sample]) -> Row:
    """Sum up the samples of one contender, by round."""
    each = list(samples.values())
    common = [number for number in samples if number in reference]
    return Row(
        work,
        name,
        Spread.of([one.cpu for one in each]),
        Spread.of([one.rate for one in each]),
        Spread.of([one.p50 for one in each]),
        Spread.of([one.p99 for one in each]),
        median(one.load for one in each),
        median(one.machine for one in each),
        ratio([(reference[number].cpu, samples[number].cpu) for number in common]),
        quartiles([(reference[number].cpu, samples[number].cpu) for number in common]),
        ratio([(reference[number].machine, samples[number].machine) for number in common]),
        ratio([(reference[number].p99, samples[number].p99) for number in common]),
        ratio([(reference[number].rate, samples[number].rate) for number in common]),
        {key: median_of(each, key) for key in extra_keys(each)},
    )


def median_of(samples: Sequence[Sample], key: str) -> float:
    """The median of one of the extras."""
    return median(one.extra[key] for one in samples if key in one.extra)


def extra_keys(samples: Sequence[Sample]) -> list[str]:
    """The names in any sample's extras, once each, in order."""
    return list(dict.fromkeys(key for one in samples for key in one.extra))


def ratio(pairs: Sequence[tuple[float, float]]) -> float | None:
    """The median of the quotients; None where there is nothing to divide by."""
    quotients = [first / second for first, second in pairs if second]
    return median(quotients) if quotients else None


def quartiles(pairs: Sequence[tuple[float, float]]) -> tuple[float, float] | None:
    """The lower and the upper quartile of the quotients; None with fewer than two of them."""
    quotients = [first / second for first, second in pairs if second]
    if len(quotients) < 2:
        return None
    lower, _, upper = quantiles(quotients, n=4, method="inclusive")
    return lower, upper


LEGEND = """\
CPU per unit: of all threads and processes of the proxy, medians over the rounds.
{reference}/it: the first's CPU by the row's in each round, then the median and the quartiles; below
1 it is cheaper. The control is the first once more: its ratios would be 1 if there were no noise.
machine: CPU time of all processes and the kernel together, of which a proxy may leave more or less
to others. The rate belongs to it: work that is waited for less may cost more.
load: share of its CPU that the load generator used; near 100 % it was the bottleneck.
start: exec to the first byte for a client in the backlog, p50 the median and p99 the slowest start.
idle: cost of a message with that many resting connections; fds and memory per resting connection,
kernel memory without the sockets of a direct connection. mixed: messages alongside eight streams.\
"""


def table(made: Sequence[Row]) -> str:
    """The report as text."""
    reference = made[0].contender if made else ""
    heading = (
        f"{'work':<33}{'contender':<14}{'CPU per unit':>12}  {'[min – max]':<17}"
        f"{reference + '/it':>11}  {'[quartiles]':<14}{'machine':>12}{'ratio':>7}{'rate':>13}"
        f"{'ratio':>7}{'p50':>11}{'p99':>11}{'ratio':>7}{'load':>6}"
    )
    lines = [heading, "─" * len(heading)]
    previous = None
    for one in made:
        if previous and one.work != previous:
            lines.append("")
        lines.append(line(one, first=one.work != previous))
        previous = one.work
    return "\n".join([*lines, "", LEGEND.format(reference=reference)])


def line(one: Row, *, first: bool) -> str:
    """One row of the table."""
    cost, spread = costs(one)
    extras = "".join(f"  {key} {number(value)}" for key, value in one.extra.items())
    return (
        f"{one.work.title if first else '':<33}{one.contender:<14}"
        f"{cost:>12}  {spread:<17}"
        f"{quotient(one.ratio):>11}  {bounds(one.spread):<14}{machine_text(one):>12}"
        f"{quotient(one.machine_ratio):>7}{rate_text(one):>13}{quotient(one.rate_ratio):>7}"
        f"{latency(one.p50):>11}{latency(one.p99):>11}{quotient(one.tail_ratio):>7}"
        f"{one.load:>6.0%}{extras}"
    ).rstrip()


def costs(one: Row) -> tuple[str, str]:
    """The median and the bounds of the CPU per unit; nothing where there is no proxy."""
    if not one.cpu.maximum:
        return "–", ""
    scale, unit = scale_of(one.work)
    minimum, maximum = number(one.cpu.minimum * scale), number(one.cpu.maximum * scale)
    return number(one.cpu.median * scale) + unit, f"[{minimum} – {maximum}]"


def bounds(spread: tuple[float, float] | None) -> str:
    """Two ratios, or nothing."""
    return f"[{quotient(spread[0])} – {quotient(spread[1])}]" if spread else ""


def machine_text(one: Row) -> str:
    """CPU time of the whole machine per unit, or nothing."""
    if not one.machine:
        return ""
    scale, unit = scale_of(one.work)
    return number(one.machine * scale) + unit


def scale_of(work: Work) -> tuple[float, str]:
    """The factor from seconds, and the sign of the unit that the table shows."""
    if work.counter == "bytes":
        return 1, " s/GB"
    return (1e3, " ms") if work.kind == "start" else (1e6, " µs")


def number(value: float) -> str:
    """Three digits that count."""
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1 if abs(value) < 1000 else 0
    return f"{value:.{digits}f}"


def rate_text(one: Row) -> str:
    """Units per second."""
    value = one.rate.median
    if one.work.counter == "bytes":
        return f"{value:.2f} GB/s"
    return f"{value / 1e3:.1f} k/s" if value >= 1e3 else f"{value:.0f} /s"


def latency(spread: Spread) -> str:
    """Microseconds, or nothing."""
    return f"{spread.median:.0f} µs" if spread.median else ""


def quotient(value: float | None) -> str:
    """A ratio, or nothing."""
    return f"{value:.2f}" if value is not None else ""


def as_json(
    runs: Sequence[Run], made: Sequence[Row], machine: dict[str, object]
) -> dict[str, object]:
    """Everything: the machine, the summary and each run."""
    return {
        "machine": machine,
        "summary": [asdict(one) | {"work": one.work.title, "unit": one.work.unit} for one in made],
        "runs": [
            {
                "work": run.work.title,
                "contender": run.contender,
                "round": run.round,
                "sample": asdict(run.sample) if run.sample else None,
                "failure": run.failure,
            }
            for run in runs
        ],
    }
