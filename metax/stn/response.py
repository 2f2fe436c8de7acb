"""The best response: how the best weights move when the hyperparameters do.

A response Φ is a linear map from a displacement ε of the h unconstrained
hyperparameters to one of the weights, with the structure of a layer: each output of a
layer is rescaled. One perturbation for the batch needs no more than a `jax.jvp` (any
model). One for each example goes by one of two routes:

    inject    one more call of each flax.linen layer: two forward passes' worth
    columns   Σ_k ε_ik (J_w f Φ_k): h tangents, any model, for few hyperparameters

MacKay et al., "Self-Tuning Networks: bilevel optimization of hyperparameters using
structured best-response functions", 2019, arXiv 1903.03088 (the row structure); Bae &
Grosse, "Delta-STN: efficient bilevel optimization for neural networks using structured
response Jacobians", 2020, arXiv 2010.13514 (the linearised network).
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count
from metax.base import Outputs, Params, Select, check_key
from metax.stn.injection import injected
from metax.stn.nodes import (
    NoResponse,
    Structure,
    contract_node,
    displace,
    init_tree,
    is_node,
)

__all__ = ["Response", "best_response", "check_response"]

ResponseParams = Any
Function = Callable[[Params], Outputs]

_MAX_COLUMNS = 4  # where h tangents cost about as much as the rest of a step


class Response(NamedTuple):
    """A family of linear maps Φ from hyperparameter to weight displacements.

    Attributes:
      init: `init(key, params) -> phi`, with Φ = 0: a node for each leaf.
      tangent: `tangent(phi, eps, params=None) -> Φε`, a tree like the parameters, each
        leaf in its dtype; eps of shape (h,). "tied_row" needs `params`.
      contract: `contract(phi, g, params=None) -> Φᵀg` of shape (h,), for a tree g like
        the parameters.
      linearize: `linearize(fn, params, phi, eps) -> (f(w0), J_w f Φε)`, for
        `fn(params) -> outputs`. eps of shape (h,) is one perturbation for all, (batch,
        h) one for each example, which is the leading axis of the outputs. Integer
        outputs come back unchanged in both.
      apply: `apply(fn, params, phi, eps) -> f(w0 + Φε)`.
    """

    init: Callable[[jax.Array, Params], ResponseParams]
    tangent: Callable[..., Params]
    contract: Callable[..., jax.Array]
    linearize: Callable[
        [Function, Params, ResponseParams, jax.Array], tuple[Outputs, Outputs]
    ]
    apply: Callable[[Function, Params, ResponseParams, jax.Array], Outputs]


def best_response(
    num_hparams: int,
    *,
    structure: Structure | Callable[[tuple[Any, ...], Any], Structure] = "row",
    select: Select | None = None,
    route: Literal["auto", "inject", "columns"] = "auto",
) -> Response:
    """A structured linear response of the weights to `num_hparams` coordinates.

    Per leaf w of last axis r:

        row        Δw_…r = W_…r (Uε)_r      W like w, U (out, h): |w| + out·h numbers
        tied_row   Δw_…r = w_…r (Uε)_r      w held constant: out·h numbers
        k          rank k                   (|w| + h)·k numbers
        dense      any Jacobian             |w|·h numbers

    A per-example `linearize` by injection costs one more product a layer and one for
    the tangent, and memory of the order of the activations.

    Args:
      num_hparams: h, the number of coordinates of all hyperparameters.
      structure: "row", "tied_row", "dense", "none", a rank k ≥ 1, or
        `structure(path, leaf)`, one of these for each leaf. A scalar leaf is dense.
      select: `select(path, leaf) -> bool`, which leaves respond. By default all float
        leaves; where the tree has a top-level collection "params", those in it.
      route: how per-example perturbations reach the outputs. "inject": flax.linen
        layers only. "columns": any model, `linearize` only. "auto": inject, or columns
        where h ≤ 4 and no linen layer was called.

    Returns:
      A `Response`.

    Raises:
      ValueError: `num_hparams` or a rank is below 1, or a word is unknown; when called,
        a layer cannot be carried or a leaf was not reached, by name.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.stn import best_response
      >>> response = best_response(2, structure="dense")
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> phi = response.init(jax.random.key(0), params)
      >>> phi = jax.tree.map(lambda x: x + jnp.eye(2), phi)
      >>> square, eps = lambda params: params["w"] ** 2, jnp.array([0.5, 0.0])
      >>> response.linearize(square, params, phi, eps)[1].tolist()
      [1.0, 0.0]
    """
    _check_arguments(num_hparams, structure, route, select)

    def init(key: jax.Array, params: Params) -> ResponseParams:
        check_key(key, "best_response(...).init(key=...)")
        chosen = _default_select(params) if select is None else select
        return init_tree(key, params, num_hparams, structure, chosen)

    def linearize(
        fn: Function, params: Params, phi: ResponseParams, eps: jax.Array
    ) -> tuple[Outputs, Outputs]:
        _check_eps("linearize", eps, num_hparams)
        if eps.ndim == 1:
            return _along(fn, params, tangent(phi, eps, params))
        if route == "columns":
            return _columns(fn, params, phi, eps)
        visit = None

        def moved(t: jax.Array) -> Outputs:
            nonlocal visit
            visit = injected(fn, params, phi, eps, t)
            return visit.outputs

        value, change = _along(moved, jnp.zeros(()), jnp.ones(()))
        if _is_carried(visit, route, num_hparams):
            return value, change
        return _columns(fn, params, phi, eps)

    def apply(
        fn: Function, params: Params, phi: ResponseParams, eps: jax.Array
    ) -> Outputs:
        _check_eps("apply", eps, num_hparams)
        if eps.ndim == 1:
            return fn(_add(params, tangent(phi, eps, params)))
        visit = injected(fn, params, phi, eps, None)
        if route == "columns" or not _is_carried(visit, route, num_hparams):
            raise ValueError(
                "`best_response(...).apply` with a perturbation for each example needs "
                "layers of flax.linen (route='inject'): weights of other models cannot "
                "differ between examples. Use perturbation='batch' or 'group', or the "
                "linearised forward in both places."
            )
        return visit.outputs

    return Response(
        init=init, tangent=tangent, contract=contract, linearize=linearize, apply=apply
    )


def tangent(
    phi: ResponseParams, eps: jax.Array, params: Params | None = None
) -> Params:
    """Φε, a tree like the parameters, for one perturbation (h,)."""
    if params is None:
        return jax.tree.map(lambda node: displace(node, eps), phi, is_leaf=is_node)
    return jax.tree.map(
        lambda node, leaf: displace(node, eps, leaf), phi, params, is_leaf=is_node
    )


def contract(
    phi: ResponseParams, gradient: Params, params: Params | None = None
) -> jax.Array:
    """Φᵀg, of shape (h,), for a tree g like the parameters."""
    nodes = jax.tree.leaves(phi, is_leaf=is_node)
    gradients = jax.tree.leaves(gradient)
    leaves = [None] * len(nodes) if params is None else jax.tree.leaves(params)
    parts = [
        contract_node(node, g, leaf)
        for node, g, leaf in zip(nodes, gradients, leaves, strict=True)
        if not isinstance(node, NoResponse)
    ]
    return sum(parts, start=jnp.zeros(()))


def check_response(
    fn: Function, params: Params, phi: ResponseParams, key: jax.Array, num_hparams: int
) -> float:
    """Compares the inject route with columns on `fn`, on random displacements.

    For a model of one's own: call it once, outside jit, on a batch of two with a phi
    whose Φ is not 0 (`jax.tree.map(lambda x: x + 0.1, phi)`).

    Args:
      fn: `fn(params) -> outputs` on a batch, without randomness (`key=None`).
      params: the parameter tree.
      phi: response nodes.
      key: a typed key.
      num_hparams: h.

    Returns:
      The relative difference of the two tangents, ‖a - b‖ / ‖b‖; below 1e-4 in float32
      is agreement.

    Raises:
      ValueError: a layer cannot be injected, by name.
    """
    check_key(key, "check_response(key=...)")
    check_count("check_response", 1, num_hparams=num_hparams)
    batch = jax.tree.leaves(jax.eval_shape(fn, params))[0].shape[0]
    eps = jax.random.normal(key, (batch, num_hparams))
    routes = [
        jax.tree.leaves(
            best_response(num_hparams, route=route).linearize(fn, params, phi, eps)[1]
        )
        for route in ("inject", "columns")
    ]
    square = lambda leaves: sum(float(jnp.sum(jnp.square(x))) for x in leaves)
    change = square([a - b for a, b in zip(*routes, strict=True)])
    return (change / max(square(routes[1]), 1e-30)) ** 0.5


def _along(fn: Callable, x: Any, dx: Any) -> tuple[Outputs, Outputs]:
    """`jax.jvp` of the float leaves; others have no tangent and pass through."""
    of_floats, pick = _floats_only(fn, x)
    values, changes, outputs = jax.jvp(of_floats, (pick(x),), (pick(dx),), has_aux=True)
    return _fill(outputs, values), _fill(outputs, changes)


def _columns(
    fn: Function, params: Params, phi: ResponseParams, eps: jax.Array
) -> tuple[Outputs, Outputs]:
    """f(w0) and Σ_k ε_ik (J_w f Φ_k): each column once for the whole batch."""
    of_floats, pick = _floats_only(fn, params)
    values, along, outputs = jax.linearize(of_floats, pick(params), has_aux=True)
    units = jnp.eye(eps.shape[1], dtype=eps.dtype)
    columns = jax.vmap(lambda unit: along(pick(tangent(phi, unit, params))))(units)
    changes = [
        jnp.einsum("bk,kb...->b...", eps, column).astype(column.dtype)
        for column in columns
    ]
    return _fill(outputs, values), _fill(outputs, changes)


def _floats_only(fn: Callable, x: Any) -> tuple[Callable, Callable[[Any], list]]:
    """`fn` of its float leaves alone, giving (float outputs, outputs); their picker."""
    leaves, treedef = jax.tree.flatten(x)

    def pick(tree: Any) -> list:
        return [
            part
            for leaf, part in zip(leaves, treedef.flatten_up_to(tree), strict=True)
            if _is_float(leaf)
        ]

    def of_floats(moving: list) -> tuple[list, Outputs]:
        outputs = fn(_fill(x, moving))
        return [y for y in jax.tree.leaves(outputs) if _is_float(y)], outputs

    return of_floats, pick


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def _fill(tree: Any, floats: list) -> Any:
    """`tree` with its float leaves replaced, in order."""
    rest = iter(floats)
    return jax.tree.map(lambda leaf: next(rest) if _is_float(leaf) else leaf, tree)


def _is_carried(visit: Any, route: str, num_hparams: int) -> bool:
    """Whether injection reached every leaf; False where columns may do instead."""
    if not visit.missing:
        return True
    if route == "auto" and not visit.seen and num_hparams <= _MAX_COLUMNS:
        return False
    raise ValueError(
        "`best_response(route=...)` by injection must reach every leaf that has a "
        f"response; not reached: {', '.join(visit.missing)}. Leaves outside of "
        "flax.linen layers, several root modules, and methods other than `__call__` "
        "and `attend` are out of its reach: use perturbation='batch', or give them no "
        "response (select=...)."
    )


def _default_select(params: Params) -> Select:
    if isinstance(params, Mapping) and "params" in params:
        return lambda path, leaf: path[0].key == "params"
    return lambda path, leaf: True


def _add(params: Params, change: Params) -> Params:
    add = lambda w, d: w + d if _is_float(w) else w
    return jax.tree.map(add, params, change)


def _check_arguments(num_hparams: int, structure: Any, route: str, select: Any) -> None:
    if num_hparams < 1:
        raise ValueError(
            f"`best_response(num_hparams=...)` must be at least 1; got {num_hparams}."
        )
    words = ("row", "tied_row", "dense", "none")
    is_rank = isinstance(structure, int) and structure >= 1
    if not (is_rank or callable(structure) or structure in words):
        raise ValueError(
            f"`best_response(structure=...)` must be one of {words}, a rank of at "
            f"least 1 or a function of path and leaf; got {structure!r}."
        )
    if not (select is None or callable(select)):
        raise ValueError(
            "`best_response(select=...)` must be a function of path and leaf, or None; "
            f"got {select!r}."
        )
    if route not in ("auto", "inject", "columns"):
        raise ValueError(
            "`best_response(route=...)` must be 'auto', 'inject' or 'columns'; got "
            f"{route!r}."
        )


def _check_eps(function: str, eps: jax.Array, num_hparams: int) -> None:
    if eps.ndim not in (1, 2) or eps.shape[-1] != num_hparams:
        raise ValueError(
            f"`best_response(...).{function}(eps=...)` must be of shape "
            f"({num_hparams},) or (batch, {num_hparams}); got {eps.shape}."
        )
