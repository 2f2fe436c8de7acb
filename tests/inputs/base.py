"""Rows of `metax` itself."""

import jax
import jax.numpy as jnp
import optax

from metax import Task, check_key, inner_loop, last_reward, squared_norm, unroll
from tests.inputs.cases import KEY, NAN, RAW, case

TASK = Task(
    init=lambda key: {"w": jnp.ones(3)},
    loss=lambda params, batch, key: jnp.mean((batch["x"] @ params["w"]) ** 2),
    sample=lambda data, key: data,
    evaluate=lambda params, data: {"loss": jnp.sum(params["w"])},
)
DATA = {"x": jnp.ones((4, 3)), "y": jnp.ones(4)}
LOOP = inner_loop(TASK, optax.sgd(0.1))
STATE = LOOP.init(KEY)
KEYS = jax.random.split(KEY, 2)

TABLE = {
    "check_key": case(
        check_key,
        {"key": KEY, "argument": "f(key=...)"},
        ("key", RAW, "f(key=...)"),
        ("key", 3, "f(key=...)"),
        ("key", None, "f(key=...)"),
        ("key", KEYS, "f(key=...)"),
    ),
    "inner_loop": case(
        inner_loop,
        {"task": TASK, "rule": optax.sgd(0.1)},
        ("task", None),
        ("task", LOOP),
        ("rule", 0.1),
        ("rule", optax.sgd),
    ),
    "inner_loop:init": case(LOOP.init, {"key": KEY}, ("key", RAW), ("key", 0)),
    "inner_loop:step": case(
        LOOP.step,
        {"state": STATE, "key": KEY, "data": DATA},
        ("key", RAW),
        ("key", KEYS),
        ("state", STATE.params),
    ),
    "unroll": case(
        unroll,
        {"loop": LOOP, "state": STATE, "keys": KEYS, "data": DATA},
        ("keys", KEY),
        ("keys", RAW),
        ("keys", 4),
        ("loop", TASK),
        ("loop", None),
        ("state", {"w": 1.0}, "inner_loop(...).step(state=...)"),
    ),
    "last_reward": case(
        last_reward,
        {"history": jnp.ones(3), "live": jnp.ones(3, bool)},
        ("live", jnp.ones(2, bool)),
        ("history", jnp.ones((3, 2))),
        ("history", NAN),
    ),
    "squared_norm": case(squared_norm, {"params": {"w": jnp.ones(2)}}, ("select", 3)),
}
