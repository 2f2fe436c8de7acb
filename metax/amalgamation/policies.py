"""Learned optimizers, coordinatewise.

A `LearnedOptimizer` is a pair of functions: `init(key)` draws the weights `theta`, and
`rule(theta)` is an ordinary optax transformation. All policies here are coordinatewise:
one small LSTM serves every scalar parameter, so they fit any tree. What they share:

* `update(grads, state, params=None, *, warmup=None, **extra)`: where the bool scalar
  `warmup` holds, moments and counts advance and recurrent states stay.
* A gradient with an entry that is not finite gives a zero update and leaves the state
  as it was, bit for bit.
* They can be differentiated in `theta` and in the gradients, at zeros too.

Cost of `rnnprop()` for each parameter and step: 82 numbers of state, 328 bytes in
float32 where Adam keeps 8, and about 10,000 operations.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.amalgamation.coordinates import (
    all_finite,
    dense,
    dense_init,
    features_dtype,
    flatten,
    keep_unless,
    lstm,
    lstm_init,
    unflatten,
    zero_carries,
)

__all__ = [
    "LearnedOptimizer",
    "RecurrentState",
    "check_network",
    "freeze",
    "l2l",
    "layers_init",
    "rnnprop",
    "run_layers",
]

Params = Any
Theta = dict[str, dict[str, jax.Array]]
Correction = Literal["true", "constant"]


class LearnedOptimizer(NamedTuple):
    """A rule with weights that can be trained.

    Attributes:
      init: `init(key) -> theta`, a tree of float arrays.
      rule: `rule(theta) -> optax.GradientTransformationExtraArgs`.
    """

    init: Callable[[jax.Array], Params]
    rule: Callable[[Params], optax.GradientTransformationExtraArgs]


class RecurrentState(NamedTuple):
    """What a coordinatewise LSTM carries from step to step.

    Attributes:
      count: int32 scalar, the steps made.
      mu: first moments, a tree like the parameters, at least float32; `()` where the
        policy has none.
      nu: second moments, likewise.
      carries: for each layer (h, c), each [N, hidden_size], N parameters in all.
    """

    count: jax.Array
    mu: Params
    nu: Params
    carries: tuple[tuple[jax.Array, jax.Array], ...]


def rnnprop(
    hidden_size: int = 20,
    num_layers: int = 2,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-10,
    output_scale: float = 0.1,
    input_layer: bool = False,
    bias_correction: Correction = "true",
) -> LearnedOptimizer:
    """The student of optimizer amalgamation: an LSTM on Adam's two ratios.

        m ← b1 m + (1 - b1) g          m̂ = m / (1 - b1^t)
        v ← b2 v + (1 - b2) g²         v̂ = v / (1 - b2^t)
        x = [m̂ / √(v̂ + ε), g / √(v̂ + ε)]
        θ ← θ - output_scale · tanh(Dense(LSTM(... LSTM(x))))

    No step of a coordinate is larger than `output_scale`. The defaults are those of the
    amalgamation paper, 5,141 weights. `rnnprop(b1=0.95, b2=0.95, input_layer=True)`,
    6,641 weights, is RNNProp of Lv et al., but for the place of ε.

    Args:
      hidden_size: units of each layer, at least 1.
      num_layers: LSTM layers, at least 1.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added under the root, above 0.
      output_scale: the largest step of a coordinate, above 0.
      input_layer: a dense layer with ELU in front of the LSTM.
      bias_correction: "true" divides by 1 - b^t as Adam does; "constant", what the
        paper's release does, by 1 - b at every step: then the inputs shrink over about
        1,000 steps, and the LSTM sees a clock in them.

    Returns:
      A `LearnedOptimizer`; `theta` has an entry for each layer.

    Raises:
      ValueError: an argument outside its range.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from metax.amalgamation import rnnprop
      >>> student = rnnprop()
      >>> theta = student.init(jax.random.key(0))
      >>> sum(leaf.size for leaf in jax.tree.leaves(theta))
      5141
      >>> rule = optax.chain(optax.clip_by_global_norm(1.0), student.rule(theta))
      >>> params = {"w": jnp.ones(3), "b": jnp.zeros(())}
      >>> updates, state = rule.update(params, rule.init(params), params)
      >>> updates["w"].shape
      (3,)

    References:
      Huang et al., Optimizer Amalgamation, ICLR 2022, arXiv:2203.06474, section 4.
      Lv, Jiang and Li, Learning Gradient Descent, 2017, arXiv:1703.03633.
    """
    check_network("rnnprop", hidden_size, num_layers, output_scale)
    for name, value in (("b1", b1), ("b2", b2)):
        if not 0 <= value < 1:
            raise ValueError(f"`rnnprop({name}=...)` must lie in [0, 1); got {value}.")
    if not eps > 0:
        raise ValueError(f"`rnnprop(eps=...)` must be above 0; got {eps}.")
    if bias_correction not in ("true", "constant"):
        raise ValueError(
            '`rnnprop(bias_correction=...)` must be "true" or "constant"; '
            f"got {bias_correction!r}."
        )

    def inputs(theta: Theta, grad: jax.Array, count: jax.Array, mu: Any, nu: Any):
        mu = b1 * mu + (1 - b1) * grad
        nu = b2 * nu + (1 - b2) * grad**2
        steps = count + 1 if bias_correction == "true" else 1
        first = mu / (1 - jnp.asarray(b1, mu.dtype) ** steps)
        root = jnp.sqrt(nu / (1 - jnp.asarray(b2, mu.dtype) ** steps) + eps)
        x = jnp.stack([first / root, grad / root], axis=-1)
        return jax.nn.elu(dense(theta["input"], x)) if input_layer else x, mu, nu

    def init(key: jax.Array) -> Theta:
        key_input, key_rest = jax.random.split(key)
        width = hidden_size if input_layer else 2
        theta = layers_init(key_rest, width, hidden_size, num_layers, 1)
        first = dense_init(key_input, 2, hidden_size)
        return {"input": first, **theta} if input_layer else theta

    squash = lambda x: output_scale * jnp.tanh(x)
    return LearnedOptimizer(init, _rule(inputs, squash, hidden_size, num_layers, True))


def l2l(
    hidden_size: int = 20,
    num_layers: int = 2,
    *,
    output_scale: float = 0.1,
    preprocess: Literal["none", "log_sign"] = "none",
    p: float = 10.0,
) -> LearnedOptimizer:
    """The first coordinatewise LSTM optimizer, on the raw gradient.

        θ ← θ - output_scale · Dense(LSTM(LSTM(x)))
        x = g, or for "log_sign"  (ln|g| / p, sign g)  where |g| ≥ e^-p,
                                  (-1, e^p g)          below

    5,061 weights, 5,141 with "log_sign". In the amalgamation paper's comparison it is
    "Original", on raw gradients, × 0.1; its authors used "log_sign" and 0.01. It is
    trained without random scaling (`random_scale=0`).

    Args:
      hidden_size: units of each layer, at least 1.
      num_layers: LSTM layers, at least 1.
      output_scale: multiplies the output, above 0.
      preprocess: what the LSTM sees of a gradient.
      p: where "log_sign" changes branch, above 0.

    Returns:
      A `LearnedOptimizer` whose state has no moments.

    Raises:
      ValueError: an argument outside its range.

    Reference:
      Andrychowicz et al., Learning to learn by gradient descent by gradient descent,
      2016, arXiv:1606.04474, section 2 and appendix A.
    """
    check_network("l2l", hidden_size, num_layers, output_scale)
    if preprocess not in ("none", "log_sign"):
        raise ValueError(
            f'`l2l(preprocess=...)` must be "none" or "log_sign"; got {preprocess!r}.'
        )
    if not p > 0:
        raise ValueError(f"`l2l(p=...)` must be above 0; got {p}.")

    def inputs(theta: Theta, grad: jax.Array, count: jax.Array, mu: Any, nu: Any):
        x = _log_sign(grad, p) if preprocess == "log_sign" else grad[:, None]
        return x, mu, nu

    def init(key: jax.Array) -> Theta:
        width = 2 if preprocess == "log_sign" else 1
        return layers_init(key, width, hidden_size, num_layers, 1)

    squash = lambda x: output_scale * x
    return LearnedOptimizer(init, _rule(inputs, squash, hidden_size, num_layers, False))


def run_layers(
    theta: Theta,
    x: jax.Array,
    carries: tuple[tuple[jax.Array, jax.Array], ...],
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array], ...]]:
    """The LSTM layers one over the other, and the dense output: [N, in] to [N, out]."""
    new = []
    for layer, carry in enumerate(carries):
        x, c = lstm(theta[f"lstm_{layer}"], x, carry)
        new.append((x, c))
    return dense(theta["output"], x), tuple(new)


def freeze(new: Any, old: Any, warmup: Any) -> Any:
    """Recurrent states during warm-up: as they were."""
    return new if warmup is None else keep_unless(jnp.asarray(warmup), old, new)


def _rule(
    inputs: Callable[..., Any],
    squash: Callable[[jax.Array], jax.Array],
    hidden_size: int,
    num_layers: int,
    has_moments: bool,
) -> Callable[[Theta], optax.GradientTransformationExtraArgs]:
    """An LSTM from the features `inputs` makes of a gradient to `squash` of its output.

    Args:
      inputs: (theta, gradient [N], count, mu, nu) to (features [N, in], mu, nu), the
        moments [N], or `()` without `has_moments`.
      squash: the output [N] to the step that is subtracted.
      hidden_size: units of each layer.
      num_layers: LSTM layers.
      has_moments: whether the state keeps them.
    """

    def rule(theta: Theta) -> optax.GradientTransformationExtraArgs:
        def init_fn(params: Params) -> RecurrentState:
            dtype = features_dtype(theta, params)
            size = sum(leaf.size for leaf in jax.tree.leaves(params))
            wide = lambda leaf: jnp.zeros(leaf.shape, features_dtype(leaf))
            # new arrays everywhere: one that stands twice cannot be donated
            moments = lambda: jax.tree.map(wide, params) if has_moments else ()
            carries = zero_carries(num_layers, size, hidden_size, dtype)
            count = jnp.zeros((), jnp.int32)
            return RecurrentState(count, moments(), moments(), carries)

        def update_fn(
            updates: Params,
            state: Any,
            params: Params | None = None,
            *,
            warmup: Any = None,
            **extra: Any,
        ) -> tuple[Params, RecurrentState]:
            del params, extra
            grads = updates
            dtype = features_dtype(theta, grads)
            finite = all_finite(grads)
            # before the dangerous operations as well as after: 0 · ∞ has no derivative
            grad = jnp.where(finite, flatten(grads, dtype), 0)
            old = (state.mu, state.nu)
            mu, nu = (flatten(m, dtype) for m in old) if has_moments else old
            x, mu, nu = inputs(theta, grad, state.count, mu, nu)
            out, carries = run_layers(theta, x, state.carries)
            step = jnp.where(finite, -squash(out[:, 0]), 0)
            if has_moments:
                mu, nu = unflatten(mu, state.mu), unflatten(nu, state.nu)
            carries = freeze(carries, state.carries, warmup)
            count = state.count + 1
            new = RecurrentState(count, mu, nu, carries)
            return unflatten(step, grads), keep_unless(finite, new, state)

        return optax.GradientTransformationExtraArgs(init_fn, update_fn)

    return rule


def layers_init(
    key: jax.Array, num_in: int, size: int, num_layers: int, num_out: int
) -> Theta:
    """LSTM layers from `num_in` features on, and the output layer."""
    *keys, key_output = jax.random.split(key, num_layers + 1)
    widths = [num_in, *(size,) * (num_layers - 1)]
    layers = zip(keys, widths, strict=True)
    theta = {f"lstm_{i}": lstm_init(k, n, size) for i, (k, n) in enumerate(layers)}
    return {**theta, "output": dense_init(key_output, size, num_out)}


def _log_sign(grad: jax.Array, p: float) -> jax.Array:
    """The pair of features of `l2l(preprocess="log_sign")`, [N, 2]."""
    large = jnp.abs(grad) >= jnp.exp(-p)
    # ln of what is not selected would have an infinite derivative at 0
    magnitude = jnp.where(large, jnp.abs(grad), 1.0)
    first = jnp.where(large, jnp.log(magnitude) / p, -1.0)
    second = jnp.where(large, jnp.sign(grad), jnp.exp(p) * grad)
    return jnp.stack([first, second], axis=-1)


def check_network(
    function: str, hidden_size: int, num_layers: int, output_scale: float
) -> None:
    """Refuses sizes below 1 and a scale that is not above 0."""
    given = {"hidden_size": hidden_size, "num_layers": num_layers}
    for name, value in given.items():
        if value < 1:
            raise ValueError(
                f"`{function}({name}=...)` must be at least 1; got {value}."
            )
    if not output_scale > 0:
        raise ValueError(
            f"`{function}(output_scale=...)` must be above 0; got {output_scale}."
        )
