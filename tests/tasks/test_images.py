"""Augmentations against known pictures, and their draws against stated ranges."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks.colour import colour_jitter
from metax.tasks.images import (
    _STRENGTHS,
    _warp,
    affine,
    cutout,
    horizontal_flip,
    scaling_noise,
    transform_images,
)

KEY = jax.random.key(0)
MEAN, STD = jnp.array([99.0, 88, 77], jnp.float32), jnp.float32(50)
TRACES = []


@jax.jit
def traced_transform(images, strengths, key):
    """One program for all tests that hand it the same shapes and names."""
    TRACES.append(1)
    return transform_images(images, strengths, key, mean=MEAN, std=STD)


BATCH = 6
VALUES = {
    "rotation": 40.0,
    "shear": 40.0,
    "translate": 0.4,
    "zoom": 0.45,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.2,
    "input_scale": 0.3,
    "cutout_length": 4.0,
    "cutout_holes": 2.0,
}


def coded(height=5, width=7, channels=2):
    """No two entries alike, and none zero."""
    size = height * width * channels
    numbers = 1 + jnp.arange(size, dtype=jnp.float32)
    return numbers.reshape(height, width, channels) / size


def warp(image, angle=0.0, lean=0.0, shift=(0.0, 0.0), factor=1.0):
    values = (jnp.float32(value) for value in (angle, lean))
    shift, factor = jnp.array(shift, jnp.float32), jnp.float32(factor)
    return np.asarray(jax.jit(_warp)(image, *values, shift, factor))


def random_batch(channels=3, dtype=np.uint8):
    rng = np.random.default_rng(0)
    images = rng.integers(1, 256, (BATCH, 16, 16, channels), dtype=np.uint8)
    return jnp.asarray(images if dtype == np.uint8 else (images / 255).astype(dtype))


def full(names, value=None):
    return {n: jnp.full(BATCH, VALUES[n] if value is None else value) for n in names}


# affine


@pytest.mark.parametrize("side", [4, 5])
def test_quarter_turns_permute_pixels_counterclockwise(side):
    image = coded(side, side)
    for turns in (-1, 1, 2, 3, 4):
        np.testing.assert_array_equal(
            warp(image, angle=90 * turns), np.rot90(image, turns)
        )


def test_whole_pixels_shift_and_zeros_come_in():
    image = coded()
    got = warp(image, shift=(2, -3))
    np.testing.assert_array_equal(got[2:, :-3], image[:-2, 3:])
    assert not got[:2].any()
    assert not got[:, -3:].any()


def test_zoom_by_three_enlarges_each_pixel_and_a_third_shrinks():
    image = coded(3, 3)
    np.testing.assert_array_equal(
        warp(image, factor=3.0), np.broadcast_to(image[1, 1], (3, 3, 2))
    )
    big = np.kron(np.asarray(coded(3, 3, 1))[..., 0], np.ones((3, 3)))[..., None]
    shrunk = warp(jnp.asarray(big), factor=1 / 3)
    np.testing.assert_array_equal(shrunk[3:6, 3:6], coded(3, 3, 1))
    assert shrunk.sum() == shrunk[3:6, 3:6].sum()


def test_shear_of_45_degrees_moves_each_row_by_its_height():
    image = coded(5, 5, 1)
    got = warp(image, lean=45.0)
    for row in range(5):
        offset = row - 2  # rows below the centre move right
        moved = np.zeros((5, 1), np.float32)
        for column in range(5):
            if 0 <= column - offset < 5:
                moved[column] = image[row, column - offset]
        np.testing.assert_array_equal(got[row], moved)


def test_rotation_comes_after_shear_and_zoom_and_before_the_shift():
    # on a large grid, a blob goes where the formula sends it, within half a pixel
    side, place = 101, np.array([20.0, 10.0])  # right, down, from the centre
    image = jnp.zeros((side, side, 1)).at[50 + 10, 50 + 20].set(1.0)
    image = jax.lax.reduce_window(image, 0.0, jax.lax.max, (3, 3, 1), (1, 1, 1), "SAME")
    angle, lean, shift, factor = 30.0, 20.0, (5.0, -8.0), 1.4
    a, b = np.deg2rad(angle), np.deg2rad(lean)
    shear = np.array([[1, np.tan(b)], [0, 1]])
    turn = np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    expected = factor * turn @ shear @ place + np.array(shift[::-1])
    rows, columns = np.nonzero(warp(image, angle, lean, shift, factor)[..., 0])
    got = np.array([columns.mean(), rows.mean()]) - 50
    # nearest neighbours: the centre of a blob of some twenty pixels is off by less
    np.testing.assert_allclose(got, expected, atol=0.5)


def test_affine_of_zero_strength_is_exactly_the_image():
    image = coded()
    for zero in (0.0, jnp.zeros(())):
        strengths = dict.fromkeys(("rotation", "shear", "translate", "zoom"), zero)
        got = jax.jit(affine)(image, KEY, **strengths)
        assert got.dtype == jnp.float32
        np.testing.assert_array_equal(got, image)


def test_shifts_are_uniform_within_their_strength_in_each_axis():
    num, height, width = 2000, 20, 40
    image = jnp.zeros((height, width, 1), jnp.float32).at[10, 20].set(1.0)
    keys = jax.random.split(KEY, num)
    moved = jax.jit(jax.vmap(lambda key: affine(image, key, translate=0.2)))(keys)
    _, row, column, _ = np.nonzero(np.asarray(moved))
    assert len(row) == num
    for offset, reach in ((row - 10, 0.2 * height), (column - 20, 0.2 * width)):
        assert set(offset) == set(range(-int(reach), int(reach) + 1))
        # rounded uniforms; five standard deviations of the mean
        assert abs(offset.mean()) < 5 * reach / (3 * num) ** 0.5
        # rounding adds a twelfth less what the two half cells at the ends lack
        assert offset.var() == pytest.approx(reach**2 / 3, rel=0.1, abs=1 / 12)
    # the axes are drawn apart
    assert abs(np.corrcoef(row, column)[0, 1]) < 5 / num**0.5


@pytest.mark.parametrize("name", ["rotation", "shear", "zoom"])
def test_every_affine_strength_moves_pixels_within_its_range(name):
    """The greatest draw does no more than the strength says, and comes near it."""
    side, keys = 41, jax.random.split(KEY, 500)
    strength = {"rotation": 30.0, "shear": 30.0, "zoom": 0.4}[name]
    ramp = jnp.arange(side, dtype=jnp.float32) - 20
    # a pixel's value is its place across, so that the centre column tells the source
    image = jnp.broadcast_to(ramp[None, :, None], (side, side, 1)) + 100
    warp_all = jax.jit(jax.vmap(lambda key: affine(image, key, **{name: strength})))
    warped = warp_all(keys)
    if name == "zoom":
        ratio = (np.asarray(warped)[:, 20, 30, 0] - 100) / 10
        low, high = 1 / (1 + strength), 1 / (1 - strength)
    else:
        ratio = (np.asarray(warped)[:, 30, 20, 0] - 100) / 10
        high = np.tan(np.deg2rad(30)) if name == "shear" else np.sin(np.deg2rad(30))
        low = -high
    # sources are whole pixels, a tenth of the lever each: within half of one
    assert low - 0.051 < ratio.min() < low + 0.11
    assert high - 0.11 < ratio.max() < high + 0.051


# flip, scale, cutout


def test_half_of_the_images_are_mirrored():
    image, keys = coded(), jax.random.split(KEY, 4000)
    flipped = jax.jit(jax.vmap(lambda key: horizontal_flip(image, key)))(keys)
    is_same = (flipped == image).all((1, 2, 3))
    is_mirrored = (flipped == image[:, ::-1]).all((1, 2, 3))
    assert (is_same ^ is_mirrored).all()
    # five standard deviations of a binomial frequency
    assert abs(is_mirrored.mean() - 0.5) < 5 * 0.5 / 4000**0.5
    assert horizontal_flip(image.astype(jnp.uint8), KEY).dtype == jnp.uint8


def test_scaling_factor_is_one_an_image_and_uniform_between_its_bounds():
    image, num, strength = coded(), 2000, 0.5
    keys = jax.random.split(KEY, num)
    scaled = jax.vmap(lambda key: scaling_noise(image, key, strength=strength))(keys)
    assert scaled.dtype == jnp.float32
    ratio = np.asarray(scaled / image).reshape(num, -1)
    np.testing.assert_allclose(ratio, ratio[:, :1] * np.ones(ratio.shape[1]), rtol=1e-6)
    low, high = 1 / 1.5, 1.5
    assert low - 1e-6 < ratio.min() < low + 0.01
    assert high - 0.01 < ratio.max() < high + 1e-6
    # five standard deviations of the mean of uniforms
    width = high - low
    assert abs(ratio[:, 0].mean() - (low + high) / 2) < 5 * width / (12 * num) ** 0.5
    np.testing.assert_array_equal(scaling_noise(image, KEY, strength=0.0), image)


@functools.cache
def cut_all(max_holes):
    def cut(key, image, length, holes):
        return cutout(image, key, length=length, holes=holes, max_holes=max_holes)

    return jax.jit(jax.vmap(cut, in_axes=(0, None, 0, 0)))


def holes_cut(length, holes, num=500, side=12, max_holes=4):
    """Masks of the pixels that were cut, [num, side, side]."""
    image, keys = jnp.ones((side, side, 2), jnp.float32), jax.random.split(KEY, num)
    cut = cut_all(max_holes)(
        keys, image, jnp.full(num, float(length)), jnp.full(num, float(holes))
    )
    assert cut.dtype == jnp.float32
    assert (cut[..., 0] == cut[..., 1]).all()
    return np.asarray(cut[..., 0]) == 0


@pytest.mark.parametrize("length", [1, 2, 3, 4.0, 5])
def test_one_hole_is_the_square_of_the_formula_and_clipped_at_the_edges(length):
    side, masks = 12, holes_cut(length, 1)
    rows, columns = masks.any(2), masks.any(1)
    np.testing.assert_array_equal(masks, rows[:, :, None] & columns[:, None, :])
    expected = set()
    for centre in range(side):
        edges = np.clip([centre - length / 2, centre + length / 2], 0, side)
        start, stop = np.trunc(edges).astype(int)
        expected.add(tuple(range(start, stop)))
        if length / 2 <= centre <= side - length / 2:
            assert stop - start == length
    for spans in (rows, columns):
        assert {tuple(np.flatnonzero(span)) for span in spans} == expected
    # and not one-pixel holes at 0, which the formula leaves empty
    is_interior = masks.any((1, 2))
    is_interior &= ~(masks[:, [0, -1]].any((1, 2)) | masks[:, :, [0, -1]].any((1, 2)))
    assert is_interior.any()
    np.testing.assert_array_equal(masks[is_interior].sum((1, 2)), length**2)


def test_centres_are_uniform_over_the_pixels():
    num, side = 4000, 6
    masks = holes_cut(2, 1, num=num, side=side)
    # a hole two pixels wide ends with the pixel of its centre
    row, column = (side - 1 - masks.any(k)[:, ::-1].argmax(1) for k in (2, 1))
    frequency = np.bincount(row * side + column, minlength=side**2) / num
    # five standard deviations of a binomial frequency
    p = 1 / side**2
    assert np.abs(frequency - p).max() < 5 * (p * (1 - p) / num) ** 0.5


@pytest.mark.parametrize("holes", [0, 1, 2, 3, 4])
def test_as_many_pixels_as_holes_are_cut(holes):
    # holes of one pixel on a large image rarely meet or fall off the edge
    counts = holes_cut(1.0, float(holes), side=30).sum((1, 2))
    assert counts.max() == holes
    assert (counts == holes).mean() > 0.7


def test_cutout_of_no_hole_or_no_length_is_the_image():
    assert not holes_cut(8, 0).any()
    assert not holes_cut(0, 4).any()
    assert holes_cut(1, 9, side=30, max_holes=2).sum((1, 2)).max() == 2


# the whole batch


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_without_strengths_a_batch_is_normalised(dtype):
    images, mean, std = random_batch(dtype=dtype), np.array([99.0, 88, 77]), 50.0
    got = transform_images(images, {}, KEY, mean=mean, std=std)
    assert got.dtype == jnp.float32
    expected = (np.asarray(random_batch(), np.float64) - mean) / std
    np.testing.assert_allclose(got, expected, atol=1e-6 * 255 / std)
    raw = transform_images(images, {}, KEY)
    np.testing.assert_allclose(raw, random_batch(), rtol=1e-6)


def test_zero_strengths_only_normalise():
    images = random_batch()
    got = traced_transform(images, full(_STRENGTHS, 0.0), KEY)
    assert got.dtype == jnp.float32
    # the hue of float32 colours, times 255 / 50
    np.testing.assert_allclose(got, (images - MEAN) / STD, atol=2e-5)


def test_transform_is_its_stages_one_after_the_other():
    images = random_batch()
    got = traced_transform(images, full(_STRENGTHS), KEY)
    moves = {n: VALUES[n] for n in ("rotation", "shear", "translate", "zoom")}
    colours = {n: VALUES[n] for n in ("brightness", "contrast", "saturation", "hue")}

    @jax.jit
    def one_by_one(image, key):
        keys = jax.random.split(key, 4)
        x = affine(jnp.asarray(image, jnp.float32) / 255, keys[0], **moves)
        x = (255 * colour_jitter(x, keys[1], **colours) - MEAN) / STD
        x = scaling_noise(x, keys[2], strength=0.3)
        return cutout(x, keys[3], length=4, holes=2)

    expected = [
        one_by_one(image, key)
        for image, key in zip(images, jax.random.split(KEY, BATCH), strict=True)
    ]
    # float32 colours times 255 / 50, fused differently
    np.testing.assert_allclose(got, jnp.stack(expected), atol=2e-5)


def test_holes_are_zero_after_the_normalisation():
    images, strengths = random_batch(), full(["cutout_length"])
    got = transform_images(images, strengths, KEY, mean=300.0, std=1.0)
    is_hole = np.asarray(got == 0).all(-1)
    assert (is_hole.any((1, 2))).all()
    assert (np.asarray(got)[~is_hole] < 0).all()
    # a single hole of at most 4 × 4
    assert is_hole.sum((1, 2)).max() <= 16


@pytest.mark.parametrize("name", [n for n in _STRENGTHS if n != "cutout_holes"])
def test_strengths_reach_the_example_they_belong_to(name):
    """Rows of strength 0 stay, their neighbours change."""
    images, is_on = random_batch(), jnp.arange(BATCH) % 2 == 0
    strengths = full(_STRENGTHS, 0.0) | full(["cutout_holes"], 1.0)
    strengths[name] = jnp.where(is_on, VALUES[name], 0.0)
    got = traced_transform(images, strengths, jax.random.key(2))
    change = np.abs(got - (images - MEAN) / STD).max((1, 2, 3))
    # rounding of float32 colours, times 255 / 50
    np.testing.assert_array_equal(change > 2e-5, is_on)


def test_hole_counts_reach_the_example_they_belong_to():
    counts = jnp.array([0, 1, 2, 3, 4, 0])
    images = jnp.full((BATCH, 64, 64, 1), 255, jnp.uint8)
    strengths = {"cutout_length": jnp.ones(BATCH), "cutout_holes": counts}
    got = jax.jit(transform_images)(images, strengths, jax.random.key(1))
    np.testing.assert_array_equal((got == 0).sum((1, 2, 3)), counts)


def test_images_of_one_batch_get_draws_of_their_own():
    image = jnp.broadcast_to(random_batch()[:1], (BATCH, 16, 16, 3))
    transform = jax.jit(transform_images)
    got = transform(image, {"brightness": 0.5}, KEY)
    assert len({np.asarray(x).tobytes() for x in got}) == BATCH
    again = transform(image, {"brightness": 0.5}, KEY)
    np.testing.assert_array_equal(got, again)


def test_no_gradient_flows_into_strengths():
    total = lambda strengths: transform_images(random_batch(), strengths, KEY).sum()
    for grad in jax.tree.leaves(jax.jit(jax.grad(total))(full(_STRENGTHS))):
        np.testing.assert_array_equal(grad, 0)


def test_new_strengths_do_not_compile_anew():
    traced_transform(random_batch(), full(_STRENGTHS), KEY)
    num_traces = len(TRACES)
    for value in (0.0, 0.1, 0.2):
        traced_transform(random_batch(), full(_STRENGTHS, value), KEY)
    assert len(TRACES) == num_traces


def test_one_channel_takes_all_but_saturation_and_hue():
    names = [name for name in _STRENGTHS if name not in ("saturation", "hue")]
    got = jax.jit(transform_images)(random_batch(channels=1), full(names), KEY)
    assert got.shape == (BATCH, 16, 16, 1)
    for name in ("saturation", "hue"):
        with pytest.raises(ValueError, match=rf"{name}=...\)` needs .*3 .*got 1"):
            transform_images(random_batch(channels=1), full([name]), KEY)


def test_bad_arguments_are_named():
    images = random_batch()
    with pytest.raises(ValueError, match=r"knows rotation, .*cutout_holes; got 'blur'"):
        transform_images(images, {"blur": 1.0}, KEY)
    with pytest.raises(ValueError, match="'cutout_holes' without 'cutout_length'"):
        transform_images(images, full(["cutout_holes"]), KEY)
    with pytest.raises(
        ValueError, match=r"\['hue'\]\)` must .*\(6,\).*got shape \(5,\)"
    ):
        transform_images(images, {"hue": jnp.zeros(5)}, KEY)
    with pytest.raises(
        ValueError, match=r"transform_images\(images=...\).*\(16, 16, 3\)"
    ):
        transform_images(images[0], {}, KEY)
    with pytest.raises(ValueError, match=r"cutout\(max_holes=...\).*got 0"):
        cutout(coded(), KEY, length=1, holes=1, max_holes=0)


@pytest.mark.parametrize(
    "door",
    [
        lambda key: transform_images(random_batch(), {}, key),
        lambda key: affine(coded(), key),
        lambda key: horizontal_flip(coded(), key),
        lambda key: scaling_noise(coded(), key, strength=0.1),
        lambda key: cutout(coded(), key, length=1, holes=1),
    ],
)
def test_raw_keys_are_refused(door):
    with pytest.raises(ValueError, match=r"\(key=...\)` must be made by"):
        door(jax.random.PRNGKey(0))
