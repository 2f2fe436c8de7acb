"""The command line of an experiment: a frozen dataclass becomes flags.

The dataclass stays in the script; the library never sees it. Five flags are common to
all scripts: `--preset`, `--out` and `--resume` say what is run and where it is written,
`--devices` and `--distributed` on what.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import tyro
from jax.sharding import Mesh

from metax.harness.parallel import device_mesh, start_devices, start_processes
from metax.harness.records import read_config

__all__ = ["RunOptions", "parse"]

Config = TypeVar("Config")

EARLY_FLAGS = ("preset", "out", "resume")
COMMON_FLAGS = (*EARLY_FLAGS, "devices", "distributed")


class RunOptions(NamedTuple):
    """Where a run is written, and on what it runs.

    Attributes:
      out: the folder of the run.
      resume: whether to go on with the run that is there.
      devices: over how many devices, of each process, the work is spread.
      distributed: whether this process is one of several.
    """

    out: Path
    resume: bool
    devices: int = 1
    distributed: bool = False

    @property
    def mesh(self) -> Mesh | None:
        """The devices, for `evaluate` and `replicate`; None where there is but one."""
        is_one = self.devices == 1 and not self.distributed
        return None if is_one else device_mesh(self.devices)


def parse(
    config_type: type[Config],
    *,
    presets: Mapping[str, Config] | None = None,
    argv: Sequence[str] | None = None,
    description: str | None = None,
    several_devices: bool = False,
) -> tuple[Config, RunOptions]:
    """Reads a config and the options of the run from the command line.

    `--preset NAME` takes the defaults from a named config, and other flags override
    them. `--out DIR` names the folder of the run, by default
    `runs/SCRIPT-YEARMONTHDAY-TIME`. `--resume DIR` takes the config from that folder;
    flags beside it must not change it. `--devices N` asks for N devices: the first of
    the GPUs, or N virtual ones of the CPU. `--distributed` makes this process one of
    several, with N devices each, see `start_processes`. Neither belongs to the config:
    a resumed run may have others. Bad flags end the program with exit code 2.

    Args:
      config_type: a frozen dataclass of plain scalars (or tuples of them) that all have
        defaults; the flag of `learning_rate` is `--learning-rate`.
      presets: names to instances of `config_type`.
      argv: the arguments without the program's name; `sys.argv[1:]` by default.
      description: what `--help` says first; that of the dataclass by default.
      several_devices: whether the script spreads its work over `options.mesh`; if not,
        both flags are refused.

    Returns:
      The config, and where to write.

    Raises:
      ValueError: a field of the dataclass is named like one of the five flags.
      SystemExit: bad flags (exit code 2), or `--help` (exit code 0).

    Example:
      >>> import dataclasses
      >>> from metax.harness import parse
      >>> @dataclasses.dataclass(frozen=True)
      ... class Config:
      ...     learning_rate: float = 0.1
      ...     num_steps: int = 100
      >>> presets = {"paper": Config(num_steps=5000)}
      >>> argv = ["--preset", "paper", "--learning-rate", "0.01", "--out", "here"]
      >>> config, options = parse(Config, presets=presets, argv=argv)
      >>> config, options.resume
      (Config(learning_rate=0.01, num_steps=5000), False)
    """
    presets = presets or {}
    argv = sys.argv[1:] if argv is None else list(argv)
    _check_fields(config_type)
    # these flags decide on the defaults of the others, so they are read first
    common = _common_parser()
    flags, _ = common.parse_known_args(argv)
    default = presets.get(flags.preset, config_type())
    if flags.resume is not None:
        default = _stored_config(config_type, flags.resume, common)
    command = tyro.cli(
        _command_type(config_type, default, tuple(presets)),
        args=argv,
        description=description or (config_type.__doc__ or "").split("\n\n")[0],
    )
    on = {"devices": command.devices, "distributed": command.distributed}
    if flags.resume is None:
        _start(command, several_devices, common)
        out = command.out or _default_folder()
        return command.config, RunOptions(out=out, resume=False, **on)
    # a preset must not change it either, though the stored values won over it
    for asked in (presets.get(flags.preset, default), command.config):
        if asked != default:
            common.error(
                "--resume goes on with the config that is stored, and other flags must "
                f"not change it; stored: {default}, asked for: {asked}"
            )
    if command.out not in (None, command.resume):
        common.error("--resume DIR writes to DIR: leave --out away")
    _start(command, several_devices, common)
    return default, RunOptions(out=command.resume, resume=True, **on)


def _start(
    command: Any, several_devices: bool, parser: argparse.ArgumentParser
) -> None:
    """Begins JAX with the processes and devices that were asked for."""
    if not command.distributed and command.devices == 1:
        return
    if not several_devices:
        parser.error(
            "--devices and --distributed: this script makes its runs one after the "
            "other, each of them on one device, and has nothing to divide. Start it "
            "several times with other flags and another --out, each on a device"
        )
    if command.distributed and command.out is None and command.resume is None:
        parser.error("--distributed needs --out DIR, the same folder for every process")
    try:
        if command.distributed:
            start_processes()
        start_devices(command.devices)
    except ValueError as error:
        parser.error(f"--devices {command.devices}: {error}")


def _common_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in EARLY_FLAGS:
        parser.add_argument(f"--{flag}")
    return parser


def _command_type(config_type: type, default: Any, presets: tuple[str, ...]) -> type:
    """The dataclass tyro reads: the fields of the config, and the common flags."""

    def flag(
        name: str, kind: Any, metavar: str | None, text: str, default: Any = None
    ) -> tuple[str, Any, Any]:
        kind = Annotated[kind, tyro.conf.arg(metavar=metavar, help=text)]
        return name, kind, dataclasses.field(default=default)

    folder, count = Path | None, "Devices to spread the work over, of each process."
    switch = tyro.conf.FlagCreatePairsOff[bool]
    config = dataclasses.field(default_factory=lambda: default)
    fields = [
        ("config", tyro.conf.OmitArgPrefixes[config_type], config),
        flag("out", folder, "DIR", "Folder of the run."),
        flag("resume", folder, "DIR", "Folder of a run to go on with."),
        flag("devices", int, "N", count, 1),
        flag("distributed", switch, None, "Be one of several processes.", False),
    ]
    if presets:
        names: Any = Literal[presets]
        text = "Named defaults, which other flags override."
        fields.append(flag("preset", names | None, f"{{{','.join(presets)}}}", text))
    return dataclasses.make_dataclass("Command", fields)


def _stored_config(
    config_type: type, folder: str, parser: argparse.ArgumentParser
) -> Any:
    try:
        stored = read_config(folder)
    except (FileNotFoundError, ValueError) as error:
        parser.error(f"--resume {folder}: {error}")
    names = {field.name for field in dataclasses.fields(config_type)}
    if stored.keys() != names:
        parser.error(
            f"--resume {folder} holds the run of another script: its config has "
            f"{sorted(stored)}, this script's has {sorted(names)}"
        )
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items()}
    return config_type(**values)


def _default_folder() -> Path:
    script = Path(sys.argv[0]).stem or "run"
    return Path("runs") / f"{script}-{time.strftime('%Y%m%d-%H%M%S')}"


def _check_fields(config_type: type) -> None:
    if not dataclasses.is_dataclass(config_type):
        raise ValueError(
            "`parse(config_type=...)` must be a dataclass; got "
            f"{getattr(config_type, '__name__', config_type)}."
        )
    taken = {field.name for field in dataclasses.fields(config_type)} & {*COMMON_FLAGS}
    if taken:
        raise ValueError(
            f"`parse(config_type=...)` must not have fields named {COMMON_FLAGS}, the "
            f"flags of every script; got {sorted(taken)}. Rename them."
        )
