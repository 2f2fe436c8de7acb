"""Artefacts of version 1 become version 2, and their weights stay as they are."""

import json

import jax.numpy as jnp
import pytest

from experiments import seal_artifacts
from metax.artifact import ArtifactError, read_arrays, write_arrays


@pytest.fixture
def old(tmp_path):
    """The sidecar of an artefact as version 1 wrote it."""
    write_arrays(tmp_path / "a.v", {"w": jnp.ones(3)}, schema="x/1", sidecar={"n": 1})
    file = tmp_path / "a.v.json"
    card = json.loads(file.read_text())
    del card["sidecar_sha256"]
    file.write_text(json.dumps(card, indent=2) + "\n")
    return file


def test_an_old_artefact_is_refused_by_the_command_that_helps(old):
    with pytest.raises(ArtifactError, match=r"python -m experiments\.seal_artifacts"):
        read_arrays(old.with_suffix(""), "x/2")
    weights = old.with_suffix(".safetensors").read_bytes()
    seal_artifacts.main([str(old)])
    arrays, card = read_arrays(old.with_suffix(""), "x/2")
    assert (arrays["w"].tolist(), card["n"]) == ([1.0, 1.0, 1.0], 1)
    assert old.with_suffix(".safetensors").read_bytes() == weights


def test_what_is_damaged_or_sealed_already_is_left_alone(old):
    weights = old.with_suffix(".safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    with pytest.raises(ArtifactError, match=r"a\.v\.safetensors must have the sha256"):
        seal_artifacts.main([str(old)])
    weights.write_bytes(content)
    seal_artifacts.main([str(old)])
    with pytest.raises(ArtifactError, match="must be of version 1; got 'x/2'"):
        seal_artifacts.main([str(old)])
