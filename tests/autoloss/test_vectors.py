import jax
import jax.numpy as jnp
import pytest

from metax.autoloss.vectors import custom, remembering, validation_loss
from tests.autoloss.observations import observation


def of_losses(**options):
    plain = {"name": "mine", "version": 1, "size": 2}
    return custom(lambda seen: seen.losses, **(plain | options))


def test_custom_features_are_the_function_of_the_last_observation():
    features = of_losses()
    state, x = features.init()
    assert x.tolist() == [0.0, 0.0]
    state, x = jax.jit(features.update)(state, observation(losses=jnp.array([3, 4])))
    assert x.tolist() == [3.0, 4.0]
    assert x.dtype == jnp.zeros(()).dtype
    assert features.reset(state)[1].tolist() == [0.0, 0.0]


def test_custom_features_are_described_by_what_was_said_of_them():
    spec = of_losses(version=3, refresh="all", observe_every=5).spec
    assert spec == ("mine", 3, 2, {}, "all", 5)


@pytest.mark.parametrize(
    ("options", "argument"),
    [
        ({"name": "paper"}, "name"),
        ({"name": ""}, "name"),
        ({"version": -1}, "version"),
        ({"size": 0}, "size"),
        ({"refresh": "none"}, "refresh"),
        ({"observe_every": 0}, "observe_every"),
    ],
)
def test_a_description_that_cannot_be_is_refused(options, argument):
    with pytest.raises(ValueError, match=rf"`custom\({argument}="):
        of_losses(**options)


def test_a_vector_of_another_size_is_refused_at_the_first_update():
    features = of_losses(size=3)
    with pytest.raises(ValueError, match=r"must return an array of shape \(3,\)"):
        features.update((), observation())


@pytest.mark.parametrize(
    ("extras", "expected"),
    [({}, 7.0), ({"valid_loss": 5.0}, 5.0), ({"valid_loss": [3.0, 4.0]}, 3.0)],
)
def test_the_validation_loss_is_the_given_one_else_the_metric(extras, expected):
    extras = {name: jnp.array(value) for name, value in extras.items()}
    seen = observation(metric=jnp.array(7.0), extras=extras)
    assert float(validation_loss(seen)) == expected


def test_what_is_remembered_stays_between_refreshes():
    """A run gives zeros there; a name that it does not give is not made up."""
    plain = custom(
        lambda seen: jnp.stack([seen.extras["a"], seen.extras.get("b", jnp.nan)]),
        name="mine", version=1, size=2,
    )  # fmt: skip
    features = remembering(plain, {"a": 7.0, "b": 5.0})
    see = lambda a, refreshed: observation(
        extras={"a": jnp.array(a)}, metric_refreshed=jnp.array(refreshed)
    )
    state, _ = features.init()
    shown = []
    for a, refreshed in ((0.0, False), (2.0, True), (0.0, False), (3.0, True)):
        state, x = features.update(state, see(a, refreshed))
        shown.append(x)
    assert [float(x[0]) for x in shown] == [7, 2, 2, 3]
    assert jnp.isnan(jnp.stack(shown)[:, 1]).all()
    state, x = features.update(features.reset(state)[0], see(0.0, False))
    assert float(x[0]) == 7
