"""What the tasks made of labelled images share: input, losses, evaluation in chunks."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.tasks.data import Split

__all__ = [
    "check_scale",
    "cross_entropy",
    "evaluate_classifier",
    "image_shape",
    "normalize",
    "stop_statistics",
]

_EVALUATION_SIZE = 1000  # images a forward pass, so that 10000 through VGG-16 fit


def normalize(image: jax.typing.ArrayLike, mean: Any, std: Any) -> jax.Array:
    """(image - mean) / std, float32."""
    return (jnp.asarray(image, jnp.float32) - mean) / std


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    """-log softmax(logits)_label of each example, [batch]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def stop_statistics(params: Any) -> Any:
    """The variables of a model with no gradient but through `"params"`."""
    statistics = {name: tree for name, tree in params.items() if name != "params"}
    return {**params, **jax.lax.stop_gradient(statistics)}


def evaluate_classifier(
    logits_of: Callable[[jax.Array], jax.Array], data: Split
) -> Mapping[str, jax.Array]:
    """Mean cross-entropy and share of right answers, chunk by chunk.

    Args:
      logits_of: from stored images [size, height, width, channels] to logits
        [size, num_classes].
      data: the images and their classes.

    Returns:
      `"loss"` and `"accuracy"`, the latter in 0..1.
    """

    def sums(batch: Split) -> tuple[jax.Array, jax.Array]:
        logits = logits_of(batch.image)
        losses = cross_entropy(logits, batch.label)
        right = jnp.argmax(logits, axis=-1) == batch.label
        return losses.sum(), right.sum()

    loss_sum, num_right = _sum_over_chunks(sums, data)
    num = len(data.label)
    return {"loss": loss_sum / num, "accuracy": num_right.astype(jnp.float32) / num}


def image_shape(example: Any, function: str) -> tuple[int, ...]:
    """Height, width and channels of an image, of a batch, or of a shape given as such.

    Raises:
      ValueError: it is none of these; the sentence names `function`.
    """
    shape = example if isinstance(example, tuple) else np.shape(example)
    if len(shape) not in (3, 4) or not all(isinstance(n, int) for n in shape):
        raise ValueError(
            f"`{function}(example=...)` must be an image [height, width, channels], "
            f"a batch of them, or such a shape; got shape {shape}."
        )
    return shape[-3:]


def check_scale(mean: Any, std: Any, function: str) -> tuple[np.ndarray, np.ndarray]:
    """Both as float32.

    Raises:
      ValueError: `std` is not above 0; the sentence names `function`.
    """
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not np.all(np.isfinite(mean)):
        raise ValueError(f"`{function}(mean=...)` must be finite; got {mean}.")
    if not np.all(std > 0):
        raise ValueError(f"`{function}(std=...)` must be above 0; got {std}.")
    return mean, std


def _sum_over_chunks(sums: Callable[[Split], Any], data: Split) -> Any:
    """Adds `sums` over chunks of the data, one after the other to bound the memory."""
    num = len(data.label)
    size = min(num, _EVALUATION_SIZE)
    full = num // size
    chunks = jax.tree.map(
        lambda leaf: leaf[: full * size].reshape(full, size, *leaf.shape[1:]), data
    )
    total = jax.tree.map(lambda leaf: leaf.sum(0), jax.lax.map(sums, chunks))
    if num % size:
        rest = sums(jax.tree.map(lambda leaf: leaf[full * size :], data))
        total = jax.tree.map(jnp.add, total, rest)
    return total
