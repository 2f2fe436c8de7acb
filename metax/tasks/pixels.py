"""Classification of images with pixels in [0, 1], in batches without repetition.

Beside `image_classification`: the data is a dict, the parameters of a model without
running statistics are its weights alone, and nothing is subtracted from the pixels. So
the published training problems of learned optimizers have it.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from metax.base import Task, check_key
from metax.tasks.data import Split
from metax.tasks.supervised import cross_entropy, evaluate_classifier, stop_statistics

__all__ = ["distinct_rows", "pixel_classification"]

Data = Mapping[str, Any]


def pixel_classification(
    model: Any, input_shape: tuple[int, ...], batch_size: int
) -> Task:
    """Cross-entropy of a flax classifier on `{"image", "label"}`, pixels in [0, 1].

        L(θ, batch, key) = mean_i [-log softmax(f_θ(x_i))_{y_i}]

    The parameters are the model's `"params"`; with batch norm they are all its
    variables, and as in `image_classification` the gradient stops at the statistics,
    which `Task.carry` writes.

    Args:
      model: a flax.linen module, `model.apply(variables, x, train=...) -> logits`.
      input_shape: height, width and channels of an image.
      batch_size: images that `sample` draws, all different; at least 1.

    Returns:
      A `Task`. Its data holds `"image"` [n, height, width, channels], integers to be
      divided by 255 or floats in [0, 1], and `"label"` [n]. A batch is the pair
      (image float32 [batch_size, height, width, channels], label int32 [batch_size]).
      `evaluate(params, data)` gives `"loss"` and `"accuracy"`, in 0..1, of the model in
      evaluation mode, over all n images.
    """

    def init_variables(key: jax.Array) -> Any:
        image = jnp.zeros((1, *input_shape), jnp.float32)
        return model.init(key, image, train=False)

    # Only shapes are computed here: whether the model keeps more than parameters.
    collections = set(jax.eval_shape(init_variables, jax.random.key(0)))
    statistics = sorted(collections - {"params"})

    def variables_of(params: Any) -> Any:
        return params if statistics else {"params": params}

    def forward(params: Any, image: jax.Array) -> tuple[jax.Array, Any]:
        """Logits, and the statistics that a training pass produced."""
        variables = stop_statistics(variables_of(params))
        return model.apply(variables, image, train=True, mutable=statistics)

    def init(key: jax.Array) -> Any:
        check_key(key, "pixel_classification(...).init(key=...)")
        variables = init_variables(key)
        return variables if statistics else variables["params"]

    def sample(data: Data, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        image, label = jnp.asarray(data["image"]), jnp.asarray(data["label"])
        _check_images(image, input_shape)
        rows = distinct_rows(key, len(image), batch_size)
        return _pixels(image[rows]), label[rows].astype(jnp.int32)

    def loss(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        image, label = batch
        logits, _ = forward(params, image)
        return cross_entropy(logits, label).mean()

    def carry(updated: Any, params: Any, batch: Any, key: jax.Array) -> Any:
        _, changed = forward(params, batch[0])
        return {**updated, **changed}

    def evaluate(params: Any, data: Data) -> Mapping[str, jax.Array]:
        variables = variables_of(params)
        split = Split(image=jnp.asarray(data["image"]), label=data["label"])
        return evaluate_classifier(
            lambda image: model.apply(variables, _pixels(image), train=False), split
        )

    return Task(
        init=init,
        loss=loss,
        sample=sample,
        evaluate=evaluate,
        carry=carry if statistics else None,
    )


def distinct_rows(key: jax.Array, num: int, size: int) -> jax.Array:
    """Draws `size` of the first `num` integers, no one twice, every set as likely.

    Floyd's algorithm: for j = num - size, ..., num - 1 draw t from 0..j and take t, or
    j where t is taken already. Which place of the result a number is at is not
    uniform; for a batch, a set, it does not matter. It costs size² comparisons, a few
    µs, where sorting all `num` costs ms.

    Bentley & Floyd, "Programming pearls: a sample of brilliance", 1987.

    Args:
      key: a typed key.
      num: how many there are.
      size: how many to draw, 1 to `num`.

    Returns:
      int32 [size].

    Raises:
      ValueError: `size` is below 1 or above `num`, or the key is raw.

    Example:
      >>> import jax
      >>> from metax.tasks.pixels import distinct_rows
      >>> sorted(distinct_rows(jax.random.key(0), 5, 5).tolist())
      [0, 1, 2, 3, 4]
    """
    check_key(key, "distinct_rows(key=...)")
    if not 1 <= size <= num:
        raise ValueError(
            f"`distinct_rows(size=...)` must be in 1..{num}, the number of examples; "
            f"got {size}."
        )
    last = jnp.arange(num - size, num, dtype=jnp.int32)
    drawn = jax.random.randint(key, (size,), 0, last + 1, jnp.int32)

    def place(i: jax.Array, rows: jax.Array) -> jax.Array:
        taken = (rows == drawn[i]).any()
        return rows.at[i].set(jnp.where(taken, last[i], drawn[i]))

    return jax.lax.fori_loop(0, size, place, jnp.full(size, -1, jnp.int32))


def _pixels(image: jax.Array) -> jax.Array:
    """float32 in [0, 1]."""
    if jnp.issubdtype(image.dtype, jnp.integer):
        return image.astype(jnp.float32) / 255
    return image.astype(jnp.float32)


def _check_images(image: jax.Array, input_shape: tuple[int, ...]) -> None:
    if image.shape[1:] != tuple(input_shape):
        raise ValueError(
            "`sample(data=...)` must hold images [n, height, width, channels] of "
            f"{list(input_shape)}; got {list(image.shape)}."
        )
