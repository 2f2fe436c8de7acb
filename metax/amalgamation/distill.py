"""What a learned optimizer is trained on: its losses, and its distance to teachers.

    L = L_meta + α (1/K) Σ_i reduce_T d_T(i)

`meta_loss` measures how far the student got, `log_distance` how far from one teacher it
is after a step; `mean_loss`, `minmax_loss`, `softmax_loss` and `choice_loss` are the
ways to reduce over teachers. All are differences of logarithms of numbers that may be
nearly equal, so they are computed in at least float32.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_number, refuse
from metax.base import Params

__all__ = [
    "choice_loss",
    "log_distance",
    "mean_loss",
    "meta_loss",
    "minmax_loss",
    "softmax_loss",
]


def log_distance(
    params: Params,
    teacher_params: Params,
    *,
    eps: Any = 1e-10,
    huber_delta: float | None = None,
) -> jax.Array:
    """Measures how far a student is from one teacher, in logarithms.

        d = ln( Σ_j ½ (ϑ_j − ϑ^T_j)² + ε ) − ln N

    With `huber_delta` δ, ½a² becomes δ(|a| − δ/2) where |a| > δ. The coordinates are
    the caller's: divide both by the random scale first for the published distance. The
    slope is at most 1/√(2ε) and is 0 where the two coincide.

    Args:
      params: of the student, any pytree.
      teacher_params: of the teacher, the same tree and shapes.
      eps: ε > 0, where the distance ends: it is never below ln ε − ln N.
      huber_delta: δ > 0, or None.

    Returns:
      A scalar, at least float32.

    Raises:
      ValueError: trees or shapes differ or hold nothing, or a number is not above 0.

    References:
      Huang et al., Optimizer Amalgamation (2022), equation 1.

    Note:
      The paper prints no ½, ε or N: they are those of the published code.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.amalgamation import distill
      >>> student, teacher = {"w": jnp.ones((3, 2))}, {"w": jnp.zeros((3, 2))}
      >>> round(float(distill.log_distance(student, teacher)), 4)  # −ln 2
      -0.6931
    """
    check_number("log_distance", "eps", eps, above=0)
    if huber_delta is not None:
        check_number("log_distance", "huber_delta", huber_delta, above=0)
    _check_same_shapes(params, teacher_params)

    def half_squares(a: jax.Array, b: jax.Array) -> jax.Array:
        gap = _wide(a) - _wide(b)
        if huber_delta is None:
            return jnp.sum(0.5 * gap**2)
        return jnp.sum(optax.losses.huber_loss(gap, delta=huber_delta))

    total = optax.tree.sum(jax.tree.map(half_squares, params, teacher_params))
    return jnp.log(total + eps) - jnp.log(1.0 * optax.tree.size(params))


def mean_loss(distances: jax.Array) -> jax.Array:
    """Averages over the teachers: each pulls alike.

    Args:
      distances: [..., T], one entry a teacher.

    Returns:
      [...], at least float32.

    Raises:
      ValueError: there is no teacher.

    References:
      Huang et al. (2022), equation 2.
    """
    return jnp.mean(_distances("mean_loss", distances), axis=-1)


def minmax_loss(distances: jax.Array) -> jax.Array:
    """Takes the farthest teacher, the only one that gets gradient.

    Args:
      distances: [..., T], one entry a teacher.

    Returns:
      [...], at least float32.

    Raises:
      ValueError: there is no teacher.

    References:
      Huang et al. (2022), equation 3.
    """
    return jnp.max(_distances("minmax_loss", distances), axis=-1)


def softmax_loss(distances: jax.Array, tau: Any = 1.0) -> jax.Array:
    """Goes smoothly from the farthest teacher (τ → 0) to the mean (τ → ∞).

        τ ln( (1/T) Σ_T exp(d_T/τ) )

    Args:
      distances: [..., T], one entry a teacher.
      tau: τ > 0, the temperature, in units of the log distance.

    Returns:
      [...], at least float32, between `mean_loss` and `minmax_loss`.

    Raises:
      ValueError: there is no teacher, or the temperature is not above 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.amalgamation import distill
      >>> distances = jnp.array([-3.0, -1.0])
      >>> [round(float(distill.softmax_loss(distances, t)), 2) for t in (0.01, 1, 100)]
      [-1.01, -1.57, -2.0]
    """
    check_number("softmax_loss", "tau", tau, above=0)
    distances = _distances("softmax_loss", distances)
    # The value does not depend on `most`, so neither does the derivative. expm1 and
    # log1p keep what τ multiplies exact where τ is large.
    most = jax.lax.stop_gradient(jnp.max(distances, axis=-1, keepdims=True))
    excess = jnp.mean(jnp.expm1((distances - most) / tau), axis=-1)
    return tau * jnp.log1p(excess) + most[..., 0]


def choice_loss(distances: jax.Array) -> jax.Array:
    """Takes the only teacher there is: a choice policy trained before.

    Args:
      distances: [..., 1].

    Returns:
      [...], at least float32.

    Raises:
      ValueError: there is another number of teachers than one.

    References:
      Huang et al. (2022), equation 4.
    """
    distances = _distances("choice_loss", distances)
    if distances.shape[-1] != 1:
        rule = "must have one entry along its last axis, the choice policy"
        refuse("choice_loss", "distances", rule, f"shape {distances.shape}")
    return distances[..., 0]


def meta_loss(
    losses: jax.Array, start_losses: jax.Array, *, eps: Any = 1e-10
) -> jax.Array:
    """Averages how much lower the losses are than they were at the start.

        L_meta = (1/K) Σ_i [ ln(M(x_i, θ_i) + ε) − ln(M(x_i, θ_start) + ε) ]

    Negative is good: −1 is a loss that is e times smaller in the geometric mean.

    Args:
      losses: [K], at least 0: the loss on each batch before its update.
      start_losses: [K], at least 0: that of the parameters at the start of the
        truncation on the same batches, a constant to whoever differentiates.
      eps: ε > 0.

    Returns:
      A scalar, at least float32.

    Raises:
      ValueError: the shapes differ or are no [K] with K ≥ 1.

    References:
      Huang et al. (2022), section 3 (mean log improvement).
    """
    check_number("meta_loss", "eps", eps, above=0)
    shape = jnp.shape(losses)
    if len(shape) != 1 or shape[0] == 0 or shape != jnp.shape(start_losses):
        shapes = f"shapes {shape} and {jnp.shape(start_losses)}"
        rule = "must have one shape [K], K ≥ 1"
        refuse("meta_loss", "losses=..., start_losses", rule, shapes)
    return jnp.mean(jnp.log(_wide(losses) + eps) - jnp.log(_wide(start_losses) + eps))


def _distances(function: str, distances: Any) -> jax.Array:
    if jnp.ndim(distances) == 0 or jnp.size(distances) == 0:
        rule = "must have shape [..., T] with at least one teacher, and not be empty"
        refuse(function, "distances", rule, f"shape {jnp.shape(distances)}")
    return _wide(distances)


def _check_same_shapes(params: Params, teacher_params: Params) -> None:
    names = "params=..., teacher_params"
    trees = jax.tree.structure(params), jax.tree.structure(teacher_params)
    if trees[0] != trees[1]:
        refuse("log_distance", names, "must be trees of one form", trees)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(params),
        jax.tree.leaves(teacher_params),
        strict=True,
    )
    for (path, mine), other in pairs:
        if jnp.shape(mine) != jnp.shape(other):
            at = f"{jnp.shape(mine)} and {jnp.shape(other)}"
            rule = f"must have equal shapes at '{jax.tree_util.keystr(path)}'"
            refuse("log_distance", names, rule, at)
    if optax.tree.size(params) == 0:
        refuse("log_distance", names, "must hold numbers", "no entry")


def _wide(values: Any) -> jax.Array:
    return jnp.asarray(values, jnp.promote_types(jnp.float32, jnp.result_type(values)))
