"""What a state gives: natural values, sweeps over starts, the learned Jacobian."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

from metax import unroll
from metax.harness import grid
from metax.stn import best_response, natural_hparams, replace_hparams, response_jacobian
from tests.stn.test_kernels import DATA, KEY, started, tuner
from tests.stn.test_perturbation import vector_problem


def test_natural_values_are_those_of_the_start():
    natural = natural_hparams(jax.jit(tuner(vector_problem()).init)(KEY))
    wanted = {"decay": jnp.array([0.1, 0.2]), "gain": 1.0}
    chex.assert_trees_all_close(natural, wanted, rtol=1e-12)


def test_replaced_values_leave_all_else():
    state = started(tuner(vector_problem()))
    moved = replace_hparams(state, {"decay": 0.5})
    assert natural_hparams(moved)["decay"].tolist() == pytest.approx([0.5, 0.5])
    chex.assert_trees_all_equal(moved._replace(hparams=state.hparams), state)
    assert float(moved.hparams["gain"]) == 1.0


def test_a_sweep_over_starts_is_a_vmap():
    loop, starts = tuner(), jnp.array([0.01, 0.1, 1.0])
    keys = jax.random.split(KEY, 2)

    def run(start, data):
        state = replace_hparams(started(loop), {"decay": start})
        return unroll(loop, state, keys, data)

    swept = jax.jit(jax.vmap(run, in_axes=(0, None)))(starts, DATA)
    alone = jax.jit(run)(starts[1], DATA)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x[1], swept), alone, rtol=1e-10, atol=1e-14
    )
    assert len(set(swept[1].hparams["decay"][:, -1].tolist())) == 3


def test_response_jacobian_holds_the_tangents_of_unit_vectors():
    loop = tuner(vector_problem())
    state, response = started(loop), best_response(3)
    jacobian = response_jacobian(state)
    units = [response.tangent(state.response, unit) for unit in jnp.eye(3)]
    stack = lambda *x: jnp.stack(x)
    chex.assert_trees_all_close(jacobian["decay"], jax.tree.map(stack, *units[:2]))
    chex.assert_trees_all_close(jacobian["gain"], units[2])
    assert jacobian["decay"]["params"]["kernel"].shape == (2, 3, 1)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("perturbation", ["example", "group", "batch"])
def test_states_keep_their_dtypes(dtype, perturbation):
    init = vector_problem().init
    problem = vector_problem()._replace(
        init=lambda key: jax.tree.map(lambda x: x.astype(dtype), init(key))
    )
    loop = tuner(
        problem, perturbation=perturbation, scale_optimizer=optax.sgd(0.1), groups=2
    )
    first = jax.eval_shape(loop.init, KEY)
    after, _ = jax.eval_shape(lambda s, d: loop.step(s, KEY, d), first, DATA)
    chex.assert_trees_all_equal_shapes_and_dtypes(first, after)
    assert first.params["params"]["kernel"].dtype == dtype


def test_a_loop_is_built_for_each_setting_of_a_grid():
    """Inside a trace: what the doors look at is known before it."""
    build = lambda rate: tuner(vector_problem(), outer_optimizer=optax.sgd(rate))
    several = grid(build, jnp.array([0.0, 0.1]))
    state, _ = jax.jit(several.step)(several.init(KEY), KEY, DATA)
    kept, moved = state.hparams["decay"]
    assert not jnp.array_equal(kept, moved)
    wanted = tuner(vector_problem()).init(KEY).hparams["decay"]
    chex.assert_trees_all_close(kept, wanted, rtol=1e-12)
