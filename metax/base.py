"""The words every method shares: problems, a loop, and how a loop is unrolled.

metax knows three nouns. A *rule* is an `optax.GradientTransformationExtraArgs`, used
as it is. A *problem* is a value that says what is to be solved; `Task` is the plain
one, `BilevelProblem` one whose hyperparameters are to be found as well,
`AlternatingProblem` one of several losses that take turns. A `Loop` is anything that
iterates, a pair of pure functions:

    init(key) -> state          step(state, key, data) -> (state, info)

State holds what the next step needs, Info what a person wants to see; `unroll` scans
the first and stacks the second. Data is always an argument and never a closure: an
array that a jitted function closes over is written into the program.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_has, check_rule
from metax.problems import (
    Action,
    AlternatingProblem,
    BilevelProblem,
    Data,
    Hyperparameter,
    Params,
    Task,
    last_reward,
    squared_norm,
)

# what annotations elsewhere call these trees by
from metax.problems import Batch as Batch
from metax.problems import Hparams as Hparams
from metax.problems import Outputs as Outputs
from metax.problems import Select as Select

__all__ = [
    "Action",
    "AlternatingProblem",
    "BilevelProblem",
    "Hyperparameter",
    "InnerInfo",
    "InnerState",
    "Loop",
    "Task",
    "check_key",
    "inner_loop",
    "last_reward",
    "squared_norm",
    "truncate",
    "unroll",
]

# A `Loop`, or a method's own tuple that begins with its two fields; no type says that.
LoopLike = Any


class Loop(NamedTuple):
    """Anything that iterates.

    Attributes:
      init: `init(key) -> state`.
      step: `step(state, key, data) -> (state, info)`; the state keeps its tree, shapes
        and dtypes. A field `is_finite` of the info, where there is one, is what the
        harness watches.
    """

    init: Callable[[jax.Array], Any]
    step: Callable[[Any, jax.Array, Data], tuple[Any, Any]]


class InnerState(NamedTuple):
    """What an inner loop carries from one step to the next.

    Attributes:
      params: the parameters, any pytree.
      opt_state: the state of the rule.
    """

    params: Params
    opt_state: optax.OptState


class InnerInfo(NamedTuple):
    """What a person wants to see of one inner step.

    Attributes:
      loss: scalar, the loss on this step's batch before the update.
      grad_norm: scalar, the Euclidean norm of its gradient over all leaves.
      is_finite: bool scalar, whether loss and gradient norm are finite.
      observed: what `observe` returned for the new optimizer state, `()` by default.
    """

    loss: jax.Array
    grad_norm: jax.Array
    is_finite: jax.Array
    observed: Any


def inner_loop(
    task: Task,
    rule: optax.GradientTransformation,
    *,
    observe: Callable[[optax.OptState], Any] | None = None,
) -> Loop:
    """Trains the parameters of `task` with `rule`.

    One step is

        batch  = sample(data, key_sample)
        loss   = L(θ, batch, key_loss)
        θ, s   = θ + u, s'        where  u, s' = rule.update(∇L, s, θ)

    Cost: one gradient a step, and what the rule needs. Rules that want more get it:
    `value`, `grad` and `value_fn` (of the same batch and key) are passed as extra
    arguments, so line searches, `momo` or `metax.hypergradient.hdm_hb` work as well.

    Args:
      task: the problem.
      rule: any optax transformation.
      observe: what to read from the optimizer state into `InnerInfo.observed` after
        each step, e.g. `lambda s: optax.tree.get(s, "learning_rate")`.

    Returns:
      A `Loop` whose state is an `InnerState` and whose info is an `InnerInfo`.

    Raises:
      ValueError: `task` is no task or `rule` no rule; the key is raw, or the state is
        another's.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax import Task, inner_loop, unroll
      >>> task = Task(
      ...     init=lambda key: jnp.array(3.0),
      ...     loss=lambda params, batch, key: (params - batch) ** 2,
      ...     sample=lambda data, key: data,
      ...     evaluate=lambda params, data: {"error": abs(params - data)},
      ... )
      >>> loop = inner_loop(task, optax.sgd(0.25))
      >>> key_init, key_run = jax.random.split(jax.random.key(0))
      >>> keys = jax.random.split(key_run, 4)
      >>> state, infos = unroll(loop, loop.init(key_init), keys, jnp.array(1.0))
      >>> [float(loss) for loss in infos.loss]
      [4.0, 1.0, 0.25, 0.0625]
    """
    check_has("inner_loop", "task", task, "a `Task`", "init", "loss", "sample")
    check_rule("inner_loop", "rule", rule)
    rule = optax.with_extra_args_support(rule)

    def init(key: jax.Array) -> InnerState:
        check_key(key, "inner_loop(...).init(key=...)")
        params = task.init(key)
        return InnerState(params=params, opt_state=rule.init(params))

    def step(
        state: InnerState, key: jax.Array, data: Data
    ) -> tuple[InnerState, InnerInfo]:
        check_key(key, "inner_loop(...).step(key=...)")
        fields = ("params", "opt_state")
        check_has("inner_loop(...).step", "state", state, "an `InnerState`", *fields)
        key_sample, key_loss = jax.random.split(key)
        batch = task.sample(data, key_sample)

        def value_fn(params: Params) -> jax.Array:
            return task.loss(params, batch, key_loss)

        loss, grad = jax.value_and_grad(value_fn)(state.params)
        extra = {"value": loss, "grad": grad, "value_fn": value_fn}
        updates, opt_state = rule.update(grad, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        if task.carry is not None:
            params = task.carry(params, state.params, batch, key_loss)
        grad_norm = optax.tree.norm(grad)
        observed = () if observe is None else observe(opt_state)
        info = InnerInfo(
            loss=loss,
            grad_norm=grad_norm,
            is_finite=jnp.isfinite(loss) & jnp.isfinite(grad_norm),
            observed=jax.tree.map(jnp.asarray, observed),
        )
        return InnerState(params=params, opt_state=opt_state), info

    return Loop(init=init, step=step)


def unroll(
    loop: LoopLike, state: Any, keys: jax.Array, data: Data, *, remat: bool = False
) -> tuple[Any, Any]:
    """Runs one step of `loop` per key, as a single `lax.scan`.

    Nothing else happens here: no jit, no logging, no splitting of keys and no
    truncation. Truncation is the caller's visible act,
    `unroll(loop, truncate(state), keys, data)`.

    Args:
      loop: what to iterate.
      state: where to start, from `loop.init` or an earlier `unroll`.
      keys: typed keys of shape [num_steps].
      data: handed to every step unchanged.
      remat: recompute each step in the backward pass instead of keeping its
        intermediates: memory of one step plus the carried states, for one more
        forward pass.

    Returns:
      The last state, and the infos with a leading axis of num_steps.

    Raises:
      ValueError: `keys` is no one-dimensional array of typed keys.
    """
    check_key(keys, "unroll(keys=...)", ndim=1)
    check_has("unroll", "loop", loop, "a `Loop`", "init", "step")
    step = jax.checkpoint(loop.step) if remat else loop.step
    return jax.lax.scan(lambda carry, key: step(carry, key, data), state, keys)


def truncate(state: Any) -> Any:
    """Cuts the gradient at `state`: the same values, and no derivative through them.

    Args:
      state: any pytree of arrays.

    Returns:
      The same tree behind `jax.lax.stop_gradient`.
    """
    return jax.lax.stop_gradient(state)


def check_key(key: jax.Array, argument: str, *, ndim: int = 0) -> None:
    """Refuses anything but typed keys; looks at types only, so it is free under jit.

    Args:
      key: what the caller passed.
      argument: how the error names it, e.g. `"unroll(keys=...)"`.
      ndim: the number of axes wanted: 0 for a single key.

    Raises:
      ValueError: `key` is a raw uint32 key, no array at all, or of another rank.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        got = type(key).__name__ if dtype is None else f"{dtype}{list(key.shape)}"
        raise ValueError(
            f"`{argument}` must be made by `jax.random.key(seed)`; got {got}. "
            "A raw uint32 key becomes a typed one by `jax.random.wrap_key_data(key)`."
        )
    if key.ndim != ndim:
        raise ValueError(
            f"`{argument}` must have {ndim} axes (one key"
            f"{' a step' if ndim else ''}); got keys of shape {list(key.shape)}."
        )
