"""A small network on which every path of the hypergradients is walked.

Two decays in one name, a shared gain that the validation loss sees as well (a direct
dependence), an integer leaf, and a running mean that is carried and no weight.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from metax.base import BilevelProblem, Hyperparameter, squared_norm

HPARAMS = {"decay": jnp.array([0.1, 0.3]), "gain": jnp.array(1.2)}


def make_data(seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(20, 2))
    y = np.tanh(x[:, 0]) - 0.5 * x[:, 1] + 0.3 * rng.normal(size=20)
    x, y = jnp.asarray(x), jnp.asarray(y)
    return {"train": {"x": x[:12], "y": y[:12]}, "valid": {"x": x[12:], "y": y[12:]}}


def problem(carried=True):
    def init(key):
        first, second = jax.random.split(key)
        return {
            "first": {"kernel": jax.random.normal(first, (2, 3)), "bias": jnp.zeros(3)},
            "second": {"kernel": jax.random.normal(second, (3,))},
            "mean": jnp.zeros(2),
            "count": jnp.int32(0),
        }

    def predict(params, batch, hparams, key):
        x = batch["x"] - jax.lax.stop_gradient(params["mean"])
        hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"])
        return {
            "prediction": hparams["gain"] * (hidden @ params["second"]["kernel"]),
            "x_mean": batch["x"].mean(0),
            "classes": jnp.argmax(hidden, axis=1),
        }

    def train_loss(outputs, batch, hparams, params):
        decay = hparams["decay"]
        in_layer = lambda name: lambda path, leaf: path[0].key == name
        norms = [squared_norm(params, in_layer(name)) for name in ("first", "second")]
        penalty = 0.5 * (decay[:, 0] * norms[0] + decay[:, 1] * norms[1])
        return jnp.log(jnp.cosh(outputs["prediction"] - batch["y"])) + penalty

    def carry(params, outputs):
        mean = 0.9 * params["mean"] + 0.1 * outputs["x_mean"]
        return {**params, "mean": mean, "count": params["count"] + 1}

    return BilevelProblem(
        init=init,
        predict=predict,
        train_loss=train_loss,
        valid_loss=lambda outputs, batch: (
            0.5 * jnp.mean((outputs["prediction"] - batch["y"]) ** 2)
        ),
        sample_train=lambda data, key: data["train"],
        sample_valid=lambda data, key: data["valid"],
        hparams={
            "decay": Hyperparameter(HPARAMS["decay"], 0.0, scale="log"),
            "gain": Hyperparameter(HPARAMS["gain"], shared=True),
        },
        carry=carry if carried else None,
    )


def spread(hparams, batch):
    size = len(batch["y"])
    return {**hparams, "decay": jnp.broadcast_to(hparams["decay"], (size, 2))}


def train_value(problem, params, hparams, batch):
    hparams = spread(hparams, batch)
    outputs = problem.predict(params, batch, hparams, None)
    return problem.train_loss(outputs, batch, hparams, params).mean()


def valid_value(problem, params, hparams, batch):
    outputs = problem.predict(params, batch, spread(hparams, batch), None)
    return problem.valid_loss(outputs, batch)


def weights_of(params):
    return {name: params[name] for name in ("first", "second")}


def optimum(problem, params, hparams, batch, newton_steps):
    """Newton's method on the weights, from near the optimum."""
    flat, unravel = ravel_pytree(weights_of(params))
    loss = lambda flat: train_value(
        problem, {**params, **unravel(flat)}, hparams, batch
    )

    def step(flat, _):
        return flat - jnp.linalg.solve(jax.hessian(loss)(flat), jax.grad(loss)(flat)), 0

    flat, _ = jax.lax.scan(step, flat, length=newton_steps)
    return {**params, **unravel(flat)}


def trained(problem, params, hparams, batch, steps=2000, rate=0.5):
    """Gradient descent on the weights, then Newton's method."""
    grad = jax.grad(
        lambda weights: train_value(problem, {**params, **weights}, hparams, batch)
    )
    step = lambda weights, _: (
        jax.tree.map(lambda w, g: w - rate * g, weights, grad(weights)),
        0,
    )
    weights, _ = jax.lax.scan(step, weights_of(params), length=steps)
    return optimum(problem, {**params, **weights}, hparams, batch, 5)


def central_differences(fn, hparams, step=1e-5):
    """dfn/dhparams, error of the order of step²."""
    flat, unravel = ravel_pytree(hparams)
    shifts = step * jnp.eye(len(flat))
    at = jax.jit(lambda shift: fn(unravel(flat + shift)))
    slopes = [(at(shift) - at(-shift)) / (2 * step) for shift in shifts]
    return unravel(jnp.stack(slopes))
