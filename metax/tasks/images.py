"""Random changes to images on the device, with strengths that may be arrays.

Hyperparameter tuners move the strengths while the network trains: so they are arrays,
one for each example, and a new value compiles nothing anew. Each function is written
for one image and one key; `transform_images` maps them over a batch. What a change
draws is its own affair: the strengths say from how wide a range.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from metax.arguments import check_axes, check_number, check_numbers
from metax.base import check_key
from metax.tasks.colour import colour_jitter
from metax.tasks.mixing import check_per_example

__all__ = [
    "affine",
    "cutout",
    "horizontal_flip",
    "scaling_noise",
    "transform_images",
]

_AFFINE = ("rotation", "shear", "translate", "zoom")
_COLOUR = ("brightness", "contrast", "saturation", "hue")
_STRENGTHS = (*_AFFINE, *_COLOUR, "input_scale", "cutout_length", "cutout_holes")

_IMAGE = "height, width, channels"


def transform_images(
    images: jax.Array,
    strengths: Mapping[str, ArrayLike],
    key: jax.Array,
    *,
    mean: ArrayLike = 0.0,
    std: ArrayLike = 1.0,
) -> jax.Array:
    """Augments and normalises a batch, with strengths of its own for each image.

        affine → colour → (255 x − mean) / std → input scaling → cutout

    Only stages with a name in `strengths` are run. The holes are zero after the
    normalisation, so they have the colour of the mean. No gradient flows into the
    strengths. A flip is not part of it: two views of one batch often share theirs
    (`horizontal_flip`).

    Args:
      images: [batch, height, width, channels], integers in [0, 255] or floats in
        [0, 1].
      strengths: scalars or arrays of shape (batch,) for some of `rotation`, `shear`,
        `translate`, `zoom` (see `affine`), `brightness`, `contrast`, `saturation`,
        `hue` (`colour_jitter`), `input_scale` (`scaling_noise`), `cutout_length` and
        `cutout_holes` (`cutout`; one hole without the latter, never more than 4).
      key: a typed key.
      mean: in the units of 0 to 255, a scalar or [channels], as from `normalization`.
      std: likewise, above 0; 255 with a mean of 0 gives images in [0, 1].

    Returns:
      float32 of the shape of `images`.

    Raises:
      ValueError: a name in `strengths` is unknown; `cutout_holes` without
        `cutout_length`; a strength or the images have a wrong shape; saturation or hue
        for images that have not 3 channels; the key is raw.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.tasks import transform_images
      >>> images = jnp.full((2, 8, 8, 3), 255, jnp.uint8)
      >>> strengths = {"cutout_length": jnp.array([0.0, 16.0])}
      >>> cut = transform_images(images, strengths, jax.random.key(0), std=255.0)
      >>> [round(float(image.mean()), 3) for image in cut]
      [1.0, 0.0]

    Reference:
      MacKay et al., Self-Tuning Networks, ICLR 2019, arXiv:1903.03088, section 4.3.
    """
    check_key(key, "transform_images(key=...)")
    _check_images(images, strengths)
    batch = images.shape[0]
    values = {
        name: jnp.broadcast_to(jnp.asarray(value, jnp.float32), (batch,))
        for name, value in strengths.items()
    }
    values = jax.lax.stop_gradient(values)
    check_numbers("transform_images", "mean", mean)
    check_numbers("transform_images", "std", std, above=0)
    is_integer = jnp.issubdtype(images.dtype, jnp.integer)
    x = jnp.asarray(images, jnp.float32) / (255.0 if is_integer else 1.0)
    mean, std = jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32)

    def transform(x: jax.Array, values: dict, key: jax.Array) -> jax.Array:
        key_affine, key_colour, key_scale, key_cutout = jax.random.split(key, 4)
        moves = {name: values[name] for name in _AFFINE if name in values}
        colours = {name: values[name] for name in _COLOUR if name in values}
        if moves:
            x = affine(x, key_affine, **moves)
        if colours:
            x = colour_jitter(x, key_colour, **colours)
        x = (255 * x - mean) / std
        if "input_scale" in values:
            x = scaling_noise(x, key_scale, strength=values["input_scale"])
        if "cutout_length" in values:
            length, holes = values["cutout_length"], values.get("cutout_holes", 1)
            max_holes = 4 if "cutout_holes" in values else 1
            x = cutout(x, key_cutout, length=length, holes=holes, max_holes=max_holes)
        return x

    return jax.vmap(transform)(x, values, jax.random.split(key, batch))


def affine(
    image: jax.Array,
    key: jax.Array,
    *,
    rotation: ArrayLike = 0.0,
    shear: ArrayLike = 0.0,
    translate: ArrayLike = 0.0,
    zoom: ArrayLike = 0.0,
) -> jax.Array:
    """Shears, zooms, rotates and shifts one image at random.

        p' = f R(a) S(b) p + t        p, p' from the centre of the image
        a ~ U[−rotation, rotation],   b ~ U[−shear, shear]
        t ~ U[−translate, translate] · (height, width),   f ~ U[1 − zoom, 1 + zoom]

    S(b) leans columns by tan b, R(a) turns counterclockwise, f above 1 enlarges. A
    pixel gets the nearest one of the image, or zero where that lies outside: one gather
    for all four. Strengths of zero return the image exactly.

    Args:
      image: [height, width, channels].
      key: a typed key.
      rotation: in degrees, a scalar, at least 0.
      shear: in degrees, a scalar in [0, 90).
      translate: fraction of the side, a scalar, at least 0; an offset for each axis.
      zoom: a scalar in [0, 1).

    Returns:
      Shape and dtype of the image.

    Raises:
      ValueError: the key is raw.
    """
    check_key(key, "affine(key=...)")
    check_axes("affine", "image", image, _IMAGE)
    moves = {"rotation": rotation, "shear": shear, "translate": translate, "zoom": zoom}
    for name, strength in moves.items():
        check_number("affine", name, strength)
    image = jnp.asarray(image)
    draws = jax.random.uniform(key, (5,), jnp.float32, -1.0, 1.0)
    rotation, shear, translate, zoom = (
        jnp.asarray(strength, jnp.float32)
        for strength in (rotation, shear, translate, zoom)
    )
    sides = jnp.array(image.shape[:2], jnp.float32)
    shift = translate * sides * draws[2:4]
    return _warp(
        image, rotation * draws[0], shear * draws[1], shift, 1 + zoom * draws[4]
    )


def _warp(
    image: jax.Array,
    angle: jax.Array,
    lean: jax.Array,
    shift: jax.Array,
    factor: jax.Array,
) -> jax.Array:
    """Moves the pixels: angles in degrees, shift (down, right) in pixels."""
    height, width, channels = image.shape
    centre_y, centre_x = (height - 1) / 2, (width - 1) / 2
    y = jnp.arange(height, dtype=jnp.float32)[:, None] - centre_y - shift[0]
    x = jnp.arange(width, dtype=jnp.float32)[None, :] - centre_x - shift[1]
    cos, sin = jnp.cos(jnp.deg2rad(angle)), jnp.sin(jnp.deg2rad(angle))
    # p = S⁻¹ R⁻¹ (p' − t) / f: where each new pixel comes from (y points down)
    source_y = (sin * x + cos * y) / factor
    source_x = (cos * x - sin * y) / factor - jnp.tan(jnp.deg2rad(lean)) * source_y
    row = jnp.floor(source_y + centre_y + 0.5)
    column = jnp.floor(source_x + centre_x + 0.5)
    is_inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    # pixels from outside get the index past the last one, which is filled with zero
    index = row.astype(jnp.int32) * width + column.astype(jnp.int32)
    index = jnp.where(is_inside, index, height * width)
    pixels = image.reshape(height * width, channels)
    return pixels.at[index].get(mode="fill", fill_value=0)


def horizontal_flip(image: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors one image, left to right, with chance ½.

    Args:
      image: [height, width, channels], any dtype.
      key: a typed key.

    Returns:
      Shape and dtype of the image.

    Raises:
      ValueError: the key is raw.
    """
    check_key(key, "horizontal_flip(key=...)")
    check_axes("horizontal_flip", "image", image, _IMAGE)
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def scaling_noise(
    image: jax.Array, key: jax.Array, *, strength: ArrayLike
) -> jax.Array:
    """Multiplies one image by one factor f ~ U[1/(1 + s), 1 + s].

    One draw an image: all its pixels and channels share the factor. Meant for images
    that are normalised already.

    Args:
      image: any shape.
      key: a typed key.
      strength: s, a scalar, at least 0.

    Returns:
      float32 of the image's shape.

    Raises:
      ValueError: the key is raw.
    """
    check_key(key, "scaling_noise(key=...)")
    check_number("scaling_noise", "strength", strength, least=0)
    high = 1 + jnp.asarray(strength, jnp.float32)
    draw = jax.random.uniform(key, (), jnp.float32)
    return jnp.asarray(image, jnp.float32) * (1 / high + (high - 1 / high) * draw)


def cutout(
    image: jax.Array,
    key: jax.Array,
    *,
    length: ArrayLike,
    holes: ArrayLike,
    max_holes: int = 4,
) -> jax.Array:
    """Sets square holes of one image to zero.

        [trunc(clip(c − L/2, 0, size)), trunc(clip(c + L/2, 0, size)))   in each axis

    are the rows and columns of a hole whose centre c is uniform over the pixels: L
    pixels wide, and less where it reaches over the edge. Shapes are static: `max_holes`
    are drawn, and the first `holes` of them are cut.

    Args:
      image: [height, width, channels].
      key: a typed key.
      length: L in pixels, a scalar, a whole number in any dtype, at least 0.
      holes: how many, a scalar, likewise; `max_holes` at most, more are not cut.
      max_holes: how many are drawn, at least 1.

    Returns:
      Shape and dtype of the image.

    Raises:
      ValueError: `max_holes` is below 1; the key is raw.

    Reference:
      DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with
      Cutout, 2017, arXiv:1708.04552.
    """
    check_key(key, "cutout(key=...)")
    if max_holes < 1:
        raise ValueError(
            f"`cutout(max_holes=...)` must be at least 1; got {max_holes}."
        )
    check_axes("cutout", "image", image, _IMAGE)
    check_number("cutout", "length", length, least=0)
    check_number("cutout", "holes", holes, least=0)
    height, width, _ = image.shape
    key_row, key_column = jax.random.split(key)
    rows = jax.random.randint(key_row, (max_holes,), 0, height, jnp.int32)
    columns = jax.random.randint(key_column, (max_holes,), 0, width, jnp.int32)
    is_cut = jnp.arange(max_holes) < jnp.asarray(holes)
    in_rows = _span(rows, length, height) & is_cut[:, None]
    in_columns = _span(columns, length, width)
    is_hole = jnp.any(in_rows[:, :, None] & in_columns[:, None, :], axis=0)
    return jnp.where(is_hole[..., None], jnp.zeros((), image.dtype), image)


def _span(centre: jax.Array, length: ArrayLike, size: int) -> jax.Array:
    """Which of `size` pixels the hole covers, [holes, size]."""
    half = jnp.asarray(length, jnp.float32) / 2
    start, stop = (
        jnp.trunc(jnp.clip(edge, 0, size))[:, None]
        for edge in (centre - half, centre + half)
    )
    place = jnp.arange(size)
    return (place >= start) & (place < stop)


def _check_images(images: jax.Array, strengths: Mapping[str, ArrayLike]) -> None:
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(
            "`transform_images(images=...)` must have the axes batch, height, width, "
            f"channels; got shape {images.shape}. A grey image has one channel."
        )
    for name, value in strengths.items():
        if name not in _STRENGTHS:
            raise ValueError(
                f"`transform_images(strengths=...)` knows {', '.join(_STRENGTHS)}; "
                f"got {name!r}."
            )
        argument = f"transform_images(strengths[{name!r}])"
        check_per_example(argument, value, images.shape[0])
        check_numbers(
            "transform_images", f"strengths={{{name!r}: ...}}", value, least=0
        )
    if "cutout_holes" in strengths and "cutout_length" not in strengths:
        raise ValueError(
            "`transform_images(strengths=...)` has 'cutout_holes' without "
            "'cutout_length'; add the length in pixels."
        )
