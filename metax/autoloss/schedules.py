"""Schedules made by hand: policies that learn nothing.

Every claim for a learned schedule is a claim against these. Probabilities and
thresholds may be traced, so a grid search is a vmap.
"""

from typing import Any, Literal

import jax
import jax.core
import jax.numpy as jnp

from metax.arguments import check_count, check_has, check_number, check_one_of, refuse
from metax.autoloss.decisions import Decision, Observation, Policy, choose, drawn
from metax.autoloss.vectors import as_float, validation_loss

__all__ = ["always", "bernoulli", "cycle", "phases", "threshold"]

STRENGTH: tuple[Literal["none", "chosen", "all"], ...] = ("none", "chosen", "all")


def always(action: int) -> Policy:
    """One action for ever.

    Args:
      action: its index, at least 0.

    Returns:
      The policy.

    Raises:
      ValueError: a negative action.
    """
    check_count("always", 0, action=action)

    def act(state: tuple[()], key: jax.Array) -> tuple[tuple[()], Decision]:
        return state, _decide(action)

    return Policy(init=lambda: (), act=act, observe=_ignore)


def cycle(counts: tuple[int, ...]) -> Policy:
    """Each action in turn, as many times as its count, and again.

    Args:
      counts: for action 0, 1, ..., at least 0 each and not all 0. `(1, K)` takes action
        0 once, then action 1 K times.

    Returns:
      The policy.

    Raises:
      ValueError: a negative count, or nothing but zeros.

    Example:
      >>> import jax
      >>> from metax.autoloss import cycle
      >>> policy, state, taken = cycle((1, 2)), cycle((1, 2)).init(), []
      >>> for step in range(6):
      ...     state, decision = policy.act(state, jax.random.key(step))
      ...     taken.append(int(decision.action))
      >>> taken
      [0, 1, 1, 0, 1, 1]
    """
    if not isinstance(counts, tuple | list):
        refuse("cycle", "counts", "must be a tuple, a count an action", counts)
    for count in counts:
        check_count("cycle", 0, counts=count)
    if sum(counts) == 0:
        refuse("cycle", "counts", "must count some action", counts)
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]

    def act(position: jax.Array, key: jax.Array) -> tuple[jax.Array, Decision]:
        action = jnp.sum(position >= jnp.array(ends))
        return (position + 1) % ends[-1], _decide(action)

    return Policy(init=lambda: jnp.zeros((), jnp.int32), act=act, observe=_ignore)


def bernoulli(p: jax.typing.ArrayLike) -> Policy:
    """A random action at each step, without memory: what learning must beat.

    Args:
      p: the probability of action 1, in [0, 1]; or [Q], a probability for each action,
        of sum 1. May be traced.

    Returns:
      The policy.

    Raises:
      ValueError: no probabilities.
    """
    p = as_float(p)
    if p.ndim == 0:
        check_number("bernoulli", "p", p, least=0, most=1)
        p = jnp.stack([1 - p, p])
    elif not isinstance(p, jax.core.Tracer):
        fine = p.ndim == 1 and bool(jnp.all(p >= 0)) and abs(float(p.sum()) - 1) < 1e-5
        if not fine:
            refuse("bernoulli", "p", "must be at least 0 and of sum 1", p.tolist())

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(key, p.shape, p.dtype)

    def act(state: tuple[()], key: jax.Array) -> tuple[tuple[()], Decision]:
        log_p = jnp.log(p)
        action = choose(log_p, drawn(draw, key))
        return state, _decide(action, log_p[action])

    return Policy(init=lambda: (), act=act, observe=_ignore, draw=draw)


def threshold(
    kind: Literal["S1", "S2", "S3"],
    th: jax.typing.ArrayLike,
    *,
    main: int = 0,
    auxiliary: int = 1,
) -> Policy:
    """The auxiliary action where a ratio exceeds a threshold, else the main one.

        S1    (v - ℓ_1)/ℓ_1 > th                  it overfits
        S2    (ℓ_2 - v)/v > th                    the auxiliary loss is large
        S3    (‖∇ℓ_2‖ - ‖∇ℓ_1‖)/‖∇ℓ_1‖ > th       so is its gradient

    with v the validation loss. The first step takes the main action; where a
    denominator is 0 the ratio counts as 0. Measures every loss, every gradient and v
    after each step.

    Args:
      kind: the rule.
      th: scalar; may be traced.
      main: index of the main action, and of its loss ℓ_1.
      auxiliary: likewise, ℓ_2.

    Returns:
      The policy; `refresh="all"`, `observe_every=1`.

    Raises:
      ValueError: an unknown rule, a negative index, or a threshold that is no number.

    Note:
      S3 compares root mean squares over the groups of each loss's actions: the same
      ratio where both move the same groups.

    Reference:
      Xu et al., AutoLoss: Learning Discrete Schedules for Alternate Optimization, 2019,
      arXiv:1810.02442, section 5.1.
    """
    check_one_of("threshold", "kind", kind, ("S1", "S2", "S3"))
    check_number("threshold", "th", th)
    check_count("threshold", 0, main=main, auxiliary=auxiliary)

    def act(exceeded: jax.Array, key: jax.Array) -> tuple[jax.Array, Decision]:
        return exceeded, _decide(jnp.where(exceeded, auxiliary, main))

    def observe(exceeded: jax.Array, observation: Observation) -> jax.Array:
        losses, rms = observation.losses, observation.gradient_rms
        v = validation_loss(observation)
        large, small = {
            "S1": (v, losses[main]),
            "S2": (losses[auxiliary], v),
            "S3": (rms[auxiliary], rms[main]),
        }[kind]
        zero = small == 0
        return jnp.where(zero, 0, (large - small) / jnp.where(zero, 1, small)) > th

    init = lambda: jnp.zeros((), bool)
    return Policy(init, act, observe, refresh="all", observe_every=1)


def phases(policies: tuple[Policy, ...], lengths: tuple[int, ...]) -> Policy:
    """One policy after the other; the last goes on for ever.

    All of them see the whole run, so that a later one does not begin blind. Decisions
    are those of the policy whose turn it is, without its inputs.

    Args:
      policies: at least one; all give weights, or none does.
      lengths: decisions of each but the last; one more is ignored.

    Returns:
      The policy. It wants to see what the most demanding of them wants, at the shortest
      of the periods that they name.

    Raises:
      ValueError: no policy, another number of lengths, or a length below 1; at the
        first decision, policies of which only some give weights.

    Example:
      >>> from metax.autoloss import always, cycle, phases
      >>> first_both_then_main = phases((cycle((1, 1)), always(0)), (1000,))
      >>> first_both_then_main.refresh
      'none'
    """
    number = len(policies)
    if number == 0 or len(lengths) not in (number - 1, number):
        rule = f"must say how long each of {number} policies but the last goes on"
        refuse("phases", "lengths", rule, lengths)
    for policy in policies:
        fields = ("init", "act", "observe")
        check_has("phases", "policies", policy, "made of `Policy`s", *fields)
    for length in lengths:
        check_count("phases", 1, lengths=length)
    ends = [sum(lengths[: i + 1]) for i in range(number - 1)]

    def init() -> tuple[jax.Array, tuple[Any, ...]]:
        return jnp.zeros((), jnp.int32), tuple(policy.init() for policy in policies)

    def act(state: Any, key: jax.Array) -> tuple[Any, Decision]:
        count, parts = state
        now = jnp.sum(count >= jnp.array(ends, jnp.int32))
        acts = [p.act(s, key) for p, s in zip(policies, parts, strict=True)]
        decision = _nothing_seen(acts[0][1])
        new_parts = []
        for i, (new, its) in enumerate(acts):
            mine = now == i
            new_parts.append(_where(mine, new, parts[i]))
            decision = _where(mine, _alike(its, decision), decision)
        return (count + 1, tuple(new_parts)), decision

    def observe(state: Any, observation: Observation) -> Any:
        count, parts = state
        pairs = zip(policies, parts, strict=True)
        return count, tuple(p.observe(s, observation) for p, s in pairs)

    periods = [p.observe_every for p in policies if p.observe_every is not None]
    refresh = STRENGTH[max(STRENGTH.index(p.refresh) for p in policies)]
    return Policy(init, act, observe, refresh, min(periods, default=None))


def _decide(action: Any, log_prob: Any = 0.0) -> Decision:
    """A decision that is based on nothing."""
    action = jnp.asarray(action, jnp.int32)
    return Decision(action, as_float(log_prob), jnp.zeros(0))


def _ignore(state: Any, observation: Observation) -> Any:
    del observation
    return state


def _nothing_seen(decision: Decision) -> Decision:
    return decision._replace(inputs=jnp.zeros(0))


def _alike(decision: Decision, like: Decision) -> Decision:
    """Without inputs, and with weights where the others have them."""
    if (decision.weights is None) != (like.weights is None):
        rule = "must all give weights, or none of them"
        refuse("phases", "policies", rule, "some that do and some that do not")
    return _nothing_seen(decision)


def _where(condition: jax.Array, new: Any, old: Any) -> Any:
    return jax.tree.map(lambda n, o: jnp.where(condition, n, o), new, old)
