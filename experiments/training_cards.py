"""What the sidecar of a trained optimizer says: how it came about, and by what command.

No script, and not to be run.
"""

import dataclasses
from typing import Any

from experiments.meta_training import Training, warmup
from metax.harness import versions


def training_command(config: Any, presets: dict[str, Any]) -> str:
    """The command that trains with a config: the nearest preset, and the other flags.

    Folders of one machine are left out.
    """
    flags = {
        name: _flags(config, default)
        for name, default in {"": type(config)(), **presets}.items()
    }
    name = min(flags, key=lambda name: len(flags[name]))
    begin = f"python -m experiments.amalgamate{f' --preset {name}' if name else ''}"
    return " ".join([begin, *flags[name]])


def card(config: Training, command: str, **more: Any) -> dict[str, Any]:
    """What the sidecar of an artefact says, but for the evaluation."""
    asked = dataclasses.asdict(config)
    return {
        **warmup(config),
        "trained_on": config.optimizee,
        "licence": "Apache-2.0",
        "training_command": command,
        "seeds": [config.seed],
        "config": {name: asked[name] for name in asked if name != "data_dir"},
        "versions": versions(),
        **more,
    }


def _flags(config: Any, default: Any) -> list[str]:
    """The flags that differ from a default, as tyro reads them."""
    asked, usual = dataclasses.asdict(config), dataclasses.asdict(default)
    found = []
    for name, value in asked.items():
        if value == usual[name] or name == "data_dir":
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            found.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            values = value if isinstance(value, tuple) else (value,)
            found.append(" ".join([f"--{flag}", *map(str, values)]))
    return found
