"""How our numbers are judged: against the paper by the noise of both, and class balancing against its own baseline.

The authors give single runs without a spread. Their own re-run implies about 0.7 points from run to run, so that is the
noise assumed for every number of theirs, and for ours where fewer than three runs tell it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

PAPER_SD = 0.7  # percentage points
RESAMPLES = 10_000  # of the pairs, for a bootstrap interval
LEVEL = 0.95  # of that interval
FEW = 3  # pairs up to which that interval is their whole range

Verdict = Literal["agrees", "better", "worse", "–"]
Row = Mapping[str, Any]  # a row of runs.csv


def spread(errors: Sequence[float]) -> float:
    """Standard deviation (n - 1) of our errors (n,); 0.7 points when n < 3, where it would say too little."""
    return float(np.std(errors, ddof=1)) if len(errors) >= 3 else PAPER_SD


def standard_error(errors: Sequence[float]) -> float:
    """Of our mean minus the paper's number: sqrt(0.7² + s²/n), in percentage points; `errors` (n,), n >= 1."""
    return float(np.sqrt(PAPER_SD**2 + spread(errors) ** 2 / len(errors)))


def difference(paper: float | None, errors: Sequence[float]) -> float | None:
    """Mean of ours minus the paper's, in points (negative: ours is lower); None when either is missing."""
    return None if paper is None or len(errors) == 0 else float(np.mean(errors)) - paper


def verdict(paper: float | None, errors: Sequence[float]) -> Verdict:
    """`agrees` within two standard errors, else `better` (ours is lower) or `worse`; `–` when either is missing."""
    apart = difference(paper, errors)
    if apart is None:
        return "–"
    if abs(apart) <= 2 * standard_error(errors):
        return "agrees"
    return "better" if apart < 0 else "worse"


class Gain(NamedTuple):
    """Mean of paired differences, in points, with a bootstrap interval where there are two pairs or more."""

    mean: float
    interval: tuple[float, float] | None
    n: int


def bootstrap(differences: Sequence[float]) -> Gain | None:
    """Mean and 95 % percentile interval of `differences` (n,); None when n = 0, no interval when n = 1.

    10,000 resamples of a generator that always starts alike, so that a table rendered twice is the same table. Of two
    or three differences the interval is their whole range: so few say little of their spread.
    """
    values = np.asarray(differences, dtype=float)
    if values.size == 0:
        return None
    if values.size == 1:
        return Gain(float(values[0]), None, 1)
    drawn = np.random.default_rng(0).integers(values.size, size=(RESAMPLES, values.size))
    means = values[drawn].mean(axis=1)  # (RESAMPLES,)
    # rounded, or a mean of zero that floats make 1e-16 would leave out zero
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).round(9)
    return Gain(float(values.mean()), (float(low), float(high)), values.size)


def interval_name(*counts: int) -> str:
    """What the intervals of `bootstrap` are, in words; `counts` are the pairs behind each, one or more numbers."""
    few = " or ".join(str(n) for n in sorted(set(counts)) if n <= FEW)
    if max(counts) <= FEW:
        return f"range of the {few} pairs"
    return f"95 % interval (of {few} pairs their range)" if few else "95 % interval"


def pairs(first: Sequence[Row], second: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Runs of two cells with the same seed and the same subset seed, in the order of `first`.

    A row is one of runs.csv as a dict. Raises ValueError when a cell has two runs of the same seeds.
    """
    by_seeds = []
    for rows in (first, second):
        found = {(row["seed"], row["subset_seed"]): row for row in rows}
        if len(found) < len(rows):
            raise ValueError(f"Two runs of {rows[0]['cell']} have the same seeds: they cannot be paired.")
        by_seeds.append(found)
    return [(row, by_seeds[1][seeds]) for seeds, row in by_seeds[0].items() if seeds in by_seeds[1]]
