"""Run as a program: every rule on parameters sharded over eight virtual devices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.rules import RULES
from tests.test_rules import advance

CURVATURE = np.linspace(0.5, 3.0, 32)


def loss(params):
    whole = jnp.concatenate([params["rows"].ravel(), params["columns"].ravel()])
    return jnp.sum(jnp.tile(CURVATURE, 2) * (jnp.cosh(whole) - 1))


def run(rule, params, num_steps=5):
    def step(carry, _):
        return advance(rule, *carry, loss), None

    walk = lambda params: jax.lax.scan(
        step, (params, rule.init(params)), length=num_steps
    )
    return jax.jit(walk)(params)[0][0]


def check_under_jit(mesh, rule, params):
    """One leaf sharded along its first axis, the other along its second."""
    specs = {"rows": P("model"), "columns": P(None, "model")}
    placed = jax.tree.map(
        lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)),
        params,
        specs,
    )
    assert len(placed["columns"].sharding.device_set) == 8
    chex.assert_trees_all_close(run(rule, placed), run(rule, params), atol=1e-12)


def check_inside_shard_map(mesh, row, params):
    """Each device steps on its part; the sums over devices come from `axis_name`."""
    curvature = {
        "rows": CURVATURE.reshape(params["rows"].shape),
        "columns": CURVATURE.reshape(params["columns"].shape),
    }

    def walk(rule, params, curvature):
        def step(carry, _):
            params, state = carry
            grad = jax.tree.map(lambda h, p: h * jnp.sinh(p), curvature, params)
            updates, state = rule.update(grad, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(step, (params, rule.init(params)), length=5)[0][0]

    def spread(rule):
        specs = {"in_specs": (P("model"), P("model")), "out_specs": P("model")}
        part = lambda params, curvature: walk(rule, params, curvature)
        return jax.shard_map(part, mesh=mesh, check_vma=False, **specs)(
            params, curvature
        )

    whole = walk(row(), params, curvature)
    chex.assert_trees_all_close(spread(row(axis_name="model")), whole, atol=1e-12)
    forgotten = np.allclose(spread(row())["rows"], whole["rows"], rtol=0, atol=1e-9)
    assert forgotten == (row.reduces == "none")


def main():
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_num_cpu_devices", 8)
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    keys = jax.random.split(jax.random.key(0))
    params = {
        "rows": jax.random.normal(keys[0], (8, 4)),
        "columns": jax.random.normal(keys[1], (8, 4)).T.reshape(4, 8),
    }
    for name, row in RULES.items():
        check_under_jit(mesh, row(), params)
        if row.reduces != "fixed":
            check_inside_shard_map(
                mesh, row, {**params, "columns": params["rows"][::-1]}
            )
        print(name)


if __name__ == "__main__":
    main()
