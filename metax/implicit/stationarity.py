"""Hypergradients from the fact that the training gradient vanishes at the optimum.

From ∂_w L_T(λ, w*(λ)) = 0 for all λ follows dw*/dλ = −H⁻¹ ∂²L_T/∂w∂λ. A hypergradient
costs one linear system with the Hessian, whatever the number of hyperparameters and
however long the training was.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import optax

from metax.arguments import check_length, refuse
from metax.base import Batch, BilevelProblem, Hparams, Params, check_key
from metax.implicit.linear_solve import conjugate_gradient, neumann_series
from metax.implicit.objectives import (
    check_hparams,
    check_params,
    merge,
    partition,
    per_example,
    train_objective,
    valid_objective,
)

__all__ = ["ImplicitInfo", "implicit_hypergradient"]


class ImplicitInfo(NamedTuple):
    """How well the linear system was solved.

    Attributes:
      residual_norm: scalar, ‖(H + δI)v − ∂_w L_V‖, computed anew at the end.
      iterations: int32 scalar, the steps that did something: fewer than asked for where
        conjugate gradients reached rounding error or met curvature ≤ 0.
    """

    residual_norm: jax.Array
    iterations: jax.Array


class _Linearised(NamedTuple):
    """The training objective near the weights, as its derivatives act on trees."""

    gradient: Callable[[Hparams, Any], Any]
    curvature: Callable[[Any], Any]


def implicit_hypergradient(
    problem: BilevelProblem,
    params: Params,
    hparams: Mapping[str, Any],
    train_batch: Batch,
    valid_batch: Batch,
    *,
    key: jax.Array | None = None,
    solver: Literal["cg", "neumann"] = "cg",
    iterations: int = 20,
    damping: float | jax.Array = 0.0,
    step_size: float | jax.Array | None = None,
    curvature: Literal["hessian", "gauss_newton"] = "hessian",
) -> tuple[Hparams, ImplicitInfo]:
    """The hypergradient by the implicit function theorem, at weights that are optimal.

        dL_V/dλ = ∂_λ L_V − (∂²L_T/∂λ∂w)ᵀ v,      (H + δI) v = ∂_w L_V

    Right where `params` minimises L_T(λ, ·) on `train_batch` and H is invertible; an
    approximation elsewhere. Cost: one gradient of each loss, `iterations` + 1 products
    with H (two passes each), and memory of a few parameter trees and one backward pass.

    L_T must be differentiable in λ. For a dropout rate or the strength of an
    augmentation, which enter only by sampling, ∂²L_T/∂λ∂w is zero or meaningless and
    **the result is wrong by construction**: use `metax.stn` there.

    Args:
      problem: what is tuned.
      params: weights near the optimum. Only float leaves are differentiated. Leaves
        without a gradient (batch-norm statistics) stay zero in every solver.
      hparams: the natural value of each name, of the shape of its `init`.
      train_batch: the batch of L_T; the whole training set where it fits.
      valid_batch: the batch of L_V.
      key: feeds what is random in the training pass, the same draw for all products;
        None turns it off.
      solver: "cg" (conjugate gradients; H + δI must be positive definite) or "neumann".
      iterations: steps of the solver, at least 1; with "cg" as many as H has distinct
        eigenvalues is exact.
      damping: δ ≥ 0, added to the curvature; above 0 where H is singular or indefinite.
        The solution in an eigendirection h is divided by h + δ instead of h.
      step_size: α of the Neumann series, above 0 and below 2 / (largest eigenvalue),
        required there and there alone.
      curvature: "hessian", or "gauss_newton": J_fᵀ (∂²ℓ/∂f²) J_f + ∂²ℓ/∂w², where
        ℓ(f, w) is the mean of `train_loss`, a function of the outputs f and directly of
        the weights (decay, exact); mixed terms of the two are left out. It is positive
        semidefinite where ℓ is convex in f and in w.

    Returns:
      dL_V/dx of each natural value x, of its shape, and an `ImplicitInfo`. For an
      unconstrained coordinate u multiply by dx/du.

    Raises:
      ValueError: names or shapes of `hparams` or `params` are not the problem's, a
        hyperparameter is discrete, or an argument is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax import BilevelProblem, Hyperparameter
      >>> from metax.implicit import implicit_hypergradient
      >>> problem = BilevelProblem(  # w* = 3 / (1 + d); L_V = w*² / 2
      ...     init=lambda key: jnp.zeros(()),
      ...     predict=lambda w, batch, hparams, key: w * jnp.ones_like(batch),
      ...     train_loss=lambda out, batch, hparams, w: (
      ...         0.5 * (out - batch) ** 2 + 0.5 * hparams["decay"] * w**2
      ...     ),
      ...     valid_loss=lambda out, batch: 0.5 * jnp.mean((out - batch) ** 2),
      ...     sample_train=lambda data, key: data[0],
      ...     sample_valid=lambda data, key: data[1],
      ...     hparams={"decay": Hyperparameter(0.5, lower=0.0, scale="log")},
      ... )
      >>> w, hparams = jnp.array(2.0), {"decay": 0.5}
      >>> gradient, _ = implicit_hypergradient(
      ...     problem, w, hparams, jnp.array([3.0]), jnp.array([0.0])
      ... )
      >>> print(round(float(gradient["decay"]), 4))  # w* dw*/dd = −9 / (1 + d)³
      -2.6667

    References:
      Pedregosa, "Hyperparameter optimization with approximate gradient", ICML 2016,
      arXiv 1602.02355 (conjugate gradients). Lorraine, Vicol & Duvenaud, "Optimizing
      millions of hyperparameters by implicit differentiation", AISTATS 2020,
      arXiv 1911.02590, equations 2 and 3 (Neumann series).
    """
    _check(key, solver, iterations, damping, step_size, curvature)
    values = check_hparams("implicit_hypergradient", problem, hparams)
    check_params("implicit_hypergradient", problem, params)
    check_length("implicit_hypergradient", "train_batch", train_batch)
    check_length("implicit_hypergradient", "valid_batch", valid_batch)
    floats, rest = partition(params)
    if not jax.tree.leaves(floats):
        rule = "must hold floating arrays to differentiate by"
        refuse("implicit_hypergradient", "params", rule, jax.tree.structure(params))

    def valid(hparams: Hparams, floats: Any) -> jax.Array:
        return valid_objective(problem, valid_batch, hparams, merge(floats, rest))

    direct, rhs = jax.grad(valid, argnums=(0, 1))(values, floats)
    near = _linearised(problem, floats, rest, values, train_batch, key, curvature)
    # one dtype, at least float32, so that sums over many steps keep their digits
    dtype = jnp.result_type(jnp.float32, *jax.tree.leaves(rhs))
    rhs = optax.tree.cast(rhs, dtype)

    def matvec(v: Any) -> Any:
        product = near.curvature(optax.tree.cast_like(v, floats))
        delta = jnp.asarray(damping, dtype)
        return optax.tree.add_scale(optax.tree.cast(product, dtype), delta, v)

    if solver == "cg":
        v, count = conjugate_gradient(matvec, rhs, iterations)
    else:
        v, count = neumann_series(matvec, rhs, iterations, step_size)
    residual_norm = optax.tree.norm(optax.tree.sub(matvec(v), rhs))
    _, pull = jax.vjp(lambda hparams: near.gradient(hparams, floats), values)
    (mixed,) = pull(optax.tree.cast_like(v, floats))
    info = ImplicitInfo(residual_norm=residual_norm, iterations=count)
    return optax.tree.sub(direct, mixed), info


def _linearised(
    problem: BilevelProblem,
    floats: Any,
    rest: Any,
    hparams: Hparams,
    batch: Batch,
    key: jax.Array | None,
    curvature: str,
) -> _Linearised:
    """∂_w L_T as a function, and the product with its curvature at the weights."""

    def predict(hparams: Hparams, floats: Any) -> Any:
        spread = per_example(problem, hparams, batch)
        return problem.predict(merge(floats, rest), batch, spread, key)

    def loss(outputs: Any, hparams: Hparams, floats: Any) -> jax.Array:
        params = merge(floats, rest)
        return train_objective(problem, outputs, batch, hparams, params)

    def objective(floats: Any, hparams: Hparams) -> jax.Array:
        return loss(predict(hparams, floats), hparams, floats)

    def gradient(hparams: Hparams, floats: Any) -> Any:
        return jax.grad(objective)(floats, hparams)

    if curvature == "hessian":
        # forward over reverse, the primal once for all products
        _, hessian = jax.linearize(lambda floats: gradient(hparams, floats), floats)
        return _Linearised(gradient, hessian)
    product = _gauss_newton(
        lambda floats: predict(hparams, floats),
        lambda outputs, floats: loss(outputs, hparams, floats),
        floats,
    )
    return _Linearised(gradient, product)


def _gauss_newton(
    predict: Callable[[Any], Any], loss: Callable[[Any, Any], jax.Array], floats: Any
) -> Callable[[Any], Any]:
    """v ↦ Jᵀ (∂²ℓ/∂f²) J v + (∂²ℓ/∂w²) v for ℓ(f, w) at f = predict(w)."""
    split = lambda floats: partition(predict(floats))
    outputs, push, constant = jax.linearize(split, floats, has_aux=True)
    pull = jax.linear_transpose(push, floats)
    by_outputs = lambda outputs: loss(merge(outputs, constant), floats)
    by_weights = lambda floats: loss(merge(outputs, constant), floats)
    _, hessian_outputs = jax.linearize(jax.grad(by_outputs), outputs)
    _, hessian_weights = jax.linearize(jax.grad(by_weights), floats)

    def product(v: Any) -> Any:
        (through_outputs,) = pull(hessian_outputs(push(v)))
        return optax.tree.add(through_outputs, hessian_weights(v))

    return product


def _check(
    key: jax.Array | None,
    solver: str,
    iterations: int,
    damping: Any,
    step_size: Any,
    curvature: str,
) -> None:
    if key is not None:
        check_key(key, "implicit_hypergradient(key=...)")
    for argument, value, words in (
        ("solver", solver, ("cg", "neumann")),
        ("curvature", curvature, ("hessian", "gauss_newton")),
    ):
        if value not in words:
            raise ValueError(
                f"`implicit_hypergradient({argument}=...)` must be {words[0]!r} or "
                f"{words[1]!r}; got {value!r}."
            )
    if iterations < 1:
        raise ValueError(
            "`implicit_hypergradient(iterations=...)` must be at least 1; got "
            f"{iterations}."
        )
    if (step_size is None) != (solver == "cg"):
        raise ValueError(
            "`implicit_hypergradient(step_size=...)` must be given with "
            'solver="neumann", below 2 / (largest eigenvalue of H), and with no other; '
            f"got step_size={step_size} with solver={solver!r}."
        )
    if step_size is not None and not _may_be(lambda x: x > 0, step_size):
        raise ValueError(
            f"`implicit_hypergradient(step_size=...)` must be above 0; got {step_size}."
        )
    if not _may_be(lambda x: x >= 0, damping):
        raise ValueError(
            f"`implicit_hypergradient(damping=...)` must be at least 0; got {damping}."
        )


def _may_be(rule: Callable[[float], bool], value: Any) -> bool:
    """Whether a number keeps a rule; a traced one passes, so that a sweep is a vmap."""
    # float, for a comparison of arrays would be traced too inside jit
    return isinstance(value, jax.core.Tracer) or rule(float(value))
