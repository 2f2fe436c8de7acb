"""A weight displacement of its own for each example, injected behind every layer.

Example i has weights w0 + Φε_i. To form them would take batch × |w| numbers; but a
layer that is affine in each of its parameters answers a displacement of them by one of
its output, which is small. For row responses:

    y_i + δ_i,    δ_i = Σ_leaf (Uε_i) ⊙ (∂ layer(x_i) / ∂leaf) W

so one more call of each layer, with W in place of w, does it. An interceptor of
flax.linen calls and adds. For the linearised network δ is added to the *tangent*: one
`jax.jvp` in a scalar t gives f(w0) and J_w f Φε together,

    inject(y, δ, t) = y,   with tangent  ẏ + δ·ṫ

Layers that are not affine in their parameters are refused by name.
"""

import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.base import Outputs, Params
from metax.stn.nodes import (
    DenseResponse,
    LowRankResponse,
    Node,
    NoResponse,
    RowResponse,
    TiedRowResponse,
    is_node,
)

if TYPE_CHECKING:
    import flax.linen as nn

__all__ = ["Visit", "injected"]

_MARK = "response_of_layer"  # the name of clones, which are not intercepted again
_REMEDY = (
    "Use perturbation='batch', which takes any model, or give the leaf no response: "
    "best_response(..., select=...)."
)
# Affine in each parameter, output r depending on slice [..., r] alone, whatever the
# fields are set to; every other layer is tried on random numbers first.
_AFFINE = ("Dense", "DenseGeneral", "Conv", "Embed", "GroupNorm")

Names = tuple[str, ...]


class Visit(NamedTuple):
    """What an intercepted call left behind.

    Attributes:
      outputs: of the function.
      seen: whether any flax layer with parameters was called.
      missing: the paths of leaves that have a response and were not visited.
    """

    outputs: Outputs
    seen: bool
    missing: tuple[str, ...]


def injected(
    fn: Callable[[Params], Outputs],
    params: Params,
    phi: Any,
    eps: jax.Array,
    t: jax.Array | None,
) -> Visit:
    """Calls `fn(params)` with the weights of example i displaced by Φε_i.

    Args:
      fn: calls flax.linen modules on `params`; the batch is the leading axis.
      params: the parameter tree.
      phi: its response nodes.
      eps: perturbations (batch, h).
      t: None: the displacement is added to the outputs of the layers. A scalar: it is
        added to their tangents in t alone.
    """
    import flax.linen as nn  # half a second, which `import metax` should not take

    nodes = _nodes_by_module(phi)
    visited: set[Names] = set()
    seen: list[Names] = []

    def interceptor(next_fun, args, kwargs, context):
        module, method = context.module, context.method_name
        y = next_fun(*args, **kwargs)
        if method not in ("__call__", "attend") or module.name == _MARK:
            return y
        own = _own_parameters(module)
        if not own:
            return y
        seen.append(module.path)
        mine = nodes.get(module.path, {})
        if not mine:
            return y
        call = _Call(module.clone(parent=None, name=_MARK), method, args, kwargs)
        variables = dict(module.variables)
        _check_layer(module, call, variables, mine, y, eps)
        visited.update((*module.path, name) for name in mine)
        return _join(y, call, variables, mine, eps, t)

    with nn.intercept_methods(interceptor):
        outputs = fn(params)
    wanted = {(*path, name) for path, mine in nodes.items() for name in mine}
    missing = tuple(sorted("/".join(names) for names in wanted - visited))
    return Visit(outputs=outputs, seen=bool(seen), missing=missing)


class _Call(NamedTuple):
    """A layer and what it was called with."""

    layer: "nn.Module"
    method: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def split(self) -> tuple[list[Any], Callable[[list[Any]], tuple[tuple, dict]]]:
        """The arrays among the arguments, and how to put others in their place."""
        leaves, treedef = jax.tree.flatten((self.args, dict(self.kwargs)))
        places = [k for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

        def merge(arrays: list[Any]) -> tuple[tuple, dict]:
            filled = list(leaves)
            for place, array in zip(places, arrays, strict=True):
                filled[place] = array
            return treedef.unflatten(filled)

        return [leaves[k] for k in places], merge


def _join(
    y: jax.Array,
    call: _Call,
    variables: dict[str, Any],
    nodes: dict[str, Node],
    eps: jax.Array,
    t: jax.Array | None,
) -> jax.Array:
    arrays, merge = call.split()

    def delta(arrays, variables, nodes, eps) -> jax.Array:
        args, kwargs = merge(arrays)
        again = call._replace(args=args, kwargs=kwargs)
        effects = [
            _effect(again, variables, name, node, eps) for name, node in nodes.items()
        ]
        return sum(effects, start=jnp.zeros(())).astype(y.dtype)

    operands = (arrays, variables, nodes, eps)
    if t is None:
        return y + delta(*operands)

    # The rule, not the function, computes δ: from the primal operands, so that their
    # tangents cost nothing, and differentiable in all of them.
    @jax.custom_jvp
    def inject(y, t, operands):
        return y

    @inject.defjvp
    def _(primals, tangents):
        y, _, operands = primals
        dy, dt, _ = tangents
        return y, dy + delta(*operands) * dt.astype(y.dtype)

    return inject(y, t, operands)


def _effect(
    call: _Call, variables: dict[str, Any], name: str, node: Node, eps: jax.Array
) -> jax.Array:
    """What the displacement of one parameter of the layer does to its output."""
    leaf = variables["params"][name]
    along = lambda direction: _derivative(call, variables, name, direction)
    match node:
        case RowResponse(weight, rescale):
            return _scaled(call, along, weight, eps @ rescale.T)
        case TiedRowResponse(rescale):
            still = jax.lax.stop_gradient(leaf)
            return _scaled(call, along, still, eps @ rescale.T)
        case LowRankResponse(basis, mix):
            return _mixed(jax.vmap(along)(basis), eps @ mix.T)
        case DenseResponse(columns):
            return _mixed(jax.vmap(along)(columns), eps)
        case _:
            raise TypeError(f"no response in {node}")


def _scaled(
    call: _Call, along: Callable, weight: jax.Array, scale: jax.Array
) -> jax.Array:
    """(Uε) ⊙ layer(x; W). In a tied decoder the scale meets the query."""
    if call.method == "attend":
        query = call.args[0]
        scaled = query * _expand(scale, query.ndim).astype(query.dtype)
        return _applied(
            call._replace(args=(scaled, *call.args[1:])),
            {"params": {"embedding": weight}},
        )
    change = along(weight)
    return _expand(scale, change.ndim) * change


def _mixed(changes: jax.Array, amounts: jax.Array) -> jax.Array:
    """Σ_j amounts_ij changes_j,i of changes (k, batch, ...)."""
    return jnp.einsum("jb...,bj->b...", changes, amounts)


def _expand(scale: jax.Array, ndim: int) -> jax.Array:
    """(batch, out) as (batch, 1, ..., 1, out)."""
    return scale.reshape(scale.shape[0], *(1,) * (ndim - 2), scale.shape[-1])


def _derivative(
    call: _Call, variables: dict[str, Any], name: str, direction: jax.Array
) -> jax.Array:
    """Of the layer's output in one parameter, along `direction`."""
    own = variables["params"]

    def output(leaf: jax.Array) -> jax.Array:
        return _applied(call, {**variables, "params": {**own, name: leaf}})

    return jax.jvp(output, (own[name],), (direction.astype(own[name].dtype),))[1]


def _applied(call: _Call, variables: Mapping[str, Any]) -> jax.Array:
    mutable = [name for name in variables if name != "params"] or False
    out: Any = call.layer.apply(
        variables, *call.args, method=call.method, mutable=mutable, **call.kwargs
    )
    return out[0] if mutable else out


def _own_parameters(module: "nn.Module") -> dict[str, Any]:
    """The module's parameters that are not a submodule's."""
    if module.scope is None:
        return {}
    held = module.variables.get("params", {})
    return {name: x for name, x in held.items() if not isinstance(x, Mapping)}


def _nodes_by_module(phi: Any) -> dict[Names, dict[str, Node]]:
    """The responding nodes by module path and name, without a leading "params"."""
    found: dict[Names, dict[str, Node]] = {}
    for path, node in jax.tree_util.tree_leaves_with_path(phi, is_leaf=is_node):
        if isinstance(node, NoResponse):
            continue
        names = tuple(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        names = names[1:] if names[:1] == ("params",) else names
        found.setdefault(names[:-1], {})[names[-1] if names else ""] = node
    return found


def _check_layer(
    module: "nn.Module",
    call: _Call,
    variables: dict,
    nodes: dict,
    y: Any,
    eps: jax.Array,
) -> None:
    name = f"{type(module).__name__} at {'/'.join(module.path) or 'the root'}"
    held, size = variables["params"], eps.shape[0]
    rules = {
        "it has parameters of its own beside submodules": lambda: (
            not any(isinstance(x, Mapping) for x in held.values())
        ),
        f"it returns a {type(y).__name__}, not an array": lambda: isinstance(
            y, jax.Array
        ),
        f"its output must be (batch of {size}, ..., features), got shape "
        f"{jnp.shape(y) if isinstance(y, jax.Array) else None}": lambda: (
            y.ndim > 1 and y.shape[0] == size
        ),
        "its parameters have other shapes than in the parameter tree, as under nn.scan "
        "over layers or nn.vmap": lambda: all(
            leaf in held and _fits(node, held[leaf].shape)
            for leaf, node in nodes.items()
        ),
        "its output is not affine in them, or mixes their last axis": lambda: (
            _is_known(type(module))
            or call.method == "attend"
            or _is_affine(call, variables, list(nodes), size)
        ),
    }
    for rule, is_kept in rules.items():
        if not is_kept():
            raise ValueError(f"`best_response` cannot carry {name}: {rule}. {_REMEDY}")


def _is_known(kind: type) -> bool:
    return kind.__module__.startswith("flax.linen.") and kind.__name__ in _AFFINE


def _fits(node: Node, shape: tuple[int, ...]) -> bool:
    match node:
        case RowResponse(weight, _):
            return weight.shape == shape
        case LowRankResponse(basis, _):
            return basis.shape[1:] == shape
        case DenseResponse(columns):
            return columns.shape[1:] == shape
        case TiedRowResponse(rescale):
            return rescale.shape[:1] == shape[-1:]
        case _:
            return True


def _is_affine(call: _Call, variables: dict, names: list[str], size: int) -> bool:
    """Tries on random numbers whether rescaled directions add up in the output.

    Two examples are enough, where the layer can be called on two.
    """
    leaves, treedef = jax.tree.flatten((call.args, dict(call.kwargs)))
    of_batch = [k for k, x in enumerate(leaves) if jnp.shape(x)[:1] == (size,)]
    specs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    flat, held = jax.tree.flatten(specs)
    for shortened in (of_batch, of_batch[:1], []):
        inputs = tuple(
            _spec(x, min(size, 2) if k in shortened else None)
            for k, x in enumerate(leaves)
        )
        given = (call.layer, call.method, treedef, inputs, held, tuple(flat))
        try:
            return _adds_up(*given, tuple(names))
        except (TypeError, ValueError, jax.errors.JAXTypeError):
            continue
    return False


def _spec(x: Any, size: int | None) -> Any:
    """Shape and dtype of an array, its leading axis replaced; other things as is."""
    if not isinstance(x, jax.Array):
        return x
    shape = x.shape if size is None else (size, *x.shape[1:])
    return jax.ShapeDtypeStruct(shape, x.dtype)


# A layer is tried once, not at every trace of every pass. The numbers are concrete, so
# that nothing of the caller's trace is kept.
@functools.lru_cache(maxsize=512)
def _adds_up(
    layer: "nn.Module", method: str, treedef, inputs: tuple, held, flat: tuple, names
) -> bool:
    with jax.ensure_compile_time_eval():
        num_draws = len(inputs) + len(flat) + 2 * len(names)
        keys = iter(jax.random.split(jax.random.key(0), num_draws))
        draw = lambda x: _random(next(keys), x)
        args, kwargs = treedef.unflatten([draw(x) for x in inputs])
        call = _Call(layer, method, args, kwargs)
        # positive, since variances are among them
        known = held.unflatten([1 + abs(draw(x)) for x in flat])
        expected, moved = _applied(call, known), dict(known["params"])
        for name in names:
            leaf = known["params"][name]
            spec = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            weight = draw(spec)
            scale = draw(jax.ShapeDtypeStruct(leaf.shape[-1:], leaf.dtype))
            expected = expected + scale * _derivative(call, known, name, weight)
            moved[name] = leaf + scale * weight
        got = _applied(call, {**known, "params": moved})
        tolerance = 1e-4 * (1 + jnp.max(jnp.abs(expected)))  # float32 sums
        return bool(jnp.max(jnp.abs(got - expected)) < tolerance)


def _random(key: jax.Array, x: Any) -> Any:
    if not isinstance(x, jax.ShapeDtypeStruct):
        return x
    if jnp.issubdtype(x.dtype, jnp.floating):
        return jax.random.normal(key, x.shape, x.dtype)
    return jnp.zeros(x.shape, x.dtype)
