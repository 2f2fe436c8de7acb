"""Trained controllers as files: parameters, feature statistics, and what they are for.

A controller means something only behind the features it was trained with and in front
of the actions it was trained on, so the sidecar holds both, and loading compares them.
"""

import importlib.metadata
import json
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from metax.arguments import check_has, refuse
from metax.artifact import (
    ArtifactError,
    fit_arrays,
    named_leaves,
    read_arrays,
    write_arrays,
)
from metax.autoloss import features as feature_sets
from metax.autoloss.controllers import (
    Controller,
    ControllerSpec,
    Phi,
    context_free,
    controller,
    named_activation,
)
from metax.autoloss.names import action_names, loss_names
from metax.autoloss.vectors import Features, FeatureState
from metax.base import AlternatingProblem

__all__ = ["SavedController", "load_controller", "save_controller"]

SCHEMA = "metax.controller/2"
FIELDS = (
    "features",
    "normalized",
    "actions",
    "losses",
    "controller",
    "metadata",
)


class SavedController(NamedTuple):
    """A controller from a file; `bind(*saved[:4])` is its policy.

    Attributes:
      controller: the network.
      phi: its parameters.
      features: what it sees, frozen.
      feature_state: their statistics.
      metadata: what was saved beside them.
    """

    controller: Controller
    phi: Phi
    features: Features
    feature_state: FeatureState
    metadata: dict[str, Any]


def save_controller(
    path: str | os.PathLike,
    controller: Controller,
    phi: Phi,
    features: Features,
    feature_state: FeatureState | None,
    problem: AlternatingProblem,
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves a controller, and what it was trained for.

    Args:
      path: of the two files, `<path>.safetensors` and `<path>.json`.
      controller: the network.
      phi: its parameters.
      features: what it sees.
      feature_state: their statistics; None for none. What belongs to a run is dropped.
      problem: whose actions it chooses from.
      metadata: what else is to be known, JSON values: the estimator, the metrics of its
        training, seeds.

    Raises:
      ArtifactError: a `ValueError`; parameters of another controller or other features,
        or metadata that are not JSON.
      ValueError: another number of actions than the problem has, or an activation
        without a name.
    """
    what = "an `AlternatingProblem`"
    check_has("save_controller", "problem", problem, what, "losses", "actions")
    what = "a `Controller`"
    check_has("save_controller", "controller", controller, what, "init", "spec")
    spec, actions = controller.spec, action_names(problem)
    if spec.num_actions != len(actions):
        rule = f"must have as many actions as the problem, {len(actions)}"
        refuse("save_controller", "controller", rule, spec.num_actions)
    if spec.activation is None and spec.hidden is not None:
        rule = "must have an activation of jax.nn, or `metax.autoloss.leaky_relu`"
        refuse("save_controller", "controller", rule, "one without a name")
    like = _shapes(controller, features)
    start = features.init()[0] if feature_state is None else feature_state
    tree = {"phi": phi, "features": features.reset(start)[0]}
    fit_arrays(named_leaves(tree, path), like, path)
    card = {
        "version": _version(),
        "features": features.spec._asdict(),
        "normalized": _is_normalized(features),
        "actions": actions,
        "losses": loss_names(problem),
        "controller": spec._asdict(),
        "metadata": dict(metadata or {}),
    }
    write_arrays(path, tree, schema=SCHEMA, sidecar=card)


def load_controller(
    path: str | os.PathLike,
    *,
    features: Features | None = None,
    problem: AlternatingProblem | None = None,
) -> SavedController:
    """Loads a controller, after checking that it fits.

    Args:
      path: of the two files, without their suffixes.
      features: what it is to see; None rebuilds `features.paper` and
        `features.released` from the file. Features of your own must be passed.
      problem: what it is to lead; None to leave that open.

    Returns:
      The controller, with frozen features.

    Raises:
      ArtifactError: a `ValueError` that names the field: a file is missing, damaged or
        of another schema, or its features, its actions or its losses are others.

    Example:
      >>> import jax, optax, pathlib, tempfile
      >>> from metax import Action, AlternatingProblem
      >>> from metax.autoloss import controller, features
      >>> from metax.autoloss import load_controller, save_controller
      >>> problem = AlternatingProblem(
      ...     init=lambda key: {"w": 1.0}, losses=(lambda p, b, k: p["w"] ** 2,) * 2,
      ...     actions=(Action(0), Action(1)), optimizers=optax.sgd(0.1),
      ...     sample=lambda data, key: data, metric=lambda p, data: p["w"])
      >>> network, seen = controller(2), features.paper(2)
      >>> phi = network.init(jax.random.key(0), seen.spec.size)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "mine"
      ...     save_controller(path, network, phi, seen, None, problem)
      ...     saved = load_controller(path, problem=problem)
      >>> saved.controller.spec.hidden, saved.features.spec.size
      ((16,), 9)
    """
    arrays, card = read_arrays(path, SCHEMA)
    missing = [name for name in FIELDS if name not in card]
    if missing:
        raise ArtifactError(f"{path}.json must say {missing}; got nothing of them.")
    if problem is not None:
        _compare(path, "actions", card["actions"], action_names(problem), "problem")
        _compare(path, "losses", card["losses"], loss_names(problem), "problem")
    seen = _rebuilt(path, card["features"]) if features is None else features
    for field, ours in seen.spec._asdict().items():
        theirs = _field(path, card, "features", field)
        _compare(path, f"features.{field}", theirs, ours, "features")
    _compare(path, "normalized", card["normalized"], _is_normalized(seen), "features")
    network = _network(path, card)
    like = _shapes(network, seen)
    tree = fit_arrays(arrays, like, path)
    # a state keeps the dtypes of its features: a file may come from double precision
    cast = lambda leaf, wanted: leaf.astype(wanted.dtype)
    state = jax.tree.map(cast, tree["features"], like["features"])
    fixed = feature_sets.frozen(seen)
    return SavedController(network, tree["phi"], fixed, state, card["metadata"])


def _version() -> str | None:
    """Of the package; None where it is not installed."""
    try:
        return importlib.metadata.version("metax")
    except importlib.metadata.PackageNotFoundError:
        return None


def _shapes(network: Controller, seen: Features) -> dict[str, Any]:
    """Shapes and dtypes of all that is saved."""
    init = lambda: network.init(jax.random.key(0), seen.spec.size)
    tree = lambda: {"phi": init(), "features": seen.init()[0]}
    return jax.eval_shape(tree)


def _is_normalized(seen: Features) -> bool:
    return "running_norm" in seen.spec.arguments


def _compare(path: Any, field: str, theirs: Any, ours: Any, argument: str) -> None:
    """Refuses a field of the sidecar that is not what the caller has."""
    # as the file has it: tuples become lists
    ours = json.loads(json.dumps(ours))
    if theirs != ours:
        raise ArtifactError(
            f"{path}.json must have at {field!r} what "
            f"`load_controller({argument}=...)` has, {ours}; got {theirs}."
        )


def _field(path: Any, card: Mapping[str, Any], part: str, name: str) -> Any:
    """A value within a part of the sidecar."""
    whole = card[part]
    if not isinstance(whole, dict) or name not in whole:
        raise ArtifactError(f"{path}.json must say '{part}.{name}'; got {whole}.")
    return whole[name]


def _rebuilt(path: Any, spec: Any) -> Features:
    """Built-in features, made from their name and arguments."""
    card = {"features": spec}
    name, arguments = (_field(path, card, "features", f) for f in ("name", "arguments"))
    known = {"paper": feature_sets.paper, "released": feature_sets.released}
    if name not in known:
        raise ArtifactError(
            f"{path}.json has at 'features.name' features of your own, {name!r}: they "
            "must be passed as `load_controller(features=...)`; got none."
        )
    options = dict(arguments)
    norm = options.pop("running_norm", None)
    try:
        made = known[name](**options)
        return made if norm is None else feature_sets.running_norm(made, **norm)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}.json must have at 'features.arguments' those of "
            f"`features.{name}`; got {arguments} ({error})."
        ) from error


def _network(path: Any, card: Mapping[str, Any]) -> Controller:
    """The controller that the sidecar describes."""
    read = {
        name: _field(path, card, "controller", name) for name in ControllerSpec._fields
    }
    spec = ControllerSpec(**read)
    try:
        if spec.hidden is None:
            return context_free(spec.num_actions, spec.temperature)
        return controller(
            spec.num_actions,
            tuple(spec.hidden),
            spec.temperature,
            activation=named_activation(spec.activation or ""),
            critic_hidden=None if spec.critic is None else tuple(spec.critic),
        )
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"{path}.json must have at 'controller' a description of one; got {read} "
            f"({error})."
        ) from error
