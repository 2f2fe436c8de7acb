"""Generative adversarial networks on images, as a problem of alternating steps.

How often the discriminator steps for each step of the generator is set by hand in the
literature (1:1, 1:5, 5:1). Here it is a choice between two actions:

    action 0, "D"   the discriminator's loss on the discriminator
    action 1, "G"   the generator's loss on the generator

The data are a dict, see `image_data`. A run is scored by the inception score under a
classifier that was trained beforehand, see `classifier_task`.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.arguments import (
    check_axes,
    check_count,
    check_has,
    check_length,
    check_number,
)
from metax.base import AlternatingProblem, check_key, last_reward
from metax.tasks.adversarial import (
    Batch,
    Networks,
    adam_common_counter,
    adversarial_actions,
    adversarial_losses,
    discriminator_error,
)
from metax.tasks.batching import minibatch
from metax.tasks.gan_networks import (
    Architecture,
    architectures,
    discriminate,
    generate,
    init_discriminator,
    init_generator,
)
from metax.tasks.grids import gaussian_grid
from metax.tasks.inception import (
    class_probabilities,
    classifier_task,
    inception_score,
    set_format,
)

__all__ = [
    "Architecture",
    "architectures",
    "classifier_task",
    "gaussian_grid",
    "image_data",
    "inception_score",
    "problem",
]

Groups = dict[str, Any]

_MNIST = Architecture()
_SPLITS = 5  # of the samples, each scored by itself
_BLOCK = 1000  # samples generated at a time; what batch norm normalises over
_REAL = 1000  # real images on which the discriminator's error is taken


def problem(
    dataset: Literal["mnist", "fashion_mnist", "cifar10", "digits"],
    *,
    architecture: Architecture = _MNIST,
    generator_repeats: int = 1,
    discriminator_scale: Any = 0.5,
    generator_loss: Literal["non_saturating", "minimax"] = "non_saturating",
    pixel_range: tuple[float, float] = (-1.0, 1.0),
    learning_rate: Any = 2e-4,
    batch_size: int = 128,
    common_counter: bool = False,
    score_samples: int = 5000,
    final_samples: int | None = 500_000,
    metric_decay: float = 0.8,
    patience: int | None = 50,
    validate_every: int = 500,
) -> AlternatingProblem:
    """A DCGAN whose schedule is to be chosen.

        ℓ_D = scale · (mean log(1 + e^{-D(x)}) + mean log(1 + e^{D(G(z))}))
        ℓ_G = mean log(1 + e^{-D(G(z))}),  or with "minimax"  -mean log(1 + e^{D(G(z))})

    Adam with β = (0.5, 0.999) on both networks. The metric, to be maximised, is the
    inception score of G on fixed latents; the reward is 10 times its square: of the
    score measured once more on `final_samples` at the best parameters, or without them
    of the best check.

    One step on MNIST at a batch of 128 costs about 14 to 19 GFLOP, a check with 5000
    samples about 0.25 TFLOP: use dispatch "switch", and a GPU.

    Args:
      dataset: "mnist" and "fashion_mnist", 28 × 28 × 1; "cifar10", 32 × 32 × 3, best
        with batch norm and batches of 256; "digits", 8 × 8 × 1, for a CPU.
      architecture: the networks.
      generator_repeats: optimizer steps of one G action; 4 in the released MNIST runs.
      discriminator_scale: 1/2 as released, 1 as published.
      generator_loss: "non_saturating" as released, or "minimax".
      pixel_range: to what real images are scaled. G ends in tanh, so (-1, 1) is what
        it can reach; the released runs scaled MNIST to (0, 1).
      learning_rate: of Adam, a number or a scalar array.
      batch_size: real images, and latents, of a step.
      common_counter: one count of steps for the bias correction of both networks.
      score_samples: latents a check takes of `data`, a multiple of 5.
      final_samples: for the last score, a multiple of 5; None for none.
      metric_decay: of the average of scores that decides what is best, in [0, 1).
      patience: checks without a better average after which a run ends; None for never.
      validate_every: steps between two checks.

    Returns:
      The problem; groups `"discriminator"` and `"generator"` hold weights only. Both
      losses give `"d_real"` and `"d_fake"`, the two means of ℓ_D; that of the real
      images costs ℓ_G one more pass through D. `observe` gives `"inception_score"` and
      `"discriminator_error"`; `evaluate` these and `"inception_score_std"`.

    Raises:
      ValueError: an argument is unknown or out of range; at the first step, the data
        hold fewer latents than `score_samples`.

    Example:
      >>> import jax
      >>> from metax.tasks import gan
      >>> problem = gan.problem("mnist", generator_repeats=4)
      >>> groups = jax.eval_shape(problem.init, jax.random.key(0))
      >>> {name: sum(leaf.size for leaf in jax.tree.leaves(tree))
      ...  for name, tree in sorted(groups.items())}
      {'discriminator': 212865, 'generator': 1015553}

    Reference:
      Xu et al., "AutoLoss: learning discrete schedules for alternate optimization",
      ICLR 2019, arXiv 1810.02442, section 4.2; the networks: Radford et al., 2015,
      arXiv 1511.06434.

    Note:
      Batch norm in a score is that of its blocks of at most 1000 samples, where the
      released code keeps running averages. Scores are those of the classifier in the
      data, never to be set beside scores of another.
    """
    form = _format(dataset, pixel_range)
    _check_counts(generator_repeats, batch_size, score_samples, final_samples)
    name = "gan.problem"
    what = "an `Architecture`"
    check_has(name, "architecture", architecture, what, "filters_g", "dim_z")
    check_count(name, 1, validate_every=validate_every)
    if patience is not None:
        check_count(name, 0, patience=patience)
    check_number(name, "metric_decay", metric_decay, least=0, below=1)
    check_number(name, "discriminator_scale", discriminator_scale, least=0)
    check_number(name, "learning_rate", learning_rate, least=0)
    if generator_loss not in ("non_saturating", "minimax"):
        raise ValueError(
            "`gan.problem(generator_loss=...)` must be 'non_saturating' or 'minimax'; "
            f"got {generator_loss!r}."
        )
    networks = Networks(
        generate=lambda params, latent: generate(params, latent, architecture),
        discriminate=lambda params, x: discriminate(params, x, architecture),
    )
    score = partial(_fixed_score, networks, form, score_samples)
    final = None
    if final_samples is not None:
        final = partial(_final_score, networks, form, final_samples, architecture.dim_z)

    def init(key: jax.Array) -> Groups:
        check_key(key, "gan.problem(...).init(key=...)")
        key_d, key_g = jax.random.split(key)
        return {
            "discriminator": init_discriminator(key_d, architecture, form.shape),
            "generator": init_generator(key_g, architecture, form.shape),
        }

    def sample(data: Any, key: jax.Array) -> Batch:
        key_image, key_latent = jax.random.split(key)
        size = (batch_size, architecture.dim_z)
        image = minibatch(data["train"], key_image, batch_size)
        latent = jax.random.normal(key_latent, size, jnp.float32)
        return Batch(real=_scaled(form, image), latent=latent)

    def evaluate(params: Groups, data: Any) -> dict[str, jax.Array]:
        mean, std = score(params, data)
        error = _error(networks, form, params, data)
        return {
            "inception_score": mean,
            "inception_score_std": std,
            "discriminator_error": error,
        }

    def observe(params: Groups, batch: Batch, data: Any) -> dict[str, jax.Array]:
        seen = evaluate(params, data)
        return {name: seen[name] for name in ("inception_score", "discriminator_error")}

    adam = optax.adam(learning_rate, b1=0.5, b2=0.999)
    return AlternatingProblem(
        init=init,
        losses=adversarial_losses(networks, discriminator_scale, generator_loss),
        actions=adversarial_actions(generator_repeats),
        optimizers=adam_common_counter(learning_rate) if common_counter else adam,
        sample=sample,
        metric=lambda params, data: score(params, data)[0],
        maximize=True,
        metric_decay=metric_decay,
        final_metric=final,
        reward=_best_reward if final is None else _final_reward,
        validate_every=validate_every,
        patience=patience,
        observe=observe,
        evaluate=evaluate,
        names=("D", "G"),
        has_aux=True,
    )


def image_data(
    train: Any,
    valid: Any,
    classifier: Any,
    key: jax.Array,
    *,
    dim_z: int = 128,
    score_samples: int = 5000,
) -> dict[str, Any]:
    """Makes the data of `problem`.

    Args:
      train: uint8 [n, height, width, channels], the images to be learned from.
      valid: likewise, for the discriminator's error; the first 1000 at most.
      classifier: trained parameters of `classifier_task`.
      key: draws the latents, on which every check is made.
      dim_z: their size, that of the architecture.
      score_samples: their number.

    Returns:
      `{"train": images, "valid": {"real": images, "latents": float32
      [score_samples, dim_z], "classifier": parameters}}`.

    Example:
      >>> import jax, numpy as np
      >>> from metax.tasks import gan
      >>> images = np.zeros((50, 28, 28, 1), np.uint8)
      >>> classifier = None  # parameters from a training of `classifier_task`
      >>> key = jax.random.key(0)
      >>> data = gan.image_data(images[:40], images[40:], classifier, key)
      >>> data["valid"]["latents"].shape
      (5000, 128)
    """
    check_key(key, "gan.image_data(key=...)")
    check_count("gan.image_data", 1, dim_z=dim_z, score_samples=score_samples)
    for name, images in (("train", train), ("valid", valid)):
        axes = "images, height, width, channels"
        check_axes("gan.image_data", name, images, axes)
        check_length("gan.image_data", name, images)
    latents = jax.random.normal(key, (score_samples, dim_z), jnp.float32)
    real = valid[:_REAL]
    fixed = {"real": real, "latents": latents, "classifier": classifier}
    return {"train": train, "valid": fixed}


class _Format(NamedTuple):
    """Shape and full intensity of stored images, and the range the networks see."""

    shape: tuple[int, int, int]
    full: int
    low: float
    high: float


def _scaled(form: _Format, image: Any) -> jax.Array:
    unit = jnp.asarray(image, jnp.float32) / form.full
    return form.low + (form.high - form.low) * unit


def _probabilities(
    networks: Networks, form: _Format, params: Groups, data: Any, latent: jax.Array
) -> jax.Array:
    image = networks.generate(params["generator"], latent)
    unit = (image - form.low) / (form.high - form.low)
    return class_probabilities(data["valid"]["classifier"], unit)


def _fixed_score(
    networks: Networks, form: _Format, num: int, params: Groups, data: Any
) -> tuple[jax.Array, jax.Array]:
    """Mean and standard deviation of the score on the latents in the data."""
    latents = data["valid"]["latents"]
    if len(latents) < num:
        raise ValueError(
            "`gan.problem(score_samples=...)` must be at most the number of latents in "
            f"the data; got {num}, {len(latents)} latents."
        )
    blocks = latents[:num].reshape(-1, _block(num), latents.shape[-1])
    return _score(lambda z: _probabilities(networks, form, params, data, z), blocks)


def _final_score(
    networks: Networks, form: _Format, num: int, dim_z: int, params: Groups, data: Any
) -> jax.Array:
    """The score on many latents, which are drawn as they are needed."""
    size, key = _block(num), jax.random.key(0)

    def of(i: jax.Array) -> jax.Array:
        z = jax.random.normal(jax.random.fold_in(key, i), (size, dim_z), jnp.float32)
        return _probabilities(networks, form, params, data, z)

    return _score(of, jnp.arange(num // size))[0]


def _score(
    probabilities_of: Callable[[jax.Array], jax.Array], blocks: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One block after the other, to bound the memory."""
    answers = jax.lax.map(probabilities_of, blocks)
    return inception_score(answers.reshape(-1, answers.shape[-1]), _SPLITS)


def _block(num: int) -> int:
    """The largest divisor that is a block."""
    return max(size for size in range(1, min(num, _BLOCK) + 1) if num % size == 0)


def _error(networks: Networks, form: _Format, params: Groups, data: Any) -> jax.Array:
    real, latents = data["valid"]["real"], data["valid"]["latents"]
    size = min(_REAL, len(real), len(latents))
    batch = Batch(real=_scaled(form, real[:size]), latent=latents[:size])
    return discriminator_error(networks, params, batch)


def _final_reward(history: jax.Array, live: jax.Array) -> jax.Array:
    return 10 * jnp.square(last_reward(history, live))


def _best_reward(history: jax.Array, live: jax.Array) -> jax.Array:
    best = jnp.max(jnp.where(live, history, -jnp.inf), initial=-jnp.inf)
    return 10 * jnp.square(jnp.where(live.any(), best, jnp.nan))


def _format(dataset: str, pixel_range: tuple[float, float]) -> _Format:
    low, high = pixel_range
    if not low < high:
        raise ValueError(
            f"`gan.problem(pixel_range=...)` must increase; got {pixel_range}."
        )
    shape, full = set_format(dataset, "gan.problem")
    return _Format(shape=shape, full=full, low=low, high=high)


def _check_counts(repeats: int, batch: int, score: int, final: int | None) -> None:
    for name, count in (("generator_repeats", repeats), ("batch_size", batch)):
        if count < 1:
            raise ValueError(f"`gan.problem({name}=...)` must be ≥ 1; got {count}.")
    for name, count in (("score_samples", score), ("final_samples", final)):
        if count is not None and (count < _SPLITS or count % _SPLITS):
            raise ValueError(
                f"`gan.problem({name}=...)` must be a positive multiple of {_SPLITS}, "
                f"the parts that are scored by themselves; got {count}."
            )
