"""A gradient checker for learning rates.

Hypergradient rules fail quietly: with a clip in the wrong place, a missing sum over
devices or the current direction in place of the previous one they still train. Here the
oracle is autodiff on the updates that a whole chain really emitted, leaf by leaf, so
that whatever happens to a direction on its way to the parameters shows.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import check_number, check_rule, refuse
from metax.hypergradient.descent import HypergradientDescentState

__all__ = ["check_hypergradient"]


class _Comparison(NamedTuple):
    """One derivative by autodiff beside the same one as the rule has it."""

    path: str
    expected: float
    found: float
    error: float


def check_hypergradient(
    loss: Callable[..., jax.Array],
    params: Any,
    rule: optax.GradientTransformation,
    *,
    batches: Any = None,
    num_steps: int = 4,
    gradient: Callable[..., Any] | None = None,
    tolerance: float | None = None,
) -> dict[str, float]:
    """Checks that the hypergradient a rule stores is the derivative of the loss.

    Runs `num_steps` updates. With U the update that the whole rule emitted at step
    t − 1 and γ the rate it used, each leaf of step t ≥ 2 must satisfy

        (1/γ) d/dr f_t(θ_{t−2} + r U_leaf, other leaves at r = 1) |_{r=1}
            = −⟨∇f_t(θ_{t−1})_leaf, direction_leaf⟩

    and the sum of the left sides must be the stored h_t (entry by entry for the scopes
    "leaf" and "element"). Use it in a test of your own chain. Cost: two gradients a
    step, run eagerly.

    Args:
      loss: the full objective, `loss(params)` or `loss(params, batch)` → scalar.
      params: where to start, any pytree of arrays.
      rule: any transformation whose state holds one outermost
        `HypergradientDescentState`.
      batches: a sequence of batches, used cyclically; None if `loss` takes none.
      num_steps: updates to run, at least 2.
      gradient: gives the gradients fed to `rule`, called like `loss`. Default: the
        gradient of `loss`. Where the chain itself adds coupled L2, pass the gradient of
        the data term alone.
      tolerance: largest error allowed, relative to ‖g_leaf‖‖U_leaf‖/|γ| (the total: to
        the sum of these). Default: 1e-10 if all parameters are float64, else 1e-4.

    Returns:
      The worst error by leaf path (as `jax.tree_util.keystr` writes it) and under
      "total".

    Raises:
      AssertionError: an error above tolerance, naming step, leaf, expected and found.
        If every leaf agrees and the total does not, the reduction is at fault.
      ValueError: fewer than 2 steps, no or several outermost states, or a rate γ of 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.hypergradient import check_hypergradient, sgd_hd
      >>> loss = lambda w: jnp.sum(jnp.cosh(w))
      >>> errors = check_hypergradient(loss, jnp.array([1.0, -2.0]), sgd_hd(0.1, 0.01))
      >>> errors["total"] < 1e-6
      True

    Note:
      Clipping before the rule changes the gradient it sees and is reported: check
      without it. A transformation after the rule that rescales is a mistake, and found.
    """
    if num_steps < 2:
        raise ValueError(
            "`check_hypergradient(num_steps=...)` must be at least 2: the first step "
            f"has no previous direction; got {num_steps}."
        )
    check_rule("check_hypergradient", "rule", rule)
    if tolerance is not None:
        check_number("check_hypergradient", "tolerance", tolerance, least=0)
    if isinstance(batches, Mapping):
        wanted = "must be a sequence of batches, one a step"
        refuse("check_hypergradient", "batches", wanted, "a mapping")
    if tolerance is None:
        doubles = all(leaf.dtype.itemsize >= 8 for leaf in jax.tree.leaves(params))
        tolerance = 1e-10 if doubles else 1e-4
    worst: dict[str, float] = {}
    for step, entries in _steps(loss, gradient, params, rule, batches, num_steps):
        for entry in entries:
            worst[entry.path] = max(worst.get(entry.path, 0.0), entry.error)
        failed = [entry for entry in entries if not entry.error <= tolerance]
        if failed:
            raise AssertionError(_report(step, failed[0], tolerance))
    return worst


def _steps(
    loss: Callable,
    gradient: Callable | None,
    params: Any,
    rule: optax.GradientTransformation,
    batches: Any,
    num_steps: int,
) -> Iterator[tuple[int, list[_Comparison]]]:
    """Runs the rule, and yields what there is to compare from step 2 on."""
    rule = optax.with_extra_args_support(rule)
    state, previous = rule.init(params), None
    _outermost(state)
    for t in range(1, num_steps + 1):
        batch = () if batches is None else (batches[(t - 1) % len(batches)],)
        objective = functools.partial(_call, loss, batch)
        fed = (
            _ascent(objective, params) if gradient is None else gradient(params, *batch)
        )
        updates, state = rule.update(fed, state, params)
        if previous is not None:
            yield t, _compare(objective, *previous, _outermost(state).hypergradient)
        previous = (params, updates, _outermost(state))
        params = optax.apply_updates(params, updates)


def _compare(
    objective: Callable, params: Any, updates: Any, last: Any, stored: Any
) -> list[_Comparison]:
    """Compares leaf by leaf, then the total; `params` are those before `updates`."""
    gamma = last.learning_rate
    if last.applied_learning_rate is not None:
        gamma = last.applied_learning_rate
    if not all(jnp.all(rate) for rate in jax.tree.leaves(gamma)):
        raise ValueError(
            "`check_hypergradient(rule=...)` must not step with a learning rate of 0, "
            f"which hides the direction; got {gamma}."
        )
    directions = _by_path(last.direction)
    spread = jax.tree.structure(gamma) == jax.tree.structure(last.direction)
    rates = _by_path(gamma) if spread else dict.fromkeys(directions, gamma)
    moved, slopes = _by_path(updates), _slopes(objective, params, updates, directions)
    grads = _by_path(_ascent(objective, optax.apply_updates(params, updates)))
    entries, expected, scale = [], {}, 0.0
    for path, direction in directions.items():
        expected[path] = slopes[path] / rates[path]
        found = -jnp.sum(jnp.real(jnp.conj(grads[path]) * direction))
        size = _norm(grads[path]) * _norm(moved[path] / rates[path])
        scale += size
        entries.append(_entry(path, jnp.sum(expected[path]), found, size))
    if not spread:
        total = sum(jnp.sum(value) for value in expected.values())
        return [*entries, _entry("total", total, stored, scale)]
    whole = [_total(expected[path], h, scale) for path, h in _by_path(stored).items()]
    return [*entries, *whole]


def _total(expected: jax.Array, stored: jax.Array, scale: float) -> _Comparison:
    """The worst of the entries that one leaf's hypergradient has."""
    if jnp.ndim(stored) == 0:
        return _entry("total", jnp.sum(expected), stored, scale)
    worst = jnp.argmax(jnp.abs(expected - stored))
    return _entry("total", expected.ravel()[worst], stored.ravel()[worst], scale)


def _entry(path: str, expected: Any, found: Any, scale: float) -> _Comparison:
    difference = abs(float(expected) - float(found))
    error = difference / scale if scale > 0 else difference
    return _Comparison(path, float(expected), float(found), error)


def _slopes(objective: Callable, params: Any, updates: Any, paths: Any) -> dict:
    """d/dr of the objective at θ + r∘u, r = 1, one number an element of each path."""

    def moved(scales: dict) -> jax.Array:
        def scaled(path: Any, u: jax.Array) -> jax.Array:
            return scales.get(jax.tree_util.keystr(path), 1.0) * u

        u = jax.tree_util.tree_map_with_path(scaled, updates)
        return objective(optax.apply_updates(params, u))

    given = _by_path(updates)
    ones = {path: jnp.ones_like(jnp.real(given[path])) for path in paths}
    return jax.grad(moved)(ones)


def _ascent(objective: Callable, params: Any) -> Any:
    """The gradient as optax wants it: of a complex leaf the conjugate of jax's."""
    return jax.tree.map(jnp.conj, jax.grad(objective)(params))


def _call(loss: Callable, batch: tuple, params: Any) -> jax.Array:
    return loss(params, *batch)


def _by_path(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _norm(array: jax.Array) -> float:
    return float(jnp.linalg.norm(jnp.ravel(array)))


def _outermost(state: Any) -> HypergradientDescentState:
    is_ours = lambda node: isinstance(node, HypergradientDescentState)
    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(
            "`check_hypergradient(rule=...)` must hold one outermost "
            f"HypergradientDescentState; got {len(found)}."
        )
    return found[0]


def _report(step: int, entry: _Comparison, tolerance: float) -> str:
    where = f"leaf '{entry.path}'"
    blame = (
        "The update of this leaf is not −γ times the stored direction: look for a "
        "transformation after the rule, or a direction stored from elsewhere."
    )
    if entry.path == "total":
        where = "the total, though every leaf agrees"
        blame = (
            "Look at the reduction (a missing psum, a sum in low precision) or at the "
            "direction it takes (the current one instead of the previous, its sign)."
        )
    return (
        f"hypergradient at step {step}, {where}: expected {entry.expected:.9g}, "
        f"found {entry.found:.9g}, relative error {entry.error:.2g} above "
        f"{tolerance:g}. {blame}"
    )
