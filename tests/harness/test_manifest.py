import pickle
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.harness import (
    CheckpointCorruptError,
    CheckpointMismatchError,
    restore_checkpoint,
    save_checkpoint,
)
from metax.harness import checkpoint as checkpoint_module

SEED = 7
FLIPS, CUTS = 14, 5


def make_state(scale=1.0):
    weights = scale * jax.random.normal(jax.random.key(0), (64, 8))
    return {"w": weights, "n": jnp.arange(3), "empty": jnp.zeros((0, 2))}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Two steps, whose files the tests damage in copies."""
    folder = tmp_path_factory.mktemp("sound")
    save_checkpoint(folder, 1, make_state(), config_hash="abc")
    save_checkpoint(folder, 2, make_state(2.0), config_hash="abc")
    return folder


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flip(path, rng):
    data = bytearray(path.read_bytes())
    bit = int(rng.integers(8 * len(data)))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path, rng):
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(len(data)))])


def delete(path, rng):
    path.unlink()


def damaged_copies(sound: Path, tmp_path: Path, kinds: list):
    """A copy a trial, in which one file of step 2 is damaged, and that file."""
    rng = np.random.default_rng(SEED)
    for file in files(sound / "2"):
        for damage in kinds:
            copy = tmp_path / "copy"
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(sound, copy)
            path = copy / file.relative_to(sound)
            damage(path, rng)
            yield copy, path


def test_no_damage_of_any_file_passes_and_the_file_is_named(sound, tmp_path):
    kinds = [flip] * FLIPS + [cut] * CUTS + [delete]
    like = jax.eval_shape(make_state)
    trials = 0
    for copy, path in damaged_copies(sound, tmp_path, kinds):
        with pytest.raises(CheckpointCorruptError) as caught:
            restore_checkpoint(copy, like)
        assert caught.value.path == path
        assert str(path) in str(caught.value)
        trials += 1
    assert trials >= 200


def test_fallback_takes_the_step_before_and_names_both(sound, tmp_path):
    wanted = np.asarray(make_state()["w"]).tobytes()
    for copy, path in damaged_copies(sound, tmp_path, [flip, cut, delete]):
        said = rf"step 2 is damaged, step 1 is taken: .*{path.name}"
        with pytest.warns(UserWarning, match=said):
            step, state = restore_checkpoint(copy, make_state(), fallback=True)
        assert step == 1
        assert np.asarray(state["w"]).tobytes() == wanted


def test_fallback_without_a_whole_step_raises_what_was_first(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "copy")
    for step in (1, 2):
        delete(tmp_path / "copy" / str(step) / "manifest.json", None)
    with pytest.raises(CheckpointCorruptError) as caught:
        restore_checkpoint(tmp_path / "copy", make_state(), fallback=True)
    assert caught.value.path == tmp_path / "copy" / "2" / "manifest.json"


def test_what_orbax_restores_wrongly_is_seen_by_the_leaf(sound, tmp_path, monkeypatch):
    """Without the hashes of the files: Orbax accepts flipped bits of an array."""
    monkeypatch.setattr(checkpoint_module, "check_files", lambda *_: None)
    largest = max(files(sound / "2"), key=lambda path: path.stat().st_size)
    wanted, leaves = np.asarray(make_state(2.0)["w"]).tobytes(), set()
    for seed in range(12):
        copy = tmp_path / str(seed)
        shutil.copytree(sound, copy)
        flip(copy / largest.relative_to(sound), np.random.default_rng(seed))
        try:
            _, state = restore_checkpoint(copy, make_state())
        except CheckpointCorruptError as error:
            leaves.add(error.leaf)
        else:
            # a bit that no reader needs
            assert np.asarray(state["w"]).tobytes() == wanted
    assert "state['w']" in leaves


def test_renamed_step_is_damage(sound, tmp_path):
    shutil.copytree(sound / "2", tmp_path / "5")
    with pytest.raises(CheckpointCorruptError, match=r"saved was step 2.*of step 5"):
        restore_checkpoint(tmp_path, make_state())


def test_another_config_is_refused_and_compared_on_request_only(sound):
    for config_hash in (None, "abc"):
        assert restore_checkpoint(sound, make_state(), config_hash=config_hash)[0] == 2
    with pytest.raises(CheckpointMismatchError, match=r"sha256 xyz.*one of abc"):
        restore_checkpoint(sound, make_state(), config_hash="xyz", fallback=True)


def test_checkpoint_of_another_version_is_named(sound, tmp_path, monkeypatch):
    monkeypatch.setattr("metax.harness.manifest.VERSION", 2)
    with pytest.raises(CheckpointMismatchError, match=r"checkpoint 2.*checkpoint 1"):
        restore_checkpoint(sound, make_state())


def test_mismatch_is_found_before_an_array_is_read(sound, tmp_path):
    shutil.copytree(sound, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "2" / "state")
    like = {**make_state(), "n": jnp.zeros(3)}
    with pytest.raises(CheckpointMismatchError) as caught:
        restore_checkpoint(tmp_path / "copy", like)
    error = caught.value
    assert (error.leaf, error.wanted) == ("state['n']", "float64[3]")
    assert error.got == "int64[3]"
    like = {**make_state(), "empty": jnp.zeros((0, 3))}
    with pytest.raises(CheckpointMismatchError, match=r"empty.*\[0, 3\].*\[0, 2\]"):
        restore_checkpoint(tmp_path / "copy", like)


@pytest.mark.parametrize("kind", [CheckpointCorruptError, CheckpointMismatchError])
def test_errors_cross_processes(kind):
    error = kind(Path("c/2"), "state['w']", "this", "that")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), str(again)) == (kind, str(error))
    assert again.leaf == "state['w']"
