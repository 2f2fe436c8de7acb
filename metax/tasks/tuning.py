"""Regularisation and augmentation of an image classifier as a `BilevelProblem`."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from metax.arguments import check_has
from metax.base import (
    BilevelProblem,
    Hparams,
    Hyperparameter,
    Outputs,
    Params,
    check_key,
    squared_norm,
)
from metax.tasks.batching import minibatch
from metax.tasks.data import Split
from metax.tasks.images import horizontal_flip, transform_images
from metax.tasks.mixing import mixup, smooth_labels
from metax.tasks.ranges import AUGMENTATION, EPSILON, LABELS
from metax.tasks.supervised import (
    check_scale,
    cross_entropy,
    evaluate_classifier,
    image_shape,
    normalize,
    stop_statistics,
)

__all__ = ["ImageTuning", "image_tuning"]


class ImageTuning(NamedTuple):
    """The problem, and how its weights are judged.

    Attributes:
      problem: the `BilevelProblem`; its data are `TuningData`.
      evaluate: `evaluate(params, split, hparams=None) -> {"loss", "accuracy"}` in
        evaluation mode, chunk by chunk: cross-entropy without penalties, and the share
        of right answers, in 0..1. `hparams`, natural values, are needed where
        `norm_epsilon` is tuned, and ignored otherwise.
    """

    problem: BilevelProblem
    evaluate: Callable[..., Mapping[str, jax.Array]]


def image_tuning(
    model: Any,
    example: Any,
    hparams: Mapping[str, Hyperparameter],
    *,
    batch_size: int = 128,
    mean: Any = 0.0,
    std: Any = 1.0,
    flip: bool = False,
) -> ImageTuning:
    """Tunes what `hparams` names of a classifier: dropout, augmentation, labels, decay.

        L_T,i = -Σ_k y_ik log softmax(f(x_i))_k + ½ Σ_d λ_d ‖w_d‖²
        L_V   = mean_i [-log softmax(f(x_i))_{y_i}]

    Names that it knows:

    * those of `model.rate_names`;
    * `rotation`, `shear`, `translate`, `zoom`, `brightness`, `contrast`, `saturation`,
      `hue`, `input_scale`, `cutout_length`, `cutout_holes`: see `transform_images`;
    * `label_smoothing`, `mixup`: they make y soft;
    * `weight_decay`, of all kernels; `weight_decay_<layer>`, of those under one key of
      the parameters' top level; `norm_decay`, of scales and biases of norm layers. The
      sets w_d may overlap, their penalties add.

    In evaluation images are normalised only, and batch norm takes running statistics.

    Args:
      model: a flax.linen module with `rate_names`, called as
        `model.apply(variables, x, rates, train)`, as those beside it:
        `TunableMLP`, `SimpleCNN`, `AlexNet`, `TunableVGG16`, `ResNet18`.
      example: one image [height, width, channels] or a batch of them, or such a shape
        as a tuple; only its shape counts.
      hparams: what is tuned, scalars each; `stock_hparams` has customary ranges. A name
        that is missing is switched off.
      batch_size: images that `sample_train` and `sample_valid` draw, at least 1.
      mean: subtracted from the stored image, a scalar or [channels].
      std: divides it, above 0, a scalar or [channels]. `normalization(name)` gives
        both.
      flip: mirror training images with chance ½. The flip is part of the batch, so that
        all passes over it share it.

    Returns:
      The problem, whose parameters are the variables of the model, `{"params": ...}`,
      with `"batch_stats"` where it has batch norm, and how to evaluate them.

    Raises:
      ValueError: a name is unknown or its `init` no scalar; `norm_epsilon` is not
        `shared`; `batch_size` is below 1, `std` not above 0, or `example` no image;
        when run, augmented images are no integers.

    Example:
      >>> import jax
      >>> from metax.tasks import load, normalization
      >>> from metax.tasks import hold_out
      >>> from metax.tasks import stock_hparams
      >>> from metax.tasks import TunableMLP
      >>> from metax.tasks import image_tuning
      >>> data, (mean, std) = hold_out(load("digits"), 0.15), normalization("digits")
      >>> hparams = stock_hparams(["input_dropout", "dropout_1", "weight_decay"])
      >>> problem, evaluate = image_tuning(
      ...     TunableMLP(10, (32,)), data.train.image, hparams, mean=mean, std=std
      ... )
      >>> params = problem.init(jax.random.key(0))
      >>> bool(evaluate(params, data.valid)["loss"] > 2)  # log 10 = 2.3 by guessing
      True
    """
    what = "a flax module of this package that can be tuned"
    check_has("image_tuning", "model", model, what, "init", "apply", "rate_names")
    shape = image_shape(example, "image_tuning")
    mean, std = check_scale(mean, std, "image_tuning")
    if batch_size < 1:
        raise ValueError(
            f"`image_tuning(batch_size=...)` must be at least 1; got {batch_size}."
        )

    def init(key: jax.Array) -> Params:
        check_key(key, "image_tuning(...).problem.init(key=...)")
        return model.init(key, jnp.zeros((1, *shape), jnp.float32), {}, False)

    shapes = jax.eval_shape(init, jax.random.key(0))
    decays = _decayed_leaves(shapes)
    _check_hparams(hparams, (*model.rate_names, *AUGMENTATION, *LABELS, *decays))

    def forward(params: Params, image: jax.Array, hparams: Hparams) -> jax.Array:
        """Logits in evaluation mode."""
        x = normalize(image, mean, std)
        return model.apply(params, x, _named(hparams, model.rate_names), False)

    def predict(
        params: Params, batch: Split, hparams: Hparams, key: jax.Array | None
    ) -> Outputs:
        params = stop_statistics(params)
        if key is None:
            logits = forward(params, batch.image, hparams)
            return {"logits": logits, **_statistics(params)}
        key_augment, key_mixup, key_dropout = jax.random.split(key, 3)
        x = _augment(batch.image, hparams, key_augment, mean, std)
        x, soft = _soften(x, batch.label, hparams, key_mixup, model.num_classes)
        rates = _named(hparams, model.rate_names)
        rngs, mutable = {"dropout": key_dropout}, list(_statistics(params))
        logits, changed = model.apply(
            params, x, rates, True, mutable=mutable, rngs=rngs
        )
        return {"logits": logits, **soft, **jax.lax.stop_gradient(changed)}

    def train_loss(
        outputs: Outputs, batch: Split, hparams: Hparams, params: Params
    ) -> jax.Array:
        losses = (
            optax.softmax_cross_entropy(outputs["logits"], outputs["target"])
            if "target" in outputs
            else cross_entropy(outputs["logits"], batch.label)
        )
        for name in _named(hparams, decays):
            losses += _penalty(params, hparams[name], decays[name])
        return losses

    def evaluate(
        params: Params, data: Split, hparams: Hparams | None = None
    ) -> Mapping[str, jax.Array]:
        if "norm_epsilon" in specs and "norm_epsilon" not in (hparams or {}):
            raise ValueError(
                "`image_tuning(...).evaluate(hparams=...)` must hold 'norm_epsilon', "
                f"which is tuned; got {hparams}. Pass the natural values."
            )
        epsilon = _named(hparams or {}, EPSILON)
        logits_of = lambda image: forward(params, image, epsilon)
        return evaluate_classifier(logits_of, data)

    specs = dict(hparams)
    problem = BilevelProblem(
        init=init,
        predict=predict,
        train_loss=train_loss,
        valid_loss=lambda outputs, batch: cross_entropy(
            outputs["logits"], batch.label
        ).mean(),
        sample_train=lambda data, key: _sample(data.train, key, batch_size, flip),
        sample_valid=lambda data, key: minibatch(data.valid, key, batch_size),
        hparams=specs,
        carry=_write_statistics if _statistics(shapes) else None,
    )
    return ImageTuning(problem=problem, evaluate=evaluate)


def _augment(
    image: jax.Array, hparams: Hparams, key: jax.Array, mean: Any, std: Any
) -> jax.Array:
    """Normalised images, changed at random where a strength is tuned."""
    strengths = _named(hparams, AUGMENTATION)
    if not strengths:
        return normalize(image, mean, std)
    if not jnp.issubdtype(image.dtype, jnp.integer):
        raise ValueError(
            "`image_tuning(...).problem.predict(batch=...)` must hold integer images, "
            f"as stored, where augmentation is tuned; got {image.dtype}."
        )
    return transform_images(image, strengths, key, mean=mean, std=std)


def _soften(
    x: jax.Array, label: jax.Array, hparams: Hparams, key: jax.Array, num_classes: int
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Images, perhaps mixed, and `{"target": ...}` where labels are soft."""
    if not _named(hparams, LABELS):
        return x, {}
    target = jax.nn.one_hot(label, num_classes, dtype=jnp.float32)
    if "mixup" in hparams:
        x, target = mixup(x, target, key, alpha=hparams["mixup"])
    if "label_smoothing" in hparams:
        target = smooth_labels(target, hparams["label_smoothing"])
    return x, {"target": target}


def _penalty(params: Params, decay: jax.Array, leaves: frozenset[str]) -> jax.Array:
    chosen = lambda path, leaf: jax.tree_util.keystr(path) in leaves
    return 0.5 * decay * squared_norm(params, chosen)


def _decayed_leaves(variables: Params) -> dict[str, frozenset[str]]:
    """What each decay that the model can have acts on, as paths."""
    leaves = jax.tree_util.tree_leaves_with_path({"params": variables["params"]})
    place = jax.tree_util.keystr
    kernels = [path for path, leaf in leaves if leaf.ndim > 1]
    norms = {place(path[:-1]) for path, _ in leaves if path[-1].key == "scale"}
    decays = {"weight_decay": frozenset(map(place, kernels))}
    for layer in dict.fromkeys(path[1].key for path in kernels):
        own = frozenset(place(path) for path in kernels if path[1].key == layer)
        decays[f"weight_decay_{layer}"] = own
    if norms:
        own = frozenset(place(path) for path, _ in leaves if place(path[:-1]) in norms)
        decays["norm_decay"] = own
    return decays


def _sample(data: Split, key: jax.Array, size: int, flip: bool) -> Split:
    key_draw, key_flip = jax.random.split(key)
    batch = minibatch(data, key_draw, size)
    if not flip:
        return batch
    keys = jax.random.split(key_flip, size)
    return batch._replace(image=jax.vmap(horizontal_flip)(batch.image, keys))


def _statistics(params: Params) -> dict[str, Any]:
    return {name: tree for name, tree in params.items() if name != "params"}


def _write_statistics(params: Params, outputs: Outputs) -> Params:
    return {name: outputs.get(name, tree) for name, tree in params.items()}


def _named(hparams: Hparams, names: Collection[str]) -> Hparams:
    return {name: hparams[name] for name in names if name in hparams}


def _check_hparams(
    hparams: Mapping[str, Hyperparameter], known: Collection[str]
) -> None:
    for name, spec in hparams.items():
        what = "made of `Hyperparameter`s"
        check_has("image_tuning", "hparams", spec, what, "init", "shared")
        if name not in known:
            raise ValueError(
                "`image_tuning(hparams=...)` must have names among "
                f"{', '.join(known)}; got {name!r}."
            )
        if np.shape(spec.init) != ():
            raise ValueError(
                f"`image_tuning(hparams=...)['{name}'].init` must be a scalar; got "
                f"shape {list(np.shape(spec.init))}."
            )
    if "norm_epsilon" in hparams and not hparams["norm_epsilon"].shared:
        raise ValueError(
            "`image_tuning(hparams=...)['norm_epsilon'].shared` must be True, for it "
            "acts on the whole batch; got False."
        )
    if "cutout_holes" in hparams and "cutout_length" not in hparams:
        raise ValueError(
            "`image_tuning(hparams=...)` has 'cutout_holes' without 'cutout_length'; "
            "add the length."
        )
