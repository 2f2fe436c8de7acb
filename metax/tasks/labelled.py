"""Classification of images as a `Task`, from a flax model and what its input is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_has, check_number, refuse
from metax.base import Task, check_key
from metax.tasks.batching import minibatch
from metax.tasks.data import Split
from metax.tasks.supervised import (
    check_scale,
    cross_entropy,
    evaluate_classifier,
    image_shape,
    normalize,
    stop_statistics,
)

__all__ = ["image_classification"]

Augment = Callable[[Split, jax.Array], Split]


def image_classification(
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
      >>> from metax.tasks import Linear, image_classification, load, normalization
      >>> data = load("digits")
      >>> mean, std = normalization("digits")
      >>> task = image_classification(
      ...     Linear(10), data.train.image[0], batch_size=64, mean=mean, std=std
      ... )
      >>> loop = inner_loop(task, optax.sgd(0.1))
      >>> keys = jax.random.split(jax.random.key(1), 200)
      >>> state, infos = unroll(loop, loop.init(jax.random.key(0)), keys, data.train)
      >>> bool(task.evaluate(state.params, data.test)["accuracy"] > 0.9)
      True
    """
    x_init = jnp.zeros((1, *image_shape(example, "image_classification")), jnp.float32)
    mean, std = check_scale(mean, std, "image_classification")
    if batch_size is not None and batch_size < 1:
        raise ValueError(
            "`image_classification(batch_size=...)` must be at least 1, or None; "
            f"got {batch_size}."
        )
    check_number("image_classification", "l2", l2, least=0)
    what = "a flax module"
    check_has("image_classification", "model", model, what, "init", "apply")
    if not (augment is None or callable(augment)):
        rule = "must be a function of batch and key, or None"
        refuse("image_classification", "augment", rule, augment)

    def forward(params: Any, image: jax.Array, key: jax.Array) -> tuple[Any, Any]:
        """Logits and the collections that a training pass changes."""
        mutable = [name for name in params if name != "params"]
        x = normalize(image, mean, std)
        rngs = {"dropout": key}
        return model.apply(params, x, train=True, mutable=mutable, rngs=rngs)

    def init(key: jax.Array) -> Any:
        check_key(key, "image_classification(...).init(key=...)")
        return model.init(key, x_init, train=False)

    def sample(data: Split, key: jax.Array) -> Split:
        key_draw, key_augment = jax.random.split(key)
        batch = data if batch_size is None else minibatch(data, key_draw, batch_size)
        return batch if augment is None else augment(batch, key_augment)

    def loss(params: Any, batch: Split, key: jax.Array) -> jax.Array:
        logits, _ = forward(stop_statistics(params), batch.image, key)
        penalty = 0.5 * l2 * optax.tree.norm(params["params"], squared=True)
        return cross_entropy(logits, batch.label).mean() + penalty

    def carry(updated: Any, params: Any, batch: Split, key: jax.Array) -> Any:
        _, changed = forward(stop_statistics(params), batch.image, key)
        return {**updated, **changed}

    def evaluate(params: Any, data: Split) -> Mapping[str, jax.Array]:
        def logits_of(image: jax.Array) -> jax.Array:
            return model.apply(params, normalize(image, mean, std), train=False)

        return evaluate_classifier(logits_of, data)

    # Only shapes are computed here: whether the model keeps more than parameters.
    has_state = set(jax.eval_shape(init, jax.random.key(0))) != {"params"}
    return Task(
        init=init,
        loss=loss,
        sample=sample,
        evaluate=evaluate,
        carry=carry if has_state else None,
    )
