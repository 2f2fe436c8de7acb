import jax
import jax.numpy as jnp
import numpy as np
import pytest

from metax import Loop, unroll
from metax.harness import host_unroll


def _noisy(traces: list) -> Loop:
    def step(x, key, data):
        traces.append(None)
        x = 0.5 * x + data * jax.random.normal(key, x.shape)
        return x, {"x": x}

    return Loop(lambda key: jax.random.normal(key, (2,)), step)


def test_it_is_unroll_and_compiles_once_for_all_lengths():
    traces = []
    loop, data = _noisy(traces), jnp.array(0.1)
    state, run = loop.init(jax.random.key(0)), host_unroll(loop)
    for num in (3, 5):
        keys = jax.random.split(jax.random.key(num), num)
        del traces[1:]
        ours = run(loop, state, keys, data)
        assert len(traces) == 1  # that of the first call
        wanted = unroll(loop, state, keys, data)
        assert ours[1]["x"].shape == (num, 2)
        # one program of steps against one of a scan: the same up to rounding
        np.testing.assert_allclose(ours[0], wanted[0], rtol=1e-12)
        np.testing.assert_allclose(ours[1]["x"], wanted[1]["x"], rtol=1e-12)


def test_a_single_key_is_refused_by_name():
    loop = _noisy([])
    with pytest.raises(ValueError, match=r"host_unroll\(...\)\(keys=...\)"):
        host_unroll(loop)(loop, jnp.zeros(2), jax.random.key(0), 0.0)
