"""Few numbers, honestly summarised: intervals for means, and comparisons in pairs.

All of it is numpy in float64 on the host. A value that is not finite is an error: a
diverged run must be counted in the open, never averaged away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Interval",
    "bootstrap_interval",
    "iqm",
    "mean_interval",
    "paired_difference",
]


class Interval(NamedTuple):
    """An estimate and how far to trust it.

    Attributes:
      estimate: the number itself.
      low: lower end of its confidence interval.
      high: upper end.
    """

    estimate: float
    low: float
    high: float


def mean_interval(values: Any, level: float = 0.95) -> Interval:
    """The mean with Student's t interval.

        m ± t_{(1 + level) / 2, n - 1} · s / √n,     s² = Σ (x_i - m)² / (n - 1)

    Exact for normal values; with the three to ten seeds of a usual table it is wider,
    and more often right, than a bootstrap.

    Args:
      values: [n], n at least 2, finite.
      level: coverage, inside (0, 1).

    Returns:
      The mean and its interval.

    Raises:
      ValueError: fewer than two values, one that is not finite, or a level outside.

    Example:
      >>> [round(x, 3) for x in mean_interval([1.0, 2.0, 3.0])]
      [2.0, -0.484, 4.484]
    """
    # scipy comes with jax; numpy has no quantiles of Student's t
    from scipy.special import stdtrit

    values = _sample(values, "mean_interval(values=...)")
    _check_level(level, "mean_interval")
    quantile = stdtrit(len(values) - 1, (1 + level) / 2)
    half = quantile * values.std(ddof=1) / np.sqrt(len(values))
    mean = values.mean()
    return Interval(float(mean), float(mean - half), float(mean + half))


def bootstrap_interval(
    values: Any,
    statistic: Callable[[np.ndarray], Any] = np.mean,
    level: float = 0.95,
    num_resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Any statistic with its percentile bootstrap interval.

    The ends are the (1 - level) / 2 and (1 + level) / 2 quantiles of the statistic over
    resamples drawn with replacement. For a mean of fewer than about ten values
    `mean_interval` covers better.

    Args:
      values: [n], n at least 2, finite.
      statistic: maps an array [n] to a number.
      level: coverage, inside (0, 1).
      num_resamples: at least 1; the default fixes about two digits of the ends.
      seed: of the resampling, so that a table can be printed twice.

    Returns:
      The statistic of `values` and its interval.

    Raises:
      ValueError: fewer than two values, one that is not finite, or a level outside.
    """
    values = _sample(values, "bootstrap_interval(values=...)")
    _check_level(level, "bootstrap_interval")
    if num_resamples < 1:
        raise ValueError(
            "`bootstrap_interval(num_resamples=...)` must be at least 1; got "
            f"{num_resamples}."
        )
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(values), size=(num_resamples, len(values)))
    resampled = [statistic(sample) for sample in values[chosen]]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(statistic(values)), float(low), float(high))


def iqm(values: Any) -> float:
    """The interquartile mean: what is left when a quarter is cut off at each end.

    As in rliable, ⌊n / 4⌋ whole values are cut at each end, with no fractional weights
    (`scipy.stats.trim_mean(values, 0.25)`): with fewer than four values this is the
    mean.

    Args:
      values: any shape, taken as one sample; at least 2 values, finite.

    Returns:
      The mean of the middle half.

    Raises:
      ValueError: fewer than two values, or one that is not finite.

    Reference:
      Agarwal et al., Deep Reinforcement Learning at the Edge of the Statistical
      Precipice, 2021, arXiv:2108.13264, section 4.3.
    """
    values = np.sort(_sample(np.ravel(values), "iqm(values=...)"))
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def paired_difference(a: Any, b: Any, level: float = 0.95) -> Interval:
    """The mean of `a - b` with Student's t interval over the pairs.

    Pairs that share a seed share their noise, which the difference removes: the
    interval is that of a paired t-test, and 0 outside of it is a difference at 1 -
    level.

    Args:
      a: [n], n at least 2, finite.
      b: [n], the partners of `a` in the same order.
      level: coverage, inside (0, 1).

    Returns:
      The mean difference and its interval.

    Raises:
      ValueError: the lengths differ, fewer than two pairs, a value that is not finite,
        or a level outside.
    """
    a = _sample(a, "paired_difference(a=...)")
    b = _sample(b, "paired_difference(b=...)")
    if len(a) != len(b):
        raise ValueError(
            "`paired_difference(a=..., b=...)` must have as many values on either "
            f"side; got {len(a)} and {len(b)}."
        )
    return mean_interval(a - b, level)


def _sample(values: Any, argument: str) -> np.ndarray:
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(
            f"`{argument}` must be one axis of at least 2 values; got shape "
            f"{list(values.shape)}."
        )
    num_bad = int((~np.isfinite(values)).sum())
    if num_bad:
        raise ValueError(
            f"`{argument}` must be finite; got {num_bad} of {len(values)} values that "
            "are not. Report diverged runs apart, then pass the others."
        )
    return values


def _check_level(level: float, function: str) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`{function}(level=...)` must lie in (0, 1); got {level}.")
