"""Saved states: Orbax behind two functions, with a manifest.

    checkpoints/12/manifest.json    what must be here (see `manifest`)
    checkpoints/12/state/           the arrays, written by Orbax

A checkpoint is a folder named after the number of steps done. It is written under
another name, `12.tmp`: the arrays, then the manifest, all of it on disk; then it is
renamed. So a numbered folder is a whole checkpoint whenever the writer was killed, and
one without its manifest was damaged later. The leaves are stored flat under their
paths: containers without leaves (`()`, None, `optax.EmptyState`) come from the state
that `restore_checkpoint` is given, and so does the kind of every container.
"""

import contextlib
import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from metax.harness.files import sync_folder, together
from metax.harness.manifest import (
    CheckpointCorruptError,
    check_files,
    check_values,
    check_wanted,
    describe_leaf,
    read_manifest,
    write_manifest,
)
from metax.harness.processes import is_first, is_here, wait_for_all, whole
from metax.harness.retention import clear, numbered, prune, unfinished

__all__ = ["begin_save", "restore_checkpoint", "save_checkpoint"]


def save_checkpoint(
    directory: str | os.PathLike,
    step: int,
    state: Any,
    *,
    keep: int | None = None,
    config_hash: str | None = None,
) -> Path:
    """Saves `state`, bit for bit, as the checkpoint after `step` steps.

    With several processes all of them call it, on a folder that all of them see.

    Args:
      directory: where the checkpoints of one run live; made if it is not there.
      step: the number of steps done; at least 0, and not saved before.
      state: any pytree of arrays but typed keys.
      keep: how many checkpoints to leave, those of the most steps; at least 1, None for
        all. Older ones are deleted when this one is complete.
      config_hash: of the config of the run (`hash_config`), for `restore_checkpoint` to
        compare.

    Returns:
      The folder of the checkpoint, complete when this returns.

    Raises:
      ValueError: the step is negative or saved already, `keep` is below 1, or a leaf is
        a typed key.
      StorageError: the disk is full, or the folder cannot be written; the checkpoints
        from before are as they were, and this step can be saved later.
    """
    return begin_save(directory, step, state, keep=keep, config_hash=config_hash)()


def begin_save(
    directory: str | os.PathLike,
    step: int,
    state: Any,
    *,
    keep: int | None = None,
    config_hash: str | None = None,
) -> Callable[[], Path]:
    """Copies `state` to the host, for a thread to save while the run goes on.

    The memory of `state` may be used again when this returns, but for what is spread
    over several processes.

    Args:
      directory: as in `save_checkpoint`.
      step: as in `save_checkpoint`.
      state: as in `save_checkpoint`.
      keep: as in `save_checkpoint`.
      config_hash: as in `save_checkpoint`.

    Returns:
      What does the rest of `save_checkpoint`, without a look at JAX's settings, some of
      which belong to a thread.

    Raises:
      ValueError: as in `save_checkpoint`.
    """
    path = Path(directory).absolute() / str(step)
    if step < 0:
        raise ValueError(
            f"`save_checkpoint(step=...)` must be at least 0; got step={step}."
        )
    if keep is not None and keep < 1:
        raise ValueError(
            f"`save_checkpoint(keep=...)` must be at least 1, or None; got keep={keep}."
        )
    if path.exists():
        raise ValueError(
            f"`save_checkpoint(step={step})` must be a step not saved before; {path} "
            "exists. Remove it, or use another directory."
        )
    named = _named_leaves(state, "save_checkpoint(state=...)")
    leaves = {
        name: np.array(leaf) if is_here(leaf) else leaf for name, leaf in named.items()
    }

    def finish() -> Path:
        with _leaving_nothing(path):
            _write(path, step, leaves, config_hash)
            if keep is not None and is_first():
                prune(path.parent, keep)
        return path

    return finish


def restore_checkpoint(
    directory: str | os.PathLike,
    like: Any,
    step: int | None = None,
    *,
    fallback: bool = False,
    config_hash: str | None = None,
) -> tuple[int, Any]:
    """Loads a checkpoint into the tree of `like`, or says what is wrong with it.

    Nothing is cast, and no damage passes: config, tree, shapes and dtypes are compared
    with the manifest before an array is read, then the size and hash of every file, and
    the hash of every leaf that was read.

    Args:
      directory: where the checkpoints of one run live.
      like: a state of the wanted tree, shapes and dtypes, or `jax.eval_shape` of what
        makes one; a leaf with a `NamedSharding` is put there.
      step: which one; the latest by default.
      fallback: where that one is damaged take the step before it, and so on, with a
        warning that names both.
      config_hash: of the config of the run (`hash_config`); None to not compare it.

    Returns:
      The number of steps done, and the state.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      CheckpointMismatchError: a ValueError: a leaf is missing, is too many, or has
        another shape or dtype; or the config is another.
      CheckpointCorruptError: a ValueError: a file or a leaf is not what was saved.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from metax.harness import restore_checkpoint, save_checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save_checkpoint(directory, 3, {"w": jnp.array([1.0, 2.0])})
      ...     step, state = restore_checkpoint(directory, {"w": jnp.zeros(2)})
      >>> step, state["w"].tolist()
      (3, [1.0, 2.0])
    """
    folder, steps = Path(directory).absolute(), numbered(directory)
    first = max(steps, default=None) if step is None else step
    if first not in steps:
        wanted = "any step" if first is None else f"step {first}"
        raise FileNotFoundError(
            f"`restore_checkpoint(directory={str(directory)!r})` must hold a checkpoint"
            f" of {wanted}; got steps {steps}."
        )
    wanted = _named_leaves(like, "restore_checkpoint(like=...)")
    try:
        return first, _restore(folder / str(first), like, wanted, config_hash)
    except CheckpointCorruptError as error:
        if not fallback:
            raise
        damage = error
    for earlier in reversed(steps[: steps.index(first)]):
        with contextlib.suppress(CheckpointCorruptError):
            state = _restore(folder / str(earlier), like, wanted, config_hash)
            message = f"step {first} is damaged, step {earlier} is taken: {damage}"
            warnings.warn(message, stacklevel=2)
            return earlier, state
    raise damage


@contextlib.contextmanager
def _leaving_nothing(path: Path) -> Iterator[None]:
    """What fails to write `path` in one process fails in all, and leaves nothing."""
    with together(path):
        try:
            yield
        except OSError:
            if is_first():
                shutil.rmtree(unfinished(path), ignore_errors=True)
            raise


def _write(
    path: Path, step: int, leaves: dict[str, Any], config_hash: str | None
) -> None:
    temporary = unfinished(path)
    if is_first():
        clear(path.parent)
        temporary.mkdir(parents=True)
    wait_for_all("metax: folder of a checkpoint")
    described = {name: describe_leaf(whole(leaf)) for name, leaf in leaves.items()}
    # Orbax refuses arrays without elements; nothing of them needs to be kept
    stored = {name: leaf for name, leaf in leaves.items() if leaf.size}
    _write_arrays(temporary / "state", {"step": np.asarray(step), **stored})
    if is_first():
        write_manifest(temporary, step, described, config_hash)
        os.replace(temporary, path)
        sync_folder(path.parent)


def _write_arrays(folder: Path, arrays: dict[str, Any]) -> None:
    import orbax.checkpoint as ocp

    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder, arrays)
    except OSError:
        raise
    except Exception as error:
        # what a disk refuses comes as a ValueError, with the number in its text
        found = re.search(r"os_error_code='(\d+)'", str(error))
        if found is None:
            raise OSError(errno.EIO, str(error)) from error
        number = int(found[1])
        raise OSError(number, os.strerror(number)) from error


def _restore(
    path: Path, like: Any, named: dict[str, Any], config_hash: str | None
) -> Any:
    import orbax.checkpoint as ocp

    manifest = read_manifest(path)
    check_wanted(path, manifest, named, config_hash)
    check_files(path, manifest)
    # numpy arrays as targets, that Orbax may not choose a device
    values = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in named.items()}
    target = {name: value for name, value in values.items() if value.size}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            found = checkpointer.restore(
                path / "state", {"step": np.asarray(0), **target}
            )
    except (MemoryError, OSError):
        raise  # of this machine, not of the checkpoint
    except Exception as error:
        # every file is as it was written, and still Orbax cannot read them
        raise CheckpointCorruptError(
            path / "state", None, "an Orbax item", f"{type(error).__name__}: {error}"
        ) from error
    values.update((name, found[name]) for name in target)
    check_values(path, manifest, values)
    leaves = [_put(values[name], leaf) for name, leaf in named.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _named_leaves(state: Any, argument: str) -> dict[str, Any]:
    """The leaves, as JAX would hold them, under their paths."""
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = "state" + jax.tree_util.keystr(path)
        named[name] = leaf if hasattr(leaf, "sharding") else jnp.asarray(leaf)
        if jnp.issubdtype(named[name].dtype, jax.dtypes.prng_key):
            raise ValueError(
                f"`{argument}` must hold no typed keys; got one at {name}. Keep keys "
                "out of states: step i uses `fold_in(key, i)`."
            )
    return named


def _put(value: np.ndarray, like: Any) -> jax.Array:
    sharding = like.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.make_array_from_callback(
            value.shape, sharding, lambda index: value[index]
        )
    return jnp.asarray(value)
