"""Everything that a run needs to go on exactly, in one file that no crash leaves half-written.

A checkpoint is one safetensors file: the tensors in their true dtypes, and in its metadata the rest
of the state as JSON (see ``state_tree``), the identity of the run, and a SHA-256 digest over both.
Any safetensors reader opens it; none executes anything. The digest finds damage and edits; it is
not a signature, and somebody who can write the file can also write a matching digest.

A file takes its name only when it is whole and on the disk, and the one before it is deleted only
afterwards: a crash or a full disk at any moment leaves the previous checkpoint as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from narrowcast.errors import CheckpointError
from narrowcast.files import replacing
from narrowcast.training.shard_files import remove_orphans
from narrowcast.training.sharded import whole
from narrowcast.training.state_tree import leaves, pack, unpack

__all__ = [
    "FORMAT",
    "buffers_in",
    "checkpoints_in",
    "fingerprint",
    "is_checkpoint",
    "load",
    "load_latest",
    "load_weights",
    "path_of",
    "save",
    "save_weights",
]

FORMAT = 1
_VERSION_KEY = "narrowcast_checkpoint"
_BUFFERS_KEY = "narrowcast_buffers"
_NAME = "step-{:08d}.safetensors"
_IS_CHECKPOINT = re.compile(r"step-(\d{8,})\.safetensors")
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


def save(
    directory: Path,
    state: Mapping[str, Any],
    *,
    step: int,
    identity: Mapping[str, Any],
    keep: int = 2,
) -> Path:
    """Write the state of a run after `step` steps; keep this one and the `keep` - 1 before it.

    `identity` is what must be the same for the run to go on: recipe, options, policy, versions.
    Holds one copy on the CPU of whatever lives on a GPU, and nothing more.
    Raises CheckpointError for a state that cannot be stored, RunDirectoryError if the disk is full.
    """
    data, tensors = pack(dict(state))
    body = json.dumps({"identity": dict(identity), "state": data}, allow_nan=False)
    target = path_of(directory, step)
    _write(target, tensors, _metadata(body, tensors))
    for old in checkpoints_in(directory)[:-keep]:
        old.unlink(missing_ok=True)
    remove_orphans(directory)
    return target


def checkpoints_in(directory: Path) -> list[Path]:
    """List the checkpoints of a directory, the newest last."""
    found = [p for p in directory.glob("step-*") if _IS_CHECKPOINT.fullmatch(p.name)]
    return sorted(found, key=_step_of)


def path_of(directory: Path, step: int) -> Path:
    """Return where `save` writes the checkpoint of a step."""
    return directory / _NAME.format(step)


def load_latest(
    directory: Path, *, identity: Mapping[str, Any] | None = None, gather: bool = True
) -> dict[str, Any]:
    """Load the newest checkpoint, verified; see `load`.

    Raises CheckpointError if there is none, or if it is damaged: a crash cannot damage it, so the
    one before it is named but never taken in its place silently.
    """
    found = checkpoints_in(directory)
    if not found:
        raise CheckpointError(
            f"{directory} holds no checkpoint", hint="leave out --resume to begin from step 0"
        )
    try:
        return load(found[-1], identity=identity, gather=gather)
    except _DamagedError as error:
        earlier = found[-2].name if len(found) > 1 else ""
        way_out = f"to continue from {earlier} instead" if earlier else "and begin again"
        raise CheckpointError(
            error.message, hint=f"{error.hint}; delete {found[-1]} {way_out}"
        ) from None


def load(
    path: Path, *, identity: Mapping[str, Any] | None = None, gather: bool = True
) -> dict[str, Any]:
    """Load one checkpoint after verifying format, digest and, if given, identity.

    Every tensor is a fresh copy on the CPU. What ranks have written as shards is put together, or
    without `gather` left to ``sharded.own_part``. Raises CheckpointError, naming file and
    difference.
    """
    metadata, tensors = _read(path)
    if _VERSION_KEY not in metadata:
        raise _DamagedError(
            f"{path} is not a narrowcast checkpoint", hint="its metadata are missing"
        )
    if metadata[_VERSION_KEY] != str(FORMAT):
        raise CheckpointError(
            f"{path} has checkpoint format {metadata['narrowcast_checkpoint']}, and this version "
            f"of narrowcast reads format {FORMAT}",
            hint="continue with the version of narrowcast that wrote it",
        )
    body = metadata.get("state", "")
    if metadata != _metadata(body, tensors):
        raise _DamagedError(
            f"{path} does not match its SHA-256 digest",
            hint="it was damaged or edited after it was written",
        )
    document = json.loads(body)
    if identity is not None:
        _compare_identity(path, document["identity"], identity)
    state: dict[str, Any] = unpack(document["state"], tensors)
    return whole(state, path) if gather else state


def save_weights(path: Path, weights: Mapping[str, Any], *, made: Collection[str] = ()) -> None:
    """Export a model's ``state_dict()`` as stored, for any reader of safetensors.

    Tied weights are written once; ``metadata[other name] = name`` tells their other names, the
    convention of ``safetensors.torch.save_model``. What is no tensor (``get_extra_state()``) is
    left out. `made` names buffers that the model does not have as it is built. Raises
    RunDirectoryError if the disk is full.
    """
    data, tensors = pack({name: w for name, w in weights.items() if isinstance(w, Tensor)})
    stored = {name: reference["tensor"] for name, reference in data["dict"]}
    aliases = {name: kept for name, kept in stored.items() if name != kept}
    # Without them the file's bytes follow from its weights: metadata are in no order of their own.
    named = {_BUFFERS_KEY: json.dumps(list(made))} if made else {}
    _write(path, tensors, {**aliases, "format": "pt", **named})


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read exported weights, tied ones under each of their names.

    Raises CheckpointError if the file is missing, damaged, or of another kind.
    """
    metadata, tensors = _read(path)
    aliases = {name: tensors[kept] for name, kept in metadata.items() if kept in tensors}
    return {**tensors, **aliases}


def buffers_in(path: Path) -> list[str]:
    """List the buffers that `save_weights` was told a forward pass had made.

    Raises CheckpointError if it is missing, damaged, or of another kind.
    """
    named: list[str] = json.loads(_read(path, contents=False)[0].get(_BUFFERS_KEY, "[]"))
    return named


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a checkpoint of ours, and no export of weights.

    Raises CheckpointError if it is missing, damaged, or of another kind.
    """
    return _VERSION_KEY in _read(path, contents=False)[0]


def fingerprint(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of a model's ``state_dict()``."""
    _, tensors = pack({name: w for name, w in weights.items() if isinstance(w, Tensor)})
    return _digest("", tensors)


class _DamagedError(CheckpointError):
    """The file is not what was written; distinguished from a sound file of another run."""


def _step_of(path: Path) -> int:
    match = _IS_CHECKPOINT.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    with replacing(path) as temporary:
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:
            code = _OS_ERROR.search(str(error))
            if code is None:
                raise CheckpointError(f"cannot write {path}: {error}") from error
            number = int(code[1])
            raise OSError(number, os.strerror(number)) from error


def _read(path: Path, *, contents: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read metadata and, unless only those are wanted, tensors."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist", hint="give the path of a safetensors file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            # Cloned: a tensor mapped to the file would change, or fault, with the file.
            names = list(file.keys()) if contents else []
            tensors = {name: file.get_tensor(name).clone() for name in names}
            return dict(file.metadata() or {}), tensors
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _DamagedError(f"{path} cannot be read: {error}", hint=_what_it_is(path)) from None


def _what_it_is(path: Path) -> str:
    """Guess what a file that is no safetensors file is, from its first bytes."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        return f"reading it fails: {os.strerror(error.errno or 0)}"
    if start[:2] == b"PK" or start[:1] == b"\x80":
        return "it is a pickle (torch.save), which can run code when loaded and is never opened"
    size, said = path.stat().st_size, int.from_bytes(start, "little") + 8
    if size < said:
        return f"it is truncated: {size} bytes, less than its header alone"
    return f"it is truncated, was edited, or is no safetensors file ({size} bytes)"


def _metadata(body: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {
        "format": "pt",  # what the readers of safetensors look for
        _VERSION_KEY: str(FORMAT),
        "state": body,
        "sha256": _digest(body, tensors),
    }


def _digest(body: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over the JSON and, in the order of names, each tensor's name, dtype, shape, bytes."""
    digest = hashlib.sha256(body.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _compare_identity(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    there, here = leaves(stored), leaves(json.loads(json.dumps(dict(wanted))))
    missing = "(absent)"
    differences = [
        f"{key}: {there.get(key, missing)!r} there, {here.get(key, missing)!r} here"
        for key in sorted({*there, *here})
        if there.get(key, missing) != here.get(key, missing)
    ]
    if differences:
        raise CheckpointError(
            f"{path} belongs to another run. It differs in {'; '.join(differences)}",
            hint="continue with the same recipe, options, precision and versions, "
            "or begin a new run in another --output",
        )
