"""Random changes to training images, on the device."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from metax.arguments import check_count
from metax.base import check_key
from metax.tasks.data import Split

__all__ = ["crop_and_flip"]


def crop_and_flip(pad: int = 4) -> Callable[[Split, jax.Array], Split]:
    """Flips each image with chance ½ and shifts it by up to `pad` pixels each way.

    Usual for CIFAR-10: the image is framed with `pad` rows and columns of zeros, and a
    window of the old size is cut out at a uniformly random place. The frame is put
    around the stored image, before normalisation.

    Args:
      pad: width of the frame in pixels, at least 0; 0 flips only.

    Returns:
      `augment(batch, key) -> batch` with the shapes, dtypes and labels of the batch,
      each image with a draw of its own.

    Raises:
      ValueError: `pad` is negative; the key is raw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import Split, crop_and_flip
      >>> batch = Split(jnp.ones((2, 8, 8, 3), jnp.uint8), jnp.array([0, 1]))
      >>> crop_and_flip(pad=2)(batch, jax.random.key(0)).image.shape
      (2, 8, 8, 3)
    """
    check_count("crop_and_flip", 0, pad=pad)

    def augment(batch: Split, key: jax.Array) -> Split:
        check_key(key, "crop_and_flip(...)(key=...)")
        keys = jax.random.split(key, batch.image.shape[0])
        return batch._replace(image=jax.vmap(augment_one)(batch.image, keys))

    def augment_one(image: jax.Array, key: jax.Array) -> jax.Array:
        key_flip, key_corner = jax.random.split(key)
        is_flipped = jax.random.bernoulli(key_flip)
        image = jnp.where(is_flipped, image[:, ::-1], image)
        framed = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
        row, column = jax.random.randint(key_corner, (2,), 0, 2 * pad + 1)
        return jax.lax.dynamic_slice(framed, (row, column, 0), image.shape)

    return augment
