"""Trained optimizers as files, and those that come with the package.

The sidecar of a file is the card of the optimizer: with which warm-up and over how many
steps it was trained, whether it passed the long-horizon gate, and how well it does.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import optax

from metax.amalgamation import teachers
from metax.amalgamation.choosing import choice
from metax.amalgamation.hierarchical import scale
from metax.amalgamation.policies import LearnedOptimizer, l2l, rnnprop
from metax.amalgamation.warmup import with_warmup
from metax.arguments import refuse
from metax.artifact import (
    ArtifactError,
    fit_arrays,
    named_leaves,
    read_arrays,
    write_arrays,
)
from metax.base import Params

__all__ = ["load", "load_artifact", "pretrained", "save_artifact"]

SCHEMA = "metax.learned_optimizer/2"
PRETRAINED = Path(__file__).with_name("pretrained")
# what `load` reads of the metadata
WARMUP = ("warmup_steps", "warmup_learning_rate")
OURS = ("policy", "policy_options")


def save_artifact(
    path: str | os.PathLike,
    theta: Params,
    *,
    policy: str,
    policy_options: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> None:
    """Saves the weights of a learned optimizer, and all that is needed to run it.

    Args:
      path: of the two files, `<path>.safetensors` and `<path>.json`.
      theta: the weights, as `init` of the policy makes them.
      policy: "rnnprop", "l2l", "scale" or "choice".
      policy_options: the keyword arguments that made the policy, JSON values. For
        "choice": `pool` and `setting`, the arguments of `metax.amalgamation.pool`, and
        those of `choice` but its pool.
      metadata: the card, JSON values. `warmup_steps` and `warmup_learning_rate` must be
        there. Say as well `trained_steps` (the longest unroll), `gate_steps` and
        `gate_passed`, `licence`, `training_command`, `seeds`, `evaluation` (a table)
        and `versions`.

    Raises:
      ArtifactError: a `ValueError`; the weights are not those of the policy, or the
        card is not JSON.
      ValueError: an unknown policy, options it does not take, a warm-up that is missing
        or names that are taken.
    """
    missing = [name for name in WARMUP if name not in metadata]
    if missing:
        rule = f"must say {' and '.join(WARMUP)}"
        refuse("save_artifact", "metadata", rule, f"no {missing}")
    taken = [name for name in OURS if name in metadata]
    if taken:
        rule = "must leave policy and policy_options to their arguments"
        refuse("save_artifact", "metadata", rule, taken)
    learned = _policy(policy, policy_options, "`save_artifact(policy=...)`")
    wanted = jax.eval_shape(learned.init, jax.random.key(0))
    fit_arrays(named_leaves(theta, path), wanted, path)
    options = {"policy": policy, "policy_options": dict(policy_options)}
    write_arrays(path, theta, schema=SCHEMA, sidecar=options | dict(metadata))


def load_artifact(
    path: str | os.PathLike,
) -> tuple[LearnedOptimizer, Params, dict[str, Any]]:
    """Loads a learned optimizer: what can be trained further.

    Args:
      path: of the two files, without their suffixes.

    Returns:
      The policy, its weights, and the sidecar.

    Raises:
      ArtifactError: a `ValueError`; a file is missing or damaged, was written by
        something else, or holds other leaves or shapes than the policy has. It names
        the file, and the leaf.

    Example:
      >>> import jax, pathlib, tempfile
      >>> from metax.amalgamation import load_artifact, rnnprop, save_artifact
      >>> theta = rnnprop(hidden_size=3).init(jax.random.key(0))
      >>> card = {"warmup_steps": 100, "warmup_learning_rate": 0.01}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "mine"
      ...     save_artifact(path, theta, policy="rnnprop",
      ...                   policy_options={"hidden_size": 3}, metadata=card)
      ...     policy, weights, sidecar = load_artifact(path)
      >>> bool((weights["lstm_0"]["wh"] == theta["lstm_0"]["wh"]).all())
      True
    """
    arrays, sidecar = read_arrays(path, SCHEMA)
    missing = [name for name in (*OURS, *WARMUP) if name not in sidecar]
    if missing:
        raise ArtifactError(f"{path}.json must say {missing}; got nothing of them.")
    options = sidecar["policy_options"]
    policy = _policy(sidecar["policy"], options, f"{path}.json, its policy,")
    like = jax.eval_shape(policy.init, jax.random.key(0))
    return policy, fit_arrays(arrays, like, path), sidecar


def load(name: str, *, warmup: bool = True) -> optax.GradientTransformationExtraArgs:
    """Loads an optimizer that comes with the package, ready for any optax chain.

    It has no learning rate to tune. It is made for problems like those it was trained
    on, and for runs of moderately more steps than it was trained for; far from both it
    loses to a tuned analytical optimizer. It costs 328 bytes of state (Adam: 8) and
    10,000 operations for each parameter and step: a million parameters are 328 MB and
    10 GF a step. Parameters that are sharded over devices are gathered; there use
    `optax.partition` by leaf.

    Args:
      name: one of `pretrained()`.
      warmup: begin with the SGD warm-up it was trained behind.

    Returns:
      The rule.

    Raises:
      ValueError: no optimizer of that name comes with the package.
    """
    known = pretrained()
    if name not in known:
        rule = f"must be one of {', '.join(map(repr, known)) or '(none come with it)'}"
        refuse("load", "name", rule, repr(name))
    policy, theta, sidecar = load_artifact(PRETRAINED / name)
    rule = policy.rule(theta)
    if not warmup:
        return rule
    return with_warmup(rule, sidecar["warmup_steps"], sidecar["warmup_learning_rate"])


def pretrained() -> tuple[str, ...]:
    """Lists the optimizers that come with the package.

    Returns:
      Their names, for `load`.
    """
    return tuple(sorted(file.stem for file in PRETRAINED.glob("*.safetensors")))


def _choice_from(pool: Any, setting: Any = "paper", **options: Any) -> LearnedOptimizer:
    """The choice policy over one of the published pools."""
    return choice(teachers.pool(pool, setting=setting), **options)


POLICIES: dict[str, Callable[..., LearnedOptimizer]] = {
    "rnnprop": rnnprop,
    "l2l": l2l,
    "scale": scale,
    "choice": _choice_from,
}


def _policy(name: str, options: Any, where: str) -> LearnedOptimizer:
    """The policy by name, made with its options."""
    if name not in POLICIES:
        known = ", ".join(map(repr, POLICIES))
        raise ArtifactError(f"{where} must be one of {known}; got {name!r}.")
    try:
        return POLICIES[name](**options)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{where} must come with options of {name}; got {options} ({error})."
        ) from error
