"""The loops of `stn_ridge`, and many of them as one program.

A `config` is that script's: `draws` and `sigma` of the perturbation, `num_seeds`,
`steps` and `seed`.
"""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments import stn_ridge_tables as tables
from metax import Loop
from metax.harness import evaluate, grid
from metax.harness.processes import all_on_host
from metax.stn import (
    DeltaSTN,
    DenseResponse,
    best_response,
    delta_stn,
    response_jacobian,
)
from metax.tasks import RidgeData, ridge_regression
from metax.tasks.ridge import tiled

VARIANTS = {
    "STN": {"centered": False, "split": False, "linearized": False},
    "split alone": {"centered": False, "linearized": False},
    "centred, joint": {"split": False, "linearized": False},
    "centred, split": {"linearized": False},
    "centred, joint, linearised": {"split": False},
    "Delta-STN": {},
}
RESPONSE = best_response(1, structure="dense")
PER_STEP = 5  # training steps a validation step


def toy(
    config: Any,
    variant: str,
    start: Any,
    rate: Any = 0.004,
    outer: Any = 0.02,
    *,
    corrected: bool = False,
    **options: Any,
) -> DeltaSTN:
    """The loop of all tables; start, rate and outer may be traced."""
    problem = ridge_regression(
        10, init=jnp.exp(start), perturbation=config.sigma, draws=config.draws
    )
    problem = problem._replace(
        sample_valid=lambda data, key: tiled(data.valid, config.draws)
    )
    how: dict[str, Any] = {
        "inner_optimizer": optax.sgd(rate),
        "response_optimizer": optax.sgd(rate),
        "outer_optimizer": optax.rmsprop(
            outer, 0.99, 1e-8, eps_in_sqrt=False, bias_correction=corrected
        ),
        "train_steps": PER_STEP,
        "perturbation": "group",
        "groups": config.draws,
        "response": RESPONSE,
    }
    return delta_stn(problem, **(how | VARIANTS[variant] | options))


def cells(**axes: Any) -> list[dict[str, Any]]:
    """The product of the axes."""
    return [
        dict(zip(axes, cell, strict=True)) for cell in itertools.product(*axes.values())
    ]


def run(
    config: Any, data: Any, build: Any, settings: list[dict], steps: int, mesh: Any
) -> Any:
    """Last states [seeds, cells] and infos [seeds, steps, cells]; seeds are spread."""
    stacked = {name: np.array([s[name] for s in settings]) for name in settings[0]}
    loop = grid(lambda setting: build(**setting), stacked)
    how: dict[str, Any] = {"num_seeds": config.num_seeds, "chunk": steps}
    return evaluate(loop, data, jax.random.key(config.seed), steps, mesh=mesh, **how)


def tuned(
    config: Any,
    data: RidgeData,
    variant: str,
    settings: list[dict],
    steps: int,
    mesh: Any,
    **options: Any,
) -> tuple[list[dict], np.ndarray]:
    """A row for each cell and seed, and λ [seeds, steps, cells]."""
    build = lambda **setting: toy(config, variant, **setting, **options)
    _, infos = run(config, data, build, settings, steps, mesh)
    sigma = infos.scale["weight_decay"]
    with np.errstate(divide="ignore"):  # a diverging run may leave the decay 0
        lam = np.log(infos.hparams["weight_decay"])
    rows = [
        {"variant": variant, **cell, "seed": s, "sigma": sigma[s, -200:, c].mean()}
        | tables.course(lam[s, :, c], infos.train_loss[s, :, c], cell["start"])
        for c, cell in enumerate(settings)
        for s in range(config.num_seeds)
    ]
    return rows, lam


def frozen(config: Any, variant: str, lam: Any, sigma: Any) -> Loop:
    """w0 and Φ are trained and λ stays, at rates that decay to end without noise."""
    decayed = optax.exponential_decay(0.1, PER_STEP * config.steps, 0.02)
    rule = optax.chain(optax.sgd(decayed), optax.scale(1 / sigma**2))
    options = {"response_optimizer": rule, "warmup_steps": 10**9, "antithetic": True}
    loop = toy(config, variant, lam, decayed, **options)
    scale = {"weight_decay": jnp.log(jnp.expm1(sigma))}
    return Loop(lambda key: loop.init(key)._replace(scale=scale), loop.step)


def jacobians(
    config: Any,
    data: RidgeData,
    variants: tuple[str, ...],
    sigmas: tuple[float, ...],
    mesh: Any,
    lam: float = -2.0,
) -> list[dict]:
    """Errors of the learned Φ to the true derivative and to its own closed form."""
    true, rows = tables.closed_form("response", data, lam), []
    error = lambda a, b: np.linalg.norm(a - b, axis=-1) / np.linalg.norm(b)
    for variant in variants:
        build = lambda sigma, v=variant: frozen(config, v, lam, sigma)
        states, _ = run(config, data, build, cells(sigma=sigmas), config.steps, mesh)
        states = all_on_host(states)
        found = jax.vmap(jax.vmap(response_jacobian))(states)["weight_decay"]["w"]
        for c, sigma in enumerate(sigmas):
            biased = tables.closed_form("response", data, lam, sigma=sigma)
            if variant == "centred, joint":
                _, biased = tables.closed_form("joint_solution", data, lam, sigma)
            learned = np.asarray(found[:, c], np.float64)
            errors = {"to_true": error(learned, true), "to_own": error(learned, biased)}
            row = {"variant": variant, "sigma": sigma, "bias": error(biased, true)}
            rows.append(row | errors)
    return rows


def rest_points(
    config: Any,
    data: RidgeData,
    weights: tuple[float, ...],
    mesh: Any,
    lam: float = -1.06,
) -> list[dict]:
    """σ with λ held, at the optimum, and Φ exact, beside √(τ / c)."""
    phi = tables.closed_form("response", data, lam)
    curvature = np.mean((data.valid.x @ phi) ** 2)
    adam = optax.adam(optax.linear_schedule(0.05, 0.001, config.steps // 2))
    exact = {
        "params": {"w": tables.closed_form("best_weights", data, lam)},
        "response": {"w": DenseResponse(columns=jnp.asarray(phi[None]))},
    }

    def build(weight: Any) -> Loop:
        options = {"scale_optimizer": adam, "entropy_weight": weight}
        loop = toy(config, "Delta-STN", lam, 0.0, 0.0, **options)
        at_best = jax.tree.map(lambda x: jnp.asarray(x, float), exact)
        return Loop(lambda key: loop.init(key)._replace(**at_best), loop.step)

    _, infos = run(config, data, build, cells(weight=weights), config.steps, mesh)
    sigma = infos.scale["weight_decay"][:, -config.steps // 4 :].mean(1)
    return [
        {"tau": tau, "root": np.sqrt(tau / curvature), "sigma": sigma[:, c]}
        for c, tau in enumerate(weights)
    ]
