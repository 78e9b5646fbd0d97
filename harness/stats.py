"""The statistics of the gate: paired ratios, equivalence, and how many pairs an answer needs.

The process is the unit of replication: every value below comes from one fresh process, never from
a step of one. Ratios are judged on their logarithms, where swapping the arms only changes a sign.
How well the intervals keep their promises is simulated by ``harness/perf/simulation.py``.

Wrong input (lengths that differ, values that are not finite, not positive) is a ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

_COST_COLUMNS = ("documents", "tokens", "tokens_squared")
_NORMAL_FROM_PAIRS = 10**6  # from here Student's t and the normal distribution agree to a few pairs in a million
_MOST_PAIRS = 10**9  # nobody measures more; also keeps the search away from overflow

# What more than one suite judges by.
CONFIDENCE = 0.95  # of two-sided intervals
LOSS_MARGIN_NATS = 0.01  # per token: held-out losses that differ by less are equally good


@dataclass(frozen=True)
class Interval:
    """A geometric mean of ``num_pairs`` ratios with its two-sided interval.

    ``log_sd``: sample standard deviation of the log ratios; None for one pair, which has none.
    One pair: ``low`` 0 and ``high`` infinite. Pairs that do not vary: a point.
    """

    estimate: float
    low: float
    high: float
    num_pairs: int
    log_sd: float | None
    confidence: float


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided t tests: mean difference, its interval at 1 - 2 alpha, the larger p value."""

    mean: float
    low: float
    high: float
    margin: float
    p_value: float
    is_equivalent: bool
    num_pairs: int


def ratio_interval(
    numerators: Sequence[float], denominators: Sequence[float], confidence: float = CONFIDENCE
) -> Interval:
    """Geometric mean of ``numerators[i] / denominators[i]`` with Student's paired-t interval on the logs.

    Both of shape (pairs,), of one positive unit, which cancels. Exact for log-normal noise; a
    percentile bootstrap covers only 83% at five pairs. Source: Student 1908, on log ratios.
    """
    _check_probability("confidence", confidence)
    above, below = _finite("numerators", numerators, 0.0), _finite("denominators", denominators, 0.0)
    if len(above) != len(below):
        raise ValueError(f"{len(above)} numerators for {len(below)} denominators: they must come in pairs")
    logs = [math.log(a) - math.log(b) for a, b in zip(above, below, strict=True)]
    mean, log_sd = _mean_and_sd(logs)
    num_pairs = len(logs)
    if log_sd is None:
        return Interval(_exp(mean), 0.0, math.inf, num_pairs, None, confidence)
    half = t_quantile((1 + confidence) / 2, num_pairs - 1) * log_sd / math.sqrt(num_pairs)
    return Interval(_exp(mean), _exp(mean - half), _exp(mean + half), num_pairs, log_sd, confidence)


def pairs_needed(log_sd: float, log_distance: float, confidence: float = CONFIDENCE, power: float = 0.9) -> int | None:
    """Pairs of a trial whose interval excludes a bar ``log_distance`` away with probability ``power``.

    ``log_sd``: standard deviation of the log ratios; ``log_distance``: log(true ratio / bar), of
    either sign. None where no number of pairs (up to a billion) would do, so at distance 0. The
    power is that of the one-sided t test at (1 - confidence) / 2, by the noncentral t distribution
    (Cohen 1988, section 2; 34 pairs for an effect of 0.5, 95%, power 0.8).
    """
    _check_probability("confidence", confidence)
    _check_probability("power", power)
    (log_sd,), (log_distance,) = _finite("log_sd", [log_sd]), _finite("log_distance", [log_distance])
    if log_sd < 0:
        raise ValueError(f"log_sd is {log_sd}: a standard deviation is not negative")
    if log_distance == 0:
        return None
    if log_sd == 0:
        return 2

    def reached(num_pairs: int) -> bool:
        from scipy.special import ndtr

        critical = t_quantile((1 + confidence) / 2, num_pairs - 1)
        distance = math.sqrt(num_pairs) * abs(log_distance) / log_sd  # in standard errors
        bends = [(distance + near) / critical for near in (-8, 0, 8)]
        return _mean_over_sd(num_pairs, lambda sd: ndtr(distance - critical * sd), bends) >= power

    spread = (_normal_quantile((1 + confidence) / 2) + _normal_quantile(power)) * log_sd / abs(log_distance)
    return _fewest_pairs(spread, reached)


def tost(differences: Sequence[float], margin: float, alpha: float = 0.05) -> Equivalence:
    """Whether the mean of paired ``differences``, shape (pairs,), lies within +-``margin`` (same unit).

    Two one-sided t tests, each at ``alpha`` (Schuirmann 1987): equivalent if the interval at
    1 - 2 alpha lies inside the margins. One pair shows nothing: infinite interval, p = 1.
    """
    _check_probability("alpha", alpha, most=0.5)
    (margin,) = _finite("margin", [margin], 0.0)
    mean, sd = _mean_and_sd(_finite("differences", differences))
    num_pairs = len(differences)
    if sd is None:
        return Equivalence(mean, -math.inf, math.inf, margin, 1.0, False, num_pairs)
    half = t_quantile(1 - alpha, num_pairs - 1) * sd / math.sqrt(num_pairs)
    low, high = mean - half, mean + half
    if sd == 0:
        p_value = 0.0 if abs(mean) < margin else 1.0
    else:
        from scipy.special import stdtr

        p_value = float(stdtr(num_pairs - 1, (abs(mean) - margin) / (sd / math.sqrt(num_pairs))))
    return Equivalence(mean, low, high, margin, p_value, -margin < low and high < margin, num_pairs)


def tost_power(sd: float, margin: float, num_pairs: int, true_difference: float = 0.0, alpha: float = 0.05) -> float:
    """Probability that :func:`tost` finds equivalence, for normal differences of this ``sd``.

    Exact: both tests share one sample standard deviation, so the chance that the mean falls where
    both reject is averaged over its chi distribution (Phillips 1990; Owen 1965).
    """
    _check_probability("alpha", alpha, most=0.5)
    (margin,), (true_difference,) = _finite("margin", [margin], 0.0), _finite("true_difference", [true_difference])
    (sd,) = _finite("sd", [sd])
    if sd < 0 or num_pairs < 1:
        raise ValueError(f"sd is {sd} and num_pairs {num_pairs}: neither may be that small")
    if num_pairs == 1:
        return 0.0
    if sd == 0:
        return float(abs(true_difference) < margin)
    from scipy.special import ndtr

    error = sd / math.sqrt(num_pairs)
    half = t_quantile(1 - alpha, num_pairs - 1) * error  # the interval's half width where the sample shows sd itself

    def given(sample_sd: float) -> float:
        width = margin - half * sample_sd  # how far from 0 the mean may fall; below 0: nowhere
        inside = ndtr((width - true_difference) / error) - ndtr((-width - true_difference) / error)
        return max(0.0, float(inside))

    bends = [(margin - abs(true_difference) + near * error) / half for near in (-8, 0, 8)]
    return _mean_over_sd(num_pairs, given, [*bends, margin / half])


def tost_pairs_needed(sd: float, margin: float, power: float = 0.9, alpha: float = 0.05) -> int | None:
    """Pairs that :func:`tost` needs to find equivalence with probability ``power`` where there is no difference.

    None beyond a billion.
    """
    _check_probability("power", power)
    _check_probability("alpha", alpha, most=0.5)
    if tost_power(sd, margin, 2, alpha=alpha) >= power:
        return 2
    spread = (_normal_quantile(1 - alpha) + _normal_quantile((1 + power) / 2)) * sd / margin
    return _fewest_pairs(spread, lambda num_pairs: tost_power(sd, margin, num_pairs, alpha=alpha) >= power)


def corpus_seconds(steps: Sequence[Mapping[str, Any]], num_warmup_steps: int, corpus: Mapping[str, float]) -> float:
    """Seconds that one pass over a whole corpus would take: the token-weighted estimate.

    Fits seconds = c0 documents + c1 tokens + c2 tokens_squared, no c below 0, by least squares over
    the lines of ``steps.jsonl`` after the first ``num_warmup_steps``, and evaluates it at the
    corpus's sums (keys ``documents``, ``tokens``, ``tokens_squared``: the sum of each document's
    tokens^2). Source: Lawson and Hanson 1974. ``ValueError`` if the steps do not determine the
    answer: too few, or all alike and unlike the corpus.
    """
    import numpy as np
    from scipy.optimize import nnls

    measured = steps[num_warmup_steps:] if num_warmup_steps >= 0 else ()
    if not measured:
        raise ValueError(f"{len(steps)} steps, of which {num_warmup_steps} warm up: none is left to measure")
    for line in (*measured, corpus):
        needed = _COST_COLUMNS if line is corpus else ("seconds", *_COST_COLUMNS)
        if missing := [key for key in needed if line.get(key) is None]:
            raise ValueError(f"{'the corpus' if line is corpus else 'a step'} has no {', '.join(missing)}")
    seconds = np.array(_finite("seconds", [line["seconds"] for line in measured], 0.0))
    work = np.array([_finite(key, [line[key] for line in measured], 0.0) for key in _COST_COLUMNS]).T
    scale = np.linalg.norm(work, axis=0)  # tokens_squared is a million times documents: bring the columns together
    work, whole = work / scale, np.array([_finite(key, [corpus[key]], 0.0)[0] for key in _COST_COLUMNS]) / scale
    weights, _, _, _ = np.linalg.lstsq(work.T, whole, rcond=1e-9)
    if np.linalg.norm(work.T @ weights - whole) > 1e-6 * np.linalg.norm(whole):
        raise ValueError(f"{len(measured)} measured steps of this make-up do not determine the corpus's time")
    return float(nnls(work, seconds)[0] @ whole)


def _mean_and_sd(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (n - 1), summed exactly: the order of the values cannot matter."""
    if min(values) == max(values):
        return values[0], 0.0 if len(values) > 1 else None
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _mean_over_sd(num_pairs: int, given: Callable[[float], float], bends: Sequence[float]) -> float:
    """Mean of ``given(sample sd / true sd)`` over normal samples: the integral over its chi density.

    ``bends``: where ``given`` turns sharply, which quadrature must not step over. For pairs_needed
    this is the noncentral t distribution by definition: scipy 1.17's own is NaN here and there.
    """
    from scipy.integrate import quad

    degrees = num_pairs - 1
    constant = math.log(2) + degrees / 2 * math.log(degrees / 2) - math.lgamma(degrees / 2)

    def weighted(sd: float) -> float:
        return given(sd) * math.exp(constant + (degrees - 1) * math.log(sd) - degrees * sd**2 / 2)

    reach = 12 / math.sqrt(2 * degrees)  # twelve standard deviations of a sample's sd: beyond is nothing
    least, most = max(0.0, 1 - reach), 1 + reach
    ends = sorted({least, most, *(end for end in (1 - reach / 4, 1.0, 1 + reach / 4, *bends) if least < end < most)})
    return min(1.0, math.fsum(quad(weighted, low, high, epsabs=1e-11)[0] for low, high in pairwise(ends)))


def _fewest_pairs(spread: float, reached: Callable[[int], bool]) -> int | None:
    """The smallest n >= 2 for which ``reached`` holds; ``spread`` squared is the normal answer, near it."""
    if spread > math.sqrt(_MOST_PAIRS):
        return None
    num_pairs = max(2, math.ceil(spread**2))
    if num_pairs >= _NORMAL_FROM_PAIRS:
        return num_pairs
    while num_pairs > 2 and reached(num_pairs - 1):
        num_pairs -= 1
    while not reached(num_pairs):
        num_pairs += 1
    return num_pairs


@lru_cache(maxsize=1024)
def t_quantile(probability: float, degrees: int) -> float:
    """Of Student's t distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _normal_quantile(probability: float) -> float:
    from scipy.special import ndtri

    return float(ndtri(probability))


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:  # two pairs that differ wildly: no upper end that a float can hold
        return math.inf


def _finite(name: str, values: Iterable[float], above: float = -math.inf) -> list[float]:
    checked = [float(value) for value in values]
    if not checked:
        raise ValueError(f"{name}: no values")
    if wrong := [value for value in checked if not math.isfinite(value) or value <= above]:
        raise ValueError(f"{name}: {wrong[0]} is not a finite number" + (f" above {above:g}" if above == 0 else ""))
    return checked


def _check_probability(name: str, value: float, most: float = 1) -> None:
    if not 0 < value < most:
        raise ValueError(f"{name} is {value}: it must lie between 0 and {most:g}")
