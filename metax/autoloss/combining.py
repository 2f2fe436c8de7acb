"""Problems with one loss made of several: joint training, and projected gradients.

Both are functions from a problem to a problem with a single action, so that what makes
one step of many losses runs, and is measured, as any schedule is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import optax

from metax.arguments import check_has, refuse
from metax.autoloss.dispatching import shared_part
from metax.autoloss.vectors import as_float
from metax.base import Action, AlternatingProblem

__all__ = ["joint", "projected"]

Groups = dict[str, Any]
Valued = tuple[jax.Array, dict[str, jax.Array]]


def joint(
    lam: jax.typing.ArrayLike = 1.0,
) -> Callable[[AlternatingProblem], AlternatingProblem]:
    """Makes a problem whose one loss is a weighted sum, and whose one action moves all.

        ℓ = ℓ_1 + λ Σ_{m>1} ℓ_m        or        ℓ = Σ_m w_m ℓ_m

    All losses see the same batch and the same key. The optimizers of the groups are
    kept. With `has_aux` what ℓ_1 returns beside itself is returned.

    Args:
      lam: λ, a scalar; or the weights w [M]. May be traced: a grid search over λ is a
        vmap of a whole run.

    Returns:
      `transform(problem) -> problem`. It raises a `ValueError` for weights of another
      number than the losses, and where optimizers belong to actions
      (`optimizer_sharing="action"` with a mapping), of which none is left.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from metax import Action, AlternatingProblem
      >>> from metax.autoloss import joint
      >>> problem = AlternatingProblem(
      ...     init=lambda key: {"w": jnp.array(2.0)},
      ...     losses=(lambda p, b, k: p["w"] ** 2, lambda p, b, k: jnp.abs(p["w"])),
      ...     actions=(Action(0), Action(1)), optimizers=optax.sgd(0.1),
      ...     sample=lambda data, key: data, metric=lambda p, data: p["w"] ** 2)
      >>> together = joint(0.5)(problem)
      >>> float(together.losses[0]({"w": jnp.array(2.0)}, None, None))
      5.0
    """
    lam = as_float(lam)
    if lam.ndim > 1:
        refuse("joint", "lam", "must be a scalar or [M]", f"shape {lam.shape}")
    if not isinstance(lam, jax.core.Tracer) and not bool(jnp.all(jnp.isfinite(lam))):
        refuse("joint", "lam", "must be finite", lam.tolist())

    def transform(problem: AlternatingProblem) -> AlternatingProblem:
        weights = _weights(lam, len(problem.losses))

        def loss(params: Groups, batch: Any, key: jax.Array) -> Any:
            values, aux = _values(problem, params, batch, key)
            total = sum(w * value for w, value in zip(weights, values, strict=True))
            return (total, aux) if problem.has_aux else total

        return _with_one_loss(problem, loss, "joint")

    return transform


def projected(problem: AlternatingProblem) -> AlternatingProblem:
    """Makes a problem whose gradient is that of all losses, conflicts projected out.

    The value is Σ_m ℓ_m. Its gradient is Σ_m g̃_m, where g̃_m begins as g_m = ∇ℓ_m and,
    for every other loss j in a random order,

        g̃_m ← g̃_m - (g̃_m·g_j / ‖g_j‖²) g_j    where g̃_m·g_j < 0

    with inner products over all groups. Costs a backward pass for each loss. All losses
    see the same batch and key, from which the orders are drawn as well. Only reverse
    mode, once.

    Args:
      problem: any; its actions are replaced by one that moves every group.

    Returns:
      The problem.

    Raises:
      ValueError: optimizers that belong to actions, of which none is left.

    Reference:
      Yu et al., Gradient Surgery for Multi-Task Learning, 2020, arXiv:2001.06782,
      algorithm 1 (PCGrad).
    """
    what = "an `AlternatingProblem`"
    check_has("projected", "problem", problem, what, "losses", "optimizers")

    @jax.custom_vjp
    def loss(params: Groups, batch: Any, key: jax.Array) -> Any:
        values, aux = _values(problem, params, batch, key)
        total = sum(values)
        return (total, aux) if problem.has_aux else total

    def forward(params: Groups, batch: Any, key: jax.Array) -> tuple[Any, Groups]:
        def one(m: int) -> tuple[Valued, Groups]:
            def of_params(params: Groups) -> Valued:
                common = shared_part(problem, params, batch, key)
                return _value(problem, m, params, batch, key, common)

            return jax.value_and_grad(of_params, has_aux=True)(params)

        parts = [one(m) for m in range(len(problem.losses))]
        total, aux = sum(value for (value, _), _ in parts), parts[0][0][1]
        # a key of its own: the losses have used this one
        orders = jax.random.fold_in(key, len(parts))
        combined = _project([grads for _, grads in parts], orders)
        return ((total, aux) if problem.has_aux else total), combined

    def backward(combined: Groups, cotangent: Any) -> tuple[Groups, None, None]:
        scale = cotangent[0] if problem.has_aux else cotangent
        scaled = lambda g: (scale * g).astype(g.dtype)
        return jax.tree.map(scaled, combined), None, None

    loss.defvjp(forward, backward)
    return _with_one_loss(problem, loss, "projected")


def _project(grads: list[Groups], key: jax.Array) -> Groups:
    """Σ_m g̃_m."""
    number = len(grads)
    # Gram matrix first: projections are linear, so g̃_m is a combination of all g_j
    gram = jnp.stack(
        [jnp.stack([as_float(optax.tree.vdot(a, b)) for b in grads]) for a in grads]
    )
    keys = jax.random.split(key, number)
    rows = [_coefficients(gram, m, keys[m]) for m in range(number)]
    total = jnp.sum(jnp.stack(rows), 0)
    scaled = [
        jax.tree.map(lambda g, c=total[j]: (c * g).astype(g.dtype), grads[j])
        for j in range(number)
    ]
    return jax.tree.map(lambda *leaves: sum(leaves), *scaled)


def _coefficients(gram: jax.Array, m: int, key: jax.Array) -> jax.Array:
    """c [M] with g̃_m = Σ_j c_j g_j."""
    number = gram.shape[0]

    def against(c: jax.Array, j: jax.Array) -> tuple[jax.Array, None]:
        product, square = c @ gram[:, j], gram[j, j]
        conflict = (product < 0) & (square > 0) & (j != m)
        share = jnp.where(conflict, product / jnp.where(square > 0, square, 1), 0)
        return c.at[j].add(-share), None

    start = jax.nn.one_hot(m, number, dtype=gram.dtype)
    return jax.lax.scan(against, start, jax.random.permutation(key, number))[0]


def _weights(lam: jax.Array, number: int) -> list[jax.Array]:
    """One weight a loss."""
    if lam.ndim == 0:
        return [jnp.ones((), lam.dtype), *([lam] * (number - 1))]
    if lam.shape != (number,):
        rule = f"must be a scalar or have one weight for each of {number} losses"
        refuse("joint", "lam", rule, f"shape {lam.shape}")
    return [lam[m] for m in range(number)]


def _value(
    problem: AlternatingProblem,
    m: int,
    params: Groups,
    batch: Any,
    key: jax.Array,
    common: tuple[Any, ...],
) -> Valued:
    out = problem.losses[m](params, batch, key, *common)
    return out if problem.has_aux else (out, {})


def _values(
    problem: AlternatingProblem, params: Groups, batch: Any, key: jax.Array
) -> tuple[list[jax.Array], dict[str, jax.Array]]:
    """Every loss, and what the first returns beside itself."""
    common = shared_part(problem, params, batch, key)
    each = range(len(problem.losses))
    parts = [_value(problem, m, params, batch, key, common) for m in each]
    return [value for value, _ in parts], parts[0][1]


def _with_one_loss(
    problem: AlternatingProblem, loss: Callable[..., Any], name: str
) -> AlternatingProblem:
    """The problem with one loss and one action on every group."""
    rules = problem.optimizers
    by_action = problem.optimizer_sharing == "action"
    if by_action and not isinstance(rules, optax.GradientTransformation):
        rule = (
            "must have one optimizer, or one a group, for no action is left; pass "
            '`problem._replace(optimizers=..., optimizer_sharing="variable")`'
        )
        refuse(name, "problem", rule, f"optimizers of the actions {sorted(rules)}")
    return problem._replace(
        losses=(loss,),
        actions=(Action(0),),
        names=(name,),
        optimizer_sharing="variable",
        shared=None,
    )
