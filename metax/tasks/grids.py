"""A grid of Gaussians in the plane: the smallest problem with modes to be missed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from metax.base import AlternatingProblem, check_key
from metax.tasks.adversarial import (
    Batch,
    Networks,
    adversarial_actions,
    adversarial_losses,
    discriminator_error,
)

__all__ = ["gaussian_grid", "grid_score"]

_SIZES_G = (2, 128, 128, 2)
_SIZES_D = (2, 128, 128, 1)
_BATCH, _SCORED, _SCORED_REAL = 256, 2500, 500


def gaussian_grid(
    side: int = 5, spacing: float = 2.0, std: float = 0.05
) -> AlternatingProblem:
    """A GAN on a square grid of Gaussians, which a CPU trains in seconds.

    Two networks of two hidden layers of 128 ReLU units, latents and samples in the
    plane, batches of 256, Adam (2e-4, β₁ = 0.5), losses as in `gan.problem`. The metric
    is `grid_score` of 2500 samples, to be maximised. Real samples are drawn by the key,
    so there are no data: hand over None.

    Args:
      side: modes along an edge, at least 1.
      spacing: between neighbours, above 0.
      std: of each mode, above 0.

    Returns:
      A problem with groups `"discriminator"` and `"generator"`; action 0 is a step of
      the former, action 1 of the latter. `observe` gives `"discriminator_error"`, and
      `"inception_score"`, in whose place the metric stands, so that features made for
      GANs work here.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax
      >>> from metax.tasks import gan
      >>> problem = gan.gaussian_grid()
      >>> problem.sample(None, jax.random.key(0)).real.shape
      (256, 2)

    Note:
      No problem of the paper: it is here for tests of schedules and restarts.
    """
    if not (side >= 1 and spacing > 0 and std > 0):
        raise ValueError(
            "`gaussian_grid(...)` must have side ≥ 1, spacing > 0 and std > 0; got "
            f"side={side}, spacing={spacing}, std={std}."
        )
    networks = Networks(
        generate=_perceptron,
        discriminate=lambda params, x: _perceptron(params, x)[:, 0],
    )

    def init(key: jax.Array) -> dict[str, Any]:
        check_key(key, "gaussian_grid(...).init(key=...)")
        key_d, key_g = jax.random.split(key)
        return {
            "discriminator": _init_perceptron(key_d, _SIZES_D),
            "generator": _init_perceptron(key_g, _SIZES_G),
        }

    def draw(key: jax.Array, size: int) -> Batch:
        key_mode, key_noise, key_latent = jax.random.split(key, 3)
        chosen = jax.random.randint(key_mode, (size,), 0, side**2)
        noise = std * jax.random.normal(key_noise, (size, 2), jnp.float32)
        latent = jax.random.normal(key_latent, (size, 2), jnp.float32)
        return Batch(real=_modes(side, spacing)[chosen] + noise, latent=latent)

    def metric(params: dict[str, Any], data: Any) -> jax.Array:
        # a fixed key: the same latents at every check
        latent = draw(jax.random.key(0), _SCORED).latent
        samples = networks.generate(params["generator"], latent)
        return grid_score(samples, side, spacing, std)

    def observe(params: dict[str, Any], batch: Any, data: Any) -> dict[str, jax.Array]:
        fixed = draw(jax.random.key(1), _SCORED_REAL)
        return {
            "inception_score": metric(params, data),
            "discriminator_error": discriminator_error(networks, params, fixed),
        }

    return AlternatingProblem(
        init=init,
        losses=adversarial_losses(networks, 0.5, "non_saturating"),
        actions=adversarial_actions(1),
        optimizers=optax.adam(2e-4, b1=0.5),
        sample=lambda data, key: draw(key, _BATCH),
        metric=metric,
        maximize=True,
        validate_every=100,
        observe=observe,
        evaluate=lambda params, data: {"grid_score": metric(params, data)},
        names=("D", "G"),
        has_aux=True,
    )


def grid_score(samples: jax.Array, side: int, spacing: float, std: float) -> jax.Array:
    """How much of the grid is covered, times how much of the samples is on it.

    A sample is on a mode when it lies within 3 std of it, and a mode is covered by one
    such sample.

        score = (covered modes / side²) · (samples on a mode / samples)

    Args:
      samples: [n, 2].
      side: modes along an edge.
      spacing: between neighbours; std < spacing / 6, or a sample is on several modes.
      std: of each mode.

    Returns:
      A scalar in 0..1.
    """
    offset = samples[:, None] - _modes(side, spacing)
    on_mode = jnp.square(offset).sum(-1) <= (3 * std) ** 2
    covered = on_mode.any(0).mean(dtype=jnp.float32)
    return covered * on_mode.any(1).mean(dtype=jnp.float32)


def _modes(side: int, spacing: float) -> jax.Array:
    """[side², 2], centred at 0."""
    ticks = spacing * (jnp.arange(side, dtype=jnp.float32) - (side - 1) / 2)
    return jnp.stack(jnp.meshgrid(ticks, ticks), -1).reshape(-1, 2)


def _init_perceptron(key: jax.Array, sizes: tuple[int, ...]) -> list[dict[str, Any]]:
    keys = jax.random.split(key, len(sizes) - 1)
    layers = []
    for k, fan_in, fan_out in zip(keys, sizes[:-1], sizes[1:], strict=True):
        kernel = jax.random.normal(k, (fan_in, fan_out), jnp.float32)
        kernel = kernel * math.sqrt(2 / fan_in)
        layers.append({"kernel": kernel, "bias": jnp.zeros((fan_out,), jnp.float32)})
    return layers


def _perceptron(params: list[dict[str, Any]], x: jax.Array) -> jax.Array:
    *hidden, last = params
    for layer in hidden:
        x = jax.nn.relu(x @ layer["kernel"] + layer["bias"])
    return x @ last["kernel"] + last["bias"]
