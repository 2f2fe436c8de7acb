"""What one step of a Self-Tuning Network does to its state."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.base import Batch, Data, Hyperparameter, Params, check_key
from metax.stn.doors import check_batch, check_used
from metax.stn.hparams import (
    constrain,
    entropy,
    inverse_softplus,
    unconstrain,
    unconstrained_bounds,
)
from metax.stn.objectives import (
    Objectives,
    current_params,
    general_gradient,
    noisy_gradient,
    noisy_valid_loss,
    plain_valid_gradient,
)
from metax.stn.perturbation import batch_size, displaced, draw, natural_values
from metax.stn.states import DeltaSTNInfo, DeltaSTNState

__all__ = ["Rules"]


class Rules(NamedTuple):
    """The optimizers and the numbers that go with them; static but for τ.

    Attributes: as the arguments of `delta_stn`; `inner`, `response`, `outer` and
      `scale` are the optimizers of w0, Φ, λ and raw σ.
    """

    inner: optax.GradientTransformation
    response: optax.GradientTransformation
    outer: optax.GradientTransformation
    scale: optax.GradientTransformation | None
    entropy_weight: Any
    train_steps: int
    valid_steps: int
    warmup_steps: int
    couple_draws: bool
    predictor: bool
    logit_bound: float
    scale_bounds: tuple[float, float]


def init(
    objectives: Objectives,
    rules: Rules,
    specs: Mapping[str, Hyperparameter],
    key: jax.Array,
) -> DeltaSTNState:
    """The state before the first step: Φ = 0."""
    check_key(key, "delta_stn(...).init(key=...)")
    key_params, key_response = jax.random.split(key)
    space, response = objectives.perturbation.space, objectives.perturbation.response
    params = objectives.problem.init(key_params)
    phi = response.init(key_response, params)
    hparams = unconstrain(specs, {name: specs[name].init for name in space.names})
    scale = {
        name: jnp.full_like(u, inverse_softplus(specs[name].perturbation))
        for name, u in hparams.items()
    }
    return DeltaSTNState(
        params=params,
        response=phi,
        hparams=hparams,
        scale=scale,
        inner_state=rules.inner.init(params),
        response_state=rules.response.init(phi),
        outer_state=rules.outer.init(hparams),
        scale_state=None if rules.scale is None else rules.scale.init(scale),
        count=jnp.zeros((), jnp.int32),
        space=space,
    )


def step(
    objectives: Objectives,
    rules: Rules,
    state: DeltaSTNState,
    key: jax.Array,
    data: Data,
) -> tuple[DeltaSTNState, DeltaSTNInfo]:
    """`train_steps` training steps, then, after the warm-up, `valid_steps` others."""
    check_key(key, "delta_stn(...).step(key=...)")
    key_train, key_valid = jax.random.split(key)
    problem = objectives.problem

    def train(state: DeltaSTNState, key: jax.Array) -> tuple[Any, DeltaSTNInfo]:
        key_sample, key_step = jax.random.split(key)
        batch = problem.sample_train(data, key_sample)
        return train_step(objectives, rules, state, batch, key_step)

    def validate(state: DeltaSTNState, key: jax.Array) -> tuple[Any, DeltaSTNInfo]:
        key_sample, key_step = jax.random.split(key)
        batch = problem.sample_valid(data, key_sample)
        return valid_step(objectives, rules, state, batch, key_step)

    def tune(state: DeltaSTNState) -> tuple[DeltaSTNState, DeltaSTNInfo]:
        keys = jax.random.split(key_valid, rules.valid_steps)
        state, infos = jax.lax.scan(validate, state, keys)
        last = jax.tree.map(lambda x: x[-1], infos)
        return state, last._replace(is_finite=jnp.all(infos.is_finite))

    is_tuning = state.count >= rules.warmup_steps
    keys = jax.random.split(key_train, rules.train_steps)
    state, trained = jax.lax.scan(train, state, keys)
    if rules.warmup_steps == 0:
        state, tuned = tune(state)
    else:
        rest = lambda state: (state, _info(objectives, rules, state))
        state, tuned = jax.lax.cond(is_tuning, tune, rest, state)
    return state, tuned._replace(
        train_loss=jnp.mean(trained.train_loss),
        response_loss=jnp.mean(trained.response_loss),
        grad_norm=jnp.mean(trained.grad_norm),
        response_grad_norm=jnp.mean(trained.response_grad_norm),
        is_finite=jnp.all(trained.is_finite) & tuned.is_finite,
    )


def train_step(
    objectives: Objectives,
    rules: Rules,
    state: DeltaSTNState,
    batch: Batch,
    key: jax.Array,
) -> tuple[DeltaSTNState, DeltaSTNInfo]:
    """Steps w0 and Φ on one batch."""
    check_key(key, "delta_stn(...).train_step(key=...)")
    _check(objectives, "delta_stn(...).train_step(batch=...)", batch, True)
    key_noise, key_general, key_response = jax.random.split(key, 3)
    key_response = key_general if rules.couple_draws else key_response
    weights, (lam, sigma) = (state.params, state.response), _vectors(state)
    size, perturb = batch_size(batch), objectives.perturbation
    natural = natural_values(perturb.space, lam, size)
    check_used(objectives.problem, state.params, batch, natural, key_general)
    eps = sigma * draw(perturb, key_noise, size, lam.dtype)
    noisy = lambda key: noisy_gradient(objectives, weights, (lam, eps), batch, key)
    if objectives.split:
        loss, outputs, by_params = general_gradient(
            objectives, weights, lam, batch, key_general
        )
        response_loss, _, by_phi = noisy(key_response)
    else:
        loss, outputs, (by_params, by_phi) = noisy(key_general)
        response_loss = loss
    params, inner_state = _descend(
        rules.inner, by_params, state.inner_state, state.params
    )
    phi, response_state = _descend(
        rules.response, by_phi, state.response_state, state.response
    )
    if objectives.problem.carry is not None:
        params = objectives.problem.carry(params, jax.lax.stop_gradient(outputs))
    state = state._replace(
        params=params,
        response=phi,
        inner_state=inner_state,
        response_state=response_state,
        count=state.count + 1,
    )
    seen = {
        "train_loss": loss,
        "response_loss": response_loss,
        "grad_norm": optax.tree.norm(by_params),
        "response_grad_norm": optax.tree.norm(by_phi),
    }
    return state, _info(objectives, rules, state, **seen)


def valid_step(
    objectives: Objectives,
    rules: Rules,
    state: DeltaSTNState,
    batch: Batch,
    key: jax.Array,
) -> tuple[DeltaSTNState, DeltaSTNInfo]:
    """Steps λ, and σ where it is tuned, on one validation batch."""
    check_key(key, "delta_stn(...).valid_step(key=...)")
    is_noisy = rules.scale is not None
    _check(objectives, "delta_stn(...).valid_step(batch=...)", batch, is_noisy)
    if not is_noisy:
        weights, (lam, _) = (state.params, state.response), _vectors(state)
        loss, outputs, by_lam = plain_valid_gradient(objectives, weights, lam, batch)
        by_scale = None
    else:
        loss, outputs, by_lam, by_scale = _noisy_gradients(
            objectives, rules, state, batch, key
        )
    space = objectives.perturbation.space
    hypergradient = space.unflatten(by_lam)
    hparams, outer_state = _descend(
        rules.outer, hypergradient, state.outer_state, state.hparams
    )
    hparams = _project(rules, space, hparams)
    scale, scale_state = state.scale, state.scale_state
    if by_scale is not None:
        scale, scale_state = _descend(rules.scale, by_scale, scale_state, scale)
        low, high = (inverse_softplus(bound) for bound in rules.scale_bounds)
        scale = {n: jnp.clip(s, low, high).astype(s.dtype) for n, s in scale.items()}
    params = state.params
    if rules.predictor:
        change = space.flatten(hparams) - space.flatten(state.hparams)
        params = displaced(params, state.response, change)
    if objectives.problem.carry is not None:
        params = objectives.problem.carry(params, jax.lax.stop_gradient(outputs))
    state = state._replace(
        params=params,
        hparams=hparams,
        scale=scale,
        outer_state=outer_state,
        scale_state=scale_state,
    )
    seen = {"valid_loss": loss, "hypergradient": hypergradient}
    return state, _info(objectives, rules, state, **seen)


def weights_at_centre(
    objectives: Objectives, rules: Rules, state: DeltaSTNState
) -> Params:
    """The weights at the current λ."""
    lam, _ = _vectors(state)
    return current_params(objectives, state.params, state.response, lam)


def _noisy_gradients(
    objectives: Objectives,
    rules: Rules,
    state: DeltaSTNState,
    batch: Batch,
    key: jax.Array,
) -> tuple[jax.Array, Any, jax.Array, dict[str, jax.Array]]:
    """Of E_ε L_V - τ H(σ), in λ and in the raw scale."""
    perturb = objectives.perturbation
    weights, (lam, _) = (state.params, state.response), _vectors(state)
    z = draw(perturb, key, batch_size(batch), lam.dtype)

    def objective(lam: jax.Array, scale: dict[str, jax.Array]) -> tuple[Any, Any]:
        sigma = jax.tree.map(jax.nn.softplus, scale)
        eps = perturb.space.flatten(sigma) * z
        loss, outputs = noisy_valid_loss(objectives, weights, (lam, eps), batch)
        return loss - rules.entropy_weight * entropy(sigma), (loss, outputs)

    gradients, (loss, outputs) = jax.grad(objective, argnums=(0, 1), has_aux=True)(
        lam, state.scale
    )
    return loss, outputs, *gradients


def _descend(
    rule: Any, gradient: Any, rule_state: Any, x: Any
) -> tuple[Any, optax.OptState]:
    updates, rule_state = rule.update(gradient, rule_state, x)
    return optax.apply_updates(x, updates), rule_state


def _vectors(state: DeltaSTNState) -> tuple[jax.Array, jax.Array]:
    """λ and σ, each (h,)."""
    sigma = jax.tree.map(jax.nn.softplus, state.scale)
    return state.space.flatten(state.hparams), state.space.flatten(sigma)


def _project(rules: Rules, space: Any, hparams: dict) -> dict[str, jax.Array]:
    """Each λ onto its bounds."""
    return {
        name: jnp.clip(
            hparams[name], *unconstrained_bounds(spec, rules.logit_bound)
        ).astype(hparams[name].dtype)
        for name, spec in space.by_name().items()
    }


def _at_bound(rules: Rules, space: Any, state: DeltaSTNState) -> dict[str, jax.Array]:
    raw = [inverse_softplus(bound) for bound in rules.scale_bounds]

    def binds(name: str, spec: Hyperparameter) -> jax.Array:
        u, s = state.hparams[name], state.scale[name]
        low, high = unconstrained_bounds(spec, rules.logit_bound)
        bound = (u <= jnp.asarray(low, u.dtype)) | (u >= jnp.asarray(high, u.dtype))
        if rules.scale is None:
            return bound
        return bound | (s <= raw[0].astype(s.dtype)) | (s >= raw[1].astype(s.dtype))

    return {name: binds(name, spec) for name, spec in space.by_name().items()}


def _info(
    objectives: Objectives, rules: Rules, state: DeltaSTNState, **seen: Any
) -> DeltaSTNInfo:
    """The info after a kernel that computed what is in `seen`."""
    space = objectives.perturbation.space
    sigma = jax.tree.map(jax.nn.softplus, state.scale)
    nan = jnp.full((), jnp.nan, next(iter(state.hparams.values())).dtype)
    unknown = {name: jnp.full_like(u, jnp.nan) for name, u in state.hparams.items()}
    scalar = lambda name: jnp.asarray(seen.get(name, nan)).astype(nan.dtype)
    is_finite = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(seen)]
    return DeltaSTNInfo(
        train_loss=scalar("train_loss"),
        response_loss=scalar("response_loss"),
        valid_loss=scalar("valid_loss"),
        entropy=entropy(sigma).astype(nan.dtype),
        hparams=constrain(space.by_name(), state.hparams),
        scale=sigma,
        hypergradient=seen.get("hypergradient", unknown),
        grad_norm=scalar("grad_norm"),
        response_grad_norm=scalar("response_grad_norm"),
        at_bound=_at_bound(rules, space, state),
        updated=jnp.array("hypergradient" in seen),
        is_finite=jnp.all(jnp.array(is_finite)),
    )


def _check(objectives: Objectives, argument: str, batch: Batch, noisy: bool) -> None:
    perturb = objectives.perturbation
    groups = perturb.groups if noisy and perturb.by == "group" else None
    antithetic = noisy and perturb.antithetic and perturb.by == "example"
    check_batch(argument, batch, groups=groups, antithetic=antithetic)
