import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks import Dataset, Split
from metax.tasks.holdout import corrupt_labels, hold_out

KEY = jax.random.key(0)


def numbered(num, first=0):
    rows = np.arange(first, first + num)
    image = np.broadcast_to(rows[:, None, None, None], (num, 2, 2, 1))
    return Split(image=image.astype(np.uint8), label=rows.astype(np.int32))


def test_the_last_rows_are_held_out_in_order():
    data = hold_out(Dataset(numbered(10), numbered(4, first=50)), 0.3)
    assert data.train.label.tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert data.valid.label.tolist() == [7, 8, 9]
    assert data.test.label.tolist() == [50, 51, 52, 53]
    for split in data:
        assert np.array_equal(split.image[:, 0, 0, 0], split.label)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, 0.01, 0.99, float("nan")])
def test_bad_fractions_are_named(fraction):
    data = Dataset(numbered(10), numbered(2))
    with pytest.raises(ValueError, match=r"hold_out\(fraction=...\).*10 images"):
        hold_out(data, fraction)


def test_a_fraction_of_the_labels_becomes_uniformly_random():
    split = Split(
        image=np.zeros((5000, 1, 1, 1), np.uint8), label=np.full(5000, 3, np.int32)
    )
    noisy = corrupt_labels(split, 0.4, KEY, 5)
    assert noisy.label.dtype == jnp.int32
    assert noisy.image is split.image
    changed = np.asarray(noisy.label) != 3
    # 2000 redrawn, of which a fifth stays: 1600 with a standard deviation of 18
    assert abs(changed.sum() - 1600) < 90
    counts = np.bincount(noisy.label[changed], minlength=5)
    assert counts[3] == 0
    assert np.abs(np.delete(counts, 3) - 400).max() < 90
    # and they are spread over the rows
    assert abs(changed[:2500].sum() - 800) < 100


@pytest.mark.parametrize("fraction", [0.0, 0.25, 1.0])
def test_exactly_the_fraction_is_redrawn(fraction):
    # classes of their own: a new label from 0..1 is never the old one
    split = numbered(40, first=100)
    noisy = corrupt_labels(split, fraction, KEY, 2)
    assert (noisy.label < 2).sum() == fraction * 40


def test_bad_arguments_of_corruption_are_named():
    split = numbered(4)
    with pytest.raises(ValueError, match=r"corrupt_labels\(fraction=...\).*1.5"):
        corrupt_labels(split, 1.5, KEY, 2)
    with pytest.raises(ValueError, match=r"corrupt_labels\(num_classes=...\).*got 0"):
        corrupt_labels(split, 0.5, KEY, 0)
    with pytest.raises(ValueError, match=r"corrupt_labels\(key=...\)"):
        corrupt_labels(split, 0.5, jax.random.PRNGKey(0), 2)
