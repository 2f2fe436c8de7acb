import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks import Split, crop_and_flip

KEY = jax.random.key(0)


def coded(num):
    """Images whose pixels tell their place, so that a shift can be read off."""
    one = 1 + np.arange(5 * 6, dtype=np.uint8).reshape(5, 6, 1)
    return Split(image=jnp.asarray(np.stack([one] * num)), label=jnp.arange(num))


def windows(image, pad):
    framed = np.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    height, width, _ = image.shape
    return {
        bytes(np.ascontiguousarray(view[row : row + height, column : column + width]))
        for view in (framed, np.pad(image[:, ::-1], ((pad, pad), (pad, pad), (0, 0))))
        for row in range(2 * pad + 1)
        for column in range(2 * pad + 1)
    }


def test_every_window_occurs_and_nothing_else():
    batch = coded(2000)
    augmented = jax.jit(crop_and_flip(pad=1))(batch, KEY)
    assert augmented.image.shape == batch.image.shape
    assert augmented.image.dtype == np.uint8
    np.testing.assert_array_equal(augmented.label, batch.label)
    seen = {bytes(np.asarray(image)) for image in augmented.image}
    # 2 · 3 · 3 windows, each drawn about 111 times
    assert seen == windows(np.asarray(batch.image[0]), 1)
    assert len(seen) == 18


def test_half_of_the_images_are_flipped():
    batch = coded(4000)
    image = crop_and_flip(pad=0)(batch, KEY).image
    is_flipped = (image == batch.image[:, :, ::-1]).all((1, 2, 3))
    is_same = (image == batch.image).all((1, 2, 3))
    assert (is_flipped ^ is_same).all()
    # five standard deviations of a binomial frequency
    assert is_flipped.mean() == pytest.approx(0.5, abs=5 * 0.5 / 4000**0.5)


def test_images_change_with_the_key():
    augment, batch = crop_and_flip(), coded(8)
    first = augment(batch, KEY).image
    np.testing.assert_array_equal(first, augment(batch, KEY).image)
    assert not np.array_equal(first, augment(batch, jax.random.key(1)).image)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"`crop_and_flip\(pad=...\)`.*got -1"):
        crop_and_flip(-1)
    with pytest.raises(ValueError, match=r"crop_and_flip\(...\)\(key=...\)"):
        crop_and_flip()(coded(2), jax.random.PRNGKey(0))
