"""Scripted observations, and what becomes of them."""

import jax
import jax.numpy as jnp
import numpy as np

from metax.autoloss.decisions import Observation


def observation(**fields):
    """One observation with two losses, all fresh."""
    plain = {
        "step": jnp.int32(1),
        "num_steps": jnp.int32(10),
        "action": jnp.int32(0),
        "losses": jnp.array([1.0, 1.0]),
        "gradient_rms": jnp.array([1.0, 1.0]),
        "refreshed": jnp.array([True, True]),
        "metric": jnp.array(1.0),
        "metric_refreshed": jnp.array(True),
        "aux": {},
        "extras": {},
    }
    return Observation(**(plain | fields))


def script(num_steps, num_losses=2, *, every=1, seed=0, aux=(), extras=()):
    """Random observations stacked on a leading axis; the metric refreshed at times.

    `aux` are names of [M] each, `extras` of scalars.
    """
    rng = np.random.default_rng(seed)
    steps = np.arange(1, num_steps + 1)
    metric_refreshed = steps % every == 0
    refreshed = rng.random((num_steps, num_losses)) < 0.6
    hold = np.maximum.accumulate(np.where(metric_refreshed, np.arange(num_steps), -1))
    # as a run gives it: the value at the last refresh, 0 before the first
    held = lambda x: np.where(hold >= 0, x[hold], 0.0)
    draw = lambda *shape: rng.uniform(0.1, 4, (num_steps, *shape))
    return Observation(
        step=jnp.array(steps, jnp.int32),
        num_steps=jnp.full(num_steps, 2 * num_steps, jnp.int32),
        action=jnp.array(rng.integers(num_losses, size=num_steps), jnp.int32),
        losses=jnp.array(draw(num_losses)),
        gradient_rms=jnp.array(draw(num_losses)),
        refreshed=jnp.array(refreshed),
        metric=jnp.array(held(draw())),
        metric_refreshed=jnp.array(metric_refreshed),
        aux={name: jnp.array(draw(num_losses)) for name in aux},
        extras={name: jnp.array(held(draw())) for name in extras},
    )


def follow(update, state, observations):
    """The last state and all outputs of `update(state, observation)`, one program."""
    return jax.jit(lambda state, seen: jax.lax.scan(update, state, seen))(
        state, observations
    )


def filled(make):
    """Random numbers in the tree that `make()` would return."""
    rng = np.random.default_rng(0)
    numbers = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype)
    return jax.tree.map(numbers, jax.eval_shape(make))


def decisions(policy, num_steps, seen=None):
    """The decisions of a policy that sees the same observation after each step."""
    seen = observation() if seen is None else seen

    @jax.jit
    def run(seen):
        def step(state, key):
            state, decision = policy.act(state, key)
            return policy.observe(state, seen), decision

        keys = jax.random.split(jax.random.key(0), num_steps)
        return jax.lax.scan(step, policy.init(), keys)[1]

    return run(seen)
