"""The choice policy: for every coordinate a learned mixture of the rules of a pool."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import (
    all_finite,
    features_dtype,
    flatten,
    keep_unless,
    unflatten,
    zero_carries,
)
from metax.amalgamation.doors import check_differentiable, check_rules
from metax.amalgamation.policies import (
    LearnedOptimizer,
    check_network,
    freeze,
    layers_init,
    run_layers,
)
from metax.arguments import check_has, refuse

__all__ = ["ChoiceState", "choice", "choice_weights"]

Params = Any


class ChoiceState(NamedTuple):
    """What the choice policy carries from step to step.

    Attributes:
      count: int32 scalar, the steps made.
      pool: the state of each member by name.
      carries: for each LSTM layer (h, c), each [N, hidden_size].
    """

    count: jax.Array
    pool: dict[str, Any]
    carries: tuple[tuple[jax.Array, jax.Array], ...]


def choice(
    pool: Mapping[str, optax.GradientTransformation],
    hidden_size: int = 20,
    *,
    num_layers: int = 2,
    time_scale: float = 2000.0,
) -> LearnedOptimizer:
    """Mixes the updates of a pool by weights that an LSTM chooses at each coordinate.

        x   = [T_1(g), ..., T_n(g), min(t / time_scale, 1), one-hot(rank ≤ 1, 2, ≥ 3)]
        c   = softmax(Dense(LSTM(... LSTM(x))))                     over the pool
        θ ← θ - Σ_j c_j T_j(g)

    T_j(g) is what member j subtracts, its learning rate included; the rank is that of
    the tensor that the coordinate belongs to. Each member keeps a state of its own,
    advanced with the gradient at the policy's parameters. Trained on the meta loss
    alone (`amalgamate(..., teachers={})`) and then frozen, it is the one teacher of
    choice amalgamation. 5,482 weights for two members, 5,886 for six; the state is that
    of the pool and 80 numbers a parameter.

    Args:
      pool: the members by name, in order; at least one. What trains the policy
        differentiates through them.
      hidden_size: units of each layer, at least 1.
      num_layers: LSTM layers, at least 1.
      time_scale: steps after which the time feature stays at 1, above 0.

    Returns:
      A `LearnedOptimizer`. Extra arguments of an update are passed on to the members.

    Raises:
      ValueError: an empty pool, an argument outside its range, or a member whose
        derivative is not finite at a gradient of zero, Adam without `eps_root` above
        all.

    Example:
      >>> import jax
      >>> from metax.amalgamation import choice, pool
      >>> theta = choice(pool("small")).init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(theta))
      5482

    Note:
      The release's time feature is t / 2000 without a bound, which ends far outside of
      what training saw; and its one-hot misses rank 4, that of convolution kernels.

    Reference:
      Huang et al., Optimizer Amalgamation, ICLR 2022, arXiv:2203.06474, Eq. 4 and
      appendix.
    """
    check_rules("choice", "pool", pool)
    if not pool:
        raise ValueError("`choice(pool=...)` must hold at least one rule; got none.")
    check_network("choice", hidden_size, num_layers, 1.0)
    if not time_scale > 0:
        raise ValueError(f"`choice(time_scale=...)` must be above 0; got {time_scale}.")
    members = {n: optax.with_extra_args_support(rule) for n, rule in pool.items()}
    for name, member in members.items():
        check_differentiable(member, f"choice(pool={{{name!r}: ...}})")

    def init(key: jax.Array) -> Params:
        width = len(members) + 4
        return layers_init(key, width, hidden_size, num_layers, len(members))

    def rule(theta: Params) -> optax.GradientTransformationExtraArgs:
        def init_fn(params: Params) -> ChoiceState:
            dtype = features_dtype(theta, params)
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            states = {name: member.init(params) for name, member in members.items()}
            carries = zero_carries(num_layers, size, hidden_size, dtype)
            return ChoiceState(jnp.zeros((), jnp.int32), states, carries)

        def update_fn(
            updates: Params,
            state: Any,
            params: Params | None = None,
            *,
            warmup: Any = None,
            **extra: Any,
        ) -> tuple[Params, ChoiceState]:
            grads = updates
            dtype = features_dtype(theta, grads)
            finite = all_finite(grads)
            # before the dangerous operations as well as after: 0 · ∞ has no derivative
            safe = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
            extra = extra if warmup is None else {**extra, "warmup": warmup}
            steps, states = [], {}
            for name, member in members.items():
                update, states[name] = member.update(
                    safe, state.pool[name], params, **extra
                )
                steps.append(-flatten(update, dtype))
            chosen = jnp.stack(steps, axis=-1)
            time = jnp.minimum(state.count / time_scale, 1).astype(dtype)
            x = _features(chosen, time, grads)
            logits, carries = run_layers(theta, x, state.carries)
            step = jnp.sum(jax.nn.softmax(logits) * chosen, axis=-1)
            step = jnp.where(finite, -step, 0)
            carries = freeze(carries, state.carries, warmup)
            new = ChoiceState(state.count + 1, states, carries)
            return unflatten(step, grads), keep_unless(finite, new, state)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, rule)


def choice_weights(theta: Params, state: ChoiceState) -> jax.Array:
    """The mixture that a choice policy used last, to look at.

    Args:
      theta: its weights.
      state: its state after an update.

    Returns:
      [N, members], each row positive and summing to 1, in the order of the pool.
    """
    check_has("choice_weights", "state", state, "a `ChoiceState`", "carries")
    if "output" not in theta:
        rule = "must be the weights of a choice policy, with 'output'"
        refuse("choice_weights", "theta", rule, sorted(theta))
    output = theta["output"]
    return jax.nn.softmax(state.carries[-1][0] @ output["w"] + output["b"])


def _features(chosen: jax.Array, time: jax.Array, grads: Params) -> jax.Array:
    """What the LSTM sees of each coordinate, [N, members + 4]."""
    ranks = [
        jnp.full(leaf.size, min(max(leaf.ndim, 1), 3) - 1)
        for leaf in jax.tree.leaves(grads)
    ]
    rank = jnp.concatenate(ranks) if ranks else jnp.zeros(0, int)
    one_hot = jax.nn.one_hot(rank, 3, dtype=chosen.dtype)
    times = jnp.broadcast_to(time, (len(chosen), 1))
    return jnp.concatenate([chosen, times, one_hot], axis=-1)
