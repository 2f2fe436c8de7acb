"""Artefacts come back bit for bit, or not at all and with a reason."""

import errno
import hashlib
import json
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.artifact import (
    ArtifactError,
    fit_arrays,
    named_leaves,
    read_arrays,
    seal,
    write_arrays,
)

SCHEMA = "test/1"


def tree():
    bits = jnp.array([1 / 3, -0.0, jnp.inf, jnp.nan, 5e-324])
    return {
        "layer": {"w": bits, "b": bits.astype(jnp.bfloat16)},
        "counts": [jnp.arange(3), jnp.array(True), jnp.zeros((0, 2), jnp.float16)],
        "scalar": jnp.float32(0.1),
    }


@pytest.fixture
def path(tmp_path):
    """An artefact whose name has a dot, in a folder that has to be made."""
    path = tmp_path / "new" / "trained.v2"
    write_arrays(path, tree(), schema=SCHEMA, sidecar={"seeds": [0, 1]})
    return path


def edit(path, **changes):
    """Changes the sidecar on purpose; None takes a name away."""
    file = path.with_name(path.name + ".json")
    card = json.loads(file.read_text()) | changes
    file.write_text(seal({k: v for k, v in card.items() if v is not None}))


def card(path):
    return json.loads(path.with_name(path.name + ".json").read_text())


def weights_file(path):
    return path.with_name(path.name + ".safetensors")


def refusal(path, schema=SCHEMA):
    with pytest.raises(ArtifactError) as caught:
        read_arrays(path, schema)
    return str(caught.value)


def test_a_tree_comes_back_bit_for_bit(path):
    arrays, sidecar = read_arrays(path, SCHEMA)
    back = fit_arrays(arrays, jax.eval_shape(tree), path)
    assert jax.tree.structure(back) == jax.tree.structure(tree())
    for new, old in zip(jax.tree.leaves(back), jax.tree.leaves(tree()), strict=True):
        assert (new.dtype, new.shape) == (old.dtype, old.shape)
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    assert sidecar["seeds"] == [0, 1]


def test_the_folder_holds_two_files_and_no_leftovers(path):
    write_arrays(path, tree(), schema=SCHEMA, sidecar={})  # over the first
    names = sorted(file.name for file in path.parent.iterdir())
    assert names == ["trained.v2.json", "trained.v2.safetensors"]


def test_the_sidecar_describes_the_leaves_and_the_file(path):
    assert card(path)["leaves"]["layer/b"] == {"shape": [5], "dtype": "bfloat16"}
    content = weights_file(path).read_bytes()
    assert card(path)["sha256"] == hashlib.sha256(content).hexdigest()


def test_a_changed_card_is_refused_unless_the_change_is_sealed(path):
    file = path.with_name(path.name + ".json")
    whole = card(path)
    told = [
        file.read_text().replace('"seeds": [', '"seeds":  ['),  # the same values
        json.dumps(whole, indent=2) + "\n\n",
        json.dumps(whole | {"seeds": [0, 2]}, indent=2) + "\n",
        json.dumps(whole | {"sidecar_sha256": ""}, indent=2) + "\n",
        json.dumps(whole | {"sidecar_sha256": 3}, indent=2) + "\n",
    ]
    for text in told:
        file.write_text(text)
        message = refusal(path)
        assert f"{file} must have the sha256 that it says of itself" in message
        assert "metax.artifact.seal" in message
    file.write_text(seal(whole | {"seeds": [0, 2]}))
    assert read_arrays(path, SCHEMA)[1]["seeds"] == [0, 2]


def test_a_card_may_hold_the_zeros_that_stand_for_its_hash(path):
    edit(path, note="0" * 64, licence="ä")
    assert read_arrays(path, SCHEMA)[1]["note"] == "0" * 64


def test_doubles_become_singles_without_x64(path):
    with jax.enable_x64(False):
        arrays, _ = read_arrays(path, SCHEMA)
    assert arrays["layer/w"].dtype == jnp.float32


@pytest.mark.parametrize("position", [0, 20, -1])
def test_one_flipped_bit_is_refused(path, position):
    content = bytearray(weights_file(path).read_bytes())
    content[position] ^= 1
    weights_file(path).write_bytes(content)
    assert f"{weights_file(path)} must have the sha256" in refusal(path)


def test_a_file_that_was_cut_off_is_refused(path):
    weights_file(path).write_bytes(weights_file(path).read_bytes()[:-8])
    assert "It was changed or cut off" in refusal(path)


def test_another_schema_is_refused(path):
    message = refusal(path, "test/2")
    assert "must have the schema 'test/2'; got 'test/1'" in message
    assert "trained.v2.json" in message


def test_leaves_that_the_sidecar_does_not_tell_are_refused(path):
    leaves = card(path)["leaves"]
    wide = {**leaves, "layer/w": {"shape": [5], "dtype": "float32"}}
    long = {**leaves, "layer/w": {"shape": [6], "dtype": "float64"}}
    more = {**leaves, "layer/v": {"shape": [1], "dtype": "float64"}}
    less = {name: leaf for name, leaf in leaves.items() if name != "scalar"}
    for changed, words in (
        (wide, "at leaf 'layer/w' shape [5] dtype float32; got shape [5] dtype float6"),
        (long, "at leaf 'layer/w' shape [6] dtype float64; got shape [5] dtype float6"),
        (more, "at leaf 'layer/v' shape [1] dtype float64; got no such leaf"),
        (less, "at leaf 'scalar' no such leaf; got shape [] dtype float32"),
    ):
        edit(path, leaves=changed)
        message = refusal(path)
        assert words in message
        assert str(weights_file(path)) in message


def test_a_tree_of_another_form_is_refused(path):
    arrays, _ = read_arrays(path, SCHEMA)
    for like, words in (
        ({**tree(), "more": jnp.zeros(2)}, "'more' shape [2]; got no such leaf"),
        ({**tree(), "scalar": jnp.zeros(2)}, "'scalar' shape [2]; got shape []"),
        ({"layer": tree()["layer"]}, "no such leaf; got shape"),
    ):
        with pytest.raises(ArtifactError) as caught:
            fit_arrays(arrays, like, path)
        assert words in str(caught.value)
        assert str(weights_file(path)) in str(caught.value)


def test_missing_and_broken_files_are_refused(path):
    assert "must be a file that can be read" in refusal(path.with_name("absent"))
    edit(path, sha256=None)
    assert "got no ['sha256']" in refusal(path)
    path.with_name(path.name + ".json").write_text("{")
    assert "must be JSON" in refusal(path)
    path.with_name(path.name + ".json").write_text("[]")
    assert "must have schema, leaves, sha256, sidecar_sha256" in refusal(path)


def test_rightly_signed_rubbish_is_refused(path):
    weights_file(path).write_bytes(b"rubbish")
    edit(path, sha256=hashlib.sha256(b"rubbish").hexdigest())
    assert "must be safetensors" in refusal(path)


def test_an_interrupted_second_write_is_told(path):
    """The arrays are new, the JSON, which comes last, is the old one."""
    old = path.with_name(path.name + ".json").read_bytes()
    write_arrays(path, {"w": jnp.ones(2)}, schema=SCHEMA, sidecar={})
    path.with_name(path.name + ".json").write_bytes(old)
    assert "must have the sha256" in refusal(path)


@pytest.mark.parametrize(
    ("tree", "sidecar", "words"),
    [
        ({"key": jax.random.key(0)}, {}, "must hold no typed keys; got one at 'key'"),
        ({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}}, {}, "got 'a/b' twice"),
        ({}, {"sha256": "mine"}, "must leave ['sha256'] to the format"),
        ({}, {"sidecar_sha256": 0}, "must leave ['sidecar_sha256'] to the format"),
        ({}, {"loss": float("nan")}, "must hold finite JSON values"),
        ({}, {"loss": jnp.ones(1)}, "must hold finite JSON values"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(tmp_path, tree, sidecar, words):
    with pytest.raises(ArtifactError) as caught:
        write_arrays(tmp_path / "x", tree, schema=SCHEMA, sidecar=sidecar)
    assert words in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("full", [False, True])
def test_a_disk_that_refuses_is_told_with_the_path(tmp_path, monkeypatch, full):
    (tmp_path / "closed").touch()  # a file, where a folder would have to be
    path = tmp_path / ("x" if full else "closed/x")
    if full:
        error = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr("os.fsync", mock.Mock(side_effect=error))
    with pytest.raises(ArtifactError, match=r"write_arrays\(path=.*/x'\)` must"):
        write_arrays(path, {"w": jnp.ones(2)}, schema=SCHEMA, sidecar={})
    assert [file.name for file in tmp_path.iterdir()] == ["closed"]


def test_leaves_are_named_by_their_paths():
    assert list(named_leaves({"a": [1.0, {"b": 2.0}]}, "x")) == ["a/0", "a/1/b"]
