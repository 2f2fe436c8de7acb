import numpy as np
import pytest

from metax.harness import (
    Interval,
    bootstrap_interval,
    iqm,
    mean_interval,
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
