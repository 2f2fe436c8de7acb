"""A learned optimizer in three tiers: parameters, tensors and the whole network.

One small GRU runs at every parameter, one at every tensor on the mean of its
parameters, and one on the mean of the tensors; each reads the tiers above. A baseline
for amalgamation.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import (
    dense,
    features_dtype,
    flatten,
    keep_unless,
    unflatten,
)
from metax.amalgamation.policies import LearnedOptimizer, freeze
from metax.arguments import check_number

__all__ = ["ScaleState", "Tiers", "scale"]

Params = Any
Theta = dict[str, dict[str, jax.Array]]


class Tiers(NamedTuple):
    """The recurrent part of the state: it stays during a warm-up.

    Attributes:
      parameter: [N, param_size], h_p of each of the N parameters.
      tensor: [tensors, tensor_size], h_t of each tensor.
      whole: [1, global_size], h_g.
      log_rate: [N], η̄, the running average of the log learning rate.
      relative_rate: [N], η_rel, the last log learning rate less its mean in the tensor.
    """

    parameter: jax.Array
    tensor: jax.Array
    whole: jax.Array
    log_rate: jax.Array
    relative_rate: jax.Array


class ScaleState(NamedTuple):
    """What the three tiers carry from step to step; all at least float32.

    Attributes:
      count: int32 scalar, the steps made.
      mu: [N, num_timescales], ḡ, running averages of the gradient.
      nu: [N, num_timescales], λ, those of its square.
      tiers: the recurrent states.
    """

    count: jax.Array
    mu: jax.Array
    nu: jax.Array
    tiers: Tiers


def scale(
    param_size: int = 20,
    tensor_size: int = 10,
    global_size: int = 10,
    *,
    num_timescales: int = 4,
    initial_learning_rate: float = 1e-3,
    learning_rate_offset: float = 1e-2,
    eps: float = 1e-10,
) -> LearnedOptimizer:
    """Learned optimizer in three tiers, with momentum at several timescales.

        ḡ_k ← β_g^(2^-k) ḡ_k + (1 - β_g^(2^-k)) g        β_g = σ(D(h_p))
        λ_k ← β_λ^(2^-k) λ_k + (1 - β_λ^(2^-k)) g²       β_λ = σ(D(h_p))
        m_k = ḡ_k / √(λ_k + ε)
        γ_k = ln(λ_k + ε), less its mean over k
        h_p ← GRU([m, γ, η_rel, h_t, h_g], h_p)          each parameter
        h_t ← GRU([mean h_p, h_g], h_t)                  each tensor
        η   = η̄ + D(h_p);   η_rel ← η, less its mean in the tensor
        η̄   ← σ(ρ) η̄ + (1 - σ(ρ)) η
        θ   ← θ - (e^η + offset) (D(h_p) + D(m))
        h_g ← GRU(mean h_t, h_g)                         once

    Each D is a dense layer of its own. β are of the h_p before the step, the other D of
    the new one. Kernels of all D start at zero, so the first update is exactly zero.
    5,070 weights; 30 numbers of state a parameter (120 bytes in float32) and about
    6,000 operations.

    Args:
      param_size: units of the GRU at each parameter, at least 1.
      tensor_size: units of that at each tensor.
      global_size: units of that of the whole.
      num_timescales: k = 0, 1, ..., at least 1.
      initial_learning_rate: e^η̄ before the first step, above 0.
      learning_rate_offset: what is added to e^η, at least 0.
      eps: ε > 0, under the root and in the logarithm.

    Returns:
      A `LearnedOptimizer` whose state is a `ScaleState`. A gradient with an entry that
      is not finite, or whose square is not, gives a zero update and no new state.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.amalgamation import scale
      >>> theta = scale().init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(theta))
      5070

    Note:
      The original draws initial rates log-uniformly from 1e-6 to 1e-2, normalises the
      direction and learns the offset.

    References:
      Wichrowska et al., Learned Optimizers that Scale and Generalize, 2017,
      arXiv:1703.04813, section 3 and appendices B and D.
    """
    sizes = {"param_size": param_size, "tensor_size": tensor_size,
             "global_size": global_size, "num_timescales": num_timescales}  # fmt: skip
    for name, size in sizes.items():
        check_number("scale", name, size, least=1)
    rates = {"initial_learning_rate": initial_learning_rate, "eps": eps}
    for name, value in rates.items():
        check_number("scale", name, value, above=0)
    check_number("scale", "learning_rate_offset", learning_rate_offset, least=0)

    def init(key: jax.Array) -> Theta:
        key_parameter, key_tensor, key_global = jax.random.split(key, 3)
        features = 2 * num_timescales + 1 + tensor_size + global_size
        return {
            "parameter_gru": _gru_init(key_parameter, features, param_size),
            "tensor_gru": _gru_init(key_tensor, param_size + global_size, tensor_size),
            "global_gru": _gru_init(key_global, tensor_size, global_size),
            "gradient_decay": _constant(param_size, _logit(0.9)),
            "square_decay": _constant(param_size, _logit(0.999)),
            "rate": _constant(param_size, 0.0),
            "direction": _constant(param_size, 0.0),
            "shortcut": _constant(num_timescales, 0.0),
            "rate_decay": {"rho": jnp.full((), 3.2, jnp.zeros(()).dtype)},
        }

    def rule(theta: Theta) -> optax.GradientTransformationExtraArgs:
        def init_fn(params: Params) -> ScaleState:
            dtype = features_dtype(theta, params)
            lengths = _lengths(params)
            num = sum(lengths)
            zeros = lambda *shape: jnp.zeros(shape, dtype)
            tiers = Tiers(
                parameter=zeros(num, param_size),
                tensor=zeros(len(lengths), tensor_size),
                whole=zeros(1, global_size),
                log_rate=jnp.full((num,), math.log(initial_learning_rate), dtype),
                relative_rate=zeros(num),
            )
            mu, nu = zeros(num, num_timescales), zeros(num, num_timescales)
            return ScaleState(jnp.zeros((), jnp.int32), mu, nu, tiers)

        def update_fn(
            updates: Params,
            state: Any,
            params: Params | None = None,
            *,
            warmup: Any = None,
            **extra_args: Any,
        ) -> tuple[Params, ScaleState]:
            del params, extra_args
            grad = flatten(updates, features_dtype(theta, updates))
            finite = jnp.all(jnp.isfinite(grad**2))
            # before the dangerous operations as well as after: 0 · ∞ has no derivative
            grad = jnp.where(finite, grad, 0)
            mu, nu = _averages(theta, grad, state)
            m = mu / jnp.sqrt(nu + eps)
            gamma = jnp.log(nu + eps)
            gamma = gamma - jnp.mean(gamma, axis=-1, keepdims=True)
            tiers, eta = _advance(theta, m, gamma, state.tiers, _lengths(updates))
            direction = dense(theta["direction"], tiers.parameter)
            direction = direction + dense(theta["shortcut"], m)
            delta = (jnp.exp(eta) + learning_rate_offset) * direction[:, 0]
            count: Any = optax.safe_increment(state.count)
            new = ScaleState(count, mu, nu, freeze(tiers, state.tiers, warmup))
            delta = jnp.where(finite, delta, 0)
            return unflatten(-delta, updates), keep_unless(finite, new, state)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return LearnedOptimizer(init, rule)


def _averages(
    theta: Theta, grad: jax.Array, state: ScaleState
) -> tuple[jax.Array, jax.Array]:
    """The running averages at all timescales, [N, num_timescales] each."""
    power = 0.5 ** jnp.arange(state.mu.shape[-1], dtype=state.mu.dtype)

    def average(name: str, old: jax.Array, new: jax.Array) -> jax.Array:
        logits = dense(theta[name], state.tiers.parameter)
        # β^p from its logarithm: 1 - β^p keeps its digits where β is nearly 1
        log_decay = power * jax.nn.log_sigmoid(logits)
        return jnp.exp(log_decay) * old - jnp.expm1(log_decay) * new[:, None]

    mu = average("gradient_decay", state.mu, grad)
    return mu, average("square_decay", state.nu, grad**2)


def _advance(
    theta: Theta,
    m: jax.Array,
    gamma: jax.Array,
    old: Tiers,
    lengths: list[int],
) -> tuple[Tiers, jax.Array]:
    """One step of the three tiers, and the log learning rates η [N]."""
    from_above = [_spread(old.tensor, lengths), _tile(old.whole, len(m))]
    seen = jnp.concatenate([m, gamma, old.relative_rate[:, None], *from_above], axis=-1)
    parameter = _gru(theta["parameter_gru"], seen, old.parameter)
    mean = _means(parameter, lengths)
    seen = jnp.concatenate([mean, _tile(old.whole, len(lengths))], axis=-1)
    tensor = _gru(theta["tensor_gru"], seen, old.tensor)
    whole = _gru(theta["global_gru"], _means(tensor, [len(lengths)]), old.whole)
    eta = old.log_rate + dense(theta["rate"], parameter)[:, 0]
    keep = jax.nn.sigmoid(theta["rate_decay"]["rho"])
    mean_eta = _spread(_means(eta[:, None], lengths), lengths)[:, 0]
    log_rate = keep * old.log_rate + (1 - keep) * eta
    return Tiers(parameter, tensor, whole, log_rate, eta - mean_eta), eta


def _gru_init(key: jax.Array, num_in: int, size: int) -> dict[str, jax.Array]:
    """Update gate, reset gate and candidate side by side in each array."""
    key_input, key_recurrent = jax.random.split(key)
    initializers = jax.nn.initializers
    return {
        "wx": initializers.glorot_uniform()(key_input, (num_in, 3 * size)),
        "wh": initializers.orthogonal()(key_recurrent, (size, 3 * size)),
        "bx": jnp.zeros(3 * size),
        "bh": jnp.zeros(3 * size),
    }


def _gru(theta: dict[str, jax.Array], x: jax.Array, h: jax.Array) -> jax.Array:
    """One step for all rows; the reset acts after the recurrent product.

    z = σ(x_z + h_z),  r = σ(x_r + h_r),  n = tanh(x_n + r h_n),  h ← z h + (1 - z) n
    """
    from_x = jnp.split(x @ theta["wx"] + theta["bx"], 3, axis=-1)
    from_h = jnp.split(h @ theta["wh"] + theta["bh"], 3, axis=-1)
    z, r = (jax.nn.sigmoid(from_x[i] + from_h[i]) for i in range(2))
    n = jnp.tanh(from_x[2] + r * from_h[2])
    return z * h + (1 - z) * n


def _constant(num_in: int, bias: float) -> dict[str, jax.Array]:
    """A dense layer to one output that gives `bias` at first."""
    w = jnp.zeros((num_in, 1))
    return {"w": w, "b": jnp.full((1,), bias, w.dtype)}


def _logit(p: float) -> float:
    return math.log(p / (1 - p))


def _lengths(tree: Params) -> list[int]:
    """How many parameters each tensor has."""
    return [math.prod(jnp.shape(leaf)) for leaf in jax.tree.leaves(tree)]


def _means(rows: jax.Array, lengths: list[int]) -> jax.Array:
    """Means over consecutive rows: [sum of lengths, k] to [len(lengths), k]."""
    ends = [sum(lengths[: i + 1]) for i in range(len(lengths) - 1)]
    parts = jnp.split(rows, ends) if lengths else []
    means = [jnp.sum(part, axis=0) / max(len(part), 1) for part in parts]
    return jnp.stack(means) if means else jnp.zeros((0, rows.shape[-1]), rows.dtype)


def _spread(rows: jax.Array, lengths: list[int]) -> jax.Array:
    """Each row as many times as its length says: undoes the shape of `_means`."""
    if not lengths:
        return rows
    pairs = zip(rows, lengths, strict=True)
    return jnp.concatenate([_tile(row[None], length) for row, length in pairs])


def _tile(row: jax.Array, length: int) -> jax.Array:
    return jnp.broadcast_to(row, (length, row.shape[-1]))
