"""A two-layer linear network whose response to weight decay is an exact row rescaling.

    f(x) = cᵀ G Vᵀx,     A = V diag(a) Vᵀ = XᵀX/N,     c = diag(1/a) Vᵀb,     b = Xᵀy/N

Under the penalty ½ e^λ ‖V G c‖² on the composed weights the best diagonal G is that of
ridge regression in the eigenbasis,

    G_kk = g_k(λ) = a_k / (a_k + e^λ) = sigmoid(log a_k − λ),      dg/dλ = −g (1 − g)

so the rows of the first layer W = G Vᵀ are rescaled and nothing else: dW = diag(u) W
with u = −(1 − g). This is the case that motivated the row structure of Self-Tuning
Networks, and the one in which a learned response can be compared with the truth.

MacKay et al., "Self-Tuning Networks: bilevel optimization of hyperparameters using
structured best-response functions", ICLR 2019, arXiv 1903.03088, section 2.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.arguments import check_number
from metax.base import BilevelProblem, Hparams, Hyperparameter, check_key
from metax.tasks.ridge import Examples, RidgeData, check_ridge, tiled

__all__ = [
    "TwoLayerLinear",
    "network_params",
    "network_response",
    "row_rescaling",
    "two_layer_regression",
]


class TwoLayerLinear(nn.Module):
    """Two dense layers without biases and nothing between them, to one number.

    Attributes:
      num_features: the width of the hidden layer, that of the input too.
    """

    num_features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Predictions [...] of rows [..., num_features]."""
        hidden = nn.Dense(self.num_features, use_bias=False, name="first")(x)
        return nn.Dense(1, use_bias=False, name="second")(hidden)[..., 0]


def network_params(data: RidgeData, lam: Any) -> Any:
    """The parameters of `TwoLayerLinear` that are the best at λ.

    Args:
      data: the examples; those to train on count, and A must have full rank.
      lam: λ, a scalar, the log of the decay.

    Returns:
      `{"params": {"first": {"kernel"}, "second": {"kernel"}}}`. flax multiplies from
      the right: kernels of (in, out), so the rows of the text are columns here.
    """
    _check("network_params", data, lam)
    eigenvalues, basis, readout = _eigenbasis(data)
    return _tree(basis * _shrinkage(eigenvalues, lam), readout[:, None])


def network_response(data: RidgeData, lam: Any) -> Any:
    """The derivative of `network_params` by λ; the second layer does not move."""
    _check("network_response", data, lam)
    eigenvalues, basis, readout = _eigenbasis(data)
    scale = _shrinkage(eigenvalues, lam) * row_rescaling(data, lam)
    return _tree(basis * scale, jnp.zeros_like(readout)[:, None])


def row_rescaling(data: RidgeData, lam: Any, *, sigma: Any = 0.0) -> jax.Array:
    """By how much each row of the first layer changes, relative to itself, per λ.

        u_k(σ) = −m e^λ / (a_k + m (1 + σ²) e^λ),     m = e^{σ²/2}

    σ = 0 is the truth, −(1 − g); above 0 it is what a learner that probes λ by σ finds.

    Args:
      data: the examples; those to train on count.
      lam: λ, a scalar.
      sigma: σ ≥ 0, a scalar.

    Returns:
      (features,), in the order of the columns of the first kernel.
    """
    _check("row_rescaling", data, lam)
    check_number("row_rescaling", "sigma", sigma, least=0)
    eigenvalues, _, _ = _eigenbasis(data)
    penalty = jnp.exp(jnp.asarray(lam) + jnp.square(sigma) / 2)
    return -penalty / (eigenvalues + (1 + jnp.square(sigma)) * penalty)


def two_layer_regression(
    num_features: int,
    *,
    init: float = 0.1,
    perturbation: float = 1.0,
    draws: int = 1,
) -> BilevelProblem:
    """Ridge regression by a two-layer linear network, its decay tuned.

        train_loss_i = ½ (f(x_i) − y_i)² + ½ d ‖Wᵀc‖²,     valid_loss = ½ mean (f − y)²

    The second layer is held: its gradient is stopped. The composed weights Wᵀc come
    from the outputs, as what the network makes of the unit vectors, so weights that
    differ between examples are penalised each with its own decay.

    Args:
      num_features: the number of columns of x.
      init: the decay d where tuning starts, above 0.
      perturbation: the standard deviation that probes λ = log d.
      draws: the training batch is the training set this many times over.

    Returns:
      A `BilevelProblem` on `RidgeData` with the hyperparameter "weight_decay" (scale
      "log"). Its `init` draws both layers; `network_params` gives the exact ones.

    Raises:
      ValueError: a count is below 1.

    Example:
      >>> from metax.tasks import network_params, two_layer_regression
      >>> from metax.tasks import diabetes_ridge
      >>> data = diabetes_ridge()
      >>> problem = two_layer_regression(10)
      >>> params = network_params(data, -1.06)
      >>> outputs = problem.predict(params, data.valid, {}, None)
      >>> print(f"{problem.valid_loss(outputs, data.valid):.4f}")
      0.2615
    """
    for argument, value in {"num_features": num_features, "draws": draws}.items():
        if value < 1:
            raise ValueError(
                f"`two_layer_regression({argument}=...)` must be at least 1; got "
                f"{value}."
            )
    check_number("two_layer_regression", "init", init, above=0)
    check_number("two_layer_regression", "perturbation", perturbation, above=0)
    model = TwoLayerLinear(num_features)

    def init_fn(key: jax.Array) -> Any:
        check_key(key, "two_layer_regression(...).init(key=...)")
        dtype = jnp.zeros(()).dtype
        params = model.init(key, jnp.zeros((1, num_features), dtype))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), params)

    def predict(
        params: Any, batch: Examples, hparams: Hparams, key: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        x = jnp.asarray(batch.x)
        layers = params["params"]
        held = {**layers, "second": jax.lax.stop_gradient(layers["second"])}
        # the unit vectors travel with each example, as further positions of it
        units = jnp.tile(jnp.eye(num_features, dtype=x.dtype), (len(x), 1, 1))
        positions = jnp.concatenate([x[:, None], units], axis=1)
        outputs: Any = model.apply({"params": held}, positions)
        return outputs[:, 0], outputs[:, 1:]

    def train_loss(
        outputs: Any, batch: Examples, hparams: Hparams, params: Any
    ) -> jax.Array:
        prediction, composed = outputs
        penalty = hparams["weight_decay"] * jnp.sum(composed**2, axis=1)
        return 0.5 * (prediction - batch.y) ** 2 + 0.5 * penalty

    def valid_loss(outputs: Any, batch: Examples) -> jax.Array:
        return 0.5 * jnp.mean((outputs[0] - batch.y) ** 2)

    return BilevelProblem(
        init=init_fn,
        predict=predict,
        train_loss=train_loss,
        valid_loss=valid_loss,
        sample_train=lambda data, key: tiled(data.train, draws),
        sample_valid=lambda data, key: data.valid,
        hparams={
            "weight_decay": Hyperparameter(
                init, 0.0, scale="log", perturbation=perturbation
            )
        },
    )


def _check(function: str, data: RidgeData, lam: Any) -> None:
    check_ridge(function, data)
    check_number(function, "lam", lam)


def _eigenbasis(data: RidgeData) -> tuple[jax.Array, jax.Array, jax.Array]:
    """a (features,), V (features, features) and c (features,)."""
    x, y = map(jnp.asarray, data.train)
    eigenvalues, basis = jnp.linalg.eigh(x.T @ x / len(y))
    return eigenvalues, basis, basis.T @ (x.T @ y / len(y)) / eigenvalues


def _shrinkage(eigenvalues: jax.Array, lam: Any) -> jax.Array:
    """g(λ) = sigmoid(log a − λ), (features,)."""
    return jax.nn.sigmoid(jnp.log(eigenvalues) - lam)


def _tree(first: jax.Array, second: jax.Array) -> Any:
    return {"params": {"first": {"kernel": first}, "second": {"kernel": second}}}
