"""Several devices: what runs side by side is spread over them, with the same numbers.

Two ways lead there. Runs that know nothing of each other, replicates and the settings
of a grid, go through `spread`: each device runs the same `vmap` over its share and
never waits for another. What meets again within a step, the tasks of a learned
optimizer or the rollouts of a controller, goes through `shard`: it says where the
arrays lie, and the compiler divides the work and sums over devices.

One mesh axis serves both, on the virtual devices of a CPU, on several GPUs, or on the
devices of many hosts: there every process runs the same script, `start_processes` has
made them one, and the arrays belong to all of them.
"""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from metax.arguments import check_count, check_has, refuse
from metax.base import Loop, LoopLike

__all__ = [
    "check_mesh",
    "check_share",
    "device_mesh",
    "put_everywhere",
    "shard",
    "spread",
    "spread_sharding",
    "start_devices",
    "start_processes",
]

PROCESS_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


def device_mesh(num_devices: int | None = None) -> Mesh:
    """Lines devices up along one axis.

    Args:
      num_devices: how many; where several processes run, of each of them. The first
        ones are taken; by default all.

    Returns:
      A mesh with the one axis "device".

    Raises:
      ValueError: there are fewer devices, or `num_devices` is below 1.

    Example:
      >>> from metax.harness import device_mesh
      >>> dict(device_mesh(1).shape)
      {'device': 1}
    """
    found: dict[int, list[Any]] = {}
    for device in jax.devices():
        found.setdefault(device.process_index, []).append(device)
    fewest = min(len(devices) for devices in found.values())
    if num_devices is not None and not 1 <= num_devices <= fewest:
        raise ValueError(
            f"`device_mesh(num_devices=...)` must be from 1 to the {fewest} "
            f"{jax.default_backend()} devices there are; got {num_devices}."
        )
    chosen = [device for devices in found.values() for device in devices[:num_devices]]
    return jax.make_mesh(
        (len(chosen),), ("device",), axis_types=(AxisType.Auto,), devices=chosen
    )


def spread(
    fn: Callable[..., Any], in_axes: Sequence[int | None], mesh: Mesh | None
) -> Callable[..., Any]:
    """`vmap`, of which each device of the mesh runs its share.

    Args:
      fn: what to run for one.
      in_axes: 0 or None for each of its arguments, as in `vmap`.
      mesh: the devices; None for a plain `vmap`.

    Returns:
      The function of the batched arguments, whose results are spread as well. It raises
      ValueError where the devices do not divide the axis.

    Raises:
      ValueError: `fn` cannot be called, `in_axes` holds something else, or `mesh` is
        neither a mesh nor None.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax.harness import device_mesh, spread
      >>> add = spread(jnp.add, (0, None), device_mesh(1))
      >>> jax.jit(add)(jnp.arange(3), 10).tolist()
      [10, 11, 12]
    """
    _check_spread(fn, in_axes, mesh)
    mapped = jax.vmap(fn, tuple(in_axes))
    if mesh is None:
        return mapped
    share = P(mesh.axis_names)
    specs = tuple(P() if axis is None else share for axis in in_axes)
    # which results differ between devices need not be found out: all of them do
    on_devices = jax.shard_map(
        mapped, mesh=mesh, in_specs=specs, out_specs=share, check_vma=False
    )

    def run(*args: Any) -> Any:
        batched = [x for x, axis in zip(args, in_axes, strict=True) if axis == 0]
        for leaf in jax.tree.leaves(batched):
            check_share("spread(...)(size of the axis)", leaf.shape[0], mesh)
        return on_devices(*args)

    return run


def _check_spread(fn: Any, in_axes: Any, mesh: Any) -> None:
    check_mesh("spread", mesh)
    if not callable(fn):
        refuse("spread", "fn", "must be a function", repr(fn))
    if not isinstance(in_axes, Sequence) or 0 not in in_axes or {*in_axes} - {0, None}:
        rule = "must be 0, for one argument at least, or None for each of them"
        refuse("spread", "in_axes", rule, in_axes)


def check_mesh(function: str, mesh: Any) -> None:
    """Refuses what is no mesh; None stands for one device.

    Args:
      function: the public name that was called.
      mesh: what the caller passed.

    Raises:
      ValueError: naming function and argument.
    """
    if mesh is not None:
        what = "a mesh, of `device_mesh()`"
        check_has(function, "mesh", mesh, what, "axis_names", "shape")


def check_share(argument: str, size: int, mesh: Mesh | None) -> None:
    """Refuses an axis that the devices do not divide.

    Args:
      argument: how the error names it, e.g. `"replicate(num_seeds=...)"`.
      size: the length of the axis.
      mesh: the devices; None for one.

    Raises:
      ValueError: `size` is no multiple of their number.
    """
    if mesh is not None and size % mesh.size:
        raise ValueError(
            f"`{argument}` must be a multiple of the number of devices; got {size} on "
            f"{mesh.size} devices."
        )


def spread_sharding(mesh: Mesh) -> NamedSharding:
    """Where arrays lie whose first axis is spread over the mesh."""
    return NamedSharding(mesh, P(mesh.axis_names))


def shard(loop: LoopLike, mesh: Mesh, size: int) -> Loop:
    """Divides the work within each step of `loop` over devices.

    For a loop that has an axis inside: the tasks of `amalgamate` and `imitate`, the
    rollouts of `autoloss`. Every leaf of its state and info whose first axis is of
    length `size` is spread, every other leaf of the state lies on each device, and the
    compiler divides what lies between. Where an array happens to have that length,
    only its place changes. Sums over the axis are made in another order than on one
    device, so results agree up to rounding.

    Args:
      loop: what to run; for independent runs use `replicate(..., mesh=mesh)`.
      mesh: the devices.
      size: the length of the axis; a multiple of the number of devices.

    Returns:
      A `Loop` with the same state and info.

    Raises:
      ValueError: the devices do not divide `size`, or, at the first step, no leaf has
        such an axis.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from metax import Loop
      >>> from metax.harness import device_mesh, shard, train
      >>> def step(x, key, data):
      ...     each = x + jnp.arange(4.0)
      ...     return each.mean(), each
      >>> loop = shard(Loop(lambda key: jnp.zeros(()), step), device_mesh(1), size=4)
      >>> float(train(loop, None, jax.random.key(0), num_steps=2)[0])
      3.0
    """
    check_has("shard", "loop", loop, "a `Loop`", "init", "step")
    check_has(
        "shard", "mesh", mesh, "a mesh, of `device_mesh()`", "axis_names", "shape"
    )
    check_count("shard", 1, size=size)
    check_share("shard(size=...)", size, mesh)
    divided, whole = spread_sharding(mesh), NamedSharding(mesh, P())
    has_axis = lambda leaf: leaf.shape[:1] == (size,)

    def place(leaf: Any) -> NamedSharding:
        return divided if has_axis(leaf) else whole

    def constrain(tree: Any) -> Any:
        return jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(leaf, place(leaf)), tree
        )

    def step(state: Any, key: jax.Array, data: Any) -> tuple[Any, Any]:
        state, info = loop.step(constrain(state), key, data)
        leaves = jax.tree.leaves((state, info))
        if not any(map(has_axis, leaves)):
            shapes = sorted({leaf.shape[:1] for leaf in leaves} - {()})
            raise ValueError(
                "`shard(size=...)` must be the length of the first axis of some leaf "
                f"of the state or info; got size={size}, found {shapes}."
            )
        # of the info only what has the axis: through it the compiler finds rollouts,
        # of which no state remains
        ask = lambda leaf: constrain(leaf) if has_axis(leaf) else leaf
        return constrain(state), jax.tree.map(ask, info)

    key = jax.eval_shape(lambda: jax.random.key(0))
    places = jax.tree.map(place, jax.eval_shape(loop.init, key))
    # jitted, its shapes say where its arrays lie, for whoever restores them
    return Loop(jax.jit(loop.init, out_shardings=places), step)


def put_everywhere(data: Any, mesh: Mesh | None) -> Any:
    """Puts a copy of `data` on each device, once and not anew at each chunk.

    Args:
      data: a pytree of arrays, the same in every process.
      mesh: the devices; where there are none, or they are those of several processes,
        each of which has its copy, `data` stays where it is.

    Returns:
      The same tree, for `train` or `record_run`.

    Raises:
      ValueError: `mesh` is neither a mesh nor None.
    """
    check_mesh("put_everywhere", mesh)
    if mesh is None or mesh.is_multi_process:
        return data
    return jax.device_put(data, NamedSharding(mesh, P()))


def start_devices(num_devices: int) -> None:
    """Makes a CPU show several virtual devices; no effect on other devices.

    Args:
      num_devices: how many, of each process; at least 1.

    Raises:
      ValueError: there are fewer, as of GPUs or where JAX has begun already.
    """
    with contextlib.suppress(RuntimeError):  # JAX has begun: it may have enough
        jax.config.update("jax_num_cpu_devices", num_devices)
    found = jax.local_device_count()
    if not 1 <= num_devices <= found:
        raise ValueError(
            f"`start_devices(num_devices=...)` must be from 1 to the {found} "
            f"{jax.default_backend()} devices there are; got {num_devices}."
        )


def start_processes() -> None:
    """Joins the processes that run this script, on one host or many, into one run.

    It is `jax.distributed.initialize`, which finds its arguments by itself under Slurm,
    Open MPI, Kubernetes and on TPUs. Elsewhere they come from three environment
    variables: `JAX_COORDINATOR_ADDRESS` (host:port of the first process),
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID` (from 0). Call it before anything asks JAX
    for devices.

    Raises:
      ValueError: neither says how many processes there are, JAX has begun already, or
        the variables are not as they should be.
    """
    given = [os.environ.get(name) for name in PROCESS_VARIABLES]
    try:
        if None in given:
            jax.distributed.initialize()
        else:
            address, count, number = map(str, given)
            jax.distributed.initialize(address, int(count), int(number))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            "`start_processes()` must be called first, under Slurm, Open MPI or "
            f"Kubernetes, or with {', '.join(PROCESS_VARIABLES)} set; got "
            f"{dict(zip(PROCESS_VARIABLES, given, strict=True))}: {error}"
        ) from error
