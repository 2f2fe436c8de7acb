"""Learned optimizers as files: what is kept, and what does not load."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax.amalgamation import artifacts
from metax.amalgamation.artifacts import (
    load,
    load_artifact,
    pretrained,
    save_artifact,
)
from metax.amalgamation.hierarchical import scale
from metax.amalgamation.policies import l2l, rnnprop
from metax.artifact import ArtifactError, seal, write_arrays

CARD = {"warmup_steps": 2, "warmup_learning_rate": 0.5, "licence": "Apache-2.0"}
OPTIONS = {"hidden_size": 3, "num_layers": 1}
CARD_FIELDS = (
    "warmup_steps", "warmup_learning_rate", "trained_steps", "gate_steps",
    "gate_passed", "licence", "training_command", "seeds", "evaluation", "versions",
)  # fmt: skip


def weights(policy=None):
    policy = rnnprop(**OPTIONS) if policy is None else policy
    return jax.jit(policy.init)(jax.random.key(0))


def save(path, theta=None, policy="rnnprop", options=OPTIONS, card=CARD):
    theta = weights() if theta is None else theta
    save_artifact(path, theta, policy=policy, policy_options=options, metadata=card)
    return path


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("rnnprop", {"hidden_size": 3, "input_layer": True}),
        ("l2l", {"hidden_size": 2, "preprocess": "log_sign"}),
        ("scale", {"param_size": 3, "num_timescales": 2}),
        ("choice", {"pool": "small", "setting": "release", "hidden_size": 3}),
    ],
)
def test_every_policy_comes_back_bit_for_bit(tmp_path, name, options):
    theta = weights(artifacts.POLICIES[name](**options))
    path = save(tmp_path / "trained", theta, name, options)
    loaded, back, sidecar = load_artifact(path)
    jax.tree.map(np.testing.assert_array_equal, back, theta)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype("float64")}
    assert (sidecar["policy"], sidecar["policy_options"]) == (name, options)
    assert sidecar["schema"] == "metax.learned_optimizer/2"

    @jax.jit
    def step(theta, params):
        rule = loaded.rule(theta)
        return rule.update(params, rule.init(params), params)[0]

    assert jnp.all(jnp.isfinite(step(back, jnp.ones(2))))


def test_single_weights_stay_single(tmp_path):
    theta = optax.tree.cast(weights(), jnp.float32)
    _, back, _ = load_artifact(save(tmp_path / "trained", theta))
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype("float32")}
    jax.tree.map(np.testing.assert_array_equal, back, theta)


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_weights_of_another_policy_are_not_saved(tmp_path, change):
    theta = weights()
    if change == "missing":
        theta.pop("output")
    elif change == "extra":
        theta["input"] = {"w": jnp.ones(3)}
    else:
        theta["output"]["w"] = jnp.ones((4, 1))
    with pytest.raises(
        ArtifactError, match=r"trained.safetensors .* leaf '(out|in)put"
    ):
        save(tmp_path / "trained", theta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("change", ["missing", "extra", "shape"])
def test_files_of_another_policy_are_not_loaded(tmp_path, change):
    theta = weights()
    if change == "missing":
        theta["output"].pop("w")
    elif change == "extra":
        theta["output"]["x"] = jnp.ones(3)
    else:
        theta["output"]["w"] = jnp.ones((4, 1))
    sidecar = {"policy": "rnnprop", "policy_options": OPTIONS, **CARD}
    path = tmp_path / "trained"
    write_arrays(path, theta, schema="metax.learned_optimizer/2", sidecar=sidecar)
    with pytest.raises(ArtifactError, match="leaf 'output/[wx]'") as caught:
        load_artifact(path)
    assert str(path) in str(caught.value)


def test_a_flipped_byte_and_another_schema_are_not_loaded(tmp_path):
    path = save(tmp_path / "trained")
    file = path.with_suffix(".safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256"):
        load_artifact(path)
    write_arrays(path, weights(), schema="metax.controller/2", sidecar=CARD)
    with pytest.raises(ArtifactError, match="must have the schema"):
        load_artifact(path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": "adam"}, "must be one of 'rnnprop', 'l2l', 'scale', 'choice'"),
        ({"policy_options": {"width": 3}}, "must come with options of rnnprop"),
        ({"policy_options": {"hidden_size": 0}}, "must be at least 1"),
        ({"policy_options": [1]}, "must come with options of rnnprop"),
        ({"warmup_steps": None}, "must say ['warmup_steps']"),
    ],
)
def test_cards_that_cannot_be_followed_are_refused(tmp_path, changes, words):
    path = save(tmp_path / "trained")
    file = path.with_suffix(".json")
    card = json.loads(file.read_text()) | changes
    card = {name: value for name, value in card.items() if value is not None}
    file.write_text(seal(card))
    with pytest.raises(ArtifactError) as caught:
        load_artifact(path)
    assert words in str(caught.value)
    assert "trained.json" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"policy": "adam"}, "save_artifact(policy=...)` must be one of"),
        ({"card": {"warmup_steps": 2}}, "no ['warmup_learning_rate']"),
        ({"card": CARD | {"policy": "x"}}, "must leave policy and policy_options"),
        ({"card": CARD | {"loss": float("inf")}}, "must hold finite JSON values"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, arguments, words):
    with pytest.raises(ValueError, match="must") as caught:
        save(tmp_path / "trained", **arguments)
    assert words in str(caught.value)


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "PRETRAINED", tmp_path)
    save(tmp_path / "one-small")
    save(tmp_path / "another-small")


@pytest.mark.usefixtures("bundled")
def test_names_are_listed_in_order():
    assert pretrained() == ("another-small", "one-small")


@pytest.mark.usefixtures("bundled")
def test_load_begins_with_the_warmup_of_the_card():
    params = jnp.array([1.0, -2.0])
    warm, bare = load("one-small"), load("one-small", warmup=False)
    own = rnnprop(**OPTIONS).rule(weights())
    step = lambda rule, state: jax.jit(rule.update)(params, state, params)
    updates, state = step(warm, warm.init(params))
    np.testing.assert_allclose(updates, -0.5 * params, rtol=1e-12)
    for _ in range(2):
        updates, state = step(warm, state)
    assert jnp.all(jnp.abs(updates) < 0.11)  # the rule itself, from the third on
    expected, _ = step(own, own.init(params))
    updates, _ = step(bare, bare.init(params))
    np.testing.assert_allclose(updates, expected, rtol=1e-12)


@pytest.mark.usefixtures("bundled")
def test_an_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="'another-small', 'one-small'; got 'large'"):
        load("large")


@pytest.mark.usefixtures("bundled")
def test_names_lead_to_no_other_folder():
    with pytest.raises(ValueError, match="must be one of"):
        load("../one-small")


def test_without_any_file_nothing_is_known(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "PRETRAINED", tmp_path / "absent")
    assert pretrained() == ()
    with pytest.raises(ValueError, match="none come with it"):
        load("amalgamated-small")


def test_everything_that_comes_with_the_package_loads_and_has_its_card():
    for name in pretrained():
        _, theta, card = load_artifact(artifacts.PRETRAINED / name)
        assert all(field in card for field in CARD_FIELDS)
        assert card["licence"] == "Apache-2.0"
        assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(theta))
        rule = load(name)
        assert rule.init(jnp.ones(2)).count == 0


def test_the_names_of_policies_are_those_of_their_factories():
    assert artifacts.POLICIES["rnnprop"] is rnnprop
    assert artifacts.POLICIES["l2l"] is l2l
    assert artifacts.POLICIES["scale"] is scale
