"""What `stn_ridge` holds its runs against: closed forms, and courses of λ in numbers.

All of it is numpy or computed in float64, whatever the runs are computed in.
"""

import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax import Loop
from metax.harness import train
from metax.implicit import implicit_hypergradient, unrolled_hypergradient
from metax.tasks import RidgeData, ridge_regression, ridge_solutions

DIVERGED = 1e3  # a training loss at the end; it starts at .5
DROPOUT = float(np.log(0.05 / 0.90))  # the logit of a rate .05 of at most .95
FACTORS = [  # λ0 of one coordinate, how many such coordinates, σ
    (-5.0, 1, 1.0),
    (-5.0, 1, 0.1),
    (-2.0, 1, 1.0),
    (-2.89, 1, 1.0),
    (0.0, 1, 0.5),
    *((DROPOUT, count, 1.0) for count in (3, 6, 18, 24)),
]
NEUMANN, UNROLLED = (5, 20, 100), (1, 10, 100)


def moments(data: RidgeData) -> RidgeData:
    """As many rows as there are columns of (X, y), with the same second moments.

    They are all that a mean of squared residuals depends on, so no loss, no gradient
    and no solution of ridge regression changes, and a batch is 300 / 11 times smaller.
    """
    return RidgeData(*(type(part)(*_triangle(*part)) for part in data))


def _triangle(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    rows = np.linalg.qr(np.column_stack([x, y]), mode="r")
    rows = rows * np.sqrt(len(rows) / len(y))
    return rows[:, :-1], rows[:, -1]


def closed_form(name: str, *arguments: Any, **options: Any) -> np.ndarray:
    """A function of `ridge_solutions` in float64."""
    with jax.enable_x64(True):
        function = jax.jit(
            lambda args: getattr(ridge_solutions, name)(*args, **options)
        )
        return jax.device_get(function(arguments))


def factor(lam: np.ndarray, sigma: float, *, centered: bool) -> np.ndarray:
    """E[λ̄ λ̄ᵀ] for λ̄ = (ε, 1), or (λ + ε, 1) where uncentred."""
    mean = np.append(np.zeros_like(lam) if centered else lam, 1.0)
    return np.outer(mean, mean) + np.diag(np.append(np.full(len(lam), sigma**2), 0.0))


def condition_numbers(gram: np.ndarray) -> list[dict[str, Any]]:
    """Of the factor of the hyperparameters, alone and times that of the weights."""
    weights, rows = np.linalg.cond(gram), []
    for lam, count, sigma in FACTORS:
        values = np.full(count, lam)
        uncentred, centred = (
            np.linalg.cond(factor(values, sigma, centered=on)) for on in (False, True)
        )
        rows.append(
            {
                "lambda": lam,
                "coordinates": count,
                "sigma": sigma,
                "uncentred": uncentred,
                "centred": centred,
                "uncentred_total": uncentred * weights,
                "centred_total": centred * weights,
            }
        )
    return rows


def largest_rate(gram: np.ndarray, lam: float, sigma: float, centered: bool) -> float:
    """2 / ((λ_max(A) + e^λ) · λ_max of the factor), the bound of a quadratic."""
    of_factor = np.linalg.eigvalsh(factor(np.array([lam]), sigma, centered=centered))
    return 2 / ((np.linalg.eigvalsh(gram)[-1] + np.exp(lam)) * of_factor[-1])


def course(
    lam: np.ndarray, loss: np.ndarray, start: float, first: int = 100
) -> dict[str, Any]:
    """Where λ, of shape (steps,), went; None for what a diverged run does not have.

    A run may pass through an enormous loss and come back: `largest_loss` tells.
    """
    finite = np.nan_to_num(loss, nan=np.inf)
    row = {"final": None, "noise": None, "steps": None, "wrong_way": None}
    row |= {"wrong_way_first": None, "largest_loss": float(finite.max())}
    if not (finite[-1] <= DIVERGED and np.all(np.isfinite(lam))):
        return row | {"diverged": True}
    last = lam[-200:]
    outward = np.maximum(np.sign(start - last.mean()) * (lam - start), 0)
    return row | {
        "final": float(last.mean()),
        "noise": float(last.std()),
        "steps": int(np.argmax(np.abs(lam - last.mean()) <= 0.2)) + 1,
        "wrong_way": float(outward.max()),
        "wrong_way_first": float(outward[:first].max()),
        "diverged": False,
    }


def bracket(rates: np.ndarray, loss: np.ndarray) -> dict[str, float | None]:
    """Largest rate below which all seeds held, and the smallest that did not.

    Args:
      rates: ascending, (rates,).
      loss: at the end of each run, (seeds, rates).
    """
    held = np.all(np.nan_to_num(loss, nan=np.inf) < DIVERGED, axis=0)
    count = len(rates) if held.all() else int(held.argmin())
    return {
        "stable": float(rates[count - 1]) if count else None,
        "unstable": float(rates[count]) if count < len(rates) else None,
    }


def oracles(
    data: RidgeData, lam: float, valid_step: Any, learned: dict[str, Any], calls: int
) -> list[dict[str, Any]]:
    """Errors and times of hypergradients in λ, at the optimal weights.

    Args:
      data: all examples.
      lam: λ.
      valid_step: that of a self-tuning network.
      learned: name to its state.
      calls: how many are timed together.
    """
    problem, weights = ridge_regression(10), closed_form("best_weights", data, lam)
    largest = np.linalg.eigvalsh(data.train.x.T @ data.train.x / len(data.train.y))[-1]
    rate = float(1 / (largest + np.exp(lam)))
    steps: dict[str, tuple[Any, Any]] = {}
    for name, how in {
        "implicit, CG 20": {"iterations": 20},
        **{
            f"implicit, Neumann {n}": {
                "solver": "neumann",
                "iterations": n,
                "step_size": rate,
            }
            for n in NEUMANN
        },
    }.items():
        steps[name] = _implicit(problem, how), lam
    for count in UNROLLED:
        steps[f"unrolled, {count} steps"] = _unrolled(problem, rate, count), lam
    for name, state in learned.items():
        steps[name] = _learned(valid_step), state
    true, rows = float(closed_form("hypergradient", data, lam)), []
    for name, (step, state) in steps.items():
        value, milliseconds = _timed(step, state, (data, weights), calls)
        rows.append(
            {"method": name, "lambda": lam, "true": true, "value": value,
             "error": abs(value / true - 1), "milliseconds": milliseconds}
        )  # fmt: skip
    return rows


# A step that is timed carries λ on, changed by less than its last place: were nothing
# carried, the compiler would compute it once for all calls.
TINY = 1e-30


def _implicit(problem: Any, how: dict[str, Any]) -> Any:
    def step(lam: Any, key: Any, data: Any) -> tuple[Any, Any]:
        (examples, w), decay = data, jnp.exp(lam)
        found, _ = implicit_hypergradient(
            problem, {"w": w}, {"weight_decay": decay}, *examples, **how
        )
        gradient = decay * found["weight_decay"]
        return lam - TINY * gradient, gradient

    return step


def _unrolled(problem: Any, rate: float, count: int) -> Any:
    def step(lam: Any, key: Any, data: Any) -> tuple[Any, Any]:
        (examples, w), decay = data, jnp.exp(lam)
        found, _ = unrolled_hypergradient(
            problem, {"w": w}, {"weight_decay": decay}, examples, key,
            inner_optimizer=optax.sgd(rate), steps=count,
        )  # fmt: skip
        gradient = decay * found["weight_decay"]
        return lam - TINY * gradient, gradient

    return step


def _learned(valid_step: Any) -> Any:
    def step(state: Any, key: Any, data: Any) -> tuple[Any, Any]:
        moved, info = valid_step(state, data[0].valid, key)
        gradient = info.hypergradient["weight_decay"]
        tiny = lambda old, new: old + TINY * (new - old)
        hparams = jax.tree.map(tiny, state.hparams, moved.hparams)
        params = jax.tree.map(lambda w: w + TINY * gradient, state.params)
        return state._replace(hparams=hparams, params=params), gradient

    return step


def _timed(step: Any, state: Any, data: Any, calls: int) -> tuple[float, float]:
    """The first value that `step` shows, and its milliseconds: the least of five."""
    ends: list[float] = []
    _, values = train(
        Loop(lambda key: jax.tree.map(jnp.asarray, state), step),
        data,
        jax.random.key(0),
        6 * calls,
        chunk=calls,
        on_chunk=lambda *_: ends.append(time.perf_counter()),
    )
    # the first chunk is compiled in its time
    return float(values[0]), 1e3 * np.diff(ends).min() / calls
