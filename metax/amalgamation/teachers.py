"""The analytical optimizers a learned rule is distilled from, and pools of them.

Most of a pool is optax. Here is the rest: the sign optimizers of Bello et al., which
optax lacks in the smooth form that choice pools differentiate through, the momentum
whose average is not an accumulation, and Adam as the published pools computed it.

Subtracted, with m and v the running averages of g and g² that start at zero:

    addsign     α g (1 + tanh(g/√(v+ε)) tanh(m/√(v+ε)))
    powersign   α g exp(tanh(g/√(v+ε)) tanh(m/√(v+ε)))
    momentum    α m
    adam        α m̂/√(v̂+ε)         m̂ = m/(1−β₁),  v̂ = v/(1−β₂): constant correction
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import features_dtype
from metax.arguments import check_number, check_one_of

__all__ = [
    "MomentsState",
    "adam_constant_correction",
    "addsign",
    "momentum_ema",
    "pool",
    "powersign",
]

Rule = optax.GradientTransformation | optax.GradientTransformationExtraArgs
# One leaf: (g, m, v) -> what is subtracted, but for the learning rate.
Direction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class MomentsState(NamedTuple):
    """What the rules of this file carry.

    Attributes:
      count: int32 [], updates done.
      mu: m, the running average of the gradient, like the parameters, at least float32.
      nu: v, that of its square; `()` where the rule has none.
    """

    count: jax.Array
    mu: Any
    nu: Any


def addsign(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-10,
    *,
    smooth: bool = True,
) -> Rule:
    """Steps further where gradient and momentum agree in sign: AddSign.

        θ ← θ − α g (1 + tanh(g/√(v+ε)) tanh(m/√(v+ε)))         smooth
        θ ← θ − α g (1 + sign(g) sign(m))                       hard

    The smooth form has a derivative everywhere, which choice pools need; as a teacher
    both work. Memory: two copies of the parameters.

    Args:
      learning_rate: α ≥ 0, a float, a scalar array or an optax schedule. Sane: 0.1.
      b1: the decay of m, in [0, 1).
      b2: that of v, in [0, 1); without bias correction.
      eps: ε > 0, inside the square root.
      smooth: tanh of the normalised values instead of their signs.

    Returns:
      A rule whose state is a `MomentsState`.

    Raises:
      ValueError: an argument is outside its range.

    References:
      Bello et al., Neural Optimizer Search with Reinforcement Learning (2017); Huang et
      al., Optimizer Amalgamation (2022), equations 7 and 8.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.amalgamation import teachers
      >>> rule = teachers.addsign(0.1)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, state = rule.update(params, rule.init(params), params)
      >>> [round(float(u), 3) for u in updates]
      [-0.2, 0.399]
    """

    def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return g * (1 + _agreement(g, m, v, eps, smooth))

    _check_moments("addsign", b1=b1, b2=b2, eps=eps)
    return _descend("addsign", learning_rate, direction, b1, b2)


def powersign(
    learning_rate: Any,
    b1: Any = 0.9,
    b2: Any = 0.999,
    eps: Any = 1e-10,
    *,
    smooth: bool = True,
) -> Rule:
    """Steps further where gradient and momentum agree in sign: PowerSign.

        θ ← θ − α g exp(tanh(g/√(v+ε)) tanh(m/√(v+ε)))          smooth
        θ ← θ − α g exp(sign(g) sign(m))                        hard

    Args:
      learning_rate: α ≥ 0, a float, a scalar array or an optax schedule. Sane: 0.1.
      b1: the decay of m, in [0, 1).
      b2: that of v, in [0, 1); without bias correction.
      eps: ε > 0, inside the square root.
      smooth: tanh of the normalised values instead of their signs.

    Returns:
      A rule whose state is a `MomentsState`.

    Raises:
      ValueError: an argument is outside its range.

    References:
      As for `addsign`.
    """

    def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        return g * jnp.exp(_agreement(g, m, v, eps, smooth))

    _check_moments("powersign", b1=b1, b2=b2, eps=eps)
    return _descend("powersign", learning_rate, direction, b1, b2)


def momentum_ema(learning_rate: Any, decay: Any = 0.9) -> Rule:
    """Steps along the running average of the gradient.

        m ← γ m + (1 − γ) g            θ ← θ − α m

    The average keeps the size of the gradient: `momentum_ema(α, γ)` is
    `optax.sgd((1 − γ) α, momentum=γ)`, whose momentum accumulates.

    Args:
      learning_rate: α ≥ 0, a float, a scalar array or an optax schedule. Sane: 0.5.
      decay: γ, in [0, 1).

    Returns:
      A rule whose state is a `MomentsState` with `nu=()`.

    Raises:
      ValueError: an argument is outside its range.
    """
    _check_moments("momentum_ema", decay=decay)
    return _descend("momentum_ema", learning_rate, lambda g, m, v: m, decay, None)


def adam_constant_correction(
    learning_rate: Any, b1: Any = 0.9, b2: Any = 0.999, eps: Any = 1e-10
) -> Rule:
    """Runs Adam with a constant in place of its bias correction.

        θ ← θ − α m̂/√(v̂ + ε)          m̂ = m/(1 − β₁),  v̂ = v/(1 − β₂)

    The first step is Adam's. Under a constant gradient the step then shrinks to
    √(1−β₂)/(1−β₁) α = 0.316 α, so its tuned rates are about three times those of Adam.
    For what was tuned or trained with it; otherwise take `optax.adam`.

    Args:
      learning_rate: α ≥ 0, a float, a scalar array or an optax schedule.
      b1: β₁, in [0, 1).
      b2: β₂, in [0, 1).
      eps: ε > 0, inside the square root.

    Returns:
      A rule whose state is a `MomentsState`.

    Raises:
      ValueError: an argument is outside its range.
    """

    def direction(g: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
        del g
        return (m / (1 - b1)) / jnp.sqrt(v / (1 - b2) + eps)

    _check_moments("adam_constant_correction", b1=b1, b2=b2, eps=eps)
    return _descend("adam_constant_correction", learning_rate, direction, b1, b2)


def pool(
    name: Literal["small", "large"],
    *,
    setting: Literal["paper", "release", "release-choice"] = "paper",
) -> dict[str, Rule]:
    """Makes the published pools of teachers, at their published learning rates.

    | | paper | release | release-choice |
    |---|---|---|---|
    | adam | 0.005 | 0.005, constant correction | 0.02, constant correction |
    | rmsprop | 0.005 | 0.005 | 0.005, ε = 1e-7 |
    | sgd | 0.2 | 0.2 | 2.0 |
    | momentum | 0.5 | 0.5 | 2.0 |
    | addsign, powersign | 0.1 | 0.1 | 1.0 |

    A pool is a plain dict: leave out what you do not want, add any rule you like. All
    members have a derivative where a gradient is exactly zero.

    Args:
      name: "small", Adam and RMSProp; "large", all six.
      setting: "paper", Adam as it is known; "release", with the constant correction of
        the published code, under which the rates were tuned; "release-choice", as that
        code set up the pools its choice policies mix.

    Returns:
      The rules by name, in the order of the table.

    Raises:
      ValueError: a name or setting that is not known.

    Note:
      Adam's 0.005 was selected under the constant correction, where it acts like 0.0016
      of Adam as it is known. "paper" keeps the number that was printed.

    References:
      Huang et al., Optimizer Amalgamation (2022), appendix.

    Example:
      >>> from metax.amalgamation import pool
      >>> list(pool("small")), len(pool("large"))
      (['adam', 'rmsprop'], 6)
    """
    check_one_of("pool", "name", name, ("small", "large"))
    check_one_of("pool", "setting", setting, ("paper", "release", "release-choice"))
    choice = setting == "release-choice"
    if setting == "paper":
        adam = optax.adam(0.005, eps=0.0, eps_root=1e-10)
    else:
        adam = adam_constant_correction(0.02 if choice else 0.005)
    eps = 1e-7 if choice else 1e-10
    small = {
        "adam": adam,
        "rmsprop": optax.rmsprop(0.005, decay=0.9, eps=eps, eps_in_sqrt=True),
    }
    if name == "small":
        return small
    return small | {
        "sgd": optax.sgd(2.0 if choice else 0.2),
        "momentum": momentum_ema(2.0 if choice else 0.5),
        "addsign": addsign(1.0 if choice else 0.1),
        "powersign": powersign(1.0 if choice else 0.1),
    }


def _descend(
    function: str, learning_rate: Any, direction: Direction, b1: Any, b2: Any
) -> optax.GradientTransformationExtraArgs:
    """The rule −α d(g, m, v); without v where `b2` is None."""
    if not callable(learning_rate):
        check_number(function, "learning_rate", learning_rate, least=0)

    def init_fn(params: Any) -> MomentsState:
        zeros = lambda p: jnp.zeros_like(p, dtype=features_dtype(p))
        return MomentsState(
            count=jnp.zeros([], jnp.int32),
            mu=jax.tree.map(zeros, params),
            nu=() if b2 is None else jax.tree.map(zeros, params),
        )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[Any, MomentsState]:
        del params, extra_args
        wide = jax.tree.map(lambda g: g.astype(features_dtype(g)), updates)
        squares = jax.tree.map(jnp.square, wide)
        mu = _average(state.mu, wide, b1)
        nu = () if b2 is None else _average(state.nu, squares, b2)
        rate: Any = learning_rate
        if callable(learning_rate):
            rate = learning_rate(state.count)
        # a rule without v is handed m in its place, and does not look at it
        d = jax.tree.map(direction, wide, mu, mu if b2 is None else nu)
        updates = jax.tree.map(lambda g, x: (-rate * x).astype(g.dtype), updates, d)
        count: Any = optax.safe_increment(state.count)
        return updates, MomentsState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _agreement(
    g: jax.Array, m: jax.Array, v: jax.Array, eps: Any, smooth: bool
) -> jax.Array:
    if not smooth:
        return jnp.sign(g) * jnp.sign(m)
    root = jnp.sqrt(v + eps)
    return jnp.tanh(g / root) * jnp.tanh(m / root)


def _average(old: Any, new: Any, decay: Any) -> Any:
    """The next running average, in the dtype of the last."""
    return jax.tree.map(
        lambda m, x: (decay * m + (1 - decay) * x).astype(m.dtype), old, new
    )


def _check_moments(function: str, **arguments: Any) -> None:
    for name, value in arguments.items():
        if name == "eps":
            check_number(function, name, value, above=0)
        else:
            check_number(function, name, value, least=0, below=1)
