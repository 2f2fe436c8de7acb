import shutil

import jax.numpy as jnp
import pytest

from metax.harness import latest_step, restore_checkpoint, save_checkpoint
from metax.harness import retention as retention_module


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_last_checkpoints_are_kept(tmp_path):
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, jnp.array(step), keep=2)
    assert names(tmp_path) == ["10", "11"]
    assert restore_checkpoint(tmp_path, jnp.array(0), step=10) == (10, 10)
    save_checkpoint(tmp_path, 12, jnp.array(12))
    assert names(tmp_path) == ["10", "11", "12"]


@pytest.mark.parametrize("keep", [0, -1])
def test_none_to_keep_is_refused(tmp_path, keep):
    with pytest.raises(ValueError, match=rf"keep=...\)`.*got keep={keep}"):
        save_checkpoint(tmp_path, 1, jnp.ones(2), keep=keep)


def test_older_one_goes_only_when_the_newer_is_complete(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, jnp.ones(2), keep=1)

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("metax.harness.checkpoint.write_manifest", fail)
        with pytest.raises(OSError, match="No space left"):
            save_checkpoint(tmp_path, 2, jnp.ones(2), keep=1)
    assert names(tmp_path) == ["1"]
    save_checkpoint(tmp_path, 2, jnp.ones(2), keep=1)
    assert names(tmp_path) == ["2"]


def test_half_deleted_one_is_not_counted_and_goes_later(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, jnp.ones(2))

    class KilledError(BaseException):
        pass

    def die(path):
        (path / "manifest.json").unlink()
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(retention_module.shutil, "rmtree", die)
        with pytest.raises(KilledError):
            save_checkpoint(tmp_path, 2, jnp.ones(2), keep=1)
    assert names(tmp_path) == ["1.tmp", "2"]
    assert restore_checkpoint(tmp_path, jnp.ones(2))[0] == 2
    save_checkpoint(tmp_path, 3, jnp.ones(2))
    assert names(tmp_path) == ["2", "3"]


def test_damaged_one_does_not_count_among_those_kept(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, jnp.ones(2))
    (tmp_path / "3" / "manifest.json").unlink()
    assert latest_step(tmp_path) == 2
    save_checkpoint(tmp_path, 4, jnp.ones(2), keep=2)
    assert names(tmp_path) == ["2", "3", "4"]


def test_damaged_ones_are_set_aside_once(tmp_path):
    for step in (1, 2):
        save_checkpoint(tmp_path, step, jnp.ones(2))
    shutil.copytree(tmp_path / "2", tmp_path / "2.corrupt")
    retention_module.set_aside(tmp_path, 1)
    assert names(tmp_path) == ["1", "2.corrupt"]
