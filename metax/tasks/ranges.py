"""The hyperparameters of image classifiers: names, ranges and where tuning starts.

The ranges are those of the experiments on self-tuning networks (MacKay et al., ICLR
2019, arXiv 1903.03088; Bae & Grosse, NeurIPS 2020, arXiv 2010.13514) where these had
the hyperparameter, and customary ones otherwise.
"""

from collections.abc import Collection

from metax.base import Hyperparameter

__all__ = ["AUGMENTATION", "EPSILON", "LABELS", "stock_hparams"]

AUGMENTATION = {
    "rotation": Hyperparameter(5.0, 0.0, 45.0, "logit"),  # degrees
    "shear": Hyperparameter(5.0, 0.0, 45.0, "logit"),  # degrees
    "translate": Hyperparameter(0.05, 0.0, 0.5, "logit"),  # of the side
    "zoom": Hyperparameter(0.05, 0.0, 0.5, "logit"),
    "brightness": Hyperparameter(0.05, 0.0, 1.0, "logit"),
    "contrast": Hyperparameter(0.05, 0.0, 1.0, "logit"),
    "saturation": Hyperparameter(0.05, 0.0, 1.0, "logit"),
    "hue": Hyperparameter(0.05, 0.0, 0.5, "logit"),
    "input_scale": Hyperparameter(0.05, 0.0, 0.3, "logit", perturbation=0.5),
    "cutout_length": Hyperparameter(4.0, 2.0, 24.0, "logit", discrete=True),  # pixels
    "cutout_holes": Hyperparameter(1.0, 0.0, 5.0, "logit", discrete=True),
}
LABELS = {
    "label_smoothing": Hyperparameter(0.05, 0.0, 0.5, "logit"),
    "mixup": Hyperparameter(0.2, 0.01, 10.0, "log"),
}
EPSILON = {
    "norm_epsilon": Hyperparameter(
        1e-5, 1e-6, 0.1, "log", perturbation=0.5, shared=True
    )
}
_RATE = Hyperparameter(0.05, 0.0, 0.95, "logit")
_DECAY = Hyperparameter(1e-4, 1e-7, 10.0, "log")


def stock_hparams(names: Collection[str]) -> dict[str, Hyperparameter]:
    """Customary ranges, starts and perturbations of what `image_tuning` tunes.

    Dropout rates, of any name with "dropout" in it, in 0..0.95 from 0.05; decays, all
    `weight_decay...` and `norm_decay`, in 1e-7..10 from 1e-4.

    Args:
      names: which to give.

    Returns:
      A new dict in the order of `names`; replace fields by `_replace`.

    Raises:
      ValueError: a name is unknown.

    Example:
      >>> from metax.tasks import stock_hparams
      >>> specs = stock_hparams(["dropout_1", "rotation"])
      >>> [(name, spec.init, spec.upper) for name, spec in specs.items()]
      [('dropout_1', 0.05, 0.95), ('rotation', 5.0, 45.0)]
    """
    return {name: _stock_hparam(name) for name in names}


def _stock_hparam(name: str) -> Hyperparameter:
    plain = {**AUGMENTATION, **LABELS, **EPSILON, "norm_decay": _DECAY}
    if name in plain:
        return plain[name]
    if name == "weight_decay" or name.startswith("weight_decay_"):
        return _DECAY
    if "dropout" in name:
        return _RATE
    raise ValueError(
        f"`stock_hparams(names=...)` knows {', '.join(plain)}, weight_decay, "
        f"weight_decay_<layer> and what has 'dropout' in it; got {name!r}."
    )
