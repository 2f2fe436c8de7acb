"""Damage to an artefact is never silent: each trial names the file that was hurt."""

import random
import shutil

import jax
import pytest

from metax.amalgamation import load_artifact, rnnprop, save_artifact
from metax.artifact import ArtifactError
from metax.autoloss import controller, load_controller, running_norm, save_controller
from metax.autoloss.features import released
from tests.autoloss.observations import filled
from tests.autoloss.pairs import two_losses

SUFFIXES = (".safetensors", ".json")
FLIPS, CUTS = 60, 20  # of each of four files, beside its deletion: 324 trials


def save_optimizer(path):
    options = {"hidden_size": 3, "num_layers": 1}
    theta = filled(lambda: rnnprop(**options).init(jax.random.key(0)))
    card = {"warmup_steps": 2, "warmup_learning_rate": 0.5, "licence": "Apache-2.0"}
    save_artifact(path, theta, policy="rnnprop", policy_options=options, metadata=card)


def save_led(path):
    net, seen = controller(2, (4,)), running_norm(released("regression"))
    phi = filled(lambda: net.init(jax.random.key(0), seen.spec.size))
    save_controller(path, net, phi, seen, None, two_losses(), metadata={"seed": 0})


ARTIFACTS = {
    "optimizer": (save_optimizer, load_artifact),
    "controller": (save_led, load_controller),
}


def flipped(content, draw):
    position = draw.randrange(8 * len(content))
    changed = bytearray(content)
    changed[position // 8] ^= 1 << position % 8
    return bytes(changed)


def cut(content, draw):
    return content[: draw.randrange(len(content))]


@pytest.fixture(scope="module", params=ARTIFACTS)
def artifact(request, tmp_path_factory):
    """The path of a whole artefact, and what loads one."""
    save, load = ARTIFACTS[request.param]
    path = tmp_path_factory.mktemp("whole") / "trained"
    save(path)
    load(path)
    return path, load


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_flip_cut_and_deletion_names_its_file(artifact, tmp_path, suffix):
    whole, load = artifact
    for other in SUFFIXES:
        shutil.copy(whole.with_suffix(other), tmp_path)
    path = tmp_path / whole.name
    file = path.with_suffix(suffix)
    content = file.read_bytes()
    draw = random.Random(f"{whole.name}{suffix}")
    damages = [flipped(content, draw) for _ in range(FLIPS)]
    damages += [cut(content, draw) for _ in range(CUTS)] + [b"", content[:-1]]
    for damaged in damages:
        assert damaged != content
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError) as caught:
            load(path)
        assert str(file) in str(caught.value)
    file.unlink()
    with pytest.raises(ArtifactError, match="must be a file that can be read") as gone:
        load(path)
    assert str(file) in str(gone.value)
    file.write_bytes(content)
    load(path)  # it was the damage, and nothing else


def test_each_bit_of_a_sidecar_counts(artifact, tmp_path):
    """Every byte once, so that no value of a description is left unguarded."""
    whole, load = artifact
    for other in SUFFIXES:
        shutil.copy(whole.with_suffix(other), tmp_path)
    path = tmp_path / whole.name
    file = path.with_suffix(".json")
    content = file.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << position % 7  # within ASCII: most stay JSON
        file.write_bytes(changed)
        with pytest.raises(ArtifactError) as caught:
            load(path)
        assert str(file) in str(caught.value), chr(content[position])
