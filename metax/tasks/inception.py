"""The inception score of images, and the classifier that it rests on."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from metax.arguments import check_axes, check_length
from metax.base import Task
from metax.tasks.convolution import Conv
from metax.tasks.labelled import image_classification
from metax.tasks.models import max_pool

__all__ = [
    "IMAGE_SETS",
    "ScoreClassifier",
    "class_probabilities",
    "classifier_task",
    "inception_score",
    "set_format",
]

# Shape of an image, and the stored value that stands for full intensity.
IMAGE_SETS = {
    "digits": ((8, 8, 1), 16),
    "mnist": ((28, 28, 1), 255),
    "fashion_mnist": ((28, 28, 1), 255),
    "cifar10": ((32, 32, 3), 255),
}


class ScoreClassifier(nn.Module):
    """Two 5 × 5 convolutions, each with ReLU and 2 × 2 max pooling, two dense layers.

    Attributes:
      channels: of the two convolutions.
      width: units of the hidden dense layer, half of which are dropped in training.
      num_classes: how many logits.
    """

    channels: tuple[int, int] = (32, 64)
    width: int = 1024
    num_classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Logits [batch, num_classes] of images [batch, height, width, channels]."""
        for i, channels in enumerate(self.channels):
            conv = Conv(channels, 5, padding="SAME", name=f"conv_{i}")
            x = max_pool(nn.relu(conv(x)), 2)
        x = nn.relu(nn.Dense(self.width, name="hidden")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="output")(x)


def classifier_task(dataset: str, small: bool = False) -> Task:
    """The classifier that scores generated images, as a task to be trained first.

    The published one took 20 000 steps of Adam at 1e-4 on MNIST. Scores of different
    classifiers are not comparable; on CIFAR-10 that includes the literature's, which
    are those of Inception networks.

    Args:
      dataset: "mnist", "fashion_mnist", "cifar10" or "digits".
      small: 8 and 16 channels and 64 hidden units, for trials on a CPU.

    Returns:
      A `Task` of `image_classification` on batches of 128 of a `Split`, whose
      parameters are what `gan.image_data(classifier=...)` wants.

    Raises:
      ValueError: the name is unknown.

    Example:
      >>> import jax
      >>> from metax.tasks import gan
      >>> task = gan.classifier_task("digits", small=True)
      >>> params = jax.eval_shape(task.init, jax.random.key(0))
      >>> params["params"]["conv_1"]["kernel"].shape
      (5, 5, 8, 16)

    Note:
      The weights begin Glorot-uniform (convolutions) and LeCun-normal (dense layers);
      the released classifier's began with N(0, 0.1²), truncated.
    """
    shape, full = set_format(dataset, "classifier_task")
    model = ScoreClassifier((8, 16), 64) if small else ScoreClassifier()
    return image_classification(model, shape, batch_size=128, std=full)


def class_probabilities(classifier: Any, image: jax.Array) -> jax.Array:
    """What a trained classifier sees in images.

    Args:
      classifier: parameters of `classifier_task`, of either size.
      image: [batch, height, width, channels], float, in [0, 1].

    Returns:
      [batch, num_classes], each row with sum 1.
    """
    layers = classifier["params"]
    model = ScoreClassifier(
        channels=(layers["conv_0"]["bias"].size, layers["conv_1"]["bias"].size),
        width=layers["hidden"]["bias"].size,
        num_classes=layers["output"]["bias"].size,
    )
    return jax.nn.softmax(jnp.asarray(model.apply(classifier, image, train=False)))


def inception_score(
    probabilities: jax.Array, splits: int = 5
) -> tuple[jax.Array, jax.Array]:
    """How sure a classifier is of each image, and how varied its answers are.

        score = exp(mean_i KL(p_i ‖ mean_j p_j))

    1 when all answers are alike, the number of classes when each is certain and all
    classes are equally frequent.

    Args:
      probabilities: [n, num_classes].
      splits: parts, each scored by itself; n must be a multiple of it.

    Returns:
      Mean and standard deviation of the score over the parts.

    Raises:
      ValueError: `splits` does not divide n.

    Example:
      >>> import jax.numpy as jnp
      >>> from metax.tasks import gan
      >>> [round(float(x), 3) for x in gan.inception_score(jnp.eye(4), splits=1)]
      [4.0, 0.0]

    Reference:
      Salimans et al., "Improved techniques for training GANs", 2016, arXiv 1606.03498,
      section 4.
    """
    check_axes("inception_score", "probabilities", probabilities, "images, classes")
    check_length("inception_score", "probabilities", probabilities)
    num, num_classes = probabilities.shape
    if splits < 1 or num % splits:
        raise ValueError(
            "`inception_score(splits=...)` must divide the number of rows; got "
            f"splits={splits}, {num} rows."
        )
    parts = probabilities.reshape(splits, num // splits, num_classes)
    # rel_entr(0, q) is 0, where p·log(p/q) written out would be NaN
    divergence = jax.scipy.special.rel_entr(parts, parts.mean(1, keepdims=True))
    scores = jnp.exp(divergence.sum(-1).mean(-1))
    return scores.mean(), scores.std()


def set_format(dataset: str, function: str) -> tuple[tuple[int, int, int], int]:
    """Shape and full intensity of the images of a set.

    Args:
      dataset: the name.
      function: who asks, for the error.

    Returns:
      (height, width, channels) and the stored value of full intensity.

    Raises:
      ValueError: the name is unknown.
    """
    if dataset not in IMAGE_SETS:
        names = ", ".join(map(repr, IMAGE_SETS))
        raise ValueError(
            f"`{function}(dataset=...)` must be one of {names}; got {dataset!r}."
        )
    return IMAGE_SETS[dataset]
