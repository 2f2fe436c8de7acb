"""Few numbers, honestly summarised: intervals for means, comparisons, stability.

All of it is numpy in float64 on the host. A value that is not finite is an error: a
diverged run must be counted in the open, never averaged away.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Interval",
    "MixedEffects",
    "bootstrap_interval",
    "iqm",
    "mean_interval",
    "mixed_effects",
    "optimization_stability",
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


class MixedEffects(NamedTuple):
    """A mean over replicates, and from where the scatter around it comes.

    Attributes:
      mean: over all replicates and evaluations.
      ci_low: lower end of its confidence interval.
      ci_high: upper end.
      meta_stability: standard deviation between replicates.
      evaluation_stability: standard deviation between evaluations of one replicate.
    """

    mean: float
    ci_low: float
    ci_high: float
    meta_stability: float
    evaluation_stability: float


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
      ValueError: fewer than two values, one that is not finite, a level outside, or a
        negative seed.
    """
    values = _sample(values, "bootstrap_interval(values=...)")
    _check_level(level, "bootstrap_interval")
    if num_resamples < 1:
        raise ValueError(
            "`bootstrap_interval(num_resamples=...)` must be at least 1; got "
            f"{num_resamples}."
        )
    if seed < 0:
        raise ValueError(
            f"`bootstrap_interval(seed=...)` must be at least 0; got {seed}."
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


def mixed_effects(values: Any, *, level: float = 0.95) -> MixedEffects:
    """Parts what training a method anew changes from what evaluating it anew changes.

        y_ij = μ + a_i + e_ij,     i = 1..R replicates,  j = 1..n evaluations

    Balanced, so in closed form, with ȳ_i the mean of a replicate and ȳ that of all:

        MSW = Σ_ij (y_ij - ȳ_i)² / (R (n - 1)),     MSB = n Σ_i (ȳ_i - ȳ)² / (R - 1)
        sd(e)² = MSW,     sd(a)² = max(0, (MSB - MSW) / n)
        ȳ ± t_{(1 + level) / 2, R - 1} · √(MSB / (R n))

    The interval counts replicates: more evaluations of the same ones do not narrow it
    beyond what the scatter between replicates allows. With few replicates sd(a) is
    rough, to about 25 % for eight, and it is 0 where they differ less than chance.

    Args:
      values: [R, n], replicates by evaluations, both at least 2, finite.
      level: coverage, inside (0, 1).

    Returns:
      The mean, its interval and the two standard deviations.

    Raises:
      ValueError: another shape, a level outside, or a value that is not finite; the
        sentence names its replicate and evaluation.

    Example:
      >>> [round(x, 3) for x in mixed_effects([[1.0, 3.0], [5.0, 7.0]])]
      [4.0, -21.412, 29.412, 2.646, 1.414]

    Reference:
      Huang et al., Optimizer Amalgamation, 2022, arXiv:2203.06474, equation 9.
    """
    from scipy.special import stdtrit

    values = np.asarray(values, dtype=np.float64)
    _check_level(level, "mixed_effects")
    if values.ndim != 2 or min(values.shape) < 2:
        raise ValueError(
            "`mixed_effects(values=...)` must have at least 2 replicates of at least 2 "
            f"evaluations; got shape {list(values.shape)}."
        )
    names = ("replicate", "evaluation")
    rule = "`mixed_effects(values=...)` must be finite"
    _check_each(values, np.isfinite(values), names, rule)
    replicates, evaluations = values.shape
    means = values.mean(axis=1)
    within = values.var(axis=1, ddof=1).mean()
    between = evaluations * means.var(ddof=1)
    mean = means.mean()
    quantile = stdtrit(replicates - 1, (1 + level) / 2)
    half = quantile * np.sqrt(between / values.size)
    return MixedEffects(
        mean=float(mean),
        ci_low=float(mean - half),
        ci_high=float(mean + half),
        meta_stability=float(np.sqrt(max(0.0, (between - within) / evaluations))),
        evaluation_stability=float(np.sqrt(within)),
    )


def optimization_stability(losses: Any, *, sigma: float = 2.0) -> np.ndarray:
    """How far a run strays from its own smoothed course, one number a run.

        ln L(t) = S(t) + u(t),     S = ln (G * L),     the result is sd_t(S - ln L)

    the sd with 1/T over the T epochs. G is a Gaussian of `sigma` epochs, cut at 4
    sigma; before the first epoch and after the last the loss continues as it is there.
    The raw loss is smoothed and the logarithm taken after, as the authors' program
    does. `mixed_effects` of the results, replicates by evaluations, gives their mean
    and its interval.

    Args:
      losses: [..., epochs], the loss of each epoch, at least 2 of them, above 0 and
        finite.
      sigma: width of the filter in epochs, above 0.

    Returns:
      [...], standard deviations in units of ln loss.

    Raises:
      ValueError: another shape, a sigma not above 0, or a loss that is not above 0 or
        not finite; the sentence names its replicate, evaluation and epoch.

    Example:
      >>> calm, nervous = [4.0, 4.0, 4.0, 4.0], [4.0, 2.0, 4.0, 2.0]
      >>> optimization_stability([calm, nervous]).round(3).tolist()
      [0.0, 0.314]

    Reference:
      Huang et al., Optimizer Amalgamation, 2022, arXiv:2203.06474, equation 10.
    """
    losses = np.asarray(losses, dtype=np.float64)
    if losses.ndim < 1 or losses.shape[-1] < 2:
        raise ValueError(
            "`optimization_stability(losses=...)` must have a last axis of at least 2 "
            f"epochs; got shape {list(losses.shape)}."
        )
    if not (sigma > 0 and np.isfinite(sigma)):
        raise ValueError(
            "`optimization_stability(sigma=...)` must be above 0 and finite; got "
            f"{sigma}."
        )
    more = [f"axis {axis} index" for axis in range(losses.ndim - 3)]
    runs = ["replicate", "evaluation"][: losses.ndim - 1]
    is_fine = np.isfinite(losses) & (losses > 0)
    rule = "`optimization_stability(losses=...)` must be finite and above 0"
    _check_each(losses, is_fine, (*more, *runs, "epoch"), rule)
    return (np.log(_smooth(losses, sigma)) - np.log(losses)).std(axis=-1)


def _smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian filter along the last axis, whose ends continue beyond themselves."""
    radius = int(4 * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2)
    epochs = np.arange(values.shape[-1])
    around = np.clip(epochs[:, None] + offsets, 0, epochs[-1])
    return values[..., around] @ (weights / weights.sum())


def _sample(values: Any, argument: str) -> np.ndarray:
    try:
        values = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`{argument}` must hold numbers; got {error}.") from error
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


def _check_each(
    values: np.ndarray, is_fine: np.ndarray, names: tuple[str, ...], rule: str
) -> None:
    bad = np.argwhere(~is_fine)
    if len(bad):
        place = [f"{name} {i}" for name, i in zip(names, bad[0], strict=True)]
        raise ValueError(
            f"{rule}; got {values[tuple(bad[0])]} at {', '.join(place)} (from 0), one "
            f"of {len(bad)} such among {values.size} values. Report diverged runs "
            "apart, then pass the others."
        )


def _check_level(level: float, function: str) -> None:
    if not 0 < level < 1:
        raise ValueError(f"`{function}(level=...)` must lie in (0, 1); got {level}.")
