"""The rows of the loops battery: every Loop of metax, with data to run it on.

A new Loop is one row of `LOOPS`. Rows are built by functions, since the battery also
builds them anew in another process.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax import Action, AlternatingProblem, Loop, Task, inner_loop
from metax.amalgamation import amalgamate, imitate, perturb, pool, rnnprop
from metax.autoloss import PPO, autoloss, bernoulli, controller, features, guide
from metax.harness import grid, replicate
from metax.hypergradient import adam_hd
from metax.stn import DeltaSTN, best_response, delta_stn
from metax.tasks import (
    Dataset,
    Examples,
    RidgeData,
    Split,
    epochs,
    two_layer_regression,
)


class Case(NamedTuple):
    """One Loop as the battery runs it.

    Attributes:
      build: makes the loop.
      data: makes its data.
      poison: makes data on which a step is not finite.
    """

    build: Callable[[], Loop]
    data: Callable[[], Any]
    poison: Callable[[], Any]


def _regression() -> Task:
    """Least squares on `Split`s whose images are vectors, with noise on the loss."""

    def loss(params: Any, batch: Split, key: jax.Array) -> jax.Array:
        noise = 0.01 * jax.random.normal(key, batch.label.shape)
        return jnp.mean((batch.image @ params["w"] + noise - batch.label) ** 2)

    return Task(
        init=lambda key: {"w": 0.1 * jax.random.normal(key, (3,))},
        loss=loss,
        sample=lambda data, key: data,
        evaluate=lambda params, data: {"loss": jnp.mean(data.image @ params["w"])},
    )


def _inner(alpha: Any = 0.01) -> Loop:
    rate = lambda state: optax.tree.get(state, "learning_rate")
    rule = adam_hd(alpha, 0.02, rule="multiplicative")
    return inner_loop(_regression(), rule, observe=rate)


def _split(value: float = 1.0) -> Split:
    x = jax.random.normal(jax.random.key(7), (10, 3))
    return Split(image=x, label=value * jnp.sum(x, axis=1))


def _set(value: float = 1.0) -> Dataset:
    return Dataset(train=_split(value), test=_split())


def _epochs() -> Loop:
    evaluate = lambda state, test: _regression().evaluate(state.params, test)
    return epochs(_inner(), 4, evaluate=evaluate)


def _delta_stn() -> DeltaSTN:
    """A perturbation for each example through flax layers, σ tuned, a short warm-up."""
    first = lambda path, leaf: path[1].key == "first"
    return delta_stn(
        two_layer_regression(3),
        inner_optimizer=optax.sgd(0.01, momentum=0.9),
        response_optimizer=optax.sgd(0.01, momentum=0.9),
        outer_optimizer=optax.adam(0.01),
        scale_optimizer=optax.adam(0.01),
        train_steps=2,
        warmup_steps=2,
        response=best_response(1, select=first),
    )


@functools.cache
def _amalgamation() -> Loop:
    """Two teachers, two tasks, noise on the weights; a restart at every second step.

    Jitted and built once: it is the largest program here, and slow without.
    """
    loop = amalgamate(
        _regression(),
        rnnprop(4, 1),
        pool("small"),
        reduce="minmax",
        truncation_length=2,
        unroll_length=4,
        num_tasks=2,
        warmup_steps=2,
        perturbation=perturb.gaussian(),
    )
    return _jitted(loop)


@functools.cache
def _imitation() -> Loop:
    """A teacher that is not differentiated, and a restart at every second step."""
    lengths = {"truncation_length": 2, "unroll_length": 4}
    return _jitted(
        imitate(_regression(), rnnprop(2, 1), adam_hd(0.01, 0.02), **lengths)
    )


def _alternating(*, full_batch: bool = False) -> AlternatingProblem:
    """Least squares and the size of the weights, which take turns."""
    task = _regression()
    fixed = lambda params, batch, key: jnp.mean((batch.image @ params["w"] - 1) ** 2)
    return AlternatingProblem(
        init=lambda key: {"model": task.init(key)},
        losses=(
            lambda params, batch, key: task.loss(params["model"], batch, key),
            lambda params, batch, key: 0.1 * jnp.sum(jnp.abs(params["model"]["w"])),
        ),
        actions=(Action(0), Action(1)),
        optimizers=optax.adam(0.05),
        sample=lambda data, key: data,
        metric=lambda params, data: fixed(params["model"], data, None),
        reward=lambda history, live: -jnp.min(jnp.where(live, history, jnp.inf)),
        validate_every=2,
        full_batch=full_batch,
    )


@functools.cache
def _autoloss() -> Loop:
    """Four runs to an update, features with statistics, gradients carried."""
    problem = _alternating(full_batch=True)
    seen = features.running_norm(features.released("regression"))
    options = {"features": seen, "num_steps": 4, "num_rollouts": 4, "chunk": 2}
    return _jitted(autoloss(problem, controller(2, (4,)), **options))


@functools.cache
def _online() -> Loop:
    """Segments of two steps, a run of four: it begins anew at every second step."""
    ppo = PPO(segment_length=2, buffer_size=8, batch_size=4, num_updates=2)
    net = controller(2, (4,), critic_hidden=(4,))
    options = {"features": features.paper(2), "num_steps": 4, "ppo": ppo}
    return _jitted(autoloss(_alternating(), net, estimator="ppo", **options))


@functools.cache
def _guide() -> Loop:
    return _jitted(guide(_alternating(), bernoulli(0.5), num_steps=5))


def _jitted(loop: Loop) -> Loop:
    return Loop(jax.jit(loop.init), jax.jit(loop.step))


def _ridge(value: float = 1.0) -> RidgeData:
    split = _split(value)
    return RidgeData(train=Examples(*split), valid=Examples(*split))


NAN = float("nan")
LOOPS = {
    "inner_loop": Case(_inner, _split, lambda: _split(NAN)),
    "epochs": Case(_epochs, _set, lambda: _set(NAN)),
    "replicate": Case(lambda: replicate(_inner(), 3), _split, lambda: _split(NAN)),
    "delta_stn": Case(_delta_stn, _ridge, lambda: _ridge(NAN)),
    "amalgamation": Case(_amalgamation, _split, lambda: _split(NAN)),
    "imitation": Case(_imitation, _split, lambda: _split(NAN)),
    "autoloss": Case(_autoloss, _split, lambda: _split(NAN)),
    "autoloss_online": Case(_online, _split, lambda: _split(NAN)),
    "guide": Case(_guide, _split, lambda: _split(NAN)),
    "grid": Case(
        lambda: grid(_inner, jnp.array([0.01, 0.1])), _split, lambda: _split(NAN)
    ),
}
