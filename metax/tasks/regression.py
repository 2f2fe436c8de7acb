"""Regression by a quadratic form that must be held down to a linear one.

    target = w·u + η,    w ~ U[-½, ½]^d,   u ~ U[-5, 5]^d,   η ~ N(0, σ²)
    f(u)   = b·u + s uᵀAu (+ c)

Two losses take turns, the mean squared error and λ Σ|θ|, and the question is in which
order. With 200 rows and 152 products of coordinates the error alone is fitted to the
noise (d = 16), so the second loss is needed, and how much of it depends on λ as much
as on the schedule.

A and Aᵀ give the same f. So the rows are kept as their d linear and d(d + 1)/2
quadratic products, made once a run, and a pass is one product with as many weights,
folded from b and A: 152 numbers in place of 272.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.arguments import check_count, check_number
from metax.base import Action, AlternatingProblem, check_key, last_reward
from metax.tasks.data import FiveWay
from metax.tasks.tables import (
    Reward,
    Sharing,
    Split,
    check_settings,
    check_sizes,
    cut,
    l1_penalty,
    shared_rule,
)

__all__ = ["Products", "Split", "draw", "generate", "problem"]

Params = dict[str, Any]
Data = dict[str, Split]

_SIZES = (200, 200, 200, 200, 200)


class Products(NamedTuple):
    """A batch: rows as the products that the weights multiply.

    Attributes:
      columns: [n, d + d(d + 1)/2], u_i, then s u_i u_j for i ≤ j row by row.
      targets: [n].
    """

    columns: jax.Array
    targets: jax.Array


def generate(
    seed: int,
    *,
    d: int = 16,
    std: float = 2.0,
    sizes: tuple[int, int, int, int, int] = _SIZES,
) -> FiveWay:
    """A set by the stream of numpy's first generator, as published.

    The draws are w, then u and η of one row after the other, part by part. With seed 1
    and the defaults these are the sets of the paper's regression.

    Args:
      seed: of `numpy.random.RandomState`.
      d: coordinates of u, at least 1.
      std: σ ≥ 0, the standard deviation of η.
      sizes: rows of each part, in the order of `FiveWay`.

    Returns:
      Five `Split`s of float32 numpy arrays; the noise of each is its own mean η².

    Raises:
      ValueError: a count is below 1, or `std` negative.

    Example:
      >>> from metax.tasks import regression
      >>> splits = regression.generate(1)
      >>> splits.test.inputs.shape, round(float(splits.test.noise), 4)
      ((200, 16), 3.7704)

    Note:
      The paper's text has η of variance 2; its code takes 2 for the standard
      deviation, which is the default here.
    """
    _check_draw("regression.generate", d, std, sizes)
    check_count("regression.generate", 0, seed=seed)
    rng = np.random.RandomState(seed)
    w = rng.rand(d) - 0.5
    u, noise = np.empty((sum(sizes), d)), np.empty(sum(sizes))
    for row in range(sum(sizes)):  # u and η of a row come from one stream
        u[row] = 10 * (rng.rand(d) - 0.5)
        noise[row] = rng.normal(0, std)
    targets = u @ w + noise
    return cut(u.astype(np.float32), targets.astype(np.float32), noise**2, sizes)


def draw(
    key: jax.Array,
    *,
    d: int = 16,
    std: Any = 2.0,
    sizes: tuple[int, int, int, int, int] = _SIZES,
) -> FiveWay:
    """A fresh set of the same distribution, inside jit.

    Args:
      key: typed.
      d: coordinates of u, at least 1.
      std: σ ≥ 0; may be traced.
      sizes: rows of each part, in the order of `FiveWay`.

    Returns:
      Five `Split`s of float32 arrays, with one w.

    Raises:
      ValueError: the key is raw, a count below 1, or `std` negative.
    """
    check_key(key, "regression.draw(key=...)")
    _check_draw("regression.draw", d, std, sizes)
    key_w, key_u, key_noise = jax.random.split(key, 3)
    rows = sum(sizes)
    w = jax.random.uniform(key_w, (d,), jnp.float32, -0.5, 0.5)
    u = jax.random.uniform(key_u, (rows, d), jnp.float32, -5.0, 5.0)
    noise = jax.random.normal(key_noise, (rows,), jnp.float32)
    noise = noise * jnp.asarray(std, jnp.float32)
    return cut(u, u @ w + noise, jnp.square(noise), sizes)


def problem(
    lam: Any = 0.2,
    *,
    d: int = 16,
    learning_rate: Any = 5e-4,
    quadratic_scale: Any = 0.1,
    intercept: bool = False,
    reward: Reward = "best",
    reward_constant: Any = 20000.0,
    optimizer_sharing: Sharing = "variable",
    patience: int | None = 100,
    validate_every: int = 10,
) -> AlternatingProblem:
    """When to step on the error and when on the penalty.

        ℓ_0(θ) = mean_i (f(u_i) - target_i)²,     ℓ_1(θ) = λ Σ|θ|

    Both move all parameters, by Adam on the whole training split. The metric is the
    mean squared error on the validation split, to be minimised.

    Args:
      lam: λ ≥ 0; may be traced.
      d: coordinates of u, at least 1.
      learning_rate: Adam's; may be traced.
      quadratic_scale: s, may be traced.
      intercept: whether there is a c.
      reward: "best", C over the least validation error of the run; "last", C over the
        last one.
      reward_constant: C > 0.
      optimizer_sharing: "variable": one Adam for both actions; "action": one each, and
        then λ cancels, for Adam does not see the scale of a gradient.
      patience: checks without a better metric after which a run ends; None for never.
      validate_every: steps between two checks, at least 1.

    Returns:
      An `AlternatingProblem` on `{"train", "valid"}` of `Split`s, with one group,
      `{"model": {"b": [d], "A": [d, d]}}` and with an intercept `"c": []`, float32.
      b ~ N(0, .1²), A ~ N(0, .01²), c = 0. `evaluate` gives `"valid_mse"` and
      `"valid_excess"`, the error above the split's own noise, for each split that the
      data holds ("train", "test").

    Raises:
      ValueError: a number is out of its range, or a choice unknown.

    Example:
      >>> import jax
      >>> from metax.tasks import regression, task_data
      >>> problem = regression.problem(lam=0.4)
      >>> data = task_data(regression.generate(1))
      >>> nothing = jax.tree.map(jax.numpy.zeros_like, problem.init(jax.random.key(0)))
      >>> excess = problem.evaluate(nothing, data)["test_excess"]
      >>> print(f"{excess:.2f}")  # the variance of w·u
      9.99

    Xu et al., "AutoLoss: learning discrete schedules for alternate optimization", ICLR
    2019, arXiv 1810.02442, section 4.1.

    Note:
      The defaults are those of the authors' code. The paper's text has s = 1 and an
      intercept, and rewards by the error at the end.
    """
    check_settings(
        "regression.problem",
        reward=reward,
        optimizer_sharing=optimizer_sharing,
        at_least_one={"d": d, "validate_every": validate_every},
        at_least_zero={
            "lam": lam,
            "learning_rate": learning_rate,
            "quadratic_scale": quadratic_scale,
            "reward_constant": reward_constant,
            "patience": patience,
        },
    )

    def init(key: jax.Array) -> dict[str, Params]:
        check_key(key, "regression.problem(...).init(key=...)")
        return {"model": _initial(key, d, intercept)}

    def sample(data: Data, key: jax.Array) -> Products:
        return _products(data["train"], quadratic_scale)

    def squared_error(params: dict[str, Params], batch: Products, key: Any) -> Any:
        return _mean_square(params["model"], batch)

    def mse(params: dict[str, Params], split: Split) -> jax.Array:
        return _mean_square(params["model"], _products(split, quadratic_scale))

    def evaluate(params: dict[str, Params], data: Data) -> dict[str, jax.Array]:
        errors = {name: mse(params, split) for name, split in data.items()}
        excess = {
            f"{name}_excess": error - data[name].noise for name, error in errors.items()
        }
        return {f"{name}_mse": error for name, error in errors.items()} | excess

    measured = _least if reward == "best" else last_reward
    return AlternatingProblem(
        init=init,
        losses=(squared_error, l1_penalty(lam)),
        actions=(Action(0), Action(1)),
        optimizers=shared_rule(optax.adam(learning_rate), optimizer_sharing),
        sample=sample,
        metric=lambda params, data: mse(params, data["valid"]),
        reward=lambda history, live: reward_constant / measured(history, live),
        optimizer_sharing=optimizer_sharing,
        validate_every=validate_every,
        patience=patience,
        evaluate=evaluate,
        names=("mse", "l1"),
        full_batch=True,
    )


def _initial(key: jax.Array, d: int, intercept: bool) -> Params:
    key_b, key_a = jax.random.split(key)
    params = {
        "b": 0.1 * jax.random.normal(key_b, (d,), jnp.float32),
        "A": 0.01 * jax.random.normal(key_a, (d, d), jnp.float32),
    }
    return params | {"c": jnp.zeros((), jnp.float32)} if intercept else params


def _products(split: Split, quadratic_scale: Any) -> Products:
    u = jnp.asarray(split.inputs)
    rows, columns = np.triu_indices(u.shape[1])
    quadratic = quadratic_scale * u[:, rows] * u[:, columns]
    return Products(
        columns=jnp.concatenate([u, quadratic.astype(u.dtype)], axis=1),
        targets=jnp.asarray(split.targets),
    )


def _fold(b: jax.Array, a: jax.Array) -> jax.Array:
    """The weight of each product: b_i, then A_ii or A_ij + A_ji."""
    rows, columns = np.triu_indices(len(b))
    count = np.where(rows == columns, 0.5, 1.0).astype(a.dtype)
    return jnp.concatenate([b, (a + a.T)[rows, columns] * count])


def _mean_square(model: Params, batch: Products) -> jax.Array:
    prediction = batch.columns @ _fold(model["b"], model["A"]) + model.get("c", 0.0)
    return jnp.mean(jnp.square(prediction - batch.targets))


def _least(history: jax.Array, live: jax.Array) -> jax.Array:
    """The least live entry, NaN where there is none."""
    least = jnp.min(jnp.where(live, history, jnp.inf), initial=jnp.inf)
    return jnp.where(jnp.any(live), least, jnp.nan)


def _check_draw(function: str, d: int, std: Any, sizes: tuple[int, ...]) -> None:
    if d < 1:
        raise ValueError(f"`{function}(d=...)` must be at least 1; got {d}.")
    check_sizes(function, sizes)
    check_number(function, "std", std, least=0)
