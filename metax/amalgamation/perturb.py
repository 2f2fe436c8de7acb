"""Perturbed weights of a learned optimizer, that it may end in a flat place.

A perturbation moves the weights before a truncation; the meta-gradient is taken there
and applied to the weights as they were. Training only: nothing here belongs into
validation.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.clipping import frobenius_norm
from metax.arguments import check_number, check_one_of, refuse
from metax.base import Params, check_key

__all__ = ["Perturbation", "adversarial", "gaussian", "none"]

Gradient = Callable[[Params], Params]
NORMS = ("relative", "clipped", "sign", "linf", "l2")
# One tensor: (φ, ψ, g) -> ψ after one step.
Move = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Perturbation(NamedTuple):
    """How the weights φ are moved before the meta-gradient is taken.

    Attributes:
      apply: `apply(theta, key, gradient_fn) -> theta` perturbed, in the tree and dtypes
        it came in. `gradient_fn(theta)` is the gradient of the truncation's loss, which
        adversarial perturbations call. What is added is a constant under
        differentiation.
      every: "truncation", or "step" to draw anew at every inner step, with the key of
        the truncation folded with the step.
    """

    apply: Callable[[Params, jax.Array, Gradient], Params]
    every: Literal["truncation", "step"] = "truncation"


def none() -> Perturbation:
    """Leaves the weights as they are.

    Returns:
      A `Perturbation` that returns `theta`.
    """
    return Perturbation(apply=lambda theta, key, gradient_fn: theta)


def gaussian(
    std: Any = 5e-4,
    *,
    relative: bool = True,
    every: Literal["truncation", "step"] = "truncation",
) -> Perturbation:
    """Adds Gaussian noise to every weight.

        relative    φ_w + σ RMS(φ_w) ξ          RMS(φ_w) = ‖φ_w‖/√|φ_w|,  ξ ~ N(0, I)
        absolute    φ_w + σ ξ

    No further gradient. A tensor of zeros stays what it is where the noise is relative.

    Args:
      std: σ ≥ 0. Sane: 5e-4, relative; at 0.1 training diverges.
      relative: σ in units of the root mean square of each weight tensor.
      every: "truncation", or "step", as published: fresh noise at every inner step.

    Returns:
      A `Perturbation`.

    Raises:
      ValueError: σ is negative, or `every` is another word.

    Note:
      The paper draws at every inner step. Once a truncation is the default here: there
      is then one student whose loss is differentiated.

    References:
      Huang et al., Optimizer Amalgamation (2022), equation 5.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.amalgamation import perturb
      >>> theta = {"w": jnp.full(10_000, 3.0)}
      >>> moved = perturb.gaussian(0.1).apply(theta, jax.random.key(0), lambda t: t)
      >>> round(float(jnp.std(moved["w"])), 2)
      0.3
    """
    check_number("gaussian", "std", std, least=0)
    check_one_of("gaussian", "every", every, ("truncation", "step"))

    def apply(theta: Params, key: jax.Array, gradient_fn: Gradient) -> Params:
        del gradient_fn
        check_key(key, "gaussian(...).apply(key=...)")

        def move(w: jax.Array, key: jax.Array) -> jax.Array:
            norm = frobenius_norm(w)
            scale = norm / max(w.size, 1) ** 0.5 if relative else 1.0
            noise = std * scale * jax.random.normal(key, w.shape, norm.dtype)
            return w + jax.lax.stop_gradient(noise).astype(w.dtype)

        leaves, tree = jax.tree.flatten(theta)
        keys = jax.random.split(key, len(leaves))
        return jax.tree.unflatten(tree, map(move, leaves, keys))

    return Perturbation(apply=apply, every=every)


def adversarial(
    step_size: Any = 1e-3,
    steps: int = 1,
    *,
    norm: Literal["relative", "clipped", "sign", "linf", "l2"] = "relative",
    radius: Any = None,
) -> Perturbation:
    """Moves the weights to where the loss of the truncation is worse.

    From ψ = 0, A times with g = ∇L(φ + ψ), in every weight tensor w:

        relative    ψ_w ← ψ_w + ε ‖φ_w‖ g_w/‖g_w‖
        clipped     ψ_w ← ψ_w + g_w min(1, ε ‖φ_w‖/‖g_w‖)
        sign        ψ_w ← ψ_w + ε sign(g_w)
        linf, l2    ψ_w ← Π(ψ_w + ε g_w)         onto the box or ball of the radius

    and φ + ψ at the end. Cost: A more gradients a truncation.

    Args:
      step_size: ε ≥ 0. Sane: 1e-3; at 1e-2, relative, training diverges.
      steps: A ≥ 0; 0 changes nothing.
      norm: which of the rules.
      radius: of box or ball in every weight tensor, above 0; for "linf" and "l2" only.

    Returns:
      A `Perturbation`.

    Raises:
      ValueError: a number is outside its range, another norm, or a radius where it has
        no meaning or none where it has.

    Note:
      The published code clips where the paper's equation normalises; it is
      `norm="clipped"`, the smaller step wherever the gradient is small.

    References:
      Huang et al., Optimizer Amalgamation (2022), equation 6.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.amalgamation import perturb
      >>> attack, theta = perturb.adversarial(0.1), {"w": jnp.array([3.0, 4.0])}
      >>> gradient = jax.grad(lambda theta: theta["w"][0])
      >>> moved = attack.apply(theta, jax.random.key(0), gradient)
      >>> [round(float(w), 3) for w in moved["w"]]
      [3.5, 4.0]
    """
    _check_attack(step_size, steps, norm, radius)
    if steps == 0:
        return none()
    move = _moves(step_size, radius)[norm]

    def apply(theta: Params, key: jax.Array, gradient_fn: Gradient) -> Params:
        del key
        fixed = jax.lax.stop_gradient(theta)

        def step(psi: Params, _: None) -> tuple[Params, None]:
            gradient = gradient_fn(jax.tree.map(jnp.add, fixed, psi))
            moved = jax.tree.map(move, fixed, psi, gradient)
            return optax.tree.cast_like(moved, psi), None

        start = jax.tree.map(jnp.zeros_like, fixed)
        psi, _ = jax.lax.scan(step, start, length=steps)
        return jax.tree.map(jnp.add, theta, jax.lax.stop_gradient(psi))

    return Perturbation(apply=apply)


def _moves(step_size: Any, radius: Any) -> dict[str, Move]:
    """The rules by the name of their norm."""

    def clip(x: jax.Array, bound: Any) -> jax.Array:
        norm = frobenius_norm(x)
        return x * jnp.where(norm > bound, bound / jnp.where(norm > 0, norm, 1), 1)

    def relative(w: jax.Array, psi: jax.Array, g: jax.Array) -> jax.Array:
        norm = frobenius_norm(g)
        unit = jnp.where(norm > 0, g / jnp.where(norm > 0, norm, 1), 0)
        return psi + step_size * frobenius_norm(w) * unit

    return {
        "relative": relative,
        "clipped": lambda w, psi, g: psi + clip(g, step_size * frobenius_norm(w)),
        "sign": lambda w, psi, g: psi + step_size * jnp.sign(g),
        "linf": lambda w, psi, g: jnp.clip(psi + step_size * g, -radius, radius),
        "l2": lambda w, psi, g: clip(psi + step_size * g, radius),
    }


def _check_attack(step_size: Any, steps: Any, norm: Any, radius: Any) -> None:
    check_number("adversarial", "step_size", step_size, least=0)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        refuse("adversarial", "steps", "must be an int of at least 0", steps)
    check_one_of("adversarial", "norm", norm, NORMS)
    projects = norm in ("linf", "l2")
    if projects and radius is None:
        refuse("adversarial", "radius", f"must be given with norm={norm!r}", radius)
    if not projects and radius is not None:
        rule = f'belongs to norm="linf" and "l2"; leave it out with {norm!r}'
        refuse("adversarial", "radius", rule, radius)
    if projects:
        check_number("adversarial", "radius", radius, above=0)
