"""Two classes of four clusters, two informative features among many, and a small net.

Each cluster is a normal cloud of its own shape around a corner of the square [-1, 1]²;
two corners belong to each class. The other features are linear combinations of these
two, and noise. A net trained on 200 rows fits the noise, so the cross-entropy takes
turns with a penalty λ Σ|θ|, and the question is in which order.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.arguments import check_axes, check_count, check_length, check_rule
from metax.base import Action, AlternatingProblem, check_key, last_reward
from metax.tasks.data import FiveWay
from metax.tasks.tables import (
    Reward,
    Sharing,
    Split,
    check_settings,
    check_sizes,
    cut,
    l1_penalty,
    shared_rule,
)

__all__ = ["Split", "draw", "from_arrays", "generate", "problem"]

Params = dict[str, Any]
Data = dict[str, Split]

_SIZES = (200, 1000, 200, 1000, 1000)
_CORNERS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))
_REDRAWN = 0.01  # share of the labels that are drawn anew
_ADAM = optax.adam(1e-3)


def generate(
    seed: int,
    *,
    num_features: int = 32,
    sizes: tuple[int, int, int, int, int] = _SIZES,
    separated: bool = False,
) -> FiveWay:
    """A set of two classes, by numpy.

        x = z·A_k + corner_k,  z ~ N(0, I₂),     redundant = x·B,     noise ~ N(0, 1)

    A_k (one a cluster) and B (one a set) are uniform in [-1, 1]. Clusters are of equal
    size; labels of 1 % of the rows are drawn anew, so about ½ % are wrong; rows are
    shuffled. The distribution is that of scikit-learn's `make_classification` with
    `num_features` features of which 2 are informative and 2 redundant, and 2 clusters
    a class.

    Args:
      seed: of `numpy.random.default_rng`.
      num_features: at least 4, of which all but 4 are noise.
      sizes: rows of each part, in the order of `FiveWay`.
      separated: keep the features in the order informative, redundant, noise; by
        default they are shuffled.

    Returns:
      Five `Split`s of numpy arrays, float32 inputs and int32 targets 0 or 1; noise 0.

    Raises:
      ValueError: a count is below 1, or `num_features` below 4.

    Example:
      >>> from metax.tasks import classification
      >>> splits = classification.generate(1)
      >>> splits.controller_valid.inputs.shape, set(splits.test.targets.tolist())
      ((1000, 32), {0, 1})

    Note:
      The paper's clusters have no shape, A_k = I, and its shares of informative,
      redundant and noise features are 5, 5 and 90 %. `separated` is as in the paper,
      all else as in the authors' code.
    """
    _check_draw("classification.generate", num_features, sizes)
    check_count("classification.generate", 0, seed=seed)
    rng, rows = np.random.default_rng(seed), sum(sizes)
    order = rng.permutation(rows)
    cluster = (np.arange(rows) % 4)[order]
    inputs = _features(
        cluster,
        corners=rng.permutation(np.array(_CORNERS)),
        shapes=rng.uniform(-1, 1, (4, 2, 2)),
        mixing=rng.uniform(-1, 1, (2, 2)),
        normals=rng.standard_normal((rows, num_features - 2)),
    )
    redrawn = rng.random(rows) < _REDRAWN
    labels = np.where(redrawn, rng.integers(0, 2, rows), cluster % 2)
    columns = rng.permutation(num_features)
    return from_arrays(inputs if separated else inputs[:, columns], labels, sizes=sizes)


def draw(
    key: jax.Array,
    *,
    num_features: int = 32,
    sizes: tuple[int, int, int, int, int] = _SIZES,
    separated: bool = False,
) -> FiveWay:
    """A fresh set of the distribution of `generate`, inside jit.

    Args:
      key: typed.
      num_features: at least 4, of which all but 4 are noise.
      sizes: rows of each part, in the order of `FiveWay`.
      separated: keep the features in the order informative, redundant, noise.

    Returns:
      Five `Split`s, float32 inputs and int32 targets 0 or 1; noise 0.

    Raises:
      ValueError: the key is raw, a count below 1, or `num_features` below 4.
    """
    check_key(key, "classification.draw(key=...)")
    _check_draw("classification.draw", num_features, sizes)
    keys = jax.random.split(key, 8)
    key_rows, key_corners, key_shapes, key_mixing = keys[:4]
    key_normals, key_redrawn, key_labels, key_columns = keys[4:]
    rows = sum(sizes)
    cluster = jax.random.permutation(key_rows, jnp.arange(rows) % 4)
    uniform = lambda key, shape: jax.random.uniform(key, shape, jnp.float32, -1, 1)
    inputs = _features(
        cluster,
        corners=jax.random.permutation(key_corners, jnp.float32(_CORNERS)),
        shapes=uniform(key_shapes, (4, 2, 2)),
        mixing=uniform(key_mixing, (2, 2)),
        normals=jax.random.normal(key_normals, (rows, num_features - 2), jnp.float32),
    )
    redrawn = jax.random.bernoulli(key_redrawn, _REDRAWN, (rows,))
    anew = jax.random.randint(key_labels, (rows,), 0, 2)
    labels = jnp.where(redrawn, anew, cluster % 2)
    columns = jax.random.permutation(key_columns, num_features)
    return from_arrays(inputs if separated else inputs[:, columns], labels, sizes=sizes)


def from_arrays(
    inputs: Any, labels: Any, *, sizes: tuple[int, int, int, int, int] = _SIZES
) -> FiveWay:
    """Cuts rows with their classes into five parts, in their order.

    The authors' own set, for one, is this cut of scikit-learn's
    `make_classification(3400, 32, n_informative=2, n_redundant=2, random_state=1)`.

    Args:
      inputs: [sum(sizes), num_features].
      labels: [sum(sizes)], 0 or 1.
      sizes: rows of each part, in the order of `FiveWay`.

    Returns:
      Five `Split`s, float32 inputs and int32 targets; noise 0.

    Raises:
      ValueError: a size is below 1, or the rows are not as many as the sizes say.
    """
    check_sizes("classification.from_arrays", sizes)
    check_axes("classification.from_arrays", "inputs", inputs, "rows, features")
    check_length("classification.from_arrays", "inputs=..., labels", (inputs, labels))
    if len(inputs) != sum(sizes) or len(labels) != sum(sizes):
        raise ValueError(
            "`classification.from_arrays(sizes=...)` must add up to the number of rows;"
            f" got {sizes}, which add up to {sum(sizes)}, for {len(inputs)} inputs and "
            f"{len(labels)} labels."
        )
    none = np.zeros(len(labels), np.float32)
    return cut(inputs.astype(np.float32), labels.astype(np.int32), none, sizes)


def problem(
    lam: Any = 0.02,
    *,
    hidden: int = 32,
    num_features: int = 32,
    optimizer: optax.GradientTransformation = _ADAM,
    reward: Reward = "best",
    reward_constant: Any = 1000.0,
    optimizer_sharing: Sharing = "variable",
    patience: int | None = 20,
    validate_every: int = 10,
) -> AlternatingProblem:
    """When to step on the cross-entropy and when on the penalty.

        ℓ_0(θ) = mean_i -log softmax(f(x_i))_{y_i},     ℓ_1(θ) = λ Σ|θ|
        f(x)   = relu(x·w1 + b1)·w2 + b2

    Both move all parameters, by one rule on the whole training split. The metric is the
    accuracy on the validation split, to be maximised.

    Args:
      lam: λ ≥ 0; may be traced.
      hidden: width of the net, at least 1.
      num_features: columns of the inputs, at least 1.
      optimizer: any optax rule; `optax.adam(1e-3)` by default.
      reward: "best", -C over the greatest validation accuracy of the run or ½, if that
        is more; "last", -C over the last one.
      reward_constant: C > 0.
      optimizer_sharing: "variable": one state of the rule for both actions; "action":
        one each, and then λ cancels under a rule that does not see the scale of a
        gradient.
      patience: checks without a better metric after which a run ends; None for never.
      validate_every: steps between two checks, at least 1.

    Returns:
      An `AlternatingProblem` on `{"train", "valid"}` of `Split`s, with one group,
      `{"model": {"w1": [num_features, hidden], "b1": [hidden], "w2": [hidden, 2],
      "b2": [2]}}`, float32: weights normal with standard deviation .1, cut at two of
      them, biases .1. `observe` gives `"train_accuracy"`, `"valid_accuracy"` and
      `"valid_loss"`, the cross-entropy; `evaluate` gives `"valid_loss"` and
      `"valid_accuracy"` and the like for each split that the data holds.

    Raises:
      ValueError: a number is out of its range, or a choice unknown.

    Example:
      >>> import jax
      >>> from metax.tasks import classification, controller_data
      >>> problem = classification.problem(lam=0.02)
      >>> data = controller_data(classification.generate(1))
      >>> params = problem.init(jax.random.key(0))
      >>> sorted(problem.observe(params, problem.sample(data, jax.random.key(0)), data))
      ['train_accuracy', 'valid_accuracy', 'valid_loss']

    Xu et al., "AutoLoss: learning discrete schedules for alternate optimization", ICLR
    2019, arXiv 1810.02442, section 4.1.

    Note:
      The defaults are those of the authors' code. The paper's text has no floor of ½
      and rewards by the accuracy at the end.
    """
    check_settings(
        "classification.problem",
        reward=reward,
        optimizer_sharing=optimizer_sharing,
        at_least_one={
            "hidden": hidden,
            "num_features": num_features,
            "validate_every": validate_every,
        },
        at_least_zero={
            "lam": lam,
            "reward_constant": reward_constant,
            "patience": patience,
        },
    )

    check_rule("classification.problem", "optimizer", optimizer)

    def init(key: jax.Array) -> dict[str, Params]:
        check_key(key, "classification.problem(...).init(key=...)")
        return {"model": _initial(key, num_features, hidden)}

    def loss(params: dict[str, Params], batch: Split, key: Any) -> jax.Array:
        return _scores(params["model"], batch)[0]

    def observe(
        params: dict[str, Params], batch: Split, data: Data
    ) -> dict[str, jax.Array]:
        valid_loss, valid_accuracy = _scores(params["model"], data["valid"])
        return {
            "train_accuracy": _scores(params["model"], batch)[1],
            "valid_accuracy": valid_accuracy,
            "valid_loss": valid_loss,
        }

    def evaluate(params: dict[str, Params], data: Data) -> dict[str, jax.Array]:
        scores = {name: _scores(params["model"], data[name]) for name in data}
        losses = {f"{name}_loss": score[0] for name, score in scores.items()}
        return losses | {f"{name}_accuracy": score[1] for name, score in scores.items()}

    measured = _greatest if reward == "best" else last_reward
    return AlternatingProblem(
        init=init,
        losses=(loss, l1_penalty(lam)),
        actions=(Action(0), Action(1)),
        optimizers=shared_rule(optimizer, optimizer_sharing),
        sample=lambda data, key: data["train"],
        metric=lambda params, data: _scores(params["model"], data["valid"])[1],
        maximize=True,
        reward=lambda history, live: -reward_constant / measured(history, live),
        optimizer_sharing=optimizer_sharing,
        validate_every=validate_every,
        patience=patience,
        observe=observe,
        evaluate=evaluate,
        names=("cross_entropy", "l1"),
        full_batch=True,
    )


def _features(
    cluster: Any, *, corners: Any, shapes: Any, mixing: Any, normals: Any
) -> Any:
    """[rows, 2 informative, 2 redundant and noise], of numpy or of jax."""
    xp = cluster.__array_namespace__()
    cloud, rest = normals[:, :2], normals[:, 2:]
    informative = xp.einsum("ni,nij->nj", cloud, shapes[cluster]) + corners[cluster]
    return xp.concatenate([informative, informative @ mixing, rest], axis=1)


def _initial(key: jax.Array, num_features: int, hidden: int) -> Params:
    key_1, key_2 = jax.random.split(key)
    weights = lambda key, *shape: (
        0.1 * jax.random.truncated_normal(key, -2, 2, shape, jnp.float32)
    )
    return {
        "w1": weights(key_1, num_features, hidden),
        "b1": jnp.full((hidden,), 0.1, jnp.float32),
        "w2": weights(key_2, hidden, 2),
        "b2": jnp.full((2,), 0.1, jnp.float32),
    }


def _scores(model: Params, split: Split) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy and share of right answers.

    Of two logits only the difference counts, so the second layer is one product with
    w2_1 - w2_0, and the cross-entropy log(1 + exp(-margin)).
    """
    # Transposed, [hidden, n]: then runs under vmap lie one after the other, in place.
    pre_activation = model["w1"].T @ split.inputs.T + model["b1"][:, None]
    readout = model["w2"][:, 1] - model["w2"][:, 0]
    difference = readout @ jax.nn.relu(pre_activation)
    difference += model["b2"][1] - model["b2"][0]
    margin = jnp.where(split.targets == 1, difference, -difference)
    # a tie goes to class 0, as in argmax
    right = (difference > 0) == (split.targets == 1)
    return jnp.mean(jax.nn.softplus(-margin)), jnp.mean(right, dtype=difference.dtype)


def _greatest(history: jax.Array, live: jax.Array) -> jax.Array:
    """The greatest live entry or ½, if that is more; NaN where no entry is live."""
    greatest = jnp.max(jnp.where(live, history, 0.5), initial=0.5)
    return jnp.where(jnp.any(live), greatest, jnp.nan)


def _check_draw(function: str, num_features: int, sizes: tuple[int, ...]) -> None:
    check_sizes(function, sizes)
    if num_features < 4:
        raise ValueError(
            f"`{function}(num_features=...)` must be at least 4, 2 informative and 2 "
            f"redundant ones; got {num_features}."
        )
