"""One decision of an alternating problem carried out, by an action that may be traced.

Three ways to the same step. `mix` differentiates Σ_m w_m ℓ_m once, with w the indicator
of the chosen loss, and keeps or drops what each optimizer made of it: one backward pass
through what `AlternatingProblem.shared` names and one through each loss, whatever the
action, also under `vmap`. `switch` runs the branch of the action alone,
which is less work where the action is a scalar; under `vmap` it is the work of all
branches. `follow` takes gradients of all losses that are known already. In all of them
a group that the action does not touch keeps its parameters and its optimizer's state
bit for bit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.autoloss.decisions import Decision
from metax.base import AlternatingProblem

__all__ = [
    "Measured",
    "Stepped",
    "follow",
    "groups_of",
    "init_optimizers",
    "keep",
    "measure_all",
    "mix",
    "shared_part",
    "switch",
    "take_step",
    "zero_gradients",
]

Groups = dict[str, Any]
States = dict[Any, Any]


class Measured(NamedTuple):
    """Losses and gradients at one place; M losses. Zeros where not measured.

    Attributes:
      losses: [M].
      gradient_rms: [M], ‖∇ℓ_m‖₂ / √dim over the groups of the action that was taken, or
        of all actions on the loss where every loss is measured.
      measured: bool [M].
      aux: [M] each.
    """

    losses: jax.Array
    gradient_rms: jax.Array
    measured: jax.Array
    aux: dict[str, jax.Array]


class Stepped(NamedTuple):
    """What a decision made of a run.

    Attributes:
      params: the groups after it.
      states: of the optimizers, by group or by action.
      taken: int32 [], optimizer steps taken so far over all groups.
      measured: what was seen on the way, at the parameters before the last step.
      is_finite: bool [], whether losses and gradients were; where not, nothing moved.
    """

    params: Groups
    states: States
    taken: jax.Array
    measured: Measured
    is_finite: jax.Array


def groups_of(problem: AlternatingProblem, params: Groups, action: int) -> list[str]:
    """The groups that an action moves, in the order of the problem's."""
    named = problem.actions[action].params
    chosen = (named,) if isinstance(named, str) else named
    return [name for name in params if chosen is None or name in chosen]


def _rule_of(problem: AlternatingProblem, owner: Any) -> Any:
    """The rule of a group or, with `optimizer_sharing="action"`, of an action."""
    rules = problem.optimizers
    rule = rules if isinstance(rules, optax.GradientTransformation) else rules[owner]
    return optax.with_extra_args_support(rule)


def init_optimizers(problem: AlternatingProblem, params: Groups) -> States:
    """One state a group, or with `optimizer_sharing="action"` one an action."""
    return {
        owner: _rule_of(problem, owner).init(_view(problem, params, owner, params))
        for owner in _owners(problem, params)
    }


def take_step(
    problem: AlternatingProblem,
    dispatch: str,
    before: Stepped,
    decision: Decision,
    key: jax.Array,
    data: Any,
) -> Stepped:
    """One decision by the way that `dispatch` names, "mix" or "switch"."""
    if dispatch == "switch":
        return switch(problem, before, decision, key, data)
    return mix(problem, before, decision, key, data)


def mix(
    problem: AlternatingProblem,
    before: Stepped,
    decision: Decision,
    key: jax.Array,
    data: Any,
) -> Stepped:
    """Steps by the gradient of the mixed loss; all actions repeat alike."""
    weights = _loss_weights(problem, decision)

    def once(now: Stepped, key: jax.Array) -> Stepped:
        key_sample, key_loss = jax.random.split(key)
        batch = problem.sample(data, key_sample)

        def mixed(params: Groups) -> tuple[jax.Array, Any]:
            common = shared_part(problem, params, batch, key_loss)
            parts = [
                _loss(problem, m, params, batch, key_loss, common)
                for m in range(len(problem.losses))
            ]
            values, aux = jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts)
            return jnp.sum(weights * values), (values, aux)

        (_, (values, aux)), grads = jax.value_and_grad(mixed, has_aux=True)(now.params)
        # with weights of its own a policy is shown every loss, also one of weight 0
        chosen = (weights != 0) | (decision.weights is not None)
        rms = _rms_of_action(problem, grads, decision.action)
        only = lambda x: jnp.where(chosen, x, 0).astype(_float())
        measured = Measured(only(values), only(rms), chosen, jax.tree.map(only, aux))
        return _move(problem, now, decision, grads, measured)

    return _repeat(once, before, key, problem.actions[0].repeats)


def switch(
    problem: AlternatingProblem,
    before: Stepped,
    decision: Decision,
    key: jax.Array,
    data: Any,
) -> Stepped:
    """Steps by the branch of the action alone."""
    if decision.weights is not None:
        raise ValueError(
            "a policy that returns `weights` follows several losses at once; got "
            "dispatch='switch', which runs one. Use dispatch='mix'."
        )

    def branch(q: int) -> Callable[[], Stepped]:
        names, m = groups_of(problem, before.params, q), problem.actions[q].loss
        only = lambda x: jnp.zeros(len(problem.losses), _float()).at[m].set(x)
        mine = decision._replace(action=q)

        def once(now: Stepped, key: jax.Array) -> Stepped:
            key_sample, key_loss = jax.random.split(key)
            batch = problem.sample(data, key_sample)

            def of_groups(groups: Groups) -> tuple[jax.Array, Any]:
                return _loss(problem, m, {**now.params, **groups}, batch, key_loss)

            groups = {name: now.params[name] for name in names}
            gradient = jax.value_and_grad(of_groups, has_aux=True)
            (value, aux), grads = gradient(groups)
            chosen = only(1) != 0
            measured = Measured(
                only(value), only(_rms(grads)), chosen, jax.tree.map(only, aux)
            )
            return _move(problem, now, mine, grads, measured)

        return lambda: _repeat(once, before, key, problem.actions[q].repeats)

    branches = [branch(q) for q in range(len(problem.actions))]
    return jax.lax.switch(decision.action, branches)


def follow(
    problem: AlternatingProblem,
    before: Stepped,
    decision: Decision,
    gradients: tuple[Groups, ...],
) -> Stepped:
    """Steps by gradients that were measured after the last step, on the same batch."""
    weights = _loss_weights(problem, decision)
    scale = lambda w, tree: jax.tree.map(
        # where, for a zero times what is not finite would be NaN
        lambda g: jnp.where(w == 0, 0, w * g).astype(g.dtype),
        tree,
    )
    parts = [
        {name: scale(weights[m], tree) for name, tree in grads.items()}
        for m, grads in enumerate(gradients)
    ]
    mixed = {
        name: functools.reduce(optax.tree.add, [p[name] for p in parts if name in p])
        for name in {name for part in parts for name in part}
    }
    return _move(problem, before, decision, mixed, before.measured)


def measure_all(
    problem: AlternatingProblem, params: Groups, key: jax.Array, data: Any
) -> tuple[Measured, tuple[Groups, ...]]:
    """Every loss and its gradient in the groups of its actions, on one batch."""
    key_sample, key_loss = jax.random.split(key)
    batch = problem.sample(data, key_sample)

    def one(m: int) -> tuple[Measured, Groups]:
        def of_groups(groups: Groups) -> tuple[jax.Array, Any]:
            return _loss(problem, m, {**params, **groups}, batch, key_loss)

        groups = {name: params[name] for name in _groups_of_loss(problem, params, m)}
        (value, aux), grads = jax.value_and_grad(of_groups, has_aux=True)(groups)
        rms = _rms(grads).astype(_float())
        return Measured(value, rms, jnp.bool_(True), aux), grads

    parts, gradients = zip(*map(one, range(len(problem.losses))), strict=True)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *parts), gradients


def zero_gradients(problem: AlternatingProblem, params: Groups) -> tuple[Groups, ...]:
    """In the form of what `measure_all` returns."""
    return tuple(
        {
            name: jax.tree.map(jnp.zeros_like, params[name])
            for name in _groups_of_loss(problem, params, m)
        }
        for m in range(len(problem.losses))
    )


def keep(condition: jax.Array, new: Any, old: Any) -> Any:
    """`new` where a scalar condition holds, else `old`, leaf by leaf."""
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)


def _move(
    problem: AlternatingProblem,
    now: Stepped,
    decision: Decision,
    grads: Groups,
    measured: Measured,
) -> Stepped:
    """Lets the optimizers act that the action calls for, where all is finite."""
    params, states = dict(now.params), dict(now.states)
    fine = jnp.all(jnp.isfinite(measured.losses))
    fine &= jnp.all(jnp.isfinite(measured.gradient_rms))
    for owner in _owners(problem, params):
        called = _is_called(problem, params, owner, decision.action)
        if called is False:
            continue  # a branch leaves what it does not touch out of its program
        old, state = _view(problem, params, owner, params), states[owner]
        grad = _view(problem, grads, owner, params)
        updates, new_state = _rule_of(problem, owner).update(
            grad, state, old, step=now.taken
        )
        new = optax.apply_updates(old, updates)
        new, states[owner] = keep(fine & called, (new, new_state), (old, state))
        params.update({owner: new} if _by_group(problem) else new)
    return Stepped(params, states, now.taken + 1, measured, now.is_finite & fine)


def _repeat(
    once: Callable[[Stepped, jax.Array], Stepped],
    before: Stepped,
    key: jax.Array,
    repeats: int,
) -> Stepped:
    """A few times, written out: gradients of convolutions are slow in scans."""
    keys = [key] if repeats == 1 else jax.random.split(key, repeats)
    for key in keys:
        before = once(before, key)
    return before


def shared_part(
    problem: AlternatingProblem, params: Groups, batch: Any, key: jax.Array
) -> tuple[Any, ...]:
    """What losses are given beside parameters, batch and key: nothing, or one thing."""
    return () if problem.shared is None else (problem.shared(params, batch, key),)


def _loss(
    problem: AlternatingProblem,
    m: int,
    params: Groups,
    batch: Any,
    key: jax.Array,
    common: tuple[Any, ...] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Loss m and what it returns beside itself, in the default precision."""
    if common is None:
        common = shared_part(problem, params, batch, key)
    out = problem.losses[m](params, batch, key, *common)
    value, aux = out if problem.has_aux else (out, {})
    # the mixed loss sums over losses, each of which may have its own dtype
    return jax.tree.map(lambda x: jnp.asarray(x, _float()), (value, aux))


def _loss_weights(problem: AlternatingProblem, decision: Decision) -> jax.Array:
    """[M]: the indicator of the chosen loss, or the weights that a policy gave."""
    if decision.weights is not None:
        return decision.weights
    loss = jnp.array([action.loss for action in problem.actions])[decision.action]
    return jax.nn.one_hot(loss, len(problem.losses), dtype=_float())


def _groups_of_loss(problem: AlternatingProblem, params: Groups, m: int) -> list[str]:
    """The groups of all actions on a loss; every group where it has no action."""
    mine = {
        name
        for q, action in enumerate(problem.actions)
        if action.loss == m
        for name in groups_of(problem, params, q)
    }
    return [name for name in params if name in mine or not mine]


def _by_group(problem: AlternatingProblem) -> bool:
    return problem.optimizer_sharing == "variable"


def _owners(problem: AlternatingProblem, params: Groups) -> list[Any]:
    """Of the optimizers' states: groups, or the indices of actions."""
    return list(params) if _by_group(problem) else list(range(len(problem.actions)))


def _view(problem: AlternatingProblem, tree: Groups, owner: Any, params: Groups) -> Any:
    """What an owner's rule works on: its group, or the groups of its action."""
    if _by_group(problem):
        return tree[owner]
    return {name: tree[name] for name in groups_of(problem, params, owner)}


def _is_called(
    problem: AlternatingProblem, params: Groups, owner: Any, action: Any
) -> Any:
    """Whether an action moves what an owner owns; False where it is known not to."""
    actions = range(len(problem.actions))
    if _by_group(problem):
        calls = [owner in groups_of(problem, params, q) for q in actions]
    else:
        calls = [owner == q for q in actions]
    if isinstance(action, int) or not any(calls):
        return any(calls) and calls[action]
    return jnp.array(calls)[action]


def _rms(tree: Any) -> jax.Array:
    """The root mean square over all entries of a tree."""
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
    return optax.tree.norm(tree) / math.sqrt(size)


def _rms_of_action(
    problem: AlternatingProblem, grads: Groups, action: jax.Array
) -> jax.Array:
    """The root mean square over the groups of an action."""
    squares = jnp.stack([optax.tree.norm(grads[n], squared=True) for n in grads])
    sizes = [sum(math.prod(x.shape) for x in jax.tree.leaves(grads[n])) for n in grads]
    moved = jnp.array(
        [
            [name in groups_of(problem, grads, q) for name in grads]
            for q in range(len(problem.actions))
        ]
    )[action]
    return jnp.sqrt(jnp.sum(moved * squares) / jnp.sum(moved * jnp.array(sizes)))


def _float() -> Any:
    """The default floating-point dtype."""
    return jnp.zeros(()).dtype
