"""Transforms of hyperparameters: inverses, bounds, overflow, counts, entropy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import Hyperparameter
from metax.stn import constrain, entropy, unconstrain
from metax.stn.hparams import inverse_softplus, unconstrained_bounds

SPECS = {
    "linear": Hyperparameter(0.0, -2e6, 2e6, "linear"),
    "log": Hyperparameter(1.0, 1e-7, 1e6, "log"),
    "logit": Hyperparameter(0.5, 0.0, 1.0, "logit"),
    "softplus": Hyperparameter(1.0, 0.0, math.inf, "softplus"),
}
LIMITS = {
    "rate": Hyperparameter(0.05, 0.0, 0.95, "logit"),
    "angle": Hyperparameter(5.0, -10.0, 45.0, "logit"),
    "decay": Hyperparameter(1e-4, 1e-7, 10.0, "log"),
    "open_log": Hyperparameter(1.0, 0.0, math.inf, "log"),
    "linear": Hyperparameter(0.0, -1.0, 3.0),
    "free": Hyperparameter(0.0),
    "alpha": Hyperparameter(0.05, 0.01, math.inf, "softplus"),
    "length": Hyperparameter(4, 2, 24, "logit", discrete=True),
    "holes": Hyperparameter(1, 0, 5, "logit", discrete=True),
}
BY_NAME = pytest.mark.parametrize("name", LIMITS)


@functools.partial(jax.jit, static_argnums=0)
def natural(spec, u):
    return constrain({"x": spec}, {"x": u})["x"]


@functools.partial(jax.jit, static_argnums=0)
def coordinate(spec, x):
    return unconstrain({"x": spec}, {"x": x})["x"]


@functools.partial(jax.jit, static_argnums=0)
def natural_and_slope(spec, u):
    return jax.vmap(jax.value_and_grad(lambda u: natural(spec, u)))(u)


def decades(name):
    """Twelve of them within the bounds; of a logit six from either end."""
    if name == "logit":
        ends = np.logspace(-12, math.log10(0.5), 49)
        return np.concatenate([ends, 1 - ends[:25]])
    if name == "linear":
        return np.concatenate([np.logspace(-6, 6, 49), -np.logspace(-6, 6, 49)])
    return np.logspace(-6, 6, 49)[:-1]


@pytest.mark.parametrize(
    # float32: u of a logarithm has an error of u·eps, of which x = e^u makes a
    # relative one of 14·eps
    ("dtype", "tolerance"),
    [(jnp.float64, 1e-12), (jnp.float32, 2e-6)],
)
@pytest.mark.parametrize("name", SPECS)
def test_natural_values_survive_a_round_trip_over_twelve_decades(
    name, dtype, tolerance
):
    x = decades(name)
    if name == "logit" and dtype == jnp.float32:
        x = x[x < 0.5]  # 1 - 1e-12 is 1 there
        x = x[x > 1e-6]  # x is kept an eps away from the ends
    x = jnp.asarray(x, dtype)
    u = coordinate(SPECS[name], x)
    back = natural(SPECS[name], u)
    assert u.dtype == back.dtype == dtype
    np.testing.assert_allclose(back, x, rtol=tolerance)


@pytest.mark.parametrize("name", SPECS)
def test_coordinates_survive_a_round_trip(name):
    u = jnp.linspace(-13.0, 13.0, 53)
    back = coordinate(SPECS[name], natural(SPECS[name], u))
    np.testing.assert_allclose(back, u, atol=1e-8)  # 1 - sigmoid(13) is 2e-6


@BY_NAME
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_perturbed_values_stay_within_the_bounds(name, dtype):
    spec = LIMITS[name]
    u = np.asarray(coordinate(spec, spec.init), dtype)
    z = np.random.default_rng(0).standard_normal(100_000).astype(dtype)
    x = np.asarray(natural(spec, u + 3 * z))
    assert x.dtype == dtype
    assert x.shape == (100_000,)
    assert np.isfinite(x).all()
    assert spec.lower <= x.min() < x.max() <= spec.upper


@BY_NAME
def test_nothing_overflows_at_a_hundred_in_float32(name):
    u = np.array([-100.0, -88.0, 88.0, 100.0], np.float32)
    values, slopes = natural_and_slope(LIMITS[name], u)
    assert values.dtype == jnp.float32
    assert np.isfinite(values).all()
    assert np.isfinite(slopes).all()


def test_derivatives_are_those_of_the_table():
    u = np.linspace(-3.0, 3.0, 13)
    inside = {"linear": u / 4, "decay": u - 5, "rate": u, "angle": u, "alpha": u}
    for name, at in inside.items():
        spec = LIMITS[name]
        x, slope = map(np.asarray, natural_and_slope(spec, at))
        wanted = {
            "linear": lambda x: np.ones_like(x),
            "log": lambda x: x,
            "logit": lambda x, s=spec: (
                (x - s.lower) * (s.upper - x) / (s.upper - s.lower)
            ),
            "softplus": lambda x, s=spec: 1 - np.exp(-(x - s.lower)),
        }[spec.scale](x)
        np.testing.assert_allclose(slope, wanted, rtol=1e-12)


def test_clipped_values_have_no_derivative():
    for name, u in {"linear": 5.0, "decay": 4.0}.items():
        value, slope = natural_and_slope(LIMITS[name], np.array([u]))
        assert float(value[0]) == LIMITS[name].upper
        assert float(slope[0]) == 0.0


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_counts_come_back_as_themselves(dtype):
    for name, counts in {"length": range(3, 24), "holes": range(1, 5)}.items():
        x = np.arange(counts.start, counts.stop).astype(dtype)
        back = natural(LIMITS[name], coordinate(LIMITS[name], x))
        assert back.tolist() == list(counts)


@pytest.mark.parametrize(("name", "wanted"), [("length", (2, 23)), ("holes", (0, 4))])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_counts_are_whole_and_take_every_value_below_the_upper_bound(
    name, wanted, dtype
):
    u = np.linspace(-100.0, 100.0, 4001).astype(dtype)
    x = np.unique(natural(LIMITS[name], u))
    assert x.tolist() == list(range(wanted[0], wanted[1] + 1))


def test_a_count_is_the_floor_and_has_no_derivative():
    u = np.linspace(-4.0, 4.0, 57)
    floored, slope = natural_and_slope(LIMITS["length"], u)
    plain = natural(LIMITS["length"]._replace(discrete=False), u)
    np.testing.assert_array_equal(floored, np.floor(plain))
    assert not slope.any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_ends_of_a_logit_are_never_reached(dtype):
    u = np.array([-1000.0, -100.0, 40.0, 100.0, 1000.0], dtype)
    x = np.asarray(natural(SPECS["logit"], u))
    assert (x > 0).all()
    assert (x < 1).all()
    assert np.isfinite(1 / (1 - x)).all()


def test_bounds_of_the_coordinate():
    got = {name: unconstrained_bounds(spec, 5.0) for name, spec in LIMITS.items()}
    assert got["rate"] == got["angle"] == got["length"] == (-5.0, 5.0)
    assert got["decay"] == (math.log(1e-7), math.log(10.0))
    assert got["open_log"] == got["alpha"] == got["free"] == (-math.inf, math.inf)
    assert got["linear"] == (-1.0, 3.0)


def test_inverse_softplus_is_stable_and_exact():
    assert float(inverse_softplus(1.0)) == pytest.approx(
        math.log(math.e - 1), abs=1e-12
    )
    x = jnp.array([1e-6, 1e-3, 1.0, 88.0, 1000.0], jnp.float32)
    back = jax.nn.softplus(inverse_softplus(x))
    np.testing.assert_allclose(back, x, rtol=1e-6)


def test_vectors_keep_their_shape():
    specs = {"k": Hyperparameter(jnp.full((3, 2), 0.1), 1e-7, 10.0, "log")}
    x = np.logspace(-6, 0, 6).reshape(3, 2)
    u = unconstrain(specs, {"k": x})
    assert u["k"].shape == (3, 2)
    np.testing.assert_allclose(constrain(specs, u)["k"], x, rtol=1e-12)
    np.testing.assert_allclose(u["k"], np.log(x), rtol=1e-12)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (jnp.float16(0.5), jnp.float32),
        (jnp.bfloat16(0.5), jnp.float32),
        (jnp.float32(0.5), jnp.float32),
        (0.5, jnp.float64),
    ],
)
def test_coordinates_have_at_least_single_precision(value, wanted):
    assert unconstrain(LIMITS, {"rate": value})["rate"].dtype == wanted


def test_coordinates_of_integers_are_floats():
    assert unconstrain(LIMITS, {"length": 4})["length"].dtype == jnp.float64


def test_entropy_is_that_of_independent_gaussians():
    sigma = {"a": jnp.array([0.5, 2.0]), "b": jnp.array(3.0)}
    wanted = sum(math.log(s * math.sqrt(2 * math.pi * math.e)) for s in (0.5, 2.0, 3.0))
    np.testing.assert_allclose(entropy(sigma), wanted, rtol=1e-12)
    by_sigma = jax.grad(entropy)(sigma)
    np.testing.assert_allclose(by_sigma["a"], 1 / sigma["a"], rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rate", 0.96),
        ("rate", 0.95),
        ("rate", 0.0),
        ("rate", math.nan),
        ("decay", 11.0),
        ("decay", 1e-8),
        ("open_log", 0.0),
        ("open_log", math.inf),
        ("linear", 3.1),
        ("free", math.inf),
        ("alpha", 0.01),
        ("length", 24),
    ],
)
def test_excluded_values_are_refused_by_name_rule_and_value(name, value):
    with pytest.raises(ValueError, match="unconstrain") as caught:
        unconstrain(LIMITS, {name: jnp.array([LIMITS[name].init, value])})
    message = str(caught.value)
    assert f"[{name!r}]" in message
    assert f"{LIMITS[name].upper:g}" in message
    assert "got" in message


@pytest.mark.parametrize(("name", "value"), [("linear", -1), ("decay", 10.0)])
def test_closed_bounds_are_allowed(name, value):
    u = unconstrain(LIMITS, {name: value})
    np.testing.assert_allclose(constrain(LIMITS, u)[name], value, rtol=1e-14)


@pytest.mark.parametrize("function", [constrain, unconstrain])
def test_unknown_names_are_refused(function):
    with pytest.raises(
        ValueError, match=rf"`{function.__name__}\(.*got \['momentum'\]"
    ):
        function(LIMITS, {"momentum": 0.5, "rate": 0.5})


def test_traced_values_are_not_checked():
    u = jax.jit(lambda x: unconstrain(LIMITS, {"decay": x}))(100.0)
    assert float(u["decay"]) == pytest.approx(math.log(100))
