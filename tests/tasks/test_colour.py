"""Colour changes against their definitions, matplotlib's HSV, and their ranges."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

from metax.tasks.colour import _NAMES, _recolour, colour_jitter

KEY = jax.random.key(0)
NO_ORDER = jnp.zeros(4, jnp.float32)
GREY = np.array([0.299, 0.587, 0.114])
RECOLOUR = jax.jit(_recolour)
ROUNDING = 2e-6  # a few operations in float32 on numbers up to 6


def random_image(seed=0, channels=3):
    shape = (5, 6, channels)
    return np.random.default_rng(seed).random(shape).astype(np.float32)


def recolour(image, times=NO_ORDER, **changes):
    changes = {name: jnp.float32(change) for name, change in changes.items()}
    return np.asarray(RECOLOUR(jnp.asarray(image), changes, times))


def by_hand(image, name, change):
    """One change in double precision, from the definitions."""
    x = image.astype(np.float64)
    if name == "hue":
        hsv = rgb_to_hsv(x)
        hsv[..., 0] = (hsv[..., 0] + change) % 1
        return hsv_to_rgb(hsv)
    grey = (x @ GREY)[..., None]
    target = {"brightness": 0.0, "contrast": grey.mean(), "saturation": grey}[name]
    return np.clip((1 + change) * x - change * target, 0, 1)


@pytest.mark.parametrize("name", _NAMES)
@pytest.mark.parametrize("change", [-0.4, 0.3])
def test_one_change_is_its_definition(name, change):
    image = random_image()
    expected = by_hand(image, name, change)
    np.testing.assert_allclose(
        recolour(image, **{name: change}), expected, atol=ROUNDING
    )


def test_brightness_factor_of_a_half_halves():
    image = random_image()
    np.testing.assert_allclose(recolour(image, brightness=-0.5), image / 2, rtol=1e-6)


def test_saturation_factor_of_zero_is_grey_and_contrast_of_zero_is_flat():
    image = random_image()
    grey = np.repeat((image @ GREY)[..., None], 3, axis=-1)
    np.testing.assert_allclose(recolour(image, saturation=-1), grey, atol=1e-6)
    flat = np.full_like(image, grey.mean())
    np.testing.assert_allclose(recolour(image, contrast=-1), flat, atol=1e-6)


def test_hue_turns_red_to_green_to_blue_and_a_full_turn_is_nothing():
    red, green, blue = np.eye(3, dtype=np.float32)[:, None, None]
    third = 1 / 3
    np.testing.assert_allclose(recolour(red, hue=third), green, atol=1e-6)
    np.testing.assert_allclose(recolour(red, hue=-third), blue, atol=1e-6)
    np.testing.assert_allclose(recolour(green, hue=third), blue, atol=1e-6)
    image = random_image()
    for turn in (-1.0, 1.0):
        np.testing.assert_allclose(recolour(image, hue=turn), image, atol=ROUNDING)


def test_hue_equals_hsv_of_matplotlib_for_random_and_special_colours():
    special = np.array(list(itertools.product([0, 0.5, 1], repeat=3)), np.float32)
    for colours in (np.random.default_rng(1).random((999, 3)).astype("f4"), special):
        for turn in (-0.5, -0.2, 0.0, 0.35):
            np.testing.assert_allclose(
                recolour(colours[None], hue=turn)[0],
                by_hand(colours, "hue", turn),
                atol=ROUNDING,
            )


def test_each_of_the_24_orders_is_that_of_the_times():
    changes = {"brightness": 0.4, "contrast": -0.5, "saturation": 0.6, "hue": 0.3}
    image, seen = random_image(), set()
    for order in itertools.permutations(range(4)):
        times = np.empty(4, np.float32)
        times[list(order)] = [0.1, 0.3, 0.6, 0.9]
        expected = image
        for place in order:
            expected = by_hand(expected, _NAMES[place], changes[_NAMES[place]])
        got = recolour(image, times, **changes)
        # a colour near grey has an ill-conditioned hue, and the errors of four add up
        np.testing.assert_allclose(got, expected, atol=1e-5)
        seen.add(got.round(3).tobytes())
    # brightness and contrast, say, need not commute, so most orders differ
    assert len(seen) > 12


def test_order_is_uniform_over_the_pairs():
    # one grey pixel pair: brightness then contrast differs from the reverse by clipping
    image = jnp.array([[[0.9] * 3, [0.1] * 3]], jnp.float32)
    keys = jax.random.split(KEY, 2000)
    jitter = lambda key: colour_jitter(image, key, brightness=1.0, contrast=1.0)
    got = jax.jit(jax.vmap(jitter))(keys)

    def forced(key, first):
        key_change, _ = jax.random.split(key)
        draws = jax.random.uniform(key_change, (4,), jnp.float32, -1, 1)
        times = jnp.zeros(4).at[1 - first].set(1.0)
        changes = {"brightness": draws[0], "contrast": draws[1]}
        return _recolour(image, changes, times)

    forced = jax.jit(jax.vmap(forced, in_axes=(0, None)))
    error = [np.abs(forced(keys, first) - got).max((1, 2, 3)) for first in (0, 1)]
    # float32 rounding of two blends; where the orders agree nothing can be told
    assert (np.minimum(*error) < 1e-6).all()
    is_told = np.maximum(*error) > 1e-3
    is_first = error[0][is_told] < error[1][is_told]
    assert is_told.sum() > 500
    # five standard deviations of a binomial frequency
    assert abs(is_first.mean() - 0.5) < 5 * 0.5 / is_told.sum() ** 0.5


@pytest.mark.parametrize("is_traced", [False, True])
def test_zero_strengths_change_nothing(is_traced):
    image = random_image()
    zero = jnp.zeros(()) if is_traced else 0.0
    strengths = dict.fromkeys(_NAMES, zero)
    jitter = jax.jit(lambda x, key, values: colour_jitter(x, key, **values))
    got = jitter(image, KEY, strengths) if is_traced else colour_jitter(image, KEY)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, image, atol=ROUNDING if is_traced else 0)


def test_results_stay_between_zero_and_one():
    keys = jax.random.split(KEY, 1000)
    strengths = {"brightness": 1.0, "contrast": 1.0, "saturation": 1.0, "hue": 0.5}
    image = jnp.asarray(random_image())
    got = jax.jit(jax.vmap(lambda key: colour_jitter(image, key, **strengths)))(keys)
    assert got.dtype == jnp.float32
    assert np.isfinite(got).all()
    assert got.min() == 0
    assert got.max() == 1


def test_factors_and_turns_are_uniform_within_their_strengths():
    keys, num = jax.random.split(KEY, 2000), 2000
    pixel = jnp.array([[[0.5, 0.25, 0.25]]], jnp.float32)
    brighten = lambda key: colour_jitter(pixel, key, brightness=0.4)
    turn_hue = lambda key: colour_jitter(pixel, key, hue=0.25)
    bright, hued = (jax.jit(jax.vmap(change))(keys) for change in (brighten, turn_hue))
    factor = np.asarray(bright[:, 0, 0, 0]) / 0.5
    turn = (rgb_to_hsv(np.asarray(hued))[:, 0, 0, 0] + 0.5) % 1 - 0.5
    for draw, low, high in ((factor, 0.6, 1.4), (turn, -0.25, 0.25)):
        assert draw.min() > low - 1e-6
        assert draw.max() < high + 1e-6
        # five standard deviations of the mean, and 12 variances of a uniform
        width = high - low
        assert abs(draw.mean() - (low + high) / 2) < 5 * width / (12 * num) ** 0.5
        # 5 standard deviations of the variance of 2,000 uniforms are 10 %
        assert draw.var() == pytest.approx(width**2 / 12, rel=0.1)


def test_one_strength_does_not_alter_the_draw_of_another():
    image = random_image()
    alone = jax.jit(colour_jitter)(image, KEY, hue=0.3)
    beside = jax.jit(colour_jitter)(image, KEY, hue=0.3, brightness=0.0)
    np.testing.assert_allclose(alone, beside, atol=ROUNDING)


def test_one_channel_takes_brightness_and_contrast():
    image = random_image(channels=1)
    got = colour_jitter(image, KEY, brightness=0.5, contrast=0.5)
    assert got.shape == image.shape
    flat = recolour(image, contrast=-1)
    np.testing.assert_allclose(flat, np.full_like(image, image.mean()), atol=1e-6)


@pytest.mark.parametrize(("name", "channels"), [("hue", 1), ("saturation", 1)])
def test_colours_of_grey_images_are_refused(name, channels):
    image = random_image(channels=channels)
    with pytest.raises(
        ValueError, match=rf"colour_jitter\({name}=...\).*got {channels}"
    ):
        colour_jitter(image, KEY, **{name: jnp.zeros(())})


def test_other_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"brightness=...\)` needs.* 1 or 3 .*got 2"):
        colour_jitter(random_image(channels=2), KEY, brightness=0.1)
    with pytest.raises(ValueError, match=r"colour_jitter\(key=...\)"):
        colour_jitter(random_image(), jax.random.PRNGKey(0))
