"""The shared words: a loop does what its docstring says, and nothing besides."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from metax import Loop, Task, check_key, inner_loop, truncate, unroll

DATA = jnp.linspace(-1.0, 2.0, 12).reshape(6, 2)
MNIST = jax.ShapeDtypeStruct((60_000, 28, 28, 1), jnp.uint8)


def noisy_task(scale=1.0):
    """Batches of two rows, and a loss that uses its key: every key matters."""

    def loss(params, batch, key):
        noise = 0.1 * jax.random.normal(key, (2,))
        error = jnp.tanh(params["w"] + noise - batch) + params["b"] ** 2
        return scale * jnp.mean(error**2)

    return Task(
        init=lambda key: {"w": jax.random.normal(key, (2,)), "b": jnp.ones(())},
        loss=loss,
        sample=lambda data, key: data[jax.random.choice(key, 6, (2,), replace=False)],
        evaluate=lambda params, data: {},
    )


def half_square_task(loss=lambda params, batch, key: 0.5 * jnp.sum(params**2)):
    return Task(
        init=lambda key: jnp.array([3.0, -4.0]),
        loss=loss,
        sample=lambda data, key: data,
        evaluate=lambda params, data: {},
    )


def started(task, rule, num_steps=5, **options):
    """A loop, its first state and the keys of a run."""
    loop = inner_loop(task, rule, **options)
    key_init, key_run = jax.random.split(jax.random.key(0))
    return loop, loop.init(key_init), jax.random.split(key_run, num_steps)


def assert_trees_close(a, b, rtol=1e-12):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol), a, b)


def last_loss(params, loop, state, keys, **options):
    """The loss before the last step, as a function of the first parameters."""
    state = state._replace(params=params)
    return unroll(loop, state, keys, DATA, **options)[1].loss[-1]


def test_inner_step_is_the_gradient_step_of_its_docstring():
    task = noisy_task()
    loop, state, keys = started(task, optax.sgd(0.3))
    key_sample, key_loss = jax.random.split(keys[0])
    batch = task.sample(DATA, key_sample)
    loss, grad = jax.value_and_grad(task.loss)(state.params, batch, key_loss)
    after, info = loop.step(state, keys[0], DATA)
    assert_trees_close(after.params, optax.tree.add_scale(state.params, -0.3, grad))
    assert info.loss == loss
    assert info.grad_norm == optax.tree.norm(grad)
    assert info.is_finite
    assert info.observed == ()


def test_unroll_equals_a_python_loop_of_steps():
    loop, first, keys = started(noisy_task(), optax.adam(0.1))
    state, losses = first, []
    for key in keys:
        state, info = loop.step(state, key, DATA)
        losses.append(info.loss)
    last, infos = unroll(loop, first, keys, DATA)
    assert_trees_close(last, state)
    np.testing.assert_allclose(infos.loss, losses, rtol=1e-12)


def test_two_unrolls_equal_one():
    loop, first, keys = started(noisy_task(), optax.adam(0.1))
    middle, _ = unroll(loop, first, keys[:2], DATA)
    last, _ = unroll(loop, middle, keys[2:], DATA)
    assert_trees_close(last, unroll(loop, first, keys, DATA)[0], rtol=0)


def test_any_pair_of_functions_is_a_loop():
    counter = Loop(
        init=lambda key: jnp.zeros(()),
        step=lambda state, key, data: (state + data, state),
    )
    keys = jax.random.split(jax.random.key(0), 4)
    state, infos = unroll(counter, counter.init(keys[0]), keys, 2.0)
    assert state == 8.0
    assert infos.tolist() == [0.0, 2.0, 4.0, 6.0]


def test_remat_changes_neither_values_nor_gradients():
    loop, state, keys = started(noisy_task(), optax.sgd(0.3))
    plain, remat = (
        jax.value_and_grad(last_loss)(state.params, loop, state, keys, remat=remat)
        for remat in (False, True)
    )
    assert_trees_close(plain, remat, rtol=1e-14)


def test_remat_recomputes_the_step():
    loop, state, keys = started(noisy_task(), optax.sgd(0.3))

    def program(remat):
        grad = jax.grad(lambda p: last_loss(p, loop, state, keys, remat=remat))
        return str(jax.make_jaxpr(grad)(state.params))

    # The primitive is called remat or checkpoint, by version of JAX.
    assert any(name in program(True) for name in ("remat", "checkpoint"))
    assert not any(name in program(False) for name in ("remat", "checkpoint"))


def test_gradient_through_an_unroll_equals_finite_differences():
    loop, state, keys = started(noisy_task(), optax.sgd(0.1, momentum=0.9))
    grad = jax.grad(last_loss)(state.params, loop, state, keys)
    direction = {"w": jnp.array([0.6, -0.8]), "b": jnp.array(0.5)}
    step = 1e-5
    high, low = (
        last_loss(optax.tree.add_scale(state.params, s, direction), loop, state, keys)
        for s in (step, -step)
    )
    slope = optax.tree.vdot(grad, direction)
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(slope, (high - low) / (2 * step), rtol=1e-7)


def test_truncation_keeps_the_values_and_cuts_the_gradient():
    loop, state, keys = started(noisy_task(), optax.sgd(0.3))

    def loss(params, cut):
        middle, _ = unroll(loop, state._replace(params=params), keys[:3], DATA)
        middle = truncate(middle) if cut else middle
        return unroll(loop, middle, keys[3:], DATA)[1].loss[-1]

    whole, cut = (jax.value_and_grad(loss)(state.params, cut) for cut in (False, True))
    assert whole[0] == cut[0]
    assert optax.tree.norm(whole[1]) > 1e-3
    assert optax.tree.norm(cut[1]) == 0


def test_data_does_not_enter_the_program():
    def loss(params, batch, key):
        return jnp.mean((batch.reshape(128, 784) / 255 @ params) ** 2)

    task = Task(
        init=lambda key: jnp.zeros((784, 10)),
        loss=loss,
        sample=lambda data, key: data[jax.random.randint(key, (128,), 0, len(data))],
        evaluate=lambda params, data: {},
    )
    loop, state, keys = started(task, optax.adam(1e-3))
    step = jax.jit(loop.step).lower(state, keys[0], MNIST)
    run = jax.jit(lambda s, k, data: unroll(loop, s, k, data)).lower(state, keys, MNIST)
    # 47 MB of pixels closed over would be 94 MB of text.
    for lowered in (step, run):
        assert len(lowered.as_text()) < 200_000


RAW = np.zeros(2, np.uint32)
DOORS = {
    "init": lambda loop, state, key: loop.init(key),
    "step": lambda loop, state, key: loop.step(state, key, DATA),
    "unroll": lambda loop, state, key: unroll(loop, state, key, DATA),
}


@pytest.mark.parametrize("key", [RAW, jnp.asarray(RAW), 0, None])
@pytest.mark.parametrize("door", DOORS)
def test_only_typed_keys_are_let_in(door, key):
    loop, state, _ = started(half_square_task(), optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"made by `jax\.random\.key\(seed\)`") as e:
        DOORS[door](loop, state, key)
    assert door in str(e.value)
    assert "jax.random.wrap_key_data(key)" in str(e.value)


@pytest.mark.parametrize("ndim", [0, 1])
def test_keys_of_another_rank_are_refused(ndim):
    keys = jax.random.split(jax.random.key(0), 3)
    check_key(keys if ndim else keys[0], "f(key=...)", ndim=ndim)
    with pytest.raises(ValueError, match=rf"must have {ndim} axes"):
        check_key(keys[0] if ndim else keys, "f(key=...)", ndim=ndim)


def test_carry_overwrites_what_the_rule_did_to_statistics():
    def loss(params, batch, key):
        mean = jax.lax.stop_gradient(params["mean"])
        return jnp.mean((params["w"] - batch + mean) ** 2)

    def carry(updated, params, batch, key):
        return {**updated, "mean": 0.9 * params["mean"] + 0.1 * jnp.mean(batch)}

    task = Task(
        init=lambda key: {"w": jnp.ones(()), "mean": jnp.ones(())},
        loss=loss,
        sample=lambda data, key: data,
        evaluate=lambda params, data: {},
        carry=carry,
    )
    # Decay would shrink the statistics to 0.995 a step if the rule's word counted.
    rule = optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.1))
    loop, state, keys = started(task, rule, num_steps=3)
    last, _ = unroll(loop, state, keys, DATA)
    mean = float(jnp.mean(DATA))
    expected = 0.9**3 + (1 - 0.9**3) * mean
    np.testing.assert_allclose(last.params["mean"], expected, rtol=1e-12)
    assert last.params["w"] != 1


def test_rules_that_want_the_value_get_it():
    # Polyak's rate on ½‖x‖² is f/‖∇f‖² = ½: every step halves the parameters.
    loop, state, keys = started(half_square_task(), optax.polyak_sgd(1.0), num_steps=3)
    last, _ = unroll(loop, state, keys, DATA)
    np.testing.assert_allclose(last.params, state.params / 8, rtol=1e-12)


def test_value_and_grad_and_value_fn_are_of_the_batch_and_key_of_the_step():
    seen = {}

    def spy(updates, state, params=None, **extra):
        value, grad = jax.value_and_grad(extra["value_fn"])(params)
        seen.update(extra, again=value, grad_again=grad, updates=updates)
        return updates, state

    rule = optax.GradientTransformationExtraArgs(lambda params: (), spy)
    loop, state, keys = started(noisy_task(), rule)
    _, info = loop.step(state, keys[0], DATA)
    assert seen["value"] == seen["again"] == info.loss
    for grad in (seen["grad"], seen["updates"]):
        assert_trees_close(grad, seen["grad_again"], rtol=0)


def test_what_is_observed_lands_in_the_infos():
    rule = optax.inject_hyperparams(optax.sgd)(lambda count: 0.5 / (1 + count))
    loop, state, keys = started(
        half_square_task(),
        rule,
        observe=lambda s: {"rate": s.hyperparams["learning_rate"], "constant": 3},
    )
    infos = unroll(loop, state, keys, DATA)[1]
    np.testing.assert_allclose(infos.observed["rate"], 0.5 / np.arange(1, 6))
    assert infos.observed["constant"].tolist() == [3] * 5
    # A Python number becomes an array without a scan to make it one, too.
    assert isinstance(
        loop.step(state, keys[0], DATA)[1].observed["constant"], jax.Array
    )


def test_trouble_is_a_flag_of_the_step_it_happens_in():
    # √x has an infinite slope at 0 and no value below it: steps of 1 from 2 to −1.
    def loss(params, batch, key):
        return jnp.sum(jnp.sqrt(params))

    task = half_square_task(loss)._replace(init=lambda key: jnp.array([2.0]))
    down = optax.stateless(lambda grads, params: jnp.full((1,), -1.0))
    loop, state, keys = started(task, down, num_steps=4)
    _, infos = unroll(loop, state, keys, DATA)
    assert jnp.isfinite(infos.loss).tolist() == [True, True, True, False]
    assert infos.is_finite.tolist() == [True, True, False, False]


def test_step_is_traced_once_a_shape():
    traces = []

    def loss(params, batch, key):
        traces.append(batch.shape)
        return jnp.sum((params - batch) ** 2)

    loop, state, keys = started(half_square_task(loss), optax.adam(0.1))
    step = jax.jit(loop.step)
    for key in keys:
        state, _ = step(state, key, DATA)
    assert traces == [(6, 2)]
    step(state, keys[0], DATA[:3])
    assert traces == [(6, 2), (3, 2)]


def test_vmap_over_init_gives_seeds_equal_to_runs_of_their_own():
    loop, _, keys = started(noisy_task(), optax.adam(0.1))
    seeds = jax.random.split(jax.random.key(1), 3)
    states = jax.vmap(loop.init)(seeds)
    batched, _ = jax.vmap(lambda s: unroll(loop, s, keys, DATA))(states)
    assert len(np.unique(states.params["w"])) == 6
    for i, seed in enumerate(seeds):
        alone, _ = unroll(loop, loop.init(seed), keys, DATA)
        assert_trees_close(jax.tree.map(lambda a, i=i: a[i], batched), alone)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32, jnp.float64])
def test_step_keeps_tree_shapes_and_dtypes(dtype):
    task = half_square_task()._replace(init=lambda key: jnp.ones((2, 3), dtype))
    loop, state, keys = started(task, optax.adam(0.1))
    after, _ = loop.step(state, keys[0], DATA)
    assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
