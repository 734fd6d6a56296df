"""Files that are whole or not there: the one place that writes what must not be half-written."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from narrowcast.errors import RunDirectoryError

__all__ = ["cannot_write", "remove_leftovers", "replacing", "write_atomically"]

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it holds the old or the new, whole.

    Raises RunDirectoryError, with the target untouched, if the disk is full or not writable.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Hand out a temporary path beside `path` that takes its place when the block ends well.

    The temporary file is flushed to the disk, renamed, and its directory flushed; if the block
    raises, it is removed and `path` is as it was. An OSError becomes a RunDirectoryError.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=TEMPORARY_SUFFIX
        )
        os.close(descriptor)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)  # mkstemp makes it private to the user
        _flush(temporary)
        temporary.replace(path)
        temporary = None
        _flush(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def remove_leftovers(directory: Path) -> None:
    """Delete what writers that were killed left half-written in `directory`; nobody else writes."""
    for pattern in (f".*{TEMPORARY_SUFFIX}", ".tmp*"):  # ours, and those of safetensors
        for leftover in directory.glob(pattern):
            leftover.unlink(missing_ok=True)


def cannot_write(path: Path, error: OSError) -> RunDirectoryError:
    """Turn an OSError into the error that a user reads, with what to do about it."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "free some disk space, then continue with --resume" if full else "choose another place"
    return RunDirectoryError(f"cannot write {path}: {reason}", hint=hint)


def _flush(path: Path) -> None:
    """Make a file, or a rename in a directory, durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
