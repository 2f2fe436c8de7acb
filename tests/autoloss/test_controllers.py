import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax.autoloss.controllers import (
    bind,
    context_free,
    controller,
    leaky_relu,
    named_activation,
)
from metax.autoloss.features import frozen, paper, released, running_norm
from tests.autoloss.observations import (
    decisions,
    filled,
    follow,
    observation,
    script,
)


def test_weights_are_xavier_uniform_and_biases_zero():
    init = controller(3, (40, 30), critic_hidden=(20,)).init
    phi = jax.device_get(jax.jit(init, static_argnums=1)(jax.random.key(0), 50))
    shapes = {"actor": [(50, 40), (40, 30), (30, 3)], "critic": [(50, 20), (20, 1)]}
    for part, expected in shapes.items():
        layers = list(phi[part].values())
        assert [layer["kernel"].shape for layer in layers] == expected
        for layer in layers:
            bound = math.sqrt(6 / sum(layer["kernel"].shape))
            largest = np.abs(layer["kernel"]).max()
            assert 0.5 * bound < largest <= bound
            assert not layer["bias"].any()
    wide = phi["actor"]["layer_0"]["kernel"]
    # a uniform variable has variance bound²/3; 2000 draws: standard error 2 %
    assert wide.var() == pytest.approx(6 / 90 / 3, rel=0.08)


def test_logits_are_the_network_over_the_temperature():
    network = controller(2, (4,), 2.0, activation=leaky_relu, critic_hidden=(3,))
    phi = filled(lambda: network.init(jax.random.key(0), 5))
    x = np.random.default_rng(0).normal(size=(7, 5))

    def dense(layers, x):
        first, second = layers["layer_0"], layers["layer_1"]
        hidden = x @ np.array(first["kernel"]) + first["bias"]
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
        return hidden @ np.array(second["kernel"]) + second["bias"]

    logits, value = jax.jit(lambda x: (network.logits(phi, x), network.value(phi, x)))(
        x
    )
    np.testing.assert_allclose(logits, dense(phi["actor"], x) / 2, rtol=1e-10)
    np.testing.assert_allclose(value, dense(phi["critic"], x)[:, 0], rtol=1e-10)


def test_no_hidden_layer_is_linear():
    network = controller(3, hidden=())
    phi = filled(lambda: network.init(jax.random.key(0), 4))
    x = jnp.arange(4.0)
    layer = phi["actor"]["layer_0"]
    expected = x @ layer["kernel"] + layer["bias"]
    np.testing.assert_allclose(network.logits(phi, x), expected, rtol=1e-12)


def test_without_a_critic_there_is_no_value():
    network = controller(2)
    assert network.value is None
    assert set(filled(lambda: network.init(jax.random.key(0), 3))) == {"actor"}


def test_a_context_free_controller_ignores_what_it_sees():
    network = context_free(3, temperature=2.0)
    phi = network.init(jax.random.key(0), 5)
    assert not network.logits(phi, jnp.ones(5)).any()
    phi["actor"]["bias"] = jnp.array([1.0, 2.0, 4.0])
    x = jax.random.normal(jax.random.key(1), (6, 5))
    logits = network.logits(phi, x)
    np.testing.assert_allclose(logits, np.tile([0.5, 1.0, 2.0], (6, 1)))


def test_equal_logits_draw_every_action():
    # the released code took the first action whenever probabilities were equal
    features = paper(2)
    network = context_free(3)
    policy = bind(network, network.init(jax.random.key(0), 9), features)
    taken = np.bincount(decisions(policy, 300).action, minlength=3)
    # 100 each, standard deviation 8
    assert (np.abs(taken - 100) < 40).all()


def test_decisions_are_drawn_from_the_softmax():
    network = context_free(2)
    phi = {"actor": {"bias": jnp.array([0.0, math.log(3)])}}
    made = decisions(bind(network, phi, paper(2)), 400)
    # 300 of 400 in the mean, standard deviation 9
    assert 255 < int(made.action.sum()) < 345
    expected = np.where(np.array(made.action) == 1, math.log(0.75), math.log(0.25))
    np.testing.assert_allclose(made.log_prob, expected, rtol=1e-10)


def test_a_greedy_policy_takes_the_likeliest_action_for_ever():
    network = context_free(3)
    phi = {"actor": {"bias": jnp.array([0.0, 0.1, 0.05])}}
    made = decisions(bind(network, phi, paper(2), greedy=True), 20)
    assert set(made.action.tolist()) == {1}
    assert not made.log_prob.any()


def test_decisions_are_based_on_the_features_of_the_last_observation():
    features, network = released("regression"), controller(2)
    phi = filled(lambda: network.init(jax.random.key(0), 5))
    policy = bind(network, phi, features)
    assert (policy.refresh, policy.observe_every) == ("all", 1)
    seen = observation(losses=jnp.array([3.0, 2.0]))

    @jax.jit
    def run(seen):
        state = policy.init()
        first = policy.act(state, jax.random.key(1))[1]
        second = policy.act(policy.observe(state, seen), jax.random.key(1))[1]
        start, x0 = features.init()
        _, x1 = features.update(start, seen)
        log_probs = jax.nn.log_softmax(network.logits(phi, x1))
        return first, second, x0, x1, log_probs[second.action]

    first, second, x0, x1, log_prob = run(seen)
    np.testing.assert_allclose(first.inputs, x0, rtol=1e-12)
    np.testing.assert_allclose(second.inputs, x1, rtol=1e-12)
    np.testing.assert_allclose(second.log_prob, log_prob, rtol=1e-10)


def test_statistics_move_unless_the_features_are_frozen():
    features, network = running_norm(released("regression")), controller(2)
    phi = filled(lambda: network.init(jax.random.key(0), 5))
    start, _ = follow(features.update, features.init()[0], script(10))
    counts = {}
    for name, chosen in (("free", features), ("frozen", frozen(features))):
        policy = bind(network, phi, chosen, start)
        run = jax.jit(lambda seen, policy=policy: policy.observe(policy.init(), seen))
        counts[name] = int(run(observation()).features.count)
    assert counts == {"free": 11, "frozen": 10}


def test_parameters_may_be_traced():
    network, features = controller(2), paper(2)
    keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    @jax.vmap
    def log_prob(key):
        policy = bind(network, network.init(key, 9), features)
        state = policy.observe(policy.init(), observation())
        return policy.act(state, key)[1].log_prob

    assert np.unique(log_prob(keys)).size == 3


def test_parameters_for_other_features_are_refused():
    network = controller(2)
    phi = filled(lambda: network.init(jax.random.key(0), 5))
    with pytest.raises(ValueError, match=r"`bind\(phi=.*9 features of 'paper'"):
        bind(network, phi, paper(2))


@pytest.mark.parametrize(
    "activation", [leaky_relu, jax.nn.leaky_relu, jnp.tanh, jax.nn.relu, jax.nn.silu]
)
def test_activations_are_known_by_name(activation):
    name = controller(2, activation=activation).spec.activation
    assert name is not None
    assert named_activation(name) is activation


def test_an_activation_of_ones_own_has_no_name():
    assert controller(2, activation=lambda x: x).spec.activation is None
    for name in ("", "initializers", "no such"):
        with pytest.raises(ValueError, match=r"jax\.nn"):
            named_activation(name)


@pytest.mark.parametrize(
    ("arguments", "argument"),
    [
        ({"num_actions": 0}, "num_actions"),
        ({"hidden": (4, 0)}, "hidden"),
        ({"critic_hidden": (0,)}, "critic_hidden"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, argument):
    with pytest.raises(ValueError, match=rf"`controller\({argument}="):
        controller(**({"num_actions": 2} | arguments))


def test_raw_keys_are_refused():
    with pytest.raises(ValueError, match="jax.random.key"):
        controller(2).init(jnp.zeros(2, jnp.uint32), 5)
