"""A small alternating problem in closed form."""

import jax.numpy as jnp
import optax

from metax.base import Action, AlternatingProblem


def two_losses(**options):
    """ℓ_1 = Σ(w - b)², ℓ_2 = Σ|w| + v², on the groups "w" [3] and "v" []."""

    def init(key):
        return {"w": jnp.array([1.0, -2.0, 0.5]), "v": jnp.array(3.0)}

    def metric(params, data):
        return jnp.sum((params["w"] - data) ** 2)

    plain = {
        "losses": (
            lambda params, batch, key: jnp.sum((params["w"] - batch) ** 2),
            lambda params, batch, key: jnp.sum(jnp.abs(params["w"])) + params["v"] ** 2,
        ),
        "actions": (Action(0), Action(1)),
        "optimizers": optax.sgd(0.1),
        "names": ("fit", "penalty"),
        "full_batch": True,
    }
    sample = lambda data, key: data
    return AlternatingProblem(
        init=init, sample=sample, metric=metric, **(plain | options)
    )
