"""Perturbed hyperparameters, and a network whose weights respond to them.

Three ways to perturb a batch: every example by itself ("example"), equal groups of
examples ("group"), or all alike ("batch"). Each gives `eps`, of shape (batch, h),
(groups, h) or (h,), and one function, `responded`, that runs the network on it.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.base import Batch, BilevelProblem, Hparams, Outputs, Params
from metax.stn.hparams import HyperparameterSpace, constrain
from metax.stn.penalty import ExampleWeights
from metax.stn.response import Response, ResponseParams, tangent

__all__ = ["Perturbation"]

Finish = Callable[[Outputs, Batch, Hparams, Any], Any]


class Perturbation(NamedTuple):
    """How a batch is perturbed; static.

    Attributes:
      by: "example", "group" or "batch".
      groups: how many groups, where `by` is "group".
      antithetic: the second half of the rows is the first with the other sign.
      space: of the hyperparameters.
      response: of the weights.
    """

    by: Literal["example", "group", "batch"]
    groups: int
    antithetic: bool
    space: HyperparameterSpace
    response: Response


def draw(perturbation: Perturbation, key: jax.Array, size: int, dtype) -> jax.Array:
    """Standard normal z: (batch, h), (groups, h) or (h,)."""
    h = perturbation.space.size()
    if perturbation.by == "batch":
        return jax.random.normal(key, (h,), dtype)
    rows = size if perturbation.by == "example" else perturbation.groups
    if perturbation.antithetic:
        half = jax.random.normal(key, (rows // 2, h), dtype)
        z = jnp.concatenate([half, -half])
    else:
        z = jax.random.normal(key, (rows, h), dtype)
    if perturbation.by == "example":
        return jnp.where(perturbation.space.shared(), z[:1], z)
    return z


def natural_values(space: HyperparameterSpace, flat: jax.Array, size: int) -> Hparams:
    """What the problem sees of λ, (h,) or (batch, h): a batch axis unless shared."""
    values = constrain(space.by_name(), space.unflatten(flat))

    def shaped(name: str, spec: Any, shape: tuple[int, ...]) -> jax.Array:
        x = values[name]
        if spec.shared:
            return x[0] if flat.ndim == 2 else x
        return x if flat.ndim == 2 else jnp.broadcast_to(x, (size, *shape))

    return {
        name: shaped(name, spec, shape)
        for name, spec, shape in zip(
            space.names, space.specs, space.shapes, strict=True
        )
    }


def responded(
    perturbation: Perturbation,
    problem: BilevelProblem,
    weights: tuple[Params, ResponseParams],
    hparams: tuple[jax.Array, jax.Array],
    batch: Batch,
    key: jax.Array | None,
    *,
    linearized: bool,
    finish: Finish,
) -> tuple[Any, Outputs]:
    """Runs the network at `w0 + Φη` and hyperparameters `λ + ε`.

    Args:
      perturbation: how the batch is perturbed.
      problem: what is solved.
      weights: w0 and Φ.
      hparams: λ + ε and η, unconstrained, each of the shape of `draw`.
      batch: the batch.
      key: of the pass; None is evaluation.
      linearized: f(w0) + J_w f Φη in place of f(w0 + Φη).
      finish: `finish(outputs, batch, natural, weights)`, the losses of a piece of the
        batch that is perturbed alike, of shape (piece,) or scalar.

    Returns:
      What `finish` returned, over all groups, and the outputs of the whole batch.
    """
    (params, phi), response = weights, perturbation.response

    def run(piece: tuple) -> tuple[Any, Outputs]:
        """A piece of the batch whose `hparams` are (piece, h) or (h,)."""
        (lam_eps, eta), part, key = piece
        natural = natural_values(perturbation.space, lam_eps, batch_size(part))
        fn = lambda params: problem.predict(params, part, natural, key)
        if linearized:
            value, change = response.linearize(fn, params, phi, eta)
            outputs = jax.tree.map(_add, value, change)
        else:
            outputs = response.apply(fn, params, phi, eta)
        if eta.ndim == 2:
            moved = ExampleWeights(params, phi, eta)
        else:
            moved = displaced(params, phi, eta)
        return finish(outputs, part, natural, moved), outputs

    if perturbation.by != "group":
        return run((hparams, batch, key))
    groups = perturbation.groups
    pieces = jax.tree.map(lambda x: x.reshape(groups, -1, *x.shape[1:]), batch)
    keys = None if key is None else jax.random.split(key, groups)
    finished, outputs = jax.lax.map(run, (hparams, pieces, keys))
    whole = jax.eval_shape(
        lambda: problem.predict(
            params,
            batch,
            natural_values(perturbation.space, hparams[0][0], batch_size(batch)),
            key,
        )
    )
    return finished, jax.tree.map(_merge, outputs, whole)


def displaced(params: Params, phi: ResponseParams, eta: jax.Array) -> Params:
    """w0 + Φη for one displacement (h,)."""
    return jax.tree.map(_add, params, tangent(phi, eta, params))


def batch_size(batch: Batch) -> int:
    """The leading axis, which all leaves share."""
    return jnp.shape(jax.tree.leaves(batch)[0])[0]


def _add(value: jax.Array, change: jax.Array) -> jax.Array:
    is_float = jnp.issubdtype(jnp.result_type(value), jnp.floating)
    return value + change if is_float else value


def _merge(stacked: jax.Array, whole: Any) -> jax.Array:
    """Groups side by side, or their mean where a leaf does not grow with the batch."""
    if stacked.ndim > 1:
        joined = (stacked.shape[0] * stacked.shape[1], *stacked.shape[2:])
        if joined == whole.shape:
            return stacked.reshape(joined)
    if jnp.issubdtype(stacked.dtype, jnp.floating):
        return stacked.mean(0)
    return stacked[0]
