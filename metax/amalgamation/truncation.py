"""One truncation of one optimizee: the teachers, then the student, then the objective.

Teachers do not depend on the student. They run first, in a scan that nothing
differentiates, and their trajectories enter the student's scan as data; so six of them
add the memory of their trajectories and nothing else. The student's scan is the only
part under a derivative, and it is checkpointed by steps or by blocks of steps.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.ad_checkpoint import checkpoint_name

from metax.amalgamation.coordinates import all_finite, keep_unless
from metax.amalgamation.distill import log_distance, meta_loss
from metax.amalgamation.policies import LearnedOptimizer
from metax.base import InnerState, Loop, Task, inner_loop, truncate

__all__ = [
    "Measured",
    "Optimizee",
    "draw",
    "follow_teachers",
    "scan_steps",
    "start_losses",
    "student_objective",
]

Params = Any
Data = Any

# What a step that is computed again takes as it was: small beside the student's state.
_FOUND = "loss and gradient of the optimizee"


class Optimizee(NamedTuple):
    """What one truncation of the student begins with; constant but for the weights.

    Attributes:
      params: the student's parameters, in true coordinates.
      student_state: state of the student's rule.
      scale: s, a tree like `params`: the student works on θ/s.
      keys: [K], one a step; batches and losses of student and teachers come of them.
      trajectories: for each teacher its parameters after each step, leaves [K, ...].
      key_noise: of noise on gradients, and of noise on the weights at every step.
      parts: [2], what meta loss and imitation count for in the objective.
    """

    params: Params
    student_state: Any
    scale: Params
    keys: jax.Array
    trajectories: dict[str, Params]
    key_noise: jax.Array
    parts: jax.Array


class Measured(NamedTuple):
    """What a truncation of one optimizee shows; K steps, T teachers.

    Attributes:
      loss: the objective.
      meta_loss: its mean log improvement.
      imitation_loss: its reduced log distance, unweighted.
      inner_losses: [K], the student's losses before each update.
      distances: [K, T], log distances after each update.
      counted: [K] bool, the steps whose distances count: all until a loss or an update
        is not finite.
    """

    loss: jax.Array
    meta_loss: jax.Array
    imitation_loss: jax.Array
    inner_losses: jax.Array
    distances: jax.Array
    counted: jax.Array


def draw(task: Task, data: Data, key: jax.Array) -> tuple[Any, jax.Array]:
    """The batch and the loss key of a step, split as `metax.inner_loop` splits them."""
    key_sample, key_loss = jax.random.split(key)
    return task.sample(data, key_sample), key_loss


def follow_teachers(
    task: Task,
    teachers: Mapping[str, optax.GradientTransformation],
    params: dict[str, Params],
    states: dict[str, Any],
    keys: jax.Array,
    data: Data,
) -> tuple[dict[str, Params], dict[str, Any], dict[str, Params]]:
    """Runs every teacher on its own trajectory, without a derivative.

    One after the other, so that they share the memory of one gradient.

    Args:
      task: the optimizee.
      teachers: the rules by name.
      params: the parameters of each, in true coordinates.
      states: the state of each.
      keys: [K].
      data: of the task.

    Returns:
      The last parameters, the last states, and the parameters after each step.
    """
    lasts, trajectories = {}, {}
    for name, rule in teachers.items():
        loop = inner_loop(task, rule)

        def step(
            inner: InnerState, key: jax.Array, loop: Loop = loop
        ) -> tuple[InnerState, Params]:
            inner, _ = loop.step(inner, key, data)
            return inner, inner.params

        start = truncate(InnerState(params[name], states[name]))
        followed = jax.lax.scan(step, start, keys)
        lasts[name], trajectories[name] = truncate(followed)
    params = {name: last.params for name, last in lasts.items()}
    states = {name: last.opt_state for name, last in lasts.items()}
    return params, states, trajectories


def start_losses(task: Task, params: Params, keys: jax.Array, data: Data) -> jax.Array:
    """M(x_i, θ_start) on every batch of a truncation, [K]; constants."""

    def loss(key: jax.Array) -> jax.Array:
        batch, key_loss = draw(task, data, key)
        return task.loss(params, batch, key_loss)

    return truncate(jax.lax.map(loss, keys))


def student_objective(
    task: Task,
    student: LearnedOptimizer,
    reduce: Callable[[jax.Array], jax.Array],
    *,
    second_order: bool = True,
    remat: str = "block",
    input_noise: Any = 0.0,
    scaled_distance: bool = True,
    distance_eps: float = 1e-10,
    huber_delta: float | None = None,
    perturb_step: Callable[[Params, jax.Array], Params] | None = None,
) -> Callable[[Params, Optimizee, Data], tuple[jax.Array, tuple[Optimizee, Measured]]]:
    """The objective of one truncation as a function of the student's weights.

        l_i, g = M(x_i, θ), ∇M(x_i, θ)
        θ ← θ - s ∘ δ(s ∘ g)                        δ the student's step, in θ/s
        L = (1/K) Σ_i [ln(l_i + ε) - ln(M(x_i, θ_start) + ε)]
            + α (1/K) Σ_i reduce_T ln(½ ‖(θ - θ_T)/s‖² + ε) - ln N

    Once a loss or an update is not finite the parameters stay where they were, the
    student's rule is shown NaN, which leaves its state as it was (the contract of a
    `LearnedOptimizer`), and further terms count 0. The steps after that are computed
    at the parameters of the start, so that nothing of them has a derivative; that of
    the step itself may still be NaN, and the meta-update is then skipped.

    Args:
      task: the optimizee.
      student: the learned optimizer.
      reduce: distances [K, T] to [K].
      second_order: whether ∇M is differentiated, in θ.
      remat: what is recomputed in the backward pass, see `scan_steps`.
      input_noise: standard deviation of noise on the gradient that the rule sees.
      scaled_distance: whether distances are taken in θ/s or in θ.
      distance_eps: ε of the distances.
      huber_delta: of the distances.
      perturb_step: (theta, key) to the weights of one step, or None.

    Returns:
      `objective(theta, optimizee, data) -> loss, (optimizee after it, Measured)`.
    """

    def move(
        theta: Params, fixed: Optimizee, carry: Any, keys: tuple[Any, Any], data: Data
    ) -> tuple[jax.Array, jax.Array, Any]:
        """One step: the loss before it, and what to carry on from it."""
        (params, state, alive), (key, key_noise) = carry, keys
        at = keep_unless(alive, params, fixed.params)
        batch, key_loss = draw(task, data, key)
        found = jax.value_and_grad(task.loss)(at, batch, key_loss)
        loss, grad = checkpoint_name(found, _FOUND)
        grad = grad if second_order else truncate(grad)
        grad = jax.tree.map(jnp.multiply, fixed.scale, grad)
        key_input, key_weights = jax.random.split(key_noise)
        if not (isinstance(input_noise, float | int) and input_noise == 0):
            grad = _add_noise(grad, input_noise, key_input)
        counts = alive & jnp.isfinite(loss)
        # A policy answers NaN by staying as it is: its state needs no second select,
        # which is another pass over the largest arrays.
        grad = jax.tree.map(lambda g: jnp.where(counts, g, jnp.nan), grad)
        if perturb_step is not None:
            theta = perturb_step(theta, key_weights)
        seen = jax.tree.map(jnp.divide, at, fixed.scale)
        updates, state = student.rule(theta).update(grad, state, seen)
        moved = jax.tree.map(lambda p, s, u: (p + s * u).astype(p.dtype),
                             at, fixed.scale, updates)  # fmt: skip
        if task.carry is not None:
            moved = task.carry(moved, at, batch, key_loss)
        alive = counts & all_finite(moved)
        return loss, counts, (keep_unless(alive, moved, params), state, alive)

    def distance(params: Params, teacher: Params, scale: Params) -> jax.Array:
        if scaled_distance:
            params, teacher = (
                jax.tree.map(jnp.divide, tree, scale) for tree in (params, teacher)
            )
        how: dict[str, Any] = {"eps": distance_eps, "huber_delta": huber_delta}
        return log_distance(params, teacher, **how)

    def objective(
        theta: Params, fixed: Optimizee, data: Data
    ) -> tuple[jax.Array, tuple[Optimizee, Measured]]:
        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            keys, start, teachers = x
            loss, counts, carry = move(theta, fixed, carry, keys, data)
            params, _, alive = carry
            # what does not count is replaced before the logarithm, and after it
            counted = jnp.where(counts, loss, start)
            far = [distance(params, p, fixed.scale) for p in teachers.values()]
            far = jnp.stack(far) if far else jnp.zeros(0, loss.dtype)
            return carry, (loss, counted, jnp.where(alive, far, 0), alive)

        carry = (fixed.params, fixed.student_state, jnp.ones((), bool))
        noise = jax.random.split(fixed.key_noise, len(fixed.keys))
        starts = start_losses(task, fixed.params, fixed.keys, data)
        xs = ((fixed.keys, noise), starts, fixed.trajectories)
        last, (losses, counted, far, alive) = scan_steps(step, carry, xs, remat)
        # the first loss is that of the start, computed by another program
        meta = meta_loss(counted.at[0].set(starts[0]), starts)
        imitation = jnp.mean(reduce(far)) if far.shape[-1] else jnp.zeros_like(meta)
        loss = fixed.parts[0] * meta + fixed.parts[1] * imitation
        after = fixed._replace(params=last[0], student_state=last[1])
        return loss, (after, Measured(loss, meta, imitation, losses, far, alive))

    return objective


def scan_steps(
    step: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, remat: str
) -> tuple[Any, Any]:
    """`lax.scan` with residuals of every step, of one step, or of a block's.

    Args:
      step: the body.
      carry: where it starts.
      xs: leaves [K, ...].
      remat: "none" keeps all; "step" keeps the carries and the optimizee's gradients
        and recomputes the rest of each step; "block" keeps the carries of every block's
        start too, the block being the largest divisor of K not above √K, and recomputes
        twice.
    """
    if remat == "none":
        return jax.lax.scan(step, carry, xs)
    keep = jax.checkpoint_policies.save_only_these_names(_FOUND)
    step = jax.checkpoint(step, prevent_cse=False, policy=keep)
    num = len(jax.tree.leaves(xs)[0])
    size = next(n for n in range(math.isqrt(num), 0, -1) if num % n == 0)
    if remat == "step" or size == 1:
        return jax.lax.scan(step, carry, xs)
    cut = lambda x: x.reshape(num // size, size, *x.shape[1:])
    block = jax.checkpoint(functools.partial(jax.lax.scan, step), prevent_cse=False)
    carry, ys = jax.lax.scan(block, carry, jax.tree.map(cut, xs))
    return carry, jax.tree.map(lambda y: y.reshape(num, *y.shape[2:]), ys)


def _add_noise(grad: Params, std: Any, key: jax.Array) -> Params:
    keys = optax.tree.split_key_like(key, grad)
    add = lambda g, k: (
        g + (std * jax.random.normal(k, g.shape, g.dtype)).astype(g.dtype)
    )
    return jax.tree.map(add, grad, keys)
