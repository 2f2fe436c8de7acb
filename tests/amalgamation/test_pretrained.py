"""The optimizers that come with the package, in a flax model of a user's own."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.amalgamation import load, load_artifact, pretrained
from metax.amalgamation.artifacts import PRETRAINED
from metax.tasks.optimizees import digits_data

NAMES = ("amalgamated-small", "choice-small", "minmax-small")
MODEL = nn.Sequential([nn.Dense(32), nn.relu, nn.Dense(10)])


def images(data):
    return jnp.asarray(data["image"], jnp.float32).reshape(-1, 64), data["label"]


def loss_of(params, x, y):
    logits = MODEL.apply(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def chained(name="amalgamated-small", **options):
    clip = optax.clip_by_global_norm(1.0)
    return optax.chain(clip, load(name, **options))


def step_of(rule):
    """One step on a batch of 128; parameters and state as they are in a user's loop."""

    def step(carry, key, x, y):
        params, state = carry
        rows = jax.random.choice(key, len(y), (128,), replace=False)
        loss, grads = jax.value_and_grad(loss_of)(params, x[rows], y[rows])
        updates, state = rule.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), loss

    return step


def start(rule, x, seed=0):
    params = MODEL.init(jax.random.key(seed), x[:1])
    params = optax.tree.cast(params, jnp.float32)
    return params, rule.init(params)


def test_the_three_names_are_there():
    assert set(pretrained()) >= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cards_say_what_a_user_must_know_and_the_gate_was_passed(name):
    _, theta, card = load_artifact(PRETRAINED / name)
    assert card["gate_passed"] is True
    assert card["licence"] == "Apache-2.0"
    assert card["training_command"].startswith("python -m experiments.amalgamate")
    assert card["trained_steps"] <= card["gate_steps"]
    assert sum(leaf.size for leaf in jax.tree.leaves(theta)) == 5141
    weights = PRETRAINED / f"{name}.safetensors"
    assert weights.stat().st_size < 25_000
    assert "/" not in json.dumps(card.get("config", {})), "no path of a machine"


@pytest.mark.slow
def test_amalgamated_small_trains_a_users_network_far_beyond_its_training():
    """Check 24: 2,000 steps, three seeds, on the digits, nothing tuned."""
    (x, y), (x_test, y_test) = map(images, digits_data())
    rule = chained()
    step = step_of(rule)

    @jax.jit
    def run(seed, x, y, x_test, y_test):
        def judged(carry, key):
            carry, loss = step(carry, key, x, y)
            return carry, (loss, loss_of(carry[0], x_test, y_test))

        keys = jax.random.split(jax.random.key(seed), 2000)
        return jax.lax.scan(judged, start(rule, x, seed), keys)[1]

    found = [run(seed, x, y, x_test, y_test) for seed in range(3)]
    losses, test = (np.stack(leaves) for leaves in zip(*found, strict=True))
    assert np.isfinite(losses).all()
    assert np.log(test.min(1)).mean() <= -2.7
    assert np.log(losses[:, -100:].mean(1)).max() <= -2.0


def test_a_saved_state_goes_on_bit_for_bit(tmp_path):
    x, y = images(digits_data()[0])
    rule = chained()
    step, carry = jax.jit(step_of(rule)), start(rule, x)
    keys = jax.random.split(jax.random.key(1), 130)
    for key in keys[:110]:  # past the warm-up
        carry, _ = step(carry, key, x, y)
    leaves, treedef = jax.tree.flatten(carry)
    np.savez(tmp_path / "state.npz", *leaves)
    for key in keys[110:]:
        carry, _ = step(carry, key, x, y)
    with np.load(tmp_path / "state.npz") as file:
        restored = jax.tree.unflatten(treedef, [jnp.asarray(file[n]) for n in file])
    for key in keys[110:]:
        restored, _ = step(restored, key, x, y)
    for ours, again in zip(*map(jax.tree.leaves, (carry, restored)), strict=True):
        np.testing.assert_array_equal(ours, again)


@pytest.mark.parametrize("warmup", [True, False])
def test_a_gradient_that_is_not_finite_changes_nothing(warmup):
    x, _ = images(digits_data()[0])
    rule = load("amalgamated-small", warmup=warmup)
    params, state = start(rule, x)
    spoil = lambda leaf: jnp.ones_like(leaf).at[0].set(jnp.nan)
    grads = jax.tree.map(spoil, params)
    updates, after = jax.jit(rule.update)(grads, state, params)
    moved = optax.apply_updates(params, updates)
    before = jax.tree.leaves((params, state))
    for old, new in zip(before, jax.tree.leaves((moved, after)), strict=True):
        np.testing.assert_array_equal(old, new)
