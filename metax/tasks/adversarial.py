"""What every generative adversarial problem shares: losses, actions, the optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from metax.base import Action

__all__ = [
    "Batch",
    "CountedState",
    "Networks",
    "adam_common_counter",
    "adversarial_actions",
    "adversarial_losses",
    "discriminator_error",
]

Groups = dict[str, Any]
Loss = Callable[..., tuple[jax.Array, dict[str, jax.Array]]]
_B1, _B2, _EPSILON = 0.5, 0.999, 1e-8


class Batch(NamedTuple):
    """What a step learns from.

    Attributes:
      real: float32 [batch, ...], real data in the units of the generator's output.
      latent: float32 [batch, dim_z], standard normal.
    """

    real: jax.Array
    latent: jax.Array


class Networks(NamedTuple):
    """The two players.

    Attributes:
      generate: `generate(params, latent) -> [batch, ...]`.
      discriminate: `discriminate(params, x) -> logits [batch]`, above 0 for real.
    """

    generate: Callable[[Any, jax.Array], jax.Array]
    discriminate: Callable[[Any, jax.Array], jax.Array]


class CountedState(NamedTuple):
    """Adam's moments; the count comes from outside.

    Attributes:
      mu: mean of the gradients, like the parameters.
      nu: mean of their squares.
    """

    mu: Any
    nu: Any


def adversarial_losses(
    networks: Networks, discriminator_scale: Any, generator_loss: str
) -> tuple[Loss, Loss]:
    """The discriminator's and the generator's loss, each with the same aux.

        d_real = mean log(1 + e^{-D(x)}),    d_fake = mean log(1 + e^{D(G(z))})
        ℓ_D = scale · (d_real + d_fake)
        ℓ_G = mean log(1 + e^{-D(G(z))})     non-saturating
            = -d_fake                        minimax

    D is a logit. The gradient of ℓ_D stops at the generator and that of ℓ_G nowhere.

    Args:
      networks: the two players.
      discriminator_scale: 1/2 as released, 1 as published.
      generator_loss: "non_saturating" or "minimax".

    Returns:
      (ℓ_D, ℓ_G), `loss(params, batch, key) -> (scalar, {"d_real", "d_fake"})`.
    """

    def logits(groups: Groups, batch: Batch) -> tuple[jax.Array, jax.Array]:
        fake = networks.generate(groups["generator"], batch.latent)
        of = lambda x: networks.discriminate(groups["discriminator"], x)
        return of(batch.real), of(fake)

    def costs(of_real: jax.Array, of_fake: jax.Array) -> dict[str, jax.Array]:
        d_real, d_fake = jax.nn.softplus(-of_real), jax.nn.softplus(of_fake)
        return {"d_real": d_real.mean(), "d_fake": d_fake.mean()}

    def loss_d(groups: Groups, batch: Batch, key: jax.Array) -> Any:
        fixed = jax.lax.stop_gradient(groups["generator"])
        aux = costs(*logits({**groups, "generator": fixed}, batch))
        return discriminator_scale * (aux["d_real"] + aux["d_fake"]), aux

    def loss_g(groups: Groups, batch: Batch, key: jax.Array) -> Any:
        of_real, of_fake = logits(groups, batch)
        aux = costs(of_real, of_fake)
        if generator_loss == "minimax":
            return -aux["d_fake"], aux
        return jax.nn.softplus(-of_fake).mean(), aux

    return loss_d, loss_g


def adversarial_actions(generator_repeats: int) -> tuple[Action, Action]:
    """A step of the discriminator, and `generator_repeats` of the generator."""
    return (
        Action(loss=0, params="discriminator"),
        Action(loss=1, params="generator", repeats=generator_repeats),
    )


def discriminator_error(networks: Networks, groups: Groups, batch: Batch) -> jax.Array:
    """The discriminator's share of errors on as many real as generated examples.

    Args:
      networks: the two players.
      groups: their parameters.
      batch: real examples and as many latents.

    Returns:
      A scalar in 0..1; a logit of 0 says "generated".
    """
    fake = networks.generate(groups["generator"], batch.latent)
    of_real = networks.discriminate(groups["discriminator"], batch.real)
    of_fake = networks.discriminate(groups["discriminator"], fake)
    missed = jnp.mean(of_real <= 0, dtype=jnp.float32)
    return (missed + jnp.mean(of_fake > 0, dtype=jnp.float32)) / 2


def adam_common_counter(
    learning_rate: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam with β = (0.5, 0.999) whose bias correction counts the steps of all groups.

        m ← β₁ m + (1 - β₁) g,    v ← β₂ v + (1 - β₂) g²
        u = -α (m / (1 - β₁ᵗ)) / (√(v / (1 - β₂ᵗ)) + 1e-8),    t = step + 1

    With a count of its own, a group that moves seldom has large corrections for long;
    one optimizer object for both networks, as in the released code, has this common t.

    Args:
      learning_rate: α, a number or a scalar array.

    Returns:
      A rule whose `update` needs `step=`, int32: the steps taken so far over all
      groups, which an `AlternatingProblem`'s runs pass.

    Raises:
      ValueError: `update` gets no `step`.
    """

    def init_fn(params: Any) -> CountedState:
        zeros = lambda tree: jax.tree.map(jnp.zeros_like, tree)
        return CountedState(mu=zeros(params), nu=zeros(params))

    def update_fn(
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        step: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, CountedState]:
        del params, extra_args
        if step is None:
            raise ValueError(
                "`adam_common_counter(...).update(step=...)` must be the number of "
                "optimizer steps taken so far over all groups; got None."
            )
        t = jnp.asarray(step, jnp.float32) + 1
        mu = optax.tree.update_moment(updates, state.mu, _B1, 1)
        nu = optax.tree.update_moment(updates, state.nu, _B2, 2)

        def direction(m: jax.Array, v: jax.Array) -> jax.Array:
            m, v = m / (1 - _B1**t), v / (1 - _B2**t)
            return (-learning_rate * m / (jnp.sqrt(v) + _EPSILON)).astype(m.dtype)

        return jax.tree.map(direction, mu, nu), CountedState(mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
