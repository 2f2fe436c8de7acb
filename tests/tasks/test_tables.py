import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.tasks import join_splits
from metax.tasks.tables import Split, check_settings, cut, l1_penalty, shared_rule

SETTINGS = {
    "reward": "best",
    "optimizer_sharing": "variable",
    "at_least_one": {"validate_every": 1},
    "at_least_zero": {"patience": None, "std": 0.0, "lam": jnp.array(-1.0)},
}


def test_a_table_is_cut_in_the_order_of_its_rows():
    inputs, targets = np.arange(30.0).reshape(15, 2), np.arange(15)
    splits = cut(inputs, targets, np.arange(15.0), (1, 2, 3, 4, 5))
    assert [len(split.inputs) for split in splits] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(
        np.concatenate([split.targets for split in splits]), targets
    )
    assert splits.task_train.inputs[0].tolist() == [6.0, 7.0]
    assert [float(split.noise) for split in splits] == [0.0, 1.5, 4.0, 7.5, 12.0]
    assert {split.noise.dtype for split in splits} == {np.dtype(np.float32)}


def test_joined_splits_have_the_noise_of_all_their_rows():
    inputs, targets = np.arange(30.0).reshape(15, 2), np.arange(15)
    splits = cut(inputs, targets, np.arange(15.0), (1, 2, 3, 4, 5))
    joined = join_splits(*splits)
    np.testing.assert_array_equal(joined.inputs, inputs)
    np.testing.assert_array_equal(joined.targets, targets)
    np.testing.assert_allclose(joined.noise, 7.0, rtol=1e-6)
    alone = join_splits(Split(inputs, targets, np.float32(3)))
    np.testing.assert_allclose(alone.noise, 3.0)


def test_the_gradient_of_the_penalty_is_the_sign_and_zero_at_zero():
    params = {"a": jnp.array([-2.0, 0.0]), "b": jnp.array(3.0)}
    loss, grad = jax.value_and_grad(l1_penalty(2.0))(params, None, None)
    assert float(loss) == 10.0
    assert (grad["a"].tolist(), float(grad["b"])) == ([-2.0, 0.0], 2.0)


def test_the_penalty_of_what_is_no_number_is_none():
    assert np.isnan(l1_penalty(2.0)({"a": jnp.array([1.0, jnp.nan])}, None, None))


def test_the_penalty_has_the_dtype_of_the_parameters():
    loss = l1_penalty(jnp.array(0.1, jnp.float64))
    assert loss(jnp.ones(3, jnp.float32), None, None).dtype == jnp.float32


def test_one_state_an_action_takes_a_rule_an_action():
    assert shared_rule("rule", "variable") == "rule"
    assert shared_rule("rule", "action") == {0: "rule", 1: "rule"}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"reward": "mean"}, r"`f\(reward=...\)` must be 'best' or 'last'; got 'mean'"),
        ({"optimizer_sharing": "loss"}, r"'variable' or 'action'; got 'loss'"),
        ({"at_least_one": {"n": 0}}, r"`f\(n=...\)` must be at least 1; got 0"),
        ({"at_least_zero": {"x": -0.1}}, r"`f\(x=...\)` must be at least 0; got -0.1"),
    ],
)
def test_settings_that_mean_nothing_are_named(setting, message):
    check_settings("f", **SETTINGS)  # arrays are not looked at
    with pytest.raises(ValueError, match=message):
        check_settings("f", **{**SETTINGS, **setting})
