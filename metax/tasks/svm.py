"""A smoothed support vector machine: deterministic, convex and badly conditioned.

Features from common to rare give the problem curvatures that differ by orders of
magnitude, as the indicator features of census data do: full-batch gradient descent at
1/L crawls along the rare ones.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from metax.arguments import check_count
from metax.base import Task, check_key

__all__ = ["census_like", "smoothed_svm"]


def census_like(
    num_examples: int = 400, num_features: int = 50, seed: int = 0
) -> np.ndarray:
    """Makes binary examples whose features range from common to rare.

    Feature j is 1 with a probability that falls geometrically from 0.8 to 0.01; a
    constant column of −1 is appended; labels are the sides of a noisy random plane that
    halves the examples.

    Args:
      num_examples: how many, at least 2.
      num_features: how many besides the constant, at least 1.
      seed: of numpy's generator.

    Returns:
      float64 [num_examples, num_features + 1], each row times its label, +1 or −1.
    """
    check_count("census_like", 2, num_examples=num_examples)
    check_count("census_like", 1, num_features=num_features)
    check_count("census_like", 0, seed=seed)
    rng = np.random.default_rng(seed)
    shape = (num_examples, num_features)
    features = (rng.random(shape) < np.geomspace(0.8, 0.01, num_features)).astype(float)
    rows = np.hstack([features, -np.ones((num_examples, 1))])
    score = rows @ rng.normal(size=num_features + 1)
    score += 0.5 * rng.normal(size=num_examples)
    return rows * np.where(score > np.median(score), 1.0, -1.0)[:, None]


def smoothed_svm(num_weights: int) -> Task:
    """Squared hinge loss over all examples at once, from a random unit vector.

        L(w) = ½ Σ_i max(0, 1 − y_i x_iᵀw)²

    The gradient is Lipschitz with the square of the largest singular value of the rows,
    `np.linalg.norm(rows, 2) ** 2`.

    Args:
      num_weights: the number of columns of the data.

    Returns:
      A `Task` whose data and batch are the rows y_i x_i, [examples, num_weights].
      `evaluate` gives `"loss"` and `"max_gradient"`, the largest entry of |∇L|.

    Example:
      >>> import jax, numpy as np, optax
      >>> from metax import inner_loop, unroll
      >>> from metax.tasks import census_like, smoothed_svm
      >>> rows = census_like()
      >>> smoothness = np.linalg.norm(rows, 2) ** 2
      >>> loop = inner_loop(smoothed_svm(51), optax.sgd(1 / smoothness))
      >>> state = loop.init(jax.random.key(0))
      >>> _, infos = unroll(loop, state, jax.random.split(jax.random.key(1), 100), rows)
      >>> bool(infos.loss[-1] < 0.5 * infos.loss[0])
      True

    Note:
      It stands in for LIBSVM's a1a with the smoothed hinge.
    """

    check_count("smoothed_svm", 1, num_weights=num_weights)

    def init(key: jax.Array) -> jax.Array:
        check_key(key, "smoothed_svm(...).init(key=...)")
        w = jax.random.normal(key, (num_weights,))
        return w / jnp.linalg.norm(w)

    def loss(w: jax.Array, rows: jax.Array, key: jax.Array | None = None) -> jax.Array:
        return 0.5 * jnp.sum(jnp.maximum(0, 1 - rows @ w) ** 2)

    def evaluate(w: jax.Array, rows: jax.Array) -> Mapping[str, jax.Array]:
        value, grad = jax.value_and_grad(loss)(w, rows)
        return {"loss": value, "max_gradient": jnp.max(jnp.abs(grad))}

    return Task(init=init, loss=loss, sample=lambda rows, key: rows, evaluate=evaluate)
