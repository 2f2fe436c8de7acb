import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.base import Hyperparameter
from metax.implicit import implicit_hypergradient
from metax.implicit.objectives import check_hparams, merge, partition, per_example
from tests.implicit import nonlinear

PROBLEM = nonlinear.problem()


def test_only_float_leaves_are_variables():
    params = PROBLEM.init(jax.random.key(0))
    floats, rest = partition(params)
    assert floats["count"] is None
    assert jax.tree.leaves(rest) == [0]
    merged = merge(floats, rest)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    assert merged["count"].dtype == jnp.int32


def test_what_is_not_shared_gets_a_value_per_example():
    spread = per_example(PROBLEM, nonlinear.HPARAMS, {"x": jnp.zeros((5, 2))})
    np.testing.assert_array_equal(spread["decay"], np.tile([0.1, 0.3], (5, 1)))
    assert spread["gain"].shape == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gain": None}, r"names.*\['decay', 'gain'\]; got \['decay'\]"),
        ({"rate": 0.1}, r"names.*got \['decay', 'gain', 'rate'\]"),
        ({"decay": jnp.ones(3)}, r"shape of `init` for 'decay', \[2\]; got \[3\]"),
    ],
)
def test_names_and_shapes_are_those_of_the_problem(change, message):
    hparams = {**nonlinear.HPARAMS, **change}
    hparams = {name: value for name, value in hparams.items() if value is not None}
    with pytest.raises(
        ValueError, match=rf"f\(hparams=\.\.\.\)` must have .*{message}"
    ):
        check_hparams("f", PROBLEM, hparams)


def test_a_discrete_hyperparameter_is_refused():
    specs = {**PROBLEM.hparams, "gain": Hyperparameter(2.0, discrete=True)}
    with pytest.raises(ValueError, match="'gain' is discrete"):
        check_hparams("f", PROBLEM._replace(hparams=specs), nonlinear.HPARAMS)


def test_a_training_loss_without_the_axis_of_examples_is_refused():
    problem = PROBLEM._replace(
        train_loss=lambda *arguments: PROBLEM.train_loss(*arguments).mean()
    )
    data = nonlinear.make_data()
    params = problem.init(jax.random.key(0))
    with pytest.raises(
        ValueError, match=r"one loss per example, shape \[12\]; got \[\]"
    ):
        implicit_hypergradient(
            problem, params, nonlinear.HPARAMS, data["train"], data["valid"]
        )


def test_whole_numbers_become_floats():
    hparams = check_hparams("f", PROBLEM, {"decay": [1, 2], "gain": 3})
    assert all(jnp.issubdtype(value.dtype, jnp.floating) for value in hparams.values())
