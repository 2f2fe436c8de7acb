"""What ridge regression does when its penalty moves, in closed form.

For L_T = 1/(2N) ‖Xw − y‖² + ½ wᵀD(λ)w with A = XᵀX/N, b = Xᵀy/N and the diagonal D(λ)
of one of the kinds of `metax.tasks.ridge`: the best weights, their derivative, what
learners of that derivative converge to, and the best λ. All take λ, the unconstrained
coordinate (the log of a decay, the logit of a rate), a scalar or of shape (features,),
and compute in float64 where JAX has it enabled.
"""

from typing import Any

import jax
import jax.numpy as jnp

from metax.arguments import check_number, check_numbers
from metax.tasks.ridge import Kind, RidgeData, check_kind, check_ridge

__all__ = [
    "best_weights",
    "hypergradient",
    "joint_solution",
    "optimum",
    "response",
    "validation_loss",
]

_SEARCH = (-20.0, 20.0)  # λ; beyond, the decay is nothing or everything


def best_weights(data: RidgeData, lam: Any, *, kind: Kind = "global") -> jax.Array:
    """w*(λ) = (A + D)⁻¹ b.

    Args:
      data: the examples; those to train on count.
      lam: λ, a scalar or (features,).
      kind: which penalty; "feature" needs no word, for λ shows it.

    Returns:
      (features,).
    """
    check_kind("best_weights", kind)
    check_ridge("best_weights", data, lam)
    gram, moment = _moments(data)
    return jnp.linalg.solve(gram + jnp.diag(_penalty(gram, lam, kind)), moment)


def response(
    data: RidgeData, lam: Any, *, sigma: Any = 0.0, kind: Kind = "global"
) -> jax.Array:
    """The derivative of the best weights, or what a learner that probes λ by σ finds.

        J    = dw*/dλ = −(A + D)⁻¹ D w*
        Φ(σ) = −(A + m (1 + σ²) D)⁻¹ m D w*,     m = e^{σ²/2}

    Φ(σ) minimises E_ε L_T(λ + ε, w* + Φε) over ε ~ N(0, σ²): the response objective of
    Delta-STN. Where λ has one coordinate a feature, column k is

        Φ_k = −(A + diag_j(m_j D_j (1 + 1[j = k] σ_j²)))⁻¹ m_k D_k w*_k e_k

    Args:
      data: the examples; those to train on count.
      lam: λ, a scalar or (features,).
      sigma: σ ≥ 0, of the shape of λ or a scalar; 0 gives J.
      kind: which penalty.

    Returns:
      (features,), or (features, features) with a column for each coordinate of λ.

    References:
      Bae & Grosse, "Delta-STN", NeurIPS 2020, arXiv 2010.13514, Theorem 3 (σ → 0).
    """
    check_kind("response", kind)
    check_ridge("response", data, lam)
    check_numbers("response", "sigma", sigma, least=0)
    gram, _ = _moments(data)
    variance = jnp.square(sigma)
    penalty = _penalty(gram, lam, kind) * jnp.exp(variance / 2)
    w = best_weights(data, lam, kind=kind)

    def column(moved: jax.Array) -> jax.Array:
        # `moved`: 1 for the features on which this coordinate of λ acts
        curvature = gram + jnp.diag(penalty * (1 + moved * variance))
        return -jnp.linalg.solve(curvature, moved * penalty * w)

    if jnp.ndim(lam) == 0:
        return column(jnp.ones_like(w))
    return jax.vmap(column, out_axes=1)(jnp.eye(len(w)))


def joint_solution(
    data: RidgeData, lam: Any, sigma: Any, *, kind: Kind = "global"
) -> tuple[jax.Array, jax.Array]:
    """What STN finds, that fits weights and response to one noisy objective.

        [A + m D     m σ² D               ] [w0]   [b]
        [m σ² D      σ² A + m (σ² + σ⁴) D ] [Φ ] = [0],     m = e^{σ²/2}

    Args:
      data: the examples; those to train on count.
      lam: λ, a scalar.
      sigma: σ > 0.
      kind: which penalty.

    Returns:
      w0 and Φ, (features,) each; w0 is not w*(λ), and that is the point.

    Raises:
      ValueError: λ has more than one coordinate.
    """
    check_kind("joint_solution", kind)
    check_ridge("joint_solution", data, lam)
    check_number("joint_solution", "sigma", sigma, above=0)
    if jnp.ndim(lam) != 0:
        raise ValueError(
            "`joint_solution(lam=...)` must be a scalar: the system is that of a "
            f"single coordinate; got shape {list(jnp.shape(lam))}."
        )
    gram, moment = _moments(data)
    variance = jnp.square(sigma)
    penalty = jnp.diag(_penalty(gram, lam, kind)) * jnp.exp(variance / 2)
    # the second row divided by σ² once, so that a small σ does not ruin the system
    system = jnp.block(
        [
            [gram + penalty, variance * penalty],
            [penalty, gram + (1 + variance) * penalty],
        ]
    )
    solution = jnp.linalg.solve(system, jnp.append(moment, jnp.zeros_like(moment)))
    w0, phi = jnp.split(solution, 2)
    return w0, phi


def validation_loss(data: RidgeData, lam: Any, *, kind: Kind = "global") -> jax.Array:
    """L_V(w*(λ)) = ½ mean (xᵀw* − y)² over the validation examples, a scalar."""
    check_kind("validation_loss", kind)
    check_ridge("validation_loss", data, lam)
    residual = data.valid.x @ best_weights(data, lam, kind=kind) - data.valid.y
    return 0.5 * jnp.mean(residual**2)


def hypergradient(data: RidgeData, lam: Any, *, kind: Kind = "global") -> jax.Array:
    """dL_V/dλ = Jᵀ ∂_w L_V(w*), of the shape of λ.

    With respect to the natural value divide by dx/dλ: e^λ for a decay, p(1 − p) for a
    rate.
    """
    check_kind("hypergradient", kind)
    check_ridge("hypergradient", data, lam)
    x, y = data.valid
    residual = x @ best_weights(data, lam, kind=kind) - y
    gradient = jnp.asarray(x).T @ residual / len(y)
    return response(data, lam, kind=kind).T @ gradient


def optimum(data: RidgeData, *, kind: Kind = "global") -> jax.Array:
    """λ* = argmin_λ L_V(w*(λ)) of a single λ, to machine precision.

    The best of a grid over −20..20, whose cell is then bisected by the sign of the
    hypergradient.

    Returns:
      A scalar; an end of the range where the loss falls towards it.
    """
    check_kind("optimum", kind)
    check_ridge("optimum", data)
    grid = jnp.linspace(*_SEARCH, 801)
    losses = jax.lax.map(lambda lam: validation_loss(data, lam, kind=kind), grid)
    best = jnp.argmin(losses)
    last = len(grid) - 1
    cell = grid[jnp.maximum(best - 1, 0)], grid[jnp.minimum(best + 1, last)]

    def halve(_: int, cell: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = cell
        middle = (low + high) / 2
        rises = hypergradient(data, middle, kind=kind) > 0
        return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

    low, high = jax.lax.fori_loop(0, 60, halve, cell)
    return (low + high) / 2


def _moments(data: RidgeData) -> tuple[jax.Array, jax.Array]:
    """A = XᵀX/N and b = Xᵀy/N."""
    x, y = map(jnp.asarray, data.train)
    return x.T @ x / len(y), x.T @ y / len(y)


def _penalty(gram: jax.Array, lam: Any, kind: Kind) -> jax.Array:
    """The diagonal of D(λ), (features,)."""
    unit = jnp.diag(gram) if kind == "input_dropout" else jnp.ones(len(gram))
    return unit * jnp.exp(jnp.asarray(lam))
