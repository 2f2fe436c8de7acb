import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Action
from metax.autoloss import Decision, cycle, rollout
from metax.autoloss.dispatching import (
    Stepped,
    follow,
    init_optimizers,
    measure_all,
    mix,
    switch,
)
from tests.autoloss.toys import bandit, two_groups, two_groups_data


def start(problem):
    params = problem.init(jax.random.key(1))
    states = init_optimizers(problem, params)
    # a step behind us, so that moments are not zero
    before = Stepped(params, states, jnp.int32(0), None, jnp.bool_(True))
    return mix(problem, before, decide(2), jax.random.key(2), two_groups_data())


def decide(action, weights=None):
    action = jnp.asarray(action, jnp.int32)
    return Decision(action, jnp.zeros(()), jnp.zeros((0,)), weights)


@pytest.mark.parametrize("sharing", ["variable", "action"])
def test_both_ways_follow_the_chosen_loss_in_the_chosen_groups(sharing):
    problem = two_groups(optimizer_sharing=sharing)
    data, key = two_groups_data(), jax.random.key(3)

    @jax.jit
    def run(action):
        before = start(problem)
        arguments = (problem, before, decide(action), key, data)
        return before, mix(*arguments), switch(*arguments)

    for q, action in enumerate(problem.actions):
        before, mixed, switched = run(q)
        chex.assert_trees_all_close(mixed, switched, rtol=1e-12)
        # by hand: the loss and its gradient of this batch, through plain optax
        key_sample, key_loss = jax.random.split(key)
        batch = problem.sample(data, key_sample)
        grads = jax.grad(problem.losses[action.loss])(before.params, batch, key_loss)
        names = {None: ["a", "b"], "a": ["a"], ("b",): ["b"]}[action.params]
        if sharing == "variable":
            for name in names:
                updates, state = problem.optimizers.update(
                    grads[name], before.states[name], before.params[name]
                )
                wanted = optax.apply_updates(before.params[name], updates)
                chex.assert_trees_all_close(mixed.params[name], wanted, rtol=1e-12)
                chex.assert_trees_all_close(mixed.states[name], state, rtol=1e-12)
        rms = optax.tree.norm({n: grads[n] for n in names})
        rms /= np.sqrt({"a": 3, "b": 4}[names[0]] if len(names) == 1 else 7)
        seen = mixed.measured
        np.testing.assert_allclose(seen.gradient_rms[action.loss], rms, rtol=1e-12)
        assert seen.measured.tolist() == [action.loss == 0, action.loss == 1]


@pytest.mark.parametrize("sharing", ["variable", "action"])
@pytest.mark.parametrize("way", [mix, switch])
def test_what_an_action_does_not_touch_stays_bit_for_bit(sharing, way):
    problem = two_groups(optimizer_sharing=sharing)
    run = jax.jit(
        lambda q: (
            before := start(problem),
            way(problem, before, decide(q), jax.random.key(3), two_groups_data()),
        )
    )
    for q, idle in ((0, "b"), (1, "a")):
        before, after = run(q)
        chex.assert_trees_all_equal(before.params[idle], after.params[idle])
        owner = idle if sharing == "variable" else 1 - q
        chex.assert_trees_all_equal(before.states[owner], after.states[owner])
        moved = {0: "a", 1: "b"}[q]
        with pytest.raises(AssertionError):
            chex.assert_trees_all_equal(before.params[moved], after.params[moved])


def test_gradients_of_all_losses_give_the_same_step():
    problem = two_groups(sample=lambda data, key: data["train"])
    data, key = two_groups_data(), jax.random.key(3)

    @jax.jit
    def run(action):
        before = start(problem)
        measured, gradients = measure_all(problem, before.params, key, data)
        before = before._replace(measured=measured)
        return (
            follow(problem, before, decide(action), gradients),
            switch(problem, before, decide(action), key, data),
        )

    for q in range(3):
        followed, switched = run(q)
        for part in ("params", "states", "taken"):
            chex.assert_trees_all_close(
                getattr(followed, part), getattr(switched, part), rtol=1e-12
            )


def test_vmapped_switch_equals_each_branch():
    problem, data = two_groups(), two_groups_data()

    @jax.jit
    def run(actions):
        before = start(problem)
        one = lambda q: switch(problem, before, decide(q), jax.random.key(3), data)
        return jax.vmap(one)(actions), [one(q) for q in actions]

    together, single = run(jnp.arange(3))
    for q, alone in enumerate(single):
        mine = jax.tree.map(lambda leaf, q=q: leaf[q], together)
        chex.assert_trees_all_close(mine, alone, rtol=1e-12)


def test_repeats_are_steps_on_fresh_batches():
    problem = two_groups(actions=(Action(0, "a", 3), Action(1, "b", 3)))
    key, data = jax.random.key(3), two_groups_data()

    @jax.jit
    def run():
        params = problem.init(jax.random.key(1))
        before = Stepped(
            params,
            init_optimizers(problem, params),
            jnp.int32(5),
            None,
            jnp.bool_(True),
        )
        after = switch(problem, before, decide(0), key, data)
        one = problem._replace(actions=(Action(0, "a"), Action(1, "b")))
        for k in jax.random.split(key, 3):
            before = switch(one, before, decide(0), k, data)
        return after, before

    after, wanted = run()
    chex.assert_trees_all_close(after, wanted, rtol=1e-12)
    assert int(after.taken) == 8


def test_weights_mix_the_losses():
    problem, data, key = two_groups(), two_groups_data(), jax.random.key(3)
    weights = jnp.array([0.5, -2.0])

    @jax.jit
    def run():
        before = start(problem)
        after = mix(problem, before, decide(2, weights), key, data)
        key_sample, key_loss = jax.random.split(key)
        batch = problem.sample(data, key_sample)
        combined = lambda p: sum(
            w * loss(p, batch, key_loss)
            for w, loss in zip(weights, problem.losses, strict=True)
        )
        rms = optax.tree.norm(jax.grad(combined)(before.params)) / np.sqrt(7)
        return after, rms

    after, rms = run()
    np.testing.assert_allclose(after.measured.gradient_rms, rms, rtol=1e-12)
    assert after.measured.measured.all()


def test_every_rule_is_told_the_steps_taken_over_all_groups():
    def update(updates, state, params=None, *, step, **extra):
        return updates, jnp.asarray(step, jnp.int32)

    tell = optax.GradientTransformationExtraArgs(lambda params: jnp.int32(-1), update)
    rules = {name: optax.chain(optax.sgd(0.1), tell) for name in "ab"}
    problem = two_groups(
        optimizers=rules,
        actions=(Action(0, "a", 2), Action(1, "b")),
        reward=two_groups().reward,
    )
    result, _ = jax.jit(
        lambda key: rollout(
            problem, cycle((1, 1)), key, two_groups_data(), 4, dispatch="switch"
        )
    )(jax.random.key(0))
    # a, a, b, a, a, b: the last of `a` is told 4, that of `b` 5
    assert int(result.optimizer_states["a"][1]) == 4
    assert int(result.optimizer_states["b"][1]) == 5


def test_a_step_that_is_not_finite_moves_nothing_and_ends_the_run():
    problem = bandit(
        losses=(bandit().losses[0], lambda p, batch, key: jnp.log(p["x"] - 10))
    )
    result, trajectory = jax.jit(
        lambda key: rollout(problem, cycle((3, 1)), key, 1.0, 8)
    )(jax.random.key(0))
    assert not result.is_finite
    assert trajectory.live.tolist() == [True] * 4 + [False] * 4
    np.testing.assert_allclose(result.params["x"], 1 - 0.8**3, rtol=1e-12)
    assert int(result.num_steps) == 4


def test_shared_slots_keep_the_weight_of_a_loss_and_slots_by_action_undo_it():
    """With an Adam of its own an action's loss may be scaled by anything."""

    def final(scale, sharing):
        problem = bandit(
            losses=(
                bandit().losses[0],
                lambda p, batch, key: scale * (p["x"] + 1) ** 2,
            ),
            optimizers=optax.adam(0.01, eps=0),
            optimizer_sharing=sharing,
        )
        result, _ = rollout(problem, cycle((1, 1)), jax.random.key(0), 1.0, 100)
        return result.params["x"]

    by = lambda sharing: jax.jit(jax.vmap(lambda s: final(s, sharing)))(
        jnp.array([0.2, 3.2])
    )
    shared, apart = by("variable"), by("action")
    np.testing.assert_allclose(apart[0], apart[1], rtol=1e-9)
    assert abs(shared[0] - shared[1]) > 0.1


def trunk_and_heads(shared):
    """Two heads on one layer, which is named as shared or written into each loss."""
    trunk = lambda params, batch, key: jnp.tanh(batch @ params["a"])

    def head(name, target):
        def loss(params, batch, key, *common):
            (hidden,) = common or (trunk(params, batch, key),)
            return jnp.mean((hidden @ params[name] - target) ** 2)

        return loss

    sizes = {"a": (3, 4), "b": (4, 2), "c": (4, 2)}
    return two_groups(
        init=lambda key: {
            name: jax.random.normal(jax.random.fold_in(key, i), shape)
            for i, (name, shape) in enumerate(sizes.items())
        },
        losses=(head("b", 1.0), head("c", -1.0)),
        actions=(Action(0, ("a", "b")), Action(1, ("a", "c"))),
        sample=lambda data, key: jax.random.normal(key, (5, 3)),
        shared=trunk if shared else None,
    )


@pytest.mark.parametrize("way", [mix, switch])
def test_what_losses_share_changes_no_step(way):
    def step(shared, action):
        problem = trunk_and_heads(shared)
        params = problem.init(jax.random.key(1))
        states = init_optimizers(problem, params)
        before = Stepped(params, states, jnp.int32(0), None, jnp.bool_(True))
        key = jax.random.key(2)
        measured = measure_all(problem, params, key, None)
        return way(problem, before, decide(action), key, None), measured

    both = jax.jit(lambda action: (step(True, action), step(False, action)))
    for action in range(2):
        chex.assert_trees_all_close(*both(action), rtol=1e-12)


def test_mix_goes_backwards_through_what_losses_share_once():
    def products(shared, dispatched):
        problem = trunk_and_heads(shared)
        params = problem.init(jax.random.key(1))
        states = init_optimizers(problem, params)
        before = Stepped(params, states, jnp.int32(0), None, jnp.bool_(True))
        step = lambda q: dispatched(problem, before, decide(q), jax.random.key(2), None)
        return str(jax.make_jaxpr(step)(0)).count("dot_general")

    # trunk and its gradient, and for each of two heads three products
    assert products(True, mix) == 2 + 2 * 3
    assert products(False, mix) == 2 * (2 + 3)
    # a branch has its own trunk
    assert products(True, switch) == products(False, switch) == 2 * (2 + 3)
