"""Turns artefacts of version 1, whose sidecar has no hash of itself, into version 2.

    python -m experiments.seal_artifacts metax/amalgamation/pretrained/*.json

The weights stay as they are, bit for bit: only the sidecar is written anew, after the
hash of the weights that it names was found to be true. Takes a second.
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from metax.artifact import ArtifactError, seal
from metax.harness.files import replacing


def sealed(file: Path) -> str:
    """The sidecar of version 2 for one of version 1."""
    card = json.loads(file.read_text(encoding="utf-8"))
    kind, _, version = card["schema"].rpartition("/")
    if version != "1" or "sidecar_sha256" in card:
        raise ArtifactError(f"{file} must be of version 1; got {card['schema']!r}.")
    weights = file.with_suffix(".safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != card["sha256"]:
        raise ArtifactError(
            f"{weights} must have the sha256 {card['sha256']}; got {digest}."
        )
    return seal({**card, "schema": f"{kind}/2"})


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="SIDECAR.json")
    for file in parser.parse_args(argv).files:
        text = sealed(file)
        with replacing(file) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(f"sealed {file}")


if __name__ == "__main__":
    main()
