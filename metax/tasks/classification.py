"""Classification of images as a `Task`, from a flax model and what its input is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.base import Task, check_key
from metax.tasks.batching import minibatch
from metax.tasks.data import Split

__all__ = ["classification"]

Augment = Callable[[Split, jax.Array], Split]
_EVALUATION_SIZE = 1000  # images a forward pass, so that 10000 through VGG-16 fit


def classification(
    model: Any,
    example: Any,
    *,
    batch_size: int | None = None,
    mean: Any = 0.0,
    std: Any = 1.0,
    l2: Any = 0.0,
    augment: Augment | None = None,
) -> Task:
    """Cross-entropy of a flax classifier on a `Split`, with optional L2.

        L(θ, batch, key) = mean_i [-log softmax(f_θ(x_i))_{y_i}] + ½ l2 ‖θ‖²
        x_i = (image_i - mean) / std

    The penalty counts every parameter, biases and norm scales included. A loss that is
    to be *reported* without it takes `l2=0` and `optax.add_decayed_weights(l2)` in
    front of the rule, which sees the same gradients.

    The parameters are the model's variables: `{"params": ...}`, or with batch norm
    `{"params": ..., "batch_stats": ...}`. The gradient stops at the statistics, and
    `Task.carry` writes those that the training pass produced. Under jit it shares that
    pass with the loss for `metax.tasks.BatchNorm`; flax's own is correct too, but there
    XLA does not see that the two passes are one, and a step costs about a third more.

    Args:
      model: a flax.linen module, `model.apply(variables, x, train=...) -> logits`.
      example: one image [height, width, channels] or a batch of them, or such a shape
        as a tuple; only its shape counts.
      batch_size: images that `sample` draws from the data, with replacement. None:
        the data handed to a step is the batch, for `epochs` and for streaming.
      mean: subtracted from the stored image, a scalar or [channels].
      std: divides it, above 0, a scalar or [channels]. `normalization(name)` gives
        both.
      l2: weight of the penalty, at least 0, a number or a scalar array; 1e-4 is
        customary.
      augment: `augment(batch, key) -> batch`, on the stored images, training only.

    Returns:
      A `Task` whose data and batches are `Split`s. `evaluate(params, data)` gives
      `"loss"`, without the penalty, and `"accuracy"`, in 0..1, of the model in
      evaluation mode.

    Raises:
      ValueError: `batch_size` is below 1, `std` not above 0, `l2` negative, or
        `example` no image.

    Example:
      >>> import jax, optax
      >>> from metax import inner_loop, unroll
      >>> from metax.tasks import Linear, classification, load, normalization
      >>> data = load("digits")
      >>> mean, std = normalization("digits")
      >>> task = classification(
      ...     Linear(10), data.train.image[0], batch_size=64, mean=mean, std=std
      ... )
      >>> loop = inner_loop(task, optax.sgd(0.1))
      >>> keys = jax.random.split(jax.random.key(1), 200)
      >>> state, infos = unroll(loop, loop.init(jax.random.key(0)), keys, data.train)
      >>> bool(task.evaluate(state.params, data.test)["accuracy"] > 0.9)
      True
    """
    x_init = jnp.zeros((1, *_image_shape(example)), jnp.float32)
    mean, std = _check_scale(mean, std)
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            "`classification(batch_size=...)` must be at least 1, or None; "
            f"got {batch_size}."
        )
    if isinstance(l2, int | float) and l2 < 0:
        raise ValueError(f"`classification(l2=...)` must be at least 0; got {l2}.")

    def forward(params: Any, image: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Logits and the collections that a training pass changes."""
        mutable = [name for name in params if name != "params"]
        x = _normalize(image, mean, std)
        rngs = {"dropout": key}
        return model.apply(params, x, train=True, mutable=mutable, rngs=rngs)

    def init(key: jax.Array) -> Any:
        check_key(key, "classification(...).init(key=...)")
        return model.init(key, x_init, train=False)

    def sample(data: Split, key: jax.Array) -> Split:
        key_draw, key_augment = jax.random.split(key)
        batch = data if batch_size is None else minibatch(data, key_draw, batch_size)
        return batch if augment is None else augment(batch, key_augment)

    def loss(params: Any, batch: Split, key: jax.Array) -> jax.Array:
        logits, _ = forward(_stop_statistics(params), batch.image, key)
        penalty = 0.5 * l2 * optax.tree.norm(params["params"], squared=True)
        return _cross_entropy(logits, batch.label).mean() + penalty

    def carry(updated: Any, params: Any, batch: Split, key: jax.Array) -> Any:
        _, changed = forward(_stop_statistics(params), batch.image, key)
        return {**updated, **changed}

    def evaluate(params: Any, data: Split) -> Mapping[str, jax.Array]:
        def sums(batch: Split) -> tuple[jax.Array, jax.Array]:
            logits = model.apply(
                params, _normalize(batch.image, mean, std), train=False
            )
            losses = _cross_entropy(logits, batch.label)
            right = jnp.argmax(logits, axis=-1) == batch.label
            return losses.sum(), right.sum()

        loss_sum, num_right = _sum_over_chunks(sums, data)
        num = len(data.label)
        return {"loss": loss_sum / num, "accuracy": num_right.astype(jnp.float32) / num}

    # Only shapes are computed here: whether the model keeps more than parameters.
    has_state = set(jax.eval_shape(init, jax.random.key(0))) != {"params"}
    return Task(
        init=init,
        loss=loss,
        sample=sample,
        evaluate=evaluate,
        carry=carry if has_state else None,
    )


def _normalize(image: jax.Array, mean: Any, std: Any) -> jax.Array:
    return (jnp.asarray(image, jnp.float32) - mean) / std


def _cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, label)


def _stop_statistics(params: Any) -> Any:
    statistics = {name: tree for name, tree in params.items() if name != "params"}
    return {**params, **jax.lax.stop_gradient(statistics)}


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


def _image_shape(example: Any) -> tuple[int, ...]:
    shape = example if isinstance(example, tuple) else np.shape(example)
    if len(shape) not in (3, 4) or not all(isinstance(n, int) for n in shape):
        raise ValueError(
            "`classification(example=...)` must be an image [height, width, channels], "
            f"a batch of them, or such a shape; got shape {shape}."
        )
    return shape[-3:]


def _check_scale(mean: Any, std: Any) -> tuple[np.ndarray, np.ndarray]:
    mean, std = np.asarray(mean, np.float32), np.asarray(std, np.float32)
    if not np.all(std > 0):
        raise ValueError(f"`classification(std=...)` must be above 0; got {std}.")
    return mean, std
