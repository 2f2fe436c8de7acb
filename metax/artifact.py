"""One file format for trained parameters: arrays in safetensors, the rest in JSON.

An artefact is two files. `<path>.safetensors` holds the leaves of a tree under their
paths, `<path>.json` says what they are: a schema with its version, the leaves with
shape and dtype, whatever the writer adds, the sha256 of the first file and that of
itself. Neither can run code when it is read, and no bit of either can change unseen.
Each is written under a temporary name and renamed, the JSON last, so that a half is
never met, and a pair that does not belong together is told by the hash.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

__all__ = [
    "ArtifactError",
    "fit_arrays",
    "named_leaves",
    "read_arrays",
    "seal",
    "write_arrays",
]

OURS = ("schema", "leaves", "sha256", "sidecar_sha256")
# what stands for the hash of the sidecar while that is taken
BLANK = "0" * 64
# the dtypes of JAX under their names in safetensors
DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}


class ArtifactError(ValueError):
    """An artefact that cannot be written or read; names the file and the leaf."""


def write_arrays(
    path: str | os.PathLike, tree: Any, *, schema: str, sidecar: Mapping[str, Any]
) -> None:
    """Writes a tree of arrays, bit for bit, and what is to be known about them.

    Args:
      path: of both files, without their suffixes; its folder is made if need be.
      tree: any pytree of arrays but typed keys. Leaves are named by their paths,
        "lstm_0/b".
      schema: what the sidecar means, with a version: "metax.learned_optimizer/2".
      sidecar: further JSON values, under any name but "schema", "leaves", "sha256" and
        "sidecar_sha256".

    Raises:
      ArtifactError: a leaf is no array, two have one name, the sidecar is not JSON, or
        the files cannot be written.
    """
    weights_file, sidecar_file = _files(path)
    taken = [name for name in OURS if name in sidecar]
    if taken:
        raise ArtifactError(
            f"`write_arrays(sidecar=...)` must leave {taken} to the format; got values "
            f"of its own for {sidecar_file}."
        )
    arrays = named_leaves(tree, path)
    content = _encode(arrays)
    card = {
        "schema": schema,
        **sidecar,
        "leaves": {name: _description(leaf) for name, leaf in arrays.items()},
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    try:
        text = seal(card)
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"`write_arrays(sidecar=...)` must hold finite JSON values; got {error} "
            f"for {sidecar_file}."
        ) from error
    try:
        weights_file.parent.mkdir(parents=True, exist_ok=True)
        _replace(weights_file, content)
        _replace(sidecar_file, text.encode())
    except OSError as error:
        raise ArtifactError(
            f"`write_arrays(path={os.fspath(path)!r})` must lead to a folder with room "
            f"that can be written; got {error.strerror or error}. Make room, or choose "
            "another path."
        ) from error


def seal(card: Mapping[str, Any]) -> str:
    """The text of a sidecar with the hash of itself, under "sidecar_sha256".

    For a card that was changed on purpose: the weights stay as they are.

    Args:
      card: finite JSON values; a hash that is there already is replaced.

    Returns:
      The text. Its hash is the sha256 of that text with 64 zeros in the hash's place.
    """
    unsealed = {name: value for name, value in card.items() if name != OURS[-1]}
    blank = json.dumps({**unsealed, OURS[-1]: BLANK}, indent=2, allow_nan=False) + "\n"
    before, _, after = blank.rpartition(BLANK)
    return before + hashlib.sha256(blank.encode()).hexdigest() + after


def read_arrays(
    path: str | os.PathLike, schema: str
) -> tuple[dict[str, jax.Array], dict[str, Any]]:
    """Reads what `write_arrays` wrote, after checking that it is just that.

    Args:
      path: of both files, without their suffixes.
      schema: the schema that the caller understands.

    Returns:
      The leaves by name, and the sidecar.

    Raises:
      ArtifactError: a file is missing or not what it should be, the schema is another,
        a hash does not match, or a leaf is missing, too many, or of another shape or
        dtype than the sidecar says.

    Example:
      >>> import jax.numpy as jnp, pathlib, tempfile
      >>> from metax.artifact import read_arrays, write_arrays
      >>> tree = {"layer": {"w": jnp.array([1.0, 2.0])}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder) / "trained"
      ...     write_arrays(path, tree, schema="example/1", sidecar={"seed": 0})
      ...     arrays, sidecar = read_arrays(path, "example/1")
      >>> arrays["layer/w"].tolist(), sidecar["seed"]
      ([1.0, 2.0], 0)
    """
    weights_file, sidecar_file = _files(path)
    sidecar = _parse(_read(sidecar_file), sidecar_file, schema)
    content = _read(weights_file)
    digest = hashlib.sha256(content).hexdigest()
    if digest != sidecar["sha256"]:
        raise ArtifactError(
            f"{weights_file} must have the sha256 that {sidecar_file.name} says, "
            f"{sidecar['sha256']}; got {digest}. It was changed or cut off: copy both "
            "files again."
        )
    parts = _decode(content, weights_file)
    found = {
        name: {"shape": list(part["shape"]), "dtype": DTYPES[part["dtype"]]}
        for name, part in parts.items()
    }
    _compare(sidecar["leaves"], found, weights_file)
    arrays = {
        # without x64 a double becomes a single here, as it does everywhere in JAX
        name: jnp.frombuffer(part["data"], DTYPES[part["dtype"]]).reshape(part["shape"])
        for name, part in parts.items()
    }
    return arrays, sidecar


def fit_arrays(arrays: Mapping[str, jax.Array], like: Any, path: Any) -> Any:
    """Puts arrays that were read back into the tree they came from.

    Args:
      arrays: leaves by name, from `read_arrays`.
      like: a tree of that form, or `jax.eval_shape` of what makes one. Shapes must
        agree; the dtypes are those of `arrays`.
      path: of the artefact, for errors.

    Returns:
      The tree.

    Raises:
      ArtifactError: a leaf is missing, too many, or of another shape.
    """
    weights_file, _ = _files(path)
    shapes = lambda leaves: {
        name: {"shape": list(leaf.shape)} for name, leaf in leaves.items()
    }
    wanted = named_leaves(like, path)
    _compare(shapes(wanted), shapes(arrays), weights_file)
    leaves = [arrays[name] for name in wanted]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def named_leaves(tree: Any, path: str | os.PathLike) -> dict[str, Any]:
    """The leaves of a tree under the names that they have in an artefact.

    Args:
      tree: any pytree of arrays or of their shapes and dtypes.
      path: of the artefact, for errors.

    Returns:
      The leaves by path, "lstm_0/b".

    Raises:
      ArtifactError: a leaf is a typed key, or two have one name.
    """
    file, _ = _files(path)
    named = {}
    for at, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(at, simple=True, separator="/")
        array = leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf)
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            raise ArtifactError(f"{file} must hold no typed keys; got one at {name!r}.")
        if name in named:
            raise ArtifactError(
                f"{file} must have a name for each leaf; got {name!r} twice."
            )
        named[name] = array
    return named


def _files(path: str | os.PathLike) -> tuple[Path, Path]:
    """`trained.v2` → `trained.v2.safetensors`, `trained.v2.json`."""
    path = Path(path)
    beside = lambda suffix: path.with_name(path.name + suffix)
    return beside(".safetensors"), beside(".json")


def _description(leaf: Any) -> dict[str, Any]:
    return {"shape": list(leaf.shape), "dtype": str(leaf.dtype)}


def _compare(wanted: Mapping, found: Mapping, file: Path) -> None:
    """Refuses the first leaf on which the two do not agree."""
    for name in [*wanted, *(name for name in found if name not in wanted)]:
        want, got = (part.get(name, "no such leaf") for part in (wanted, found))
        if want != got:
            raise ArtifactError(
                f"{file} must have at leaf {name!r} {_words(want)}; got {_words(got)}."
            )


def _words(description: Any) -> str:
    if isinstance(description, str):
        return description
    return " ".join(f"{name} {value}" for name, value in description.items())


def _encode(arrays: Mapping[str, Any]) -> bytes:
    from safetensors.numpy import save

    return save(jax.device_get(dict(arrays)))


def _decode(content: bytes, file: Path) -> dict[str, dict[str, Any]]:
    """What lies in the file: shape, dtype and bytes of each leaf."""
    from safetensors import SafetensorError, deserialize

    try:
        parts = dict(deserialize(content))
    except SafetensorError as error:
        raise ArtifactError(f"{file} must be safetensors; got {error}.") from error
    for name, part in parts.items():
        if part["dtype"] not in DTYPES:
            raise ArtifactError(
                f"{file} must have at leaf {name!r} one of the dtypes "
                f"{', '.join(DTYPES)}; got {part['dtype']}."
            )
    return parts


def _parse(content: bytes, file: Path, schema: str) -> dict[str, Any]:
    """The sidecar, if it is one of this schema and as it was written."""
    try:
        sidecar = json.loads(content)
    except ValueError as error:
        raise ArtifactError(f"{file} must be JSON; got {error}.") from error
    names = sidecar if isinstance(sidecar, dict) else {}
    if names.get("schema", schema) != schema:
        raise ArtifactError(
            f"{file} must have the schema {schema!r}; got {sidecar['schema']!r}. "
            "Another part or version wrote it: `python -m experiments.seal_artifacts` "
            "turns version 1 into 2."
        )
    missing = [name for name in OURS if name not in names]
    if missing:
        raise ArtifactError(f"{file} must have {', '.join(OURS)}; got no {missing}.")
    _check_seal(content, sidecar[OURS[-1]], file)
    if not isinstance(sidecar["leaves"], dict):
        raise ArtifactError(f"{file} must have a description of every leaf; got none.")
    return sidecar


def _check_seal(content: bytes, stated: Any, file: Path) -> None:
    """Refuses a sidecar in which any byte is not the one that was written."""
    whole = isinstance(stated, str) and len(stated) == len(BLANK)
    before, found, after = content.rpartition(str(stated or BLANK).encode())
    digest = hashlib.sha256(before + BLANK.encode() + after).hexdigest()
    if not (whole and found and digest == stated):
        raise ArtifactError(
            f"{file} must have the sha256 that it says of itself, {stated}; got "
            f"{digest}. It was changed or cut off: copy both files again, or, where "
            "the change is meant, write what `metax.artifact.seal` makes of it."
        )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise ArtifactError(
            f"{file} must be a file that can be read; got {error.strerror}."
        ) from error


def _replace(file: Path, content: bytes) -> None:
    """Writes the file in one act: it is the old one or the new one."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
