"""Controllers: small networks that give each action a probability.

A controller is a pair of functions of parameters φ; `bind` makes a policy of it, with
features in front.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from metax.arguments import check_count, check_has, check_number, refuse
from metax.autoloss.decisions import Decision, Observation, Policy, choose, drawn
from metax.autoloss.vectors import Features, FeatureState
from metax.base import check_key

__all__ = [
    "BoundState",
    "Controller",
    "ControllerSpec",
    "bind",
    "context_free",
    "controller",
    "leaky_relu",
    "named_activation",
]

Phi = dict[str, Any]
Activation = Callable[[jax.Array], jax.Array]


class ControllerSpec(NamedTuple):
    """What a controller file records of its controller.

    Attributes:
      num_actions: Q.
      hidden: the sizes of the hidden layers, () for a linear one; None for a controller
        that ignores its input.
      temperature: what the logits are divided by.
      activation: the name of the activation, None for one without a name in `jax.nn`
        or here: such a controller cannot be saved.
      critic: the sizes of the critic's hidden layers; None without a critic.
    """

    num_actions: int
    hidden: tuple[int, ...] | None
    temperature: float
    activation: str | None
    critic: tuple[int, ...] | None


class Controller(NamedTuple):
    """A policy network and perhaps a critic, as functions of their parameters φ.

    Attributes:
      init: `init(key, num_features) -> φ`, a dict with "actor" and, where there is a
        critic, "critic".
      logits: `logits(φ, x [..., F]) -> [..., Q]`, divided by the temperature.
      value: `value(φ, x [..., F]) -> [...]`; None without a critic.
      spec: its description.
    """

    init: Callable[[jax.Array, int], Phi]
    logits: Callable[[Phi, jax.Array], jax.Array]
    value: Callable[[Phi, jax.Array], jax.Array] | None
    spec: ControllerSpec


class BoundState(NamedTuple):
    """What the policy of a controller carries.

    Attributes:
      features: the state of the features.
      inputs: [F], the vector that the next decision is based on.
    """

    features: FeatureState
    inputs: jax.Array


def controller(
    num_actions: int,
    hidden: tuple[int, ...] = (16,),
    temperature: float = 1.0,
    *,
    activation: Activation = jax.nn.relu,
    critic_hidden: tuple[int, ...] | None = None,
) -> Controller:
    """A multilayer perceptron over the features, and a softmax.

        π(a | x) = softmax(z(x) / temperature)_a,    z: F → hidden → Q

    Weights begin Xavier-uniform, U(-b, b) with b = √(6 / (fan_in + fan_out)), biases at
    0. The released controllers are `controller(2, (16,), 2.0, activation=leaky_relu)`
    for regression and classification and `controller(3, (32,), activation=jnp.tanh,
    critic_hidden=(32,))` for translation; two actions and a softmax are the paper's
    Bernoulli policy.

    Args:
      num_actions: Q, at least 1.
      hidden: the sizes of the hidden layers; () is linear.
      temperature: above 0. Larger is nearer to the uniform policy.
      activation: between layers, of actor and critic. One of `jax.nn` or `leaky_relu`
        if the controller is to be saved.
      critic_hidden: the sizes of a critic's hidden layers, which proximal policy
        optimization needs; None for no critic.

    Returns:
      The controller.

    Raises:
      ValueError: a size below 1 or a temperature that is not above 0.

    Reference:
      Xu et al., AutoLoss: Learning Discrete Schedules for Alternate Optimization, 2019,
      arXiv:1810.02442, section 3.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.autoloss import controller
      >>> small = controller(2, hidden=(16,), temperature=2.0)
      >>> phi = small.init(jax.random.key(0), 5)
      >>> jax.nn.softmax(small.logits(phi, jnp.zeros(5))).tolist()
      [0.5, 0.5]
    """
    check_count("controller", 1, num_actions=num_actions)
    check_number("controller", "temperature", temperature, above=0)
    hidden, critic = _sizes("hidden", hidden), None
    if critic_hidden is not None:
        critic = _sizes("critic_hidden", critic_hidden)
    if not callable(activation):
        refuse("controller", "activation", "must be a function", repr(activation))
    name = _name_of(activation)

    def init(key: jax.Array, num_features: int) -> Phi:
        check_key(key, "controller(...).init(key=...)")
        key_actor, key_critic = jax.random.split(key)
        phi = {"actor": _init_layers(key_actor, (num_features, *hidden, num_actions))}
        if critic is not None:
            phi["critic"] = _init_layers(key_critic, (num_features, *critic, 1))
        return phi

    def logits(phi: Phi, x: jax.Array) -> jax.Array:
        return _apply_layers(phi["actor"], x, activation) / temperature

    def value(phi: Phi, x: jax.Array) -> jax.Array:
        return _apply_layers(phi["critic"], x, activation)[..., 0]

    spec = ControllerSpec(num_actions, hidden, temperature, name, critic)
    return Controller(init, logits, None if critic is None else value, spec)


def context_free(num_actions: int, temperature: float = 1.0) -> Controller:
    """A controller that ignores what it sees: Q biases, which begin at 0.

        π(a) = softmax(b / temperature)_a

    The control for every claim that a schedule depends on the state of the run. It
    holds the same policies as a network that is fed a constant, but does not learn as
    such a network does.

    Args:
      num_actions: Q, at least 1.
      temperature: above 0.

    Returns:
      The controller, without a critic.

    Raises:
      ValueError: no action, or a temperature that is not above 0.
    """
    check_count("context_free", 1, num_actions=num_actions)
    check_number("context_free", "temperature", temperature, above=0)

    def init(key: jax.Array, num_features: int) -> Phi:
        del key, num_features
        return {"actor": {"bias": jnp.zeros(num_actions)}}

    def logits(phi: Phi, x: jax.Array) -> jax.Array:
        bias = phi["actor"]["bias"] / temperature
        return jnp.broadcast_to(bias, (*jnp.shape(x)[:-1], num_actions))

    spec = ControllerSpec(num_actions, None, temperature, None, None)
    return Controller(init, logits, None, spec)


def bind(
    controller: Controller,
    phi: Phi,
    features: Features,
    feature_state: FeatureState | None = None,
    *,
    greedy: bool = False,
) -> Policy:
    """Makes a policy of a controller, its parameters and its features.

    Statistics of the features keep moving; to hold them, as for a guided run, bind
    `frozen(features)`.

    Args:
      controller: the network.
      phi: its parameters; may be traced, so that a population is a vmap.
      features: what it sees.
      feature_state: statistics to begin with; None for none.
      greedy: take the likeliest action instead of drawing one. Rarely wise: a policy
        near a constant, .6 to .4 say, then takes one action for ever.

    Returns:
      The policy; its state is a `BoundState`.

    Raises:
      ValueError: φ is not of this controller on these features.
    """
    out = _checked_fit(controller, phi, features)

    def init() -> BoundState:
        if feature_state is None:
            return BoundState(*features.init())
        return BoundState(*features.reset(feature_state))

    def draw(key: jax.Array) -> jax.Array:
        return jax.random.gumbel(key, out.shape, out.dtype)

    def act(state: BoundState, key: jax.Array) -> tuple[BoundState, Decision]:
        logits = controller.logits(phi, state.inputs)
        if greedy:
            action = jnp.argmax(logits).astype(jnp.int32)
            log_prob = jnp.zeros((), logits.dtype)
        else:
            action = choose(logits, drawn(draw, key))
            log_prob = jax.nn.log_softmax(logits)[action]
        return state, Decision(action, log_prob, state.inputs)

    def observe(state: BoundState, observation: Observation) -> BoundState:
        return BoundState(*features.update(state.features, observation))

    spec = features.spec
    return Policy(
        init, act, observe, spec.refresh, spec.observe_every, None if greedy else draw
    )


def leaky_relu(x: jax.Array) -> jax.Array:
    """max(x, .2 x): the activation of the released controllers."""
    return jax.nn.leaky_relu(x, 0.2)


# names that a file may hold beside those of `jax.nn`
OURS: dict[str, Activation] = {"leaky_relu(0.2)": leaky_relu}


def named_activation(name: str) -> Activation:
    """The activation that a `ControllerSpec` names."""
    found = OURS.get(name, getattr(jax.nn, name, None))
    if not callable(found):
        rule = f"must be a function of jax.nn or one of {sorted(OURS)}"
        refuse("named_activation", "name", rule, repr(name))
    return found


def _name_of(activation: Activation) -> str | None:
    known = {name: getattr(jax.nn, name) for name in dir(jax.nn) if name[0] != "_"}
    same = [name for name, f in (OURS | known).items() if f is activation]
    return same[0] if same else None


def _sizes(name: str, sizes: Sequence[int]) -> tuple[int, ...]:
    if not isinstance(sizes, tuple | list):
        refuse("controller", name, "must be a tuple of sizes, a layer each", sizes)
    for size in sizes:
        check_count("controller", 1, **{name: size})
    return tuple(sizes)


def _init_layers(key: jax.Array, sizes: tuple[int, ...]) -> dict[str, Any]:
    """Xavier-uniform kernels and zero biases of a chain of dense layers."""
    keys = jax.random.split(key, len(sizes) - 1)
    xavier = jax.nn.initializers.glorot_uniform()
    return {
        f"layer_{i}": {
            "kernel": xavier(keys[i], (fan_in, fan_out), jnp.zeros(()).dtype),
            "bias": jnp.zeros(fan_out),
        }
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes))
    }


def _apply_layers(
    layers: dict[str, Any], x: jax.Array, activation: Activation
) -> jax.Array:
    for i in range(len(layers)):
        layer = layers[f"layer_{i}"]
        x = (activation(x) if i else x) @ layer["kernel"] + layer["bias"]
    return x


def _checked_fit(
    controller: Controller, phi: Phi, features: Features
) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the logits, which is all that is looked at."""
    check_has("bind", "controller", controller, "a `Controller`", "logits", "spec")
    check_has("bind", "features", features, "`Features`", "init", "update", "spec")
    x = jax.ShapeDtypeStruct((features.spec.size,), jnp.zeros(()).dtype)
    try:
        return jax.eval_shape(controller.logits, phi, x)
    except (TypeError, ValueError, KeyError) as error:
        rule = (
            f"must be parameters of this controller for the {features.spec.size} "
            f"features of {features.spec.name!r}"
        )
        raise ValueError(f"`bind(phi=...)` {rule}; got {error!r}.") from error
