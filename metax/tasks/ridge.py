"""Ridge regression with its decay tuned: a bilevel problem with a closed form.

With A = XᵀX/N, b = Xᵀy/N and a diagonal penalty D(λ), the inner problem is

    L_T(λ, w) = 1/(2N) ‖Xw − y‖² + ½ wᵀD(λ)w,      w*(λ) = (A + D)⁻¹ b

    kind              D(λ)                  natural value          coordinates of λ
    "global"          e^λ I                 decay e^λ              one
    "feature"         diag(e^λ_j)           decays e^λ_j           one a feature
    "input_dropout"   diag(A) e^λ           rate p = sigmoid(λ)    one, or one a feature

Dropping inputs at rate p and scaling the rest by 1/(1 − p) adds ½ p/(1 − p) Σ A_jj w_j²
in expectation: the third row is that expectation itself, so nothing is sampled. The
solutions are in `ridge_solutions`.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from metax.arguments import (
    check_axes,
    check_has,
    check_length,
    check_number,
    check_numbers,
    refuse,
)
from metax.base import (
    BilevelProblem,
    Hparams,
    Hyperparameter,
    check_key,
    squared_norm,
)

__all__ = [
    "Examples",
    "Kind",
    "RidgeData",
    "check_kind",
    "check_ridge",
    "diabetes_ridge",
    "ridge_regression",
    "tiled",
]

Kind = Literal["global", "feature", "input_dropout"]

_NAMES = {
    "global": "weight_decay",
    "feature": "weight_decay",
    "input_dropout": "rate",
}


class Examples(NamedTuple):
    """Rows with their targets; also what a batch is.

    Attributes:
      x: floating [N, features].
      y: floating [N].
    """

    x: Any
    y: Any


class RidgeData(NamedTuple):
    """What the weights and what the hyperparameters are fitted to.

    Attributes:
      train: the examples of L_T.
      valid: the examples of L_V.
    """

    train: Examples
    valid: Examples


class _Outputs(NamedTuple):
    """Linear in the weights, so that a linearised response is exact.

    Attributes:
      prediction: (batch,).
      penalised: (batch, features), what is squared and summed under the penalty beside
        the weights themselves; no features where that is nothing.
    """

    prediction: jax.Array
    penalised: jax.Array


def diabetes_ridge() -> RidgeData:
    """Scikit-learn's diabetes set: 300 examples to train on, 142 to validate.

    Features and target have mean 0 and standard deviation 1 over all 442 examples; the
    first 300 of `numpy.random.default_rng(0).permutation(442)` are for training. The
    eigenvalues of A span .0072 to 4.34.

    Returns:
      The set, as float64 numpy arrays, 10 features.
    """
    from sklearn.datasets import load_diabetes

    bunch: Any = load_diabetes()
    x, y = (
        (column - column.mean(0)) / column.std(0)
        for column in (bunch.data, bunch.target)
    )
    train, valid = np.split(np.random.default_rng(0).permutation(len(y)), [300])
    return RidgeData(
        train=Examples(x=x[train], y=y[train]), valid=Examples(x=x[valid], y=y[valid])
    )


def ridge_regression(
    num_features: int,
    *,
    kind: Kind = "global",
    init: Any = 0.1,
    perturbation: float = 1.0,
    draws: int = 1,
) -> BilevelProblem:
    """The bilevel problem of this file, on full batches.

        train_loss_i = ½ (x_iᵀw − y_i)² + ½ wᵀDw,     valid_loss = ½ mean (xᵀw − y)²

    For "input_dropout" wᵀDw is Σ_j p/(1 − p) x_ij² w_j², whose mean is that of the
    table above.

    Args:
      num_features: the number of columns of x.
      kind: which penalty.
      init: where tuning starts, natural: a decay above 0, or a rate between 0 and 1.
        "feature" spreads a scalar over the features; "input_dropout" takes a scalar or
        (features,).
      perturbation: the standard deviation that probes λ.
      draws: the training batch is the training set this many times over, one copy
        after the other, so that a tuner which cuts it into as many groups probes each
        copy with a perturbation of its own.

    Returns:
      A `BilevelProblem` on `RidgeData`, with parameters `{"w": (features,)}` that start
      at zero and the hyperparameter "weight_decay" (scale "log") or "rate" ("logit").

    Raises:
      ValueError: `kind` is unknown, or a count is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.tasks import diabetes_ridge, ridge_regression
      >>> from metax.tasks.ridge_solutions import best_weights
      >>> data = diabetes_ridge()
      >>> problem = ridge_regression(10)
      >>> params = {"w": best_weights(data, -2.0)}
      >>> outputs = problem.predict(params, data.valid, {}, None)
      >>> print(f"{problem.valid_loss(outputs, data.valid):.4f}")
      0.2642
    """
    check_kind("ridge_regression", kind)
    for argument, value in {"num_features": num_features, "draws": draws}.items():
        if value < 1:
            raise ValueError(
                f"`ridge_regression({argument}=...)` must be at least 1; got {value}."
            )
    check_numbers("ridge_regression", "init", init, above=0)
    if jnp.shape(init) not in ((), (num_features,)):
        rule = f"must be a scalar or of shape ({num_features},)"
        refuse("ridge_regression", "init", rule, f"shape {jnp.shape(init)}")
    check_number("ridge_regression", "perturbation", perturbation, above=0)
    name = _NAMES[kind]

    def init_fn(key: jax.Array) -> dict[str, jax.Array]:
        check_key(key, "ridge_regression(...).init(key=...)")
        return {"w": jnp.zeros(num_features)}

    def predict(
        params: Any, batch: Examples, hparams: Hparams, key: jax.Array | None
    ) -> _Outputs:
        x, w = jnp.asarray(batch.x), params["w"]
        penalised = {
            "global": jnp.zeros((len(x), 0), w.dtype),
            "feature": jnp.broadcast_to(w, x.shape),
            "input_dropout": x * w,
        }
        return _Outputs(prediction=x @ w, penalised=penalised[kind])

    def train_loss(
        outputs: _Outputs, batch: Examples, hparams: Hparams, params: Any
    ) -> jax.Array:
        value = hparams[name]
        penalty = value / (1 - value) if kind == "input_dropout" else value
        if kind == "global":
            total = penalty * squared_norm(params)
        else:
            by_feature = penalty.reshape(len(penalty), -1)
            total = jnp.sum(by_feature * outputs.penalised**2, axis=1)
        return 0.5 * (outputs.prediction - batch.y) ** 2 + 0.5 * total

    def valid_loss(outputs: _Outputs, batch: Examples) -> jax.Array:
        return 0.5 * jnp.mean((outputs.prediction - batch.y) ** 2)

    return BilevelProblem(
        init=init_fn,
        predict=predict,
        train_loss=train_loss,
        valid_loss=valid_loss,
        sample_train=lambda data, key: tiled(data.train, draws),
        sample_valid=lambda data, key: data.valid,
        hparams={name: _hyperparameter(kind, init, num_features, perturbation)},
    )


def tiled(examples: Examples, draws: int) -> Examples:
    """The examples `draws` times over, one copy after the other."""
    return Examples(*(jnp.concatenate([jnp.asarray(a)] * draws) for a in examples))


def check_kind(function: str, kind: str) -> None:
    """Refuses what is no `Kind`; the sentence names `function`."""
    if kind not in _NAMES:
        kinds = ", ".join(map(repr, _NAMES))
        raise ValueError(
            f"`{function}(kind=...)` must be one of {kinds}; got {kind!r}."
        )


def check_ridge(function: str, data: Any, lam: Any = 0.0) -> None:
    """Refuses what is no `RidgeData`, and a λ that does not fit it."""
    check_has(function, "data", data, "a `RidgeData`", "train", "valid")
    for part in (data.train, data.valid):
        check_axes(function, "data", part.x, "examples, features")
        check_length(function, "data", part)
    check_numbers(function, "lam", lam)
    shape, features = jnp.shape(lam), jnp.shape(data.train.x)[1:]
    if shape not in ((), features):
        rule = f"must be a scalar or of shape {features}"
        refuse(function, "lam", rule, f"shape {shape}")


def _hyperparameter(
    kind: Kind, init: Any, num_features: int, perturbation: float
) -> Hyperparameter:
    if kind == "input_dropout":
        return Hyperparameter(init, 0.0, 1.0, "logit", perturbation)
    if kind == "feature":
        init = jnp.broadcast_to(init, (num_features,))
    return Hyperparameter(init, 0.0, scale="log", perturbation=perturbation)
