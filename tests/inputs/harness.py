"""Rows of `metax.harness`."""

import dataclasses

import jax.numpy as jnp
import numpy as np

from metax import harness, inner_loop
from metax.hypergradient import sgd_hd
from tests.inputs.base import DATA, LOOP, TASK
from tests.inputs.cases import ABSENT, KEY, NAN, RAW, case, counts, numbers, rows

LEVEL = numbers("level", bad=(NAN, 0.0, 1.0))
LOOPS = (("loop", None), ("loop", TASK))
MESH = harness.device_mesh()
NO_MESH = (("mesh", 8), ("mesh", "device"))
STEPS = (*counts("num_steps", "chunk"), ("key", RAW))
BUILD = lambda rate: inner_loop(TASK, sgd_hd(rate, 0.01))
SETTINGS = (
    ("settings", 0.1),
    ("settings", jnp.ones(0)),
    ("settings", {}),
    ("settings", {"a": jnp.ones(2), "b": jnp.ones(3)}),
)
TAKEN = dataclasses.make_dataclass("Taken", [("out", int, 1)], frozen=True)
FINE = dataclasses.make_dataclass("Fine", [("steps", int, 1)], frozen=True)

TABLE = {
    "harness.append_metrics": case(
        harness.append_metrics,
        {"run": ABSENT, "rows": [{"step": 1}]},
        ("run", ABSENT, str(ABSENT / "metrics.jsonl"), "--out"),
        runs=False,
    ),
    "harness.bootstrap_interval": case(
        harness.bootstrap_interval,
        {"values": rows(5), "num_resamples": 10},
        ("values", []),
        ("values", [1.0]),
        ("values", [1.0, NAN]),
        ("values", "a"),
        *LEVEL,
        *counts("num_resamples"),
        ("seed", -1),
    ),
    "harness.create_run": case(
        harness.create_run,
        {"directory": ABSENT, "config": {}},
        ("directory", ABSENT, "create_run(directory=...)", str(ABSENT)),
        runs=False,
    ),
    "harness.evaluate": case(
        harness.evaluate,
        {"loop": LOOP, "data": DATA, "key": KEY, "num_steps": 2, "num_seeds": 2},
        *STEPS,
        *LOOPS,
        *counts("num_seeds"),
        *NO_MESH,
        named=("train", "replicate"),
        runs=False,
    ),
    "harness.evaluate_in_turn": case(
        harness.evaluate_in_turn,
        {
            "build": BUILD,
            "settings": jnp.array([0.1, 0.2]),
            "data": DATA,
            "key": KEY,
            "num_steps": 2,
            "num_seeds": 2,
            "judge": lambda state, data: 0.0,
            "judge_every": 1,
        },
        *counts("num_steps", "num_seeds", "judge_every"),
        ("judge_every", 3),
        ("key", RAW),
        *SETTINGS,
        runs=False,
    ),
    "harness.grid": case(
        harness.grid,
        {"build": BUILD, "settings": jnp.array([0.1])},
        *SETTINGS,
        *NO_MESH,
    ),
    "harness.hash_config": case(
        harness.hash_config,
        {"config": {"rate": 0.1, "widths": [1, 2], "more": {"name": None}}},
        ("config", {"rate": NAN}),
        ("config", {"rates": [1.0, float("inf")]}),
        ("config", {"rate": np.float32(NAN)}),
        ("config", {"loop": LOOP.step}),
        ("config", 0.1),
    ),
    "harness.host_unroll": case(harness.host_unroll, {"loop": LOOP}, ("loop", None)),
    "harness.iqm": case(
        harness.iqm, {"values": rows(5)}, ("values", []), ("values", [1.0, NAN])
    ),
    "harness.long_rows": case(
        harness.long_rows,
        {"measured": {"loss": rows(2)}, "axes": {"seed": (0, 1)}},
        ("axes", {"seed": (0,)}, "long_rows(measured=...)", "seed"),
        ("axes", {}, "long_rows(measured=...)"),
    ),
    "harness.mean_interval": case(
        harness.mean_interval,
        {"values": rows(5)},
        ("values", []),
        ("values", [1.0]),
        ("values", [1.0, NAN]),
        *LEVEL,
    ),
    "harness.mean_rows": case(
        harness.mean_rows,
        {"step": 2, "state": None, "infos": {"loss": rows(2)}},
        ("infos", {}),
    ),
    "harness.mixed_effects": case(
        harness.mixed_effects,
        {"values": rows(3, 4)},
        ("values", rows(3)),
        ("values", rows(1, 1)),
        ("values", rows(0, 3)),
        ("values", np.full((3, 4), NAN)),
        *LEVEL,
    ),
    "harness.optimization_stability": case(
        harness.optimization_stability,
        {"losses": rows(3, 30)},
        ("losses", rows(3, 1)),
        ("losses", np.full((3, 4), NAN)),
        ("losses", np.float32(1)),
        *numbers("sigma"),
    ),
    "harness.paired_difference": case(
        harness.paired_difference,
        {"a": rows(5), "b": rows(5, seed=1)},
        ("a", rows(4), "paired_difference(a=..., b=...)"),
        ("b", []),
        ("b", [NAN] * 5),
        *LEVEL,
        named=("mean_interval",),
    ),
    "harness.parse": case(
        harness.parse,
        {"config_type": FINE, "argv": []},
        ("config_type", int),
        ("config_type", TAKEN),
    ),
    "harness.plot_curves": case(
        harness.plot_curves,
        {"path": ABSENT, "curves": {"a": rows(3)}, "xlabel": "", "ylabel": ""},
        ("curves", {}, "plot_panels(panels=...)"),
        ("curves", {"a": rows(2, 2, 2)}, "curve", "'a'"),
        ("curves", {"a": []}, "curve", "'a'"),
        runs=False,
    ),
    "harness.plot_panels": case(
        harness.plot_panels,
        {"path": ABSENT, "panels": {"p": {"a": rows(3)}}, "xlabel": "", "ylabel": ""},
        ("panels", {}),
        *counts("num_columns"),
        runs=False,
    ),
    "harness.put_everywhere": case(
        harness.put_everywhere, {"data": DATA, "mesh": None}, *NO_MESH
    ),
    "harness.read_config": case(
        harness.read_config, {"run": ABSENT}, ("run", ABSENT, str(ABSENT)), runs=False
    ),
    "harness.record_run": case(
        harness.record_run,
        {"directory": ABSENT, "loop": LOOP, "data": DATA, "key": KEY, "num_steps": 2},
        ("key", RAW),
        ("directory", ABSENT),
        runs=False,
    ),
    "harness.replicate": case(
        harness.replicate,
        {"loop": LOOP, "num_seeds": 2},
        *counts("num_seeds"),
        *LOOPS,
        *NO_MESH,
    ),
    "harness.replicate:init": case(
        harness.replicate(LOOP, 2).init, {"key": KEY}, ("key", RAW), runs=False
    ),
    "harness.restore_checkpoint": case(
        harness.restore_checkpoint,
        {"directory": ABSENT, "like": {}},
        ("directory", ABSENT, str(ABSENT)),
        runs=False,
    ),
    "harness.save_checkpoint": case(
        harness.save_checkpoint,
        {"directory": ABSENT, "step": 0, "state": {"a": jnp.ones(1)}},
        ("step", -1),
        ("directory", ABSENT, str(ABSENT), "--out"),
        runs=False,
    ),
    "harness.spread": case(
        harness.spread,
        {"fn": jnp.add, "in_axes": (0, None), "mesh": None},
        *NO_MESH,
        ("fn", None),
        ("in_axes", 0),
        ("in_axes", (1, None)),
        ("in_axes", (None, None)),
    ),
    "harness.train": case(
        harness.train,
        {"loop": LOOP, "data": DATA, "key": KEY, "num_steps": 2},
        *STEPS,
        *LOOPS,
        ("chunk", 3),
        ("start", -1),
        ("start", 2),
        ("start", 1, "train(state=...)"),
        ("state", {}, "step(state=...)"),
        runs=False,
    ),
    "harness.device_mesh": case(
        harness.device_mesh, {}, *counts("num_devices"), ("num_devices", 99)
    ),
    "harness.first_non_finite": case(
        harness.first_non_finite, {"infos": None}, ("infos", {}), runs=False
    ),
    "harness.freeze": case(harness.freeze, {"loop": LOOP, "data": DATA}, *LOOPS),
    "harness.shard": case(
        harness.shard,
        {"loop": LOOP, "mesh": MESH, "size": 3},
        *LOOPS,
        ("mesh", None),
        *counts("size"),
    ),
    "harness.start_devices": case(
        harness.start_devices, {"num_devices": 1}, *counts("num_devices"), runs=False
    ),
    "harness.sweep": case(
        harness.sweep,
        {"cells": [{"a": 1}], "fn": len, "directory": ABSENT},
        ("directory", ABSENT),
        runs=False,
    ),
    "harness.trim_metrics": case(
        harness.trim_metrics, {"run": ABSENT, "step": 2}, ("step", -1), ("step", 0.5)
    ),
    "harness.write_json": case(
        harness.write_json,
        {"path": ABSENT, "value": {}},
        ("path", ABSENT, str(ABSENT), "--out"),
        runs=False,
    ),
    "harness.write_summary": case(
        harness.write_summary,
        {"run": ABSENT, "summary": {}, "wall_time": 0.1},
        ("run", ABSENT, str(ABSENT / "summary.json"), "--out"),
        ("summary", {"versions": {}}),
        runs=False,
    ),
}
