"""Saved states: Orbax behind three functions.

A checkpoint is a folder named after the number of steps done. Orbax writes it under
another name and renames it when it is complete, so a folder with a number is a whole
checkpoint whenever the writer was killed. The leaves are stored flat under their paths:
containers without leaves (`()`, None, `optax.EmptyState`) come from the state that
`restore_checkpoint` is given, and so does the kind of every container.
"""

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["latest_step", "restore_checkpoint", "save_checkpoint"]


def save_checkpoint(directory: str | os.PathLike, step: int, state: Any) -> Path:
    """Saves `state`, bit for bit, as the checkpoint after `step` steps.

    Args:
      directory: where the checkpoints of one run live; made if it is not there.
      step: the number of steps done; at least 0, and not saved before.
      state: any pytree of arrays but typed keys.

    Returns:
      The folder of the checkpoint, complete when this returns.

    Raises:
      ValueError: the step is negative or saved already, or a leaf is a typed key.
    """
    import orbax.checkpoint as ocp

    path = Path(directory).absolute() / str(step)
    if step < 0:
        raise ValueError(
            f"`save_checkpoint(step=...)` must be at least 0; got step={step}."
        )
    if path.exists():
        raise ValueError(
            f"`save_checkpoint(step={step})` must be a step not saved before; {path} "
            "exists. Remove it, or use another directory."
        )
    named = _named_leaves(state, "save_checkpoint(state=...)")
    # Orbax refuses arrays without elements; nothing of them needs to be kept
    leaves = {name: np.asarray(leaf) for name, leaf in named.items() if leaf.size}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, {"step": np.asarray(step), **leaves})
    return path


def latest_step(directory: str | os.PathLike) -> int | None:
    """Finds the last complete checkpoint.

    Args:
      directory: where the checkpoints of one run live.

    Returns:
      Its number of steps, None where there is no checkpoint or no folder.
    """
    return max(_steps(directory), default=None)


def restore_checkpoint(
    directory: str | os.PathLike, like: Any, step: int | None = None
) -> tuple[int, Any]:
    """Loads a checkpoint into the tree of `like`.

    Args:
      directory: where the checkpoints of one run live.
      like: a state of the wanted tree, shapes and dtypes, or `jax.eval_shape` of what
        makes one; a leaf with a `NamedSharding` is put there.
      step: which one; the latest by default.

    Returns:
      The number of steps done, and the state.

    Raises:
      FileNotFoundError: there is no such checkpoint.
      ValueError: a leaf is missing, is too many, or has another shape or dtype.

    Example:
      >>> import jax.numpy as jnp, tempfile
      >>> from metax.harness import restore_checkpoint, save_checkpoint
      >>> with tempfile.TemporaryDirectory() as directory:
      ...     path = save_checkpoint(directory, 3, {"w": jnp.array([1.0, 2.0])})
      ...     step, state = restore_checkpoint(directory, {"w": jnp.zeros(2)})
      >>> step, state["w"].tolist()
      (3, [1.0, 2.0])
    """
    import orbax.checkpoint as ocp

    steps = _steps(directory)
    step = max(steps, default=None) if step is None else step
    if step not in steps:
        wanted = "any step" if step is None else f"step {step}"
        raise FileNotFoundError(
            f"`restore_checkpoint(directory={str(directory)!r})` must hold a checkpoint"
            f" of {wanted}; got steps {steps}."
        )
    path = Path(directory).absolute() / str(step)
    named = _named_leaves(like, "restore_checkpoint(like=...)")
    wanted = {name: leaf for name, leaf in named.items() if leaf.size}
    with ocp.StandardCheckpointer() as checkpointer:
        stored = dict(checkpointer.metadata(path).item_metadata.tree)
        stored.pop("step")
        _check_same_leaves(path, wanted, stored)
        # numpy arrays as targets, that Orbax may not choose a device
        target = {
            name: np.empty(leaf.shape, leaf.dtype) for name, leaf in wanted.items()
        }
        found = checkpointer.restore(path, {"step": np.asarray(0), **target})
    leaves = [
        _put(found[name] if leaf.size else np.zeros(leaf.shape, leaf.dtype), leaf)
        for name, leaf in named.items()
    ]
    return step, jax.tree.unflatten(jax.tree.structure(like), leaves)


def _steps(directory: str | os.PathLike) -> list[int]:
    folder = Path(directory)
    if not folder.is_dir():
        return []
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


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


def _check_same_leaves(path: Path, wanted: dict, stored: dict) -> None:
    def describe(leaves: dict, name: str) -> str:
        if name not in leaves:
            return "no leaf"
        return f"{np.dtype(leaves[name].dtype)}{list(leaves[name].shape)}"

    for name in [*wanted, *(name for name in stored if name not in wanted)]:
        want, got = describe(wanted, name), describe(stored, name)
        if want != got:
            raise ValueError(
                "`restore_checkpoint(like=...)` must have the leaves that were saved; "
                f"at {name} it wants {want} and {path} holds {got}."
            )


def _put(value: Any, like: Any) -> jax.Array:
    sharding = like.sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.device_put(value, sharding)
    return jnp.asarray(value)
