"""Changes to the labels of a batch, with strengths that may be arrays."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from metax.arguments import check_axes, check_numbers
from metax.base import check_key

__all__ = ["check_per_example", "mixup", "smooth_labels"]


def mixup(
    images: jax.Array, labels_onehot: jax.Array, key: jax.Array, *, alpha: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example of a batch, picture and label, with another one.

        x_i ← c_i x_i + (1 − c_i) x_π(i),    y_i likewise,    c_i ~ Beta(α_i, α_i)

    π is a random permutation of the batch, which may leave examples where they are. No
    gradient flows into α.

    Args:
      images: [batch, ...].
      labels_onehot: [batch, classes].
      key: a typed key.
      alpha: above 0, a scalar or of shape (batch,): small values leave most examples
        nearly pure; 0.2 is usual.

    Returns:
      `(images, labels)`, float32 in the shapes given.

    Raises:
      ValueError: the lengths differ; `alpha` has another shape; the key is raw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import mixup
      >>> images, labels = jnp.arange(4.0)[:, None], jnp.eye(4)
      >>> mixed, targets = mixup(images, labels, jax.random.key(0), alpha=0.2)
      >>> bool(jnp.allclose(mixed, targets @ images)), float(targets.sum().round(5))
      (True, 4.0)

    Reference:
      Zhang et al., mixup: Beyond Empirical Risk Minimization, ICLR 2018,
      arXiv:1710.09412.
    """
    check_key(key, "mixup(key=...)")
    check_axes("mixup", "labels_onehot", labels_onehot, "batch, classes")
    batch = images.shape[0]
    if labels_onehot.shape[0] != batch:
        raise ValueError(
            "`mixup(labels_onehot=...)` must have one row an image; got "
            f"{labels_onehot.shape[0]} rows for {batch} images."
        )
    check_numbers("mixup", "alpha", alpha, least=0)
    alpha = jax.lax.stop_gradient(jnp.asarray(alpha, jnp.float32))
    check_per_example("mixup(alpha=...)", alpha, batch)
    key_coefficient, key_partner = jax.random.split(key)
    alpha = jnp.broadcast_to(alpha, (batch,))
    c = jax.random.beta(key_coefficient, alpha, alpha, dtype=jnp.float32)
    partner = jax.random.permutation(key_partner, batch)

    def mix(x: jax.Array) -> jax.Array:
        x = jnp.asarray(x, jnp.float32)
        own = c.reshape(batch, *(1,) * (x.ndim - 1))
        return own * x + (1 - own) * x[partner]

    return mix(images), mix(labels_onehot)


def smooth_labels(labels_onehot: jax.Array, strength: ArrayLike) -> jax.Array:
    """Moves a share of each label to all classes alike: (1 − s) y + s / classes.

    Args:
      labels_onehot: [batch, classes].
      strength: s in [0, 1], a scalar or of shape (batch,). Gradients flow into it.

    Returns:
      float32 of the labels' shape.

    Raises:
      ValueError: `strength` has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.tasks import smooth_labels
      >>> smoothed = smooth_labels(jnp.eye(2), jnp.array([0.0, 0.2]))
      >>> [[round(float(y), 3) for y in row] for row in smoothed]
      [[1.0, 0.0], [0.1, 0.9]]
    """
    check_axes("smooth_labels", "labels_onehot", labels_onehot, "batch, classes")
    check_numbers("smooth_labels", "strength", strength, least=0, most=1)
    s = jnp.asarray(strength, jnp.float32)
    check_per_example("smooth_labels(strength=...)", s, labels_onehot.shape[0])
    y = jnp.asarray(labels_onehot, jnp.float32)
    return (1 - s[..., None]) * y + s[..., None] / y.shape[-1]


def check_per_example(argument: str, value: ArrayLike, batch: int) -> None:
    """Refuses what is neither a scalar nor one value for each example of a batch.

    Args:
      argument: how the error names it, e.g. `"mixup(alpha=...)"`.
      value: what the caller passed.
      batch: the number of examples.

    Raises:
      ValueError: `value` has another shape.
    """
    if jnp.shape(value) not in ((), (batch,)):
        raise ValueError(
            f"`{argument}` must be a scalar or have shape ({batch},), one value an "
            f"example; got shape {jnp.shape(value)}."
        )
