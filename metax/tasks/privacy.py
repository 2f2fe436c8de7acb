"""A loss whose gradient is that of DP-SGD, so that any rule becomes private."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

__all__ = ["private_loss"]

Loss = Callable[[Any, Any, jax.Array], jax.Array]


def private_loss(loss: Loss, clip_norm: float, noise_multiplier: float) -> Loss:
    """The same value with the clipped and noised gradient of DP-SGD.

        g_i = ∇L(θ, {x_i}, key),     ḡ_i = g_i · min(1, C / ‖g_i‖)
        ∇   = (1/B) (Σ_i ḡ_i + N(0, (σ C)² I))

    where the norm is over all tensors jointly, C is `clip_norm`, σ `noise_multiplier`
    and B the size of the batch. The key of the loss draws the noise. It costs B
    gradients of one example each, and holds them all: B times the parameters.

    For evaluation, and first order only: this gradient is a rule and not the derivative
    of the value. `jax.jvp` refuses it; do not train an optimizer through it, and do not
    call it under a differentiation with respect to anything but the parameters. What
    privacy it buys, (ε, δ), is not computed here.

    Args:
      loss: `loss(params, batch, key) -> scalar`, a mean over the examples of `batch`,
        any tree of arrays with the example as leading axis.
      clip_norm: C, above 0.
      noise_multiplier: σ, at least 0; 0 clips only.

    Returns:
      A loss of the same signature.

    Raises:
      ValueError: `clip_norm` is not above 0, or `noise_multiplier` negative.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import private_loss
      >>> mean = lambda params, batch, key: jnp.mean(params * batch)
      >>> private = private_loss(mean, clip_norm=1.0, noise_multiplier=0.0)
      >>> batch = jnp.array([5.0, 0.5])  # the gradient of the first is clipped to 1
      >>> round(float(jax.grad(private)(jnp.array(2.0), batch, jax.random.key(0))), 3)
      0.75

    Reference:
      Abadi et al., "Deep learning with differential privacy", 2016, arXiv 1607.00133,
      algorithm 1.
    """
    if not clip_norm > 0:
        raise ValueError(
            f"`private_loss(clip_norm=...)` must be above 0; got {clip_norm}."
        )
    if not noise_multiplier >= 0:
        raise ValueError(
            "`private_loss(noise_multiplier=...)` must be at least 0; got "
            f"{noise_multiplier}."
        )

    def clipped_gradient(params: Any, example: Any, key: jax.Array) -> Any:
        batch_of_one = jax.tree.map(lambda leaf: leaf[None], example)
        grad = jax.grad(loss)(params, batch_of_one, key)
        # the division is safe: at norm 0 the maximum is C
        factor = clip_norm / jnp.maximum(optax.tree.norm(grad), clip_norm)
        return optax.tree.scale(factor, grad)

    def private_gradient(params: Any, batch: Any, key: jax.Array) -> Any:
        size = jax.tree.leaves(batch)[0].shape[0]
        key_loss, key_noise = jax.random.split(key)
        per_example = jax.vmap(clipped_gradient, in_axes=(None, 0, None))
        grads = per_example(params, batch, key_loss)
        noise = optax.tree.random_like(key_noise, params, jax.random.normal)
        std = noise_multiplier * clip_norm
        return jax.tree.map(lambda g, n: (g.sum(0) + std * n) / size, grads, noise)

    @jax.custom_vjp
    def private(params: Any, batch: Any, key: jax.Array) -> jax.Array:
        return loss(params, batch, key)

    def forward(params: Any, batch: Any, key: jax.Array) -> tuple[jax.Array, Any]:
        return loss(params, batch, key), (params, batch, key)

    def backward(residuals: Any, cotangent: jax.Array) -> tuple[Any, None, None]:
        return optax.tree.scale(cotangent, private_gradient(*residuals)), None, None

    private.defvjp(forward, backward)
    return private
