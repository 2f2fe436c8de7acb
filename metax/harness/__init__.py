"""The host side of a run: it knows loops and no method."""

from metax.harness.checkpoint import restore_checkpoint, save_checkpoint
from metax.harness.cli import RunOptions, parse
from metax.harness.evaluation import (
    evaluate,
    evaluate_in_turn,
    grid,
    replicate,
)
from metax.harness.files import StorageError, write_json
from metax.harness.freezing import FreezeState, first_non_finite, freeze
from metax.harness.manifest import CheckpointCorruptError, CheckpointMismatchError
from metax.harness.parallel import (
    device_mesh,
    put_everywhere,
    shard,
    spread,
    start_devices,
    start_processes,
)
from metax.harness.plot import plot_curves, plot_panels
from metax.harness.recording import mean_rows, record_run
from metax.harness.records import (
    append_metrics,
    create_run,
    hash_config,
    long_rows,
    read_config,
    read_metrics,
    trim_metrics,
    versions,
    write_summary,
)
from metax.harness.retention import latest_step
from metax.harness.stats import (
    Interval,
    MixedEffects,
    bootstrap_interval,
    iqm,
    mean_interval,
    mixed_effects,
    optimization_stability,
    paired_difference,
)
from metax.harness.stepping import host_unroll
from metax.harness.sweeping import SweepError, sweep
from metax.harness.training import NonFiniteError, train

__all__ = [
    "CheckpointCorruptError",
    "CheckpointMismatchError",
    "FreezeState",
    "Interval",
    "MixedEffects",
    "NonFiniteError",
    "RunOptions",
    "StorageError",
    "SweepError",
    "append_metrics",
    "bootstrap_interval",
    "create_run",
    "device_mesh",
    "evaluate",
    "evaluate_in_turn",
    "first_non_finite",
    "freeze",
    "grid",
    "hash_config",
    "host_unroll",
    "iqm",
    "latest_step",
    "long_rows",
    "mean_interval",
    "mean_rows",
    "mixed_effects",
    "optimization_stability",
    "paired_difference",
    "parse",
    "plot_curves",
    "plot_panels",
    "put_everywhere",
    "read_config",
    "read_metrics",
    "record_run",
    "replicate",
    "restore_checkpoint",
    "save_checkpoint",
    "shard",
    "spread",
    "start_devices",
    "start_processes",
    "sweep",
    "train",
    "trim_metrics",
    "versions",
    "write_json",
    "write_summary",
]
