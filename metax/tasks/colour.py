"""Random changes to the colours of an image, with strengths that may be arrays.

Four changes in a random order: three of them draw the image towards another one (black,
its mean grey, its grey version) and the fourth turns the hue. A branch between four
changes at each of four places would, under vmap, compute all sixteen. Since a blend of
factor 1 changes nothing, the three blends are run in their order twice instead, before
the hue with the late ones at factor 1 and after it with the early ones: six cheap
passes and one turn of the hue give each of the 24 orders.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from metax.arguments import check_numbers
from metax.base import check_key

__all__ = ["colour_jitter"]

_BLENDS = ("brightness", "contrast", "saturation")
_NAMES = (*_BLENDS, "hue")
_GREY_WEIGHTS = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601


def colour_jitter(
    image: jax.Array,
    key: jax.Array,
    *,
    brightness: ArrayLike = 0.0,
    contrast: ArrayLike = 0.0,
    saturation: ArrayLike = 0.0,
    hue: ArrayLike = 0.0,
) -> jax.Array:
    """Changes brightness, contrast, saturation and hue of one image at random.

        brightness   x ← clip(f x)                         f ~ U[1 − v, 1 + v]
        contrast     x ← clip(f x + (1 − f) mean(grey(x)))
        saturation   x ← clip(f x + (1 − f) grey(x))
        hue          x ← x with its HSV hue moved by d     d ~ U[−h, h]

    Each is clipped to [0, 1], the order of the four is uniform over the permutations,
    and grey(x) = 0.299 R + 0.587 G + 0.114 B (ITU-R BT.601). Strengths of zero change
    nothing but the last bits. For a batch, vmap over images, keys and strengths.

    Cost: six blends and one turn of the hue whatever the order; a strength that is the
    Python number 0 costs nothing.

    Args:
      image: [height, width, channels] in [0, 1], 3 channels; 1 for brightness and
        contrast alone.
      key: a typed key.
      brightness: v, a scalar in [0, 1].
      contrast: v, a scalar in [0, 1].
      saturation: v, a scalar in [0, 1].
      hue: h in turns, a scalar in [0, 0.5].

    Returns:
      float32 of the image's shape, in [0, 1].

    Raises:
      ValueError: saturation or hue for an image that has not 3 channels; brightness or
        contrast for one that has neither 1 nor 3; the key is raw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import colour_jitter
      >>> red = jnp.zeros((1, 1, 3)).at[..., 0].set(0.5)
      >>> jittered = colour_jitter(red, jax.random.key(0), brightness=0.4)
      >>> bool(0.3 <= jittered[0, 0, 0] <= 0.7), float(jittered[0, 0, 1])
      (True, 0.0)
    """
    check_key(key, "colour_jitter(key=...)")
    amounts = (brightness, contrast, saturation, hue)
    given = tuple(zip(_NAMES, amounts, strict=True))
    for name, value in given:
        check_numbers("colour_jitter", name, value, least=0)
    strengths = {name: value for name, value in given if not _is_off(value)}
    _check_channels(image, strengths)
    key_change, key_time = jax.random.split(key)
    # four draws whatever is asked for, so that no change alters another's draw
    draws = jax.random.uniform(key_change, (4,), jnp.float32, -1.0, 1.0)
    times = jax.random.uniform(key_time, (4,), jnp.float32)
    changes = {
        name: jnp.asarray(strengths[name], jnp.float32) * draw
        for name, draw in zip(_NAMES, draws, strict=True)
        if name in strengths
    }
    return _recolour(image, changes, times)


def _recolour(
    image: jax.Array, changes: Mapping[str, jax.Array], times: jax.Array
) -> jax.Array:
    """Applies the named changes in the order of their times, `_NAMES` by `_NAMES`."""
    # colours first: rows of pixels fill the vector units, three channels do not
    planes = jnp.moveaxis(jnp.asarray(image, jnp.float32), -1, 0)
    kinds = [kind for kind, name in enumerate(_BLENDS) if name in changes]
    if kinds:
        order = jnp.argsort(times[jnp.array(kinds)])
        kind = jnp.array(kinds)[order]
        factor = 1 + jnp.stack([changes[_BLENDS[kind]] for kind in kinds])[order]
        is_early = times[kind] < times[3]
    else:
        kind = factor = is_early = jnp.zeros(0)

    def blend(planes: jax.Array, factor: jax.Array) -> jax.Array:
        for i in range(len(kinds)):
            planes = _blend(planes, factor[i], kind[i])
        return planes

    if "hue" not in changes:
        return jnp.moveaxis(blend(planes, factor), 0, -1)
    planes = blend(planes, jnp.where(is_early, factor, 1.0))
    planes = _turn_hue(planes, changes["hue"])
    planes = blend(planes, jnp.where(is_early, 1.0, factor))
    return jnp.moveaxis(planes, 0, -1)


def _blend(planes: jax.Array, factor: jax.Array, kind: jax.Array) -> jax.Array:
    """clip(f x + (1 − f) target), the target by the index into `_BLENDS`."""
    grey = planes[0]
    if len(planes) == 3:
        grey = sum(w * plane for w, plane in zip(_GREY_WEIGHTS, planes, strict=True))
    target = jnp.where(kind == 1, jnp.mean(grey), grey)
    target = jnp.where(kind == 0, 0.0, target)
    return jnp.clip(factor * planes + (1 - factor) * target, 0.0, 1.0)


def _turn_hue(planes: jax.Array, turn: jax.Array) -> jax.Array:
    """Moves the hue by `turn`, keeping value and saturation of HSV.

    The hue in sixths of a turn is h; a channel is V − C clip(min(k, 4 − k), 0, 1) with
    k = (h + 5, 3, 1) mod 6 for red, green, blue, V the largest channel and C the
    largest less the smallest.
    """
    red, green, blue = planes
    value = jnp.maximum(jnp.maximum(red, green), blue)
    chroma = value - jnp.minimum(jnp.minimum(red, green), blue)
    inverse = 1 / jnp.where(chroma > 0, chroma, 1.0)
    h = jnp.where(
        value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4
    )
    h = jnp.where(value == red, (green - blue) * inverse, h) + 6 * turn

    def channel(offset: int) -> jax.Array:
        k = h + offset
        k = k - 6 * jnp.floor(k / 6)  # faster than mod, which calls fmod
        return value - chroma * jnp.clip(jnp.minimum(k, 4 - k), 0.0, 1.0)

    return jnp.clip(jnp.stack([channel(5), channel(3), channel(1)]), 0.0, 1.0)


def _is_off(strength: ArrayLike) -> bool:
    """Whether the strength is known to be zero while tracing."""
    return isinstance(strength, int | float) and strength == 0


def _check_channels(image: jax.Array, strengths: Mapping[str, ArrayLike]) -> None:
    channels = jnp.shape(image)[-1]
    for name in strengths:
        allowed = (1, 3) if name in ("brightness", "contrast") else (3,)
        if channels not in allowed:
            raise ValueError(
                f"`colour_jitter({name}=...)` needs images with "
                f"{' or '.join(map(str, allowed))} channels; got {channels}. "
                f"Leave {name} out for these images."
            )
