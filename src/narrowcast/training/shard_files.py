"""The files of shards: one of safetensors a rank, written and read by torch.distributed.checkpoint.

    step-00000010.safetensors     what all ranks have once; written last, with the digests of
    step-00000010.shards/         every rank's part

dcp's own format keeps its metadata in a pickle; this one, which it has for Hugging Face, does not.
"""

from __future__ import annotations

import hashlib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from narrowcast.errors import CheckpointError
from narrowcast.files import cannot_write, flush
from narrowcast.parallel.peers import Ranks

__all__ = ["DAMAGED", "read_shards", "remove_orphans", "shards_of", "verify_shards", "write_files"]

_SUFFIX = ".shards"

DAMAGED = (
    "it was damaged, edited or deleted after it was written; delete the checkpoint and its shards "
    "to continue from the one before"
)
"""What to do about shards that are not what was written."""


def shards_of(path: Path) -> Path:
    """Return the directory of the shards that belong to a checkpoint's file."""
    return path.with_suffix(_SUFFIX)


def write_files(path: Path, own: Mapping[str, Tensor], ranks: Ranks) -> dict[str, str]:
    """Write this rank's tensors and parts (DTensors) beside `path`; returns all files' digests.

    Every rank has to call it. Raises RunDirectoryError on all if the disk of one is full.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    target = shards_of(path)
    with _as_our_error(target):
        if ranks.is_main:
            shutil.rmtree(target, ignore_errors=True)  # what a run that was killed left
            target.mkdir(parents=True)
        ranks.any(False)  # nobody writes before
        writer = HuggingFaceStorageWriter(str(target), save_distributed=True)
        with _quietly():
            save(cast("dict[str, Any]", dict(own)), storage_writer=writer)
        if ranks.is_main:
            flush(target)
        return _digests(target, ranks)


def read_shards(path: Path, room: Mapping[str, Tensor]) -> None:
    """Fill tensors and parts from the shards that belong to `path`; a rank does so by itself."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    if room:
        reader = HuggingFaceStorageReader(str(shards_of(path)))
        with _quietly():
            load(cast("dict[str, Any]", dict(room)), storage_reader=reader, no_dist=True)


def remove_orphans(directory: Path) -> None:
    """Delete shards without a checkpoint: of one that was replaced, or never finished."""
    for found in directory.glob(f"step-*{_SUFFIX}"):
        if not found.with_suffix(".safetensors").exists():
            shutil.rmtree(found, ignore_errors=True)


def verify_shards(path: Path, digests: Mapping[str, str], *, rank: int = 0, size: int = 1) -> None:
    """Raise CheckpointError unless the shards are what was written; a rank reads its share."""
    for name, expected in sorted(digests.items())[rank::size]:
        file = shards_of(path) / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: a part of {path}", hint=DAMAGED)
        if _digest(file) != expected:
            raise CheckpointError(f"{file} does not match its SHA-256 digest", hint=DAMAGED)


def _digests(directory: Path, ranks: Ranks) -> dict[str, str]:
    """Return the SHA-256 of every file, of which each rank reads its share."""
    files = sorted(directory.iterdir())
    own = {file.name: _digest(file) for file in files[ranks.rank :: ranks.size]}
    return {name: digest for each in ranks.gather(own) for name, digest in each.items()}


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextmanager
def _quietly() -> Iterator[None]:
    """Leave out torch's notices that the format is in beta: the files are plain safetensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _as_our_error(target: Path) -> Iterator[None]:
    """Turn a disk that is full, which dcp wraps, into the error that a person reads."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except OSError as error:
        raise cannot_write(target, error) from None
    except CheckpointException as error:
        for cause, _ in error.failures.values():
            if isinstance(cause, OSError):
                raise cannot_write(target, cause) from None
        raise
