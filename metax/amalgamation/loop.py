"""Optimizer amalgamation as a `Loop`: one step is one truncation and one meta-update.

Words: the *student* is the learned optimizer under training, `theta` its weights; a
*teacher* is a rule that it is to follow; an *optimizee* is what both train, a draw of
`task`; an *unroll* is the life of an optimizee, cut into *truncations* of K steps.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation import distill, perturb
from metax.amalgamation.doors import (
    check_differentiable_student,
    check_perturbation,
    check_settings,
)
from metax.amalgamation.estimators import Carry, bptt, es, over_tasks, pes, pes_start
from metax.amalgamation.perturb import Perturbation
from metax.amalgamation.policies import LearnedOptimizer
from metax.amalgamation.restarts import Restart, restarts
from metax.amalgamation.states import (
    DUE,
    AmalgamationInfo,
    AmalgamationState,
    default_meta_optimizer,
    meta_update,
    show,
)
from metax.amalgamation.truncation import (
    Optimizee,
    follow_teachers,
    student_objective,
)
from metax.base import Loop, Task, check_key, truncate

__all__ = ["amalgamate", "release_settings"]

Params = Any
Data = Any


def amalgamate(
    task: Task,
    student: LearnedOptimizer,
    teachers: Mapping[str, optax.GradientTransformation],
    *,
    reduce: Literal["mean", "minmax", "softmax"] = "mean",
    softmax_tau: float = 1.0,
    imitation_weight: float = 0.1,
    combine: Literal["sum", "switch"] = "sum",
    truncation_length: int = 100,
    unroll_length: int = 1000,
    num_tasks: int = 1,
    warmup_steps: int = 100,
    warmup_learning_rate: float = 0.01,
    warmup_coordinates: Literal["true", "scaled"] = "true",
    random_scale: float = 3.0,
    perturbation: Perturbation | None = None,
    input_noise: float = 0.0,
    second_order: bool = True,
    meta_optimizer: optax.GradientTransformation | None = None,
    estimator: Literal["bptt", "pes", "es"] = "bptt",
    es_std: float = 0.01,
    remat: Literal["none", "step", "block"] = "block",
    distance_coordinates: Literal["scaled", "true"] = "scaled",
    distance_eps: float = 1e-10,
    huber_delta: float | None = None,
) -> Loop:
    """Trains a learned optimizer to improve on a task and to follow a pool of rules.

    One step of the loop is one truncation of K steps on each of B optimizees, and one
    meta-update:

        L_meta = (1/K) Σ_i [ln(M(x_i, θ_i) + ε) - ln(M(x_i, θ_start) + ε)]
        d_T(i) = ln(Σ_j ½ ((θ_{i+1,j} - θ^T_{i+1,j}) / s_j)² + ε) - ln N
        L      = L_meta + α (1/K) Σ_i reduce_T d_T(i)                    (2), (3), (4)
        φ      ← φ + meta_optimizer(∇_φ L)

    Teachers begin where the student begins, after a warm-up of plain SGD, see the same
    batches, and go on along their own trajectories to the end of the unroll.
    `teachers={}` is plain meta-learning, which trains L2L, RNNProp and `choice`; a
    trained choice policy as the only teacher, `{"choice": choice(pool).rule(theta)}`,
    is choice amalgamation.

    Cost of a truncation: about 4.5 gradients of the optimizee and three passes of the
    student's LSTM a step, and a gradient for each teacher. Memory: the carries of a
    few blocks of steps, about 330 bytes a parameter and step kept, and the teachers'
    trajectories. A truncation of 100 steps of a CNN with 18,122 parameters takes 15 to
    25 seconds of a CPU core, a student wants a thousand: on CPUs train on small
    networks (`python -m benchmarks.amalgamation`).

    Args:
      task: what the optimizees are; `task.init` draws one.
      student: the learned optimizer, `rnnprop()` in the paper.
      teachers: rules by name; any optax transformations. They are not differentiated.
      reduce: "mean" (2), "minmax", the farthest teacher (3), or "softmax", smooth
        between both.
      softmax_tau: temperature of "softmax", above 0: minmax at 0, mean at ∞.
      imitation_weight: α, at least 0, a number or a scalar array; .2 to .02.
      combine: "sum"; "switch": with probability α only the imitation counts, else only
        the meta loss.
      truncation_length: K, at least 1; divides `unroll_length`.
      unroll_length: steps of an optimizee.
      num_tasks: B, optimizees side by side.
      warmup_steps: of SGD before student and teachers begin, at least 0.
      warmup_learning_rate: of that SGD, at least 0.
      warmup_coordinates: whether it runs in θ or, as in the release, in θ/s.
      random_scale: each coordinate is scaled by s = exp(U(-r, r)), for the student
        alone; 0 for none.
      perturbation: of the weights in training, from `perturb`.
      input_noise: standard deviation of noise on the gradients that the student sees.
      second_order: whether the optimizee's gradient is differentiated too.
      meta_optimizer: default `chain(clip_by_weight_norm(0.1, 1e-3), adam(1e-3))`.
      estimator: "bptt", reverse mode; "pes" or "es", evolution strategies, which want
        many tasks.
      es_std: standard deviation of their perturbations, above 0.
      remat: "block" keeps about 2 √K carries, "step" K, "none" everything.
      distance_coordinates: whether distances are taken in θ/s, as published, or in θ.
      distance_eps: ε of the distances, above 0.
      huber_delta: distances grow linearly beyond it; None for squares.

    Returns:
      A `Loop` with `AmalgamationState` and `AmalgamationInfo`. `init` has no data: its
      state is due for a restart. Under `vmap` over replicates the restart becomes a
      select, and its warm-up is paid at every truncation, about a fifth more.

    Raises:
      ValueError: an argument outside its range; lengths that do not divide; "minmax" or
        "softmax" of fewer than two teachers; "switch" with none, or with a weight above
        1; an adversarial perturbation without reverse mode; a student without a finite
        derivative.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax import Task, unroll
      >>> from metax.amalgamation import amalgamate, pool, rnnprop
      >>> bowl = Task(
      ...     init=lambda key: jax.random.normal(key, (4,)),
      ...     loss=lambda params, batch, key: jnp.sum(params**2),
      ...     sample=lambda data, key: (),
      ...     evaluate=lambda params, data: {"loss": jnp.sum(params**2)},
      ... )
      >>> lengths = dict(truncation_length=5, unroll_length=10, warmup_steps=2)
      >>> loop = amalgamate(bowl, rnnprop(4), pool("small"), reduce="minmax", **lengths)
      >>> state = loop.init(jax.random.key(0))
      >>> keys = jax.random.split(jax.random.key(1), 3)
      >>> state, infos = unroll(loop, state, keys, ())
      >>> infos.restarted.tolist(), infos.inner_losses.shape
      ([True, False, True], (3, 5))

    Note:
      Against the release: warm-up by 0.01 in θ, true bias corrections and tuned
      teachers (`release_settings` has its ways); every step's batch is drawn for
      itself; gradients are averaged over tasks before they are clipped; noise on the
      weights once a truncation; recurrent states rest in every warm-up.

    Reference:
      Huang et al., Optimizer Amalgamation, ICLR 2022, arXiv:2203.06474, Eq. 1-6.
    """
    check_settings(locals())
    if estimator == "bptt":
        check_differentiable_student(student, "amalgamate(student=...)")
    moves = perturb.none() if perturbation is None else perturbation
    check_perturbation(moves, student, estimator)
    by_step = moves.every == "step"
    if meta_optimizer is None:
        meta_optimizer = default_meta_optimizer()
    reduced: dict[str, Callable[[jax.Array], jax.Array]] = {
        "mean": distill.mean_loss,
        "minmax": distill.minmax_loss,
        "softmax": lambda distances: distill.softmax_loss(distances, softmax_tau),
    }
    estimate = {"bptt": bptt, "pes": pes(es_std), "es": es(es_std)}[estimator]
    no_gradient = lambda theta: theta  # `every="step"` exists for plain noise only
    objective = student_objective(
        task,
        student,
        reduced[reduce],
        second_order=second_order,
        remat=remat if estimator == "bptt" else "none",
        input_noise=input_noise,
        scaled_distance=distance_coordinates == "scaled",
        distance_eps=distance_eps,
        huber_delta=huber_delta,
        perturb_step=(lambda theta, key: moves.apply(theta, key, no_gradient))
        if by_step
        else None,
    )
    # in the order that dicts have as pytrees: distances stand along an axis
    teachers = dict(sorted(teachers.items()))
    begin, draw_anew = restarts(
        task,
        student,
        teachers,
        random_scale=random_scale,
        warmup_steps=warmup_steps,
        warmup_learning_rate=warmup_learning_rate,
        scaled_warmup=warmup_coordinates == "scaled",
    )

    def init(key: jax.Array) -> AmalgamationState:
        check_key(key, "amalgamate(...).init(key=...)")
        key_theta, key_tasks = jax.random.split(key)
        theta = student.init(key_theta)
        keys = jax.random.split(key_tasks, num_tasks)
        fresh = over_tasks(begin)(theta, keys)
        return AmalgamationState(
            theta=theta,
            meta_state=meta_optimizer.init(theta),
            inner_step=jnp.array(DUE, jnp.int32),
            count=jnp.zeros((), jnp.int32),
            imitation_weight=jnp.asarray(imitation_weight, jnp.float32),
            unroll_length=jnp.array(unroll_length, jnp.int32),
            estimator_state=remember(theta, fresh),
            **fresh._asdict(),
        )

    def remember(theta: Params, fresh: Restart) -> Any:
        """What the estimator keeps of optimizees that are new."""
        if estimator != "pes":
            return ()
        return pes_start(theta, fresh.params, fresh.student_state)

    def renew(state: AmalgamationState, key: jax.Array, data: Data) -> Any:
        keys = jax.random.split(key, num_tasks)
        fresh = over_tasks(draw_anew, (None, 0, None))(state.theta, keys, data)
        return state._replace(
            inner_step=jnp.zeros((), jnp.int32),
            estimator_state=remember(state.theta, fresh),
            **fresh._asdict(),
        )

    def step(
        state: AmalgamationState, key: jax.Array, data: Data
    ) -> tuple[AmalgamationState, AmalgamationInfo]:
        check_key(key, "amalgamate(...).step(key=...)")
        key_restart, key_run, key_noise, key_weights = jax.random.split(key, 4)
        key_perturb, key_estimate, key_parts = jax.random.split(key_weights, 3)
        due = state.inner_step >= state.unroll_length
        # the predicate has no task axis: under a vmap, both branches would be run
        state = jax.lax.cond(
            due, lambda: renew(state, key_restart, data), lambda: state
        )
        keys = jax.vmap(lambda k: jax.random.split(k, truncation_length))(
            jax.random.split(key_run, num_tasks)
        )
        follow = lambda p, s, k, d: follow_teachers(task, teachers, p, s, k, d)
        followed = over_tasks(follow, (0, 0, 0, None))(
            state.teacher_params, state.teacher_states, keys, data
        ) if teachers else ({}, {}, {})  # fmt: skip
        parts = _parts(state.imitation_weight, combine, key_parts)
        optimizees = Optimizee(
            params=state.params,
            student_state=state.student_state,
            scale=state.scale,
            keys=keys,
            trajectories=followed[2],
            key_noise=jax.random.split(key_noise, num_tasks),
            parts=jnp.broadcast_to(parts, (num_tasks, 2)),
        )
        loss_fn = lambda theta, one: objective(theta, one, data)
        carry = Carry(optimizees, state.estimator_state)
        theta = state.theta
        if not by_step:
            slope = lambda theta: bptt(loss_fn, theta, carry, key_estimate)[0]
            theta = truncate(moves.apply(theta, key_perturb, slope))
        gradient, carry, (loss, measured) = estimate(
            loss_fn, theta, carry, key_estimate
        )
        before = state.theta
        state, is_finite = meta_update(meta_optimizer, state, gradient, loss)
        length = state.inner_step + truncation_length
        state = state._replace(
            params=carry.optimizees.params,
            student_state=carry.optimizees.student_state,
            teacher_params=followed[0],
            teacher_states=followed[1],
            inner_step=jnp.where(is_finite, length, DUE).astype(jnp.int32),
            estimator_state=carry.estimator_state,
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(state.params)) // num_tasks
        floor = jnp.log(distance_eps) - jnp.log(size)
        shown = show(measured, loss, gradient, before, list(teachers), floor)
        info = shown._replace(restarted=due, is_finite=is_finite)
        return truncate(state), info

    return Loop(init, step)


def release_settings() -> dict[str, Any]:
    """The arguments of `amalgamate` under which it does what the paper's release does.

    With them go other arguments elsewhere:

        what the release does                           in metax
        constant division in place of bias correction   rnnprop(bias_correction=
          in the student and in Adam                      "constant"), pool(name,
                                                          setting="release")
        larger rates in the choice policy's pool        pool(name, setting=
                                                          "release-choice")
        warm-up by 0.05, in the scaled coordinates      these settings
        distances in the scaled coordinates             these settings, and the default
        new noise on the weights at every step          perturb.gaussian(5e-4, every=
                                                          "step"); its own is smaller
                                                          by √|w| than Eq. 5 says

    Returns:
      Keyword arguments, new at each call.
    """
    return {
        "warmup_learning_rate": 0.05,
        "warmup_coordinates": "scaled",
        "distance_coordinates": "scaled",
    }


def _parts(weight: jax.Array, combine: str, key: jax.Array) -> jax.Array:
    """What meta loss and imitation count for: (1, α), or one of them alone."""
    if combine == "switch":
        weight = jax.random.bernoulli(key, weight).astype(weight.dtype)
        return jnp.stack([1 - weight, weight])
    return jnp.stack([jnp.ones_like(weight), weight])
