import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from metax.harness import (
    Interval,
    bootstrap_interval,
    iqm,
    mean_interval,
    mixed_effects,
    optimization_stability,
    paired_difference,
)


def test_two_values_have_the_cauchy_quantile():
    # n = 2, one degree of freedom: t_{0.975} = tan(0.475 π), s / √n = 1
    interval = mean_interval([1.0, 3.0])
    half = np.tan(0.475 * np.pi)
    np.testing.assert_allclose(interval, (2.0, 2.0 - half, 2.0 + half), rtol=1e-12)


def test_three_values_have_the_closed_quantile():
    # two degrees of freedom: t_p = (2p - 1) √(2 / (4p (1 - p)))
    p = 0.95
    quantile = (2 * p - 1) * np.sqrt(2 / (4 * p * (1 - p)))
    interval = mean_interval([1.0, 2.0, 3.0], level=0.9)
    half = quantile / np.sqrt(3)
    np.testing.assert_allclose(interval, (2.0, 2.0 - half, 2.0 + half), rtol=1e-12)


def test_ten_values_have_the_tabled_quantile():
    values = np.arange(10.0)
    half = 2.262157 * values.std(ddof=1) / np.sqrt(10)
    # the table has seven digits
    assert mean_interval(values).high == pytest.approx(4.5 + half, rel=1e-6)


def test_mean_interval_covers_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(size=(2000, 4))
    intervals = [mean_interval(sample, level=0.9) for sample in samples]
    covered = np.mean([i.low <= 0 <= i.high for i in intervals])
    # four standard errors of a proportion over 2000 samples
    assert abs(covered - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 2000)


def test_bootstrap_of_many_values_is_the_normal_interval():
    values = np.random.default_rng(1).normal(size=400)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.estimate == values.mean()
    # 10 000 resamples fix the ends of the interval to a few per cent of its width
    assert interval.high - values.mean() == pytest.approx(half, rel=0.08)
    assert values.mean() - interval.low == pytest.approx(half, rel=0.08)


def test_bootstrap_of_two_values_is_their_span():
    # a quarter of the resamples is (a, a), a quarter (b, b): both beyond 2.5 %
    assert bootstrap_interval([1.0, 2.0]) == Interval(1.5, 1.0, 2.0)


def test_bootstrap_takes_any_statistic_and_repeats_itself():
    values = np.random.default_rng(2).normal(size=20)
    interval = bootstrap_interval(values, statistic=iqm, num_resamples=200)
    assert interval.estimate == iqm(values)
    assert interval.low < interval.estimate < interval.high
    again = bootstrap_interval(values, statistic=iqm, num_resamples=200)
    assert again == interval
    other = bootstrap_interval(values, statistic=iqm, num_resamples=200, seed=1)
    assert other != interval


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([9.0, 1.0, 2.0, -50.0], 1.5),
        ([0.0, 3.0], 1.5),
        ([5.0, 1.0, 2.0, 3.0, 100.0], 10 / 3),
        (np.arange(8.0).reshape(2, 4), 3.5),
        ([0.0, 0.0, 1.0, 2.0, 6.0, 7.0, 50.0, 90.0], 4.0),
    ],
)
def test_iqm_is_the_mean_of_the_middle_half(values, wanted):
    assert iqm(values) == pytest.approx(wanted, rel=1e-12)


def test_pairing_removes_shared_noise():
    noise = 100 * np.random.default_rng(3).normal(size=6)
    a, b = noise + np.array([2.0, 1.0, 2.0, 1.0, 2.0, 1.0]), noise
    paired = paired_difference(a, b)
    # the noise is about 100, so the differences are exact to about 1e-13
    assert paired.estimate == pytest.approx(1.5, abs=1e-12)
    assert 0 < paired.low < 1.5 < paired.high < 3
    unpaired = mean_interval(a)
    assert unpaired.high - unpaired.low > 50 * (paired.high - paired.low)


@pytest.mark.parametrize(
    "function",
    [mean_interval, bootstrap_interval, iqm, lambda x: paired_difference(x, x)],
)
@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.0], "at least 2 values"),
        ([], "at least 2 values"),
        ([1.0, np.nan], "must be finite; got 1 of 2"),
        ([1.0, np.inf, -np.inf], "must be finite; got 2 of 3"),
    ],
)
def test_too_few_or_diverged_values_are_refused(function, values, message):
    with pytest.raises(ValueError, match=message):
        function(values)


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"mean_interval\(level=...\).*got 95"):
        mean_interval([1.0, 2.0], level=95)
    with pytest.raises(ValueError, match=r"bootstrap_interval\(level=...\)"):
        bootstrap_interval([1.0, 2.0], level=0.0)
    with pytest.raises(ValueError, match=r"bootstrap_interval\(num_resamples=...\)"):
        bootstrap_interval([1.0, 2.0], num_resamples=0)
    with pytest.raises(ValueError, match=r"paired_difference.*got 2 and 3"):
        paired_difference([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="one axis"):
        mean_interval(np.ones((2, 2)))


def test_two_by_two_mixed_effects_by_hand():
    # means 2 and 6; MSW = (2 + 2) / 2 = 2, MSB = 2 · (4 + 4) / 1 = 16
    result = mixed_effects([[1.0, 3.0], [5.0, 7.0]])
    half = np.tan(0.475 * np.pi) * np.sqrt(16 / 4)  # t of one degree is Cauchy
    expected = (4.0, 4 - half, 4 + half, np.sqrt(7.0), np.sqrt(2.0))
    np.testing.assert_allclose(result, expected, rtol=1e-12)


def test_replicates_that_differ_less_than_chance_have_meta_stability_zero():
    result = mixed_effects([[1.0, 3.0], [3.0, 1.0]])
    assert result.meta_stability == 0.0
    assert result.evaluation_stability == pytest.approx(np.sqrt(2.0))


def simulate(num, sd_a, sd_e, shape=(8, 10)):
    rng = np.random.default_rng(0)
    a = sd_a * rng.normal(size=(num, shape[0], 1))
    return 1.5 + a + sd_e * rng.normal(size=(num, *shape))


def test_mixed_effects_recover_both_standard_deviations():
    results = [mixed_effects(values) for values in simulate(200, 0.3, 0.1)]
    # the median of 200 is known to 2 %; sd(a) of eight replicates is 4 % low
    assert np.median([r.meta_stability for r in results]) == pytest.approx(0.3, rel=0.1)
    evaluation = np.median([r.evaluation_stability for r in results])
    assert evaluation == pytest.approx(0.1, rel=0.1)


def test_interval_of_mixed_effects_covers_as_often_as_it_says():
    results = [mixed_effects(v, level=0.9) for v in simulate(1000, 0.3, 0.5, (4, 3))]
    covered = np.mean([r.ci_low <= 1.5 <= r.ci_high for r in results])
    # four standard errors of a proportion over 1000 samples
    assert abs(covered - 0.9) < 4 * np.sqrt(0.9 * 0.1 / 1000)


@pytest.mark.parametrize("sigma", [2.0, 0.7, 3.3])
@pytest.mark.parametrize("epochs", [2, 5, 25])
def test_optimization_stability_filters_as_scipy_does(sigma, epochs):
    losses = np.random.default_rng(0).lognormal(-3, 1, size=(3, 4, epochs))
    smooth = gaussian_filter1d(losses, sigma, axis=-1, mode="nearest", truncate=4.0)
    expected = np.std(np.log(smooth) - np.log(losses), axis=-1)
    result = optimization_stability(losses, sigma=sigma)
    assert result.shape == (3, 4)
    np.testing.assert_allclose(result, expected, rtol=1e-6)


def test_optimization_stability_smooths_before_the_logarithm():
    losses = np.random.default_rng(0).lognormal(-3, 1, size=25)
    late = np.std(
        gaussian_filter1d(np.log(losses), 2.0, mode="nearest") - np.log(losses)
    )
    assert abs(optimization_stability(losses) - late) > 0.01
    # and does not change with the unit of the loss
    scaled = optimization_stability(1000 * losses)
    np.testing.assert_allclose(scaled, optimization_stability(losses), rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_diverged_runs_are_named(bad):
    values = np.ones((3, 4))
    values[1, 2] = bad
    with pytest.raises(
        ValueError, match="at replicate 1, evaluation 2 .*one of 1 such among 12"
    ):
        mixed_effects(values)
    losses = np.ones((3, 4, 5))
    losses[2, 1, 3] = bad
    with pytest.raises(
        ValueError, match=f"got {bad} at replicate 2, evaluation 1, epoch 3"
    ):
        optimization_stability(losses)
    with pytest.raises(
        ValueError, match="got 0.0 at axis 0 index 1, replicate 0, evaluation 0"
    ):
        optimization_stability(np.stack([np.ones((2, 2, 5)), np.zeros((2, 2, 5))]))


def test_bad_arguments_of_stability_are_named():
    with pytest.raises(
        ValueError, match=r"mixed_effects\(values=...\).*shape \[1, 4\]"
    ):
        mixed_effects(np.ones((1, 4)))
    with pytest.raises(ValueError, match=r"mixed_effects\(values=...\).*shape \[4\]"):
        mixed_effects(np.ones(4))
    with pytest.raises(ValueError, match=r"mixed_effects\(level=...\).*got 95"):
        mixed_effects(np.ones((2, 2)), level=95)
    with pytest.raises(ValueError, match=r"optimization_stability\(sigma=...\).*got 0"):
        optimization_stability(np.ones(5), sigma=0)
    with pytest.raises(
        ValueError, match=r"optimization_stability\(losses=...\).*shape \[1\]"
    ):
        optimization_stability(np.ones(1))
