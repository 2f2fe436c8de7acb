import pytest

from metax.tasks.ranges import AUGMENTATION, EPSILON, LABELS, stock_hparams

NAMES = (
    *AUGMENTATION,
    *LABELS,
    *EPSILON,
    "input_dropout",
    "dropout_3",
    "weight_decay",
    "weight_decay_stage_1",
    "norm_decay",
)


def test_names_keep_their_order():
    assert tuple(stock_hparams(NAMES)) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_tuning_starts_between_the_bounds(name):
    spec = stock_hparams([name])[name]
    assert spec.lower < spec.init < spec.upper
    assert spec.perturbation > 0
    assert spec.scale == ("log" if spec.lower > 0 and not spec.discrete else "logit")


def test_only_what_acts_on_the_whole_batch_is_shared_and_only_counts_are_discrete():
    specs = stock_hparams(NAMES)
    assert {n for n in NAMES if specs[n].shared} == {"norm_epsilon"}
    assert {n for n in NAMES if specs[n].discrete} == {"cutout_length", "cutout_holes"}


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="got 'learning_rate'"):
        stock_hparams(["rotation", "learning_rate"])
