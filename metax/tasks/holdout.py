"""Data for tuning: a validation part, and labels that call for regularisation."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_has, check_length
from metax.base import check_key
from metax.tasks.data import Dataset, Split

__all__ = ["TuningData", "corrupt_labels", "hold_out"]


class TuningData(NamedTuple):
    """What a run of tuning reads.

    Attributes:
      train: what the weights are fitted to.
      valid: what the hyperparameters are chosen by.
      test: what neither sees.
    """

    train: Split
    valid: Split
    test: Split


def hold_out(data: Dataset, fraction: float) -> TuningData:
    """Takes the last part of the training set for validation.

    Args:
      data: a set, as from `load`.
      fraction: of the training set, between 0 and 1; 0.15 or 0.2 is customary.

    Returns:
      The three parts; the order of the images is kept.

    Raises:
      ValueError: `fraction` is not between 0 and 1, or a part would be empty.

    Example:
      >>> from metax.tasks import load
      >>> from metax.tasks import hold_out
      >>> [len(split.label) for split in hold_out(load("digits"), 0.15)]
      [1221, 216, 360]
    """
    check_has("hold_out", "data", data, "a `Dataset`", "train", "test")
    check_length("hold_out", "data", data.train)
    num = len(data.train.label)
    num_valid = round(num * fraction) if 0 < fraction < 1 else 0
    if not 0 < num_valid < num:
        raise ValueError(
            "`hold_out(fraction=...)` must be between 0 and 1 and leave an image on "
            f"either side; got fraction={fraction}, {num} images."
        )
    cut = num - num_valid
    train, valid = Split(*(x[:cut] for x in data.train)), [x[cut:] for x in data.train]
    return TuningData(train=train, valid=Split(*valid), test=data.test)


def corrupt_labels(
    split: Split, fraction: float, key: jax.Array, num_classes: int
) -> Split:
    """Puts random classes in place of some labels, for regularisation to matter.

    Args:
      split: images with their classes.
      fraction: how many get a label drawn uniformly from all classes, which may be the
        old one; in 0..1.
      key: a typed key.
      num_classes: how many classes there are, at least 1.

    Returns:
      The same images, in the same order.

    Raises:
      ValueError: `fraction` is not in 0..1, `num_classes` is below 1, or the key is
        raw.
    """
    check_key(key, "corrupt_labels(key=...)")
    check_has("corrupt_labels", "split", split, "a `Split`", "image", "label")
    if not 0 <= fraction <= 1:
        raise ValueError(
            f"`corrupt_labels(fraction=...)` must be in 0..1; got {fraction}."
        )
    if num_classes < 1:
        raise ValueError(
            f"`corrupt_labels(num_classes=...)` must be at least 1; got {num_classes}."
        )
    key_rows, key_labels = jax.random.split(key)
    label = jnp.asarray(split.label)
    rows = jax.random.permutation(key_rows, len(label))[: round(fraction * len(label))]
    drawn = jax.random.randint(key_labels, rows.shape, 0, num_classes, label.dtype)
    return split._replace(label=label.at[rows].set(drawn))
