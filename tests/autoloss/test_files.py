import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.artifact import ArtifactError, seal
from metax.autoloss.controllers import bind, context_free, controller, leaky_relu
from metax.autoloss.features import (
    custom,
    frozen,
    paper,
    released,
    running_norm,
)
from metax.autoloss.files import load_controller, save_controller
from metax.base import Action
from tests.autoloss.observations import filled, observation
from tests.autoloss.pairs import two_losses

FEATURES = {
    "paper": lambda: paper(2, decay=0.8, orders=1),
    "released": lambda: released("regression"),
    "normalized": lambda: running_norm(released("regression"), clip=3.0),
}
NETWORKS = {
    "released": lambda: controller(2, (16,), 2.0, activation=leaky_relu),
    "critic": lambda: controller(2, (4,), activation=jnp.tanh, critic_hidden=(3,)),
    "linear": lambda: controller(2, ()),
    "context_free": lambda: context_free(2, 2.0),
}


def saved(path, *, seen=None, network=None, **options):
    """A controller in a file; returns its parts."""
    seen = running_norm(released("regression")) if seen is None else seen
    network = controller(2) if network is None else network
    phi = filled(lambda: network.init(jax.random.key(0), seen.spec.size))
    state = filled(lambda: seen.init()[0])
    problem = options.pop("problem", two_losses())
    save_controller(path, network, phi, seen, state, problem, **options)
    return network, phi, seen, state


def edit(path, change):
    """Changes the sidecar on purpose."""
    file = path.with_name(path.name + ".json")
    card = json.loads(file.read_text(encoding="utf-8"))
    change(card)
    file.write_text(seal(card), encoding="utf-8")


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("seen", FEATURES)
@pytest.mark.parametrize("network", NETWORKS)
def test_what_is_loaded_is_what_was_saved(tmp_path, seen, network):
    path = tmp_path / "mine"
    network, phi, seen, state = saved(
        path, seen=FEATURES[seen](), network=NETWORKS[network]()
    )
    loaded = load_controller(path, problem=two_losses())
    same(loaded.phi, phi)
    same(loaded.feature_state, seen.reset(state)[0])
    assert loaded.controller.spec == network.spec
    assert loaded.features.spec == seen.spec
    assert loaded.features.fixed is None


def test_a_loaded_policy_decides_as_the_saved_one(tmp_path):
    network, phi, seen, state = saved(tmp_path / "mine")
    loaded = load_controller(tmp_path / "mine")
    policies = bind(network, phi, frozen(seen), state), bind(*loaded[:4])

    @jax.jit
    def decide(seen):
        states = [policy.observe(policy.init(), seen) for policy in policies]
        pairs = zip(policies, states, strict=True)
        return [policy.act(now, jax.random.key(1))[1] for policy, now in pairs]

    same(*decide(observation()))


def test_metadata_come_back_and_the_card_says_what_it_is_for(tmp_path):
    metadata = {"estimator": "reinforce", "seeds": [0, 1], "excess": 0.11}
    saved(tmp_path / "mine", metadata=metadata)
    assert load_controller(tmp_path / "mine").metadata == metadata
    card = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
    assert card["actions"] == ["fit@all", "penalty@all"]
    assert card["losses"] == ["fit", "penalty"]
    assert card["normalized"] is True
    assert card["controller"]["hidden"] == [16]
    assert card["version"]


@pytest.mark.parametrize("task", ["regression", "translation"])
def test_files_are_smaller_than_ten_kilobytes(tmp_path, task):
    sizes = {"hidden": (16,), "critic_hidden": None}
    problem = two_losses()
    if task == "translation":
        sizes = {"hidden": (32,), "critic_hidden": (32,)}
        problem = two_losses(actions=tuple(Action(0, "w") for _ in range(3)))
    seen = running_norm(released(task))
    network = controller(len(problem.actions), **sizes)
    phi = filled(lambda: network.init(jax.random.key(0), seen.spec.size))
    phi = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), phi)
    save_controller(tmp_path / "mine", network, phi, seen, None, problem)
    files = list(tmp_path.iterdir())
    assert len(files) == 2
    assert sum(file.stat().st_size for file in files) < 10_000


def test_statistics_in_single_precision_load_in_that_of_their_features(tmp_path):
    seen, network = running_norm(paper(2)), controller(2)
    start = seen.init()[0]
    single = lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x
    phi = filled(lambda: network.init(jax.random.key(0), seen.spec.size))
    state = jax.tree.map(single, start)
    save_controller(tmp_path / "mine", network, phi, seen, state, two_losses())
    loaded = load_controller(tmp_path / "mine").feature_state
    dtypes = lambda tree: [leaf.dtype for leaf in jax.tree.leaves(tree)]
    assert dtypes(loaded) == dtypes(start)


def test_a_flipped_bit_is_refused(tmp_path):
    saved(tmp_path / "mine")
    file = tmp_path / "mine.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256"):
        load_controller(tmp_path / "mine")


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (lambda: running_norm(paper(2)), "features.name"),
        (lambda: released("regression"), "features.arguments"),
        (lambda: running_norm(released("regression"), clip=1.0), "features.arguments"),
        (lambda: running_norm(released("classification")), "features.size"),
    ],
)
def test_other_features_are_refused_by_the_field(tmp_path, other, field):
    saved(tmp_path / "mine")
    with pytest.raises(ArtifactError, match=f"'{field}'"):
        load_controller(tmp_path / "mine", features=other())


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"actions": (Action(0), Action(1, "w"))}, "actions"),
        ({"actions": (Action(1), Action(0))}, "actions"),
        ({"actions": (Action(0), Action(1, repeats=4))}, "actions"),
        ({"actions": (Action(0),)}, "actions"),
    ],
)
def test_other_actions_are_refused_by_the_field(tmp_path, options, field):
    saved(tmp_path / "mine")
    with pytest.raises(ArtifactError, match=f"'{field}'"):
        load_controller(tmp_path / "mine", problem=two_losses(**options))


def test_other_losses_are_refused_by_the_field(tmp_path):
    third = lambda params, batch, key: params["v"]
    losses = (*two_losses().losses, third)
    problem = two_losses(losses=losses, names=("fit", "penalty", "third"))
    saved(tmp_path / "mine")
    with pytest.raises(ArtifactError, match="'losses'"):
        load_controller(tmp_path / "mine", problem=problem)


@pytest.mark.parametrize(
    ("field", "value"),
    [("version", 2), ("size", 4), ("refresh", "chosen"), ("observe_every", 2)],
)
def test_a_file_of_another_version_of_the_features_is_refused(tmp_path, field, value):
    saved(tmp_path / "mine")
    edit(tmp_path / "mine", lambda card: card["features"].update({field: value}))
    with pytest.raises(ArtifactError, match=f"'features.{field}'"):
        load_controller(tmp_path / "mine")


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda card: card.update(schema="metax.controller/3"), "schema"),
        (lambda card: card.pop("actions"), "actions"),
        (lambda card: card.update(features=3), "features.name"),
        (lambda card: card["features"].pop("size"), "features.size"),
        (lambda card: card["features"].update(arguments={"x": 1}), "arguments"),
        (lambda card: card.update(normalized=False), "normalized"),
        (lambda card: card["controller"].pop("hidden"), "controller.hidden"),
        (lambda card: card["controller"].update(activation="exec"), "controller"),
        (lambda card: card["controller"].update(hidden=[8]), "phi/actor/layer_0"),
    ],
)
def test_a_damaged_card_is_refused_by_the_field(tmp_path, change, field):
    saved(tmp_path / "mine")
    edit(tmp_path / "mine", change)
    with pytest.raises(ArtifactError, match=field):
        load_controller(tmp_path / "mine")


def test_features_of_ones_own_must_be_passed_and_are_compared(tmp_path):
    make = lambda version: custom(
        lambda seen: seen.losses, name="mine", version=version, size=2
    )
    saved(tmp_path / "mine", seen=running_norm(make(1)))
    assert load_controller(tmp_path / "mine", features=running_norm(make(1)))
    with pytest.raises(ArtifactError, match="must be passed"):
        load_controller(tmp_path / "mine")
    with pytest.raises(ArtifactError, match="'features.version'"):
        load_controller(tmp_path / "mine", features=running_norm(make(2)))


def test_what_could_not_be_loaded_is_not_saved(tmp_path):
    path = tmp_path / "mine"
    with pytest.raises(ValueError, match=r"`save_controller\(controller=.*actions"):
        saved(path, network=controller(3))
    with pytest.raises(ValueError, match="activation"):
        saved(path, network=controller(2, activation=lambda x: x))
    with pytest.raises(ArtifactError, match="JSON"):
        saved(path, metadata={"excess": float("nan")})
    network, seen = controller(2), paper(2)
    other = filled(lambda: network.init(jax.random.key(0), 5))
    with pytest.raises(ArtifactError, match="phi/actor/layer_0/kernel"):
        save_controller(path, network, other, seen, None, two_losses())
    assert not list(tmp_path.iterdir())
