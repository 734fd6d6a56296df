"""Files that are whole or not there: the one place that writes what must not be half-written."""

from __future__ import annotations

import errno
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from narrowcast.errors import RunDirectoryError

__all__ = [
    "cannot_write",
    "flush",
    "remove_leftovers",
    "replacing",
    "require_replaceable",
    "write_all",
    "write_atomically",
    "write_for_user",
]

TEMPORARY_SUFFIX = ".tmp"


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace `path` by `content`: after a crash at any moment it holds the old or the new, whole.

    Raises RunDirectoryError, with the target untouched, if the disk is full or not writable.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_for_user(path: Path, content: str, ours: Callable[[bytes], bool]) -> None:
    """Write to a path that a user named: a device or a pipe as it is, a file whole or not at all.

    Raises RunDirectoryError as `require_replaceable` does, or if the writing itself fails.
    """
    require_replaceable(path, ours)
    if not _takes_a_stream(path):
        write_atomically(Path(os.path.realpath(path)), content)  # a link goes on being a link
        return
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
        try:
            write_all(descriptor, content.encode())
        finally:
            os.close(descriptor)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise cannot_write(path, error) from None


def require_replaceable(path: Path, ours: Callable[[bytes], bool]) -> None:
    """Check that a path that a user named can be written, and that nothing of theirs is lost by it.

    It is new in a folder that exists, empty, a device or a pipe, or `ours` knows its content as
    ours. Raises RunDirectoryError otherwise.
    """
    try:
        if path.is_dir():
            raise RunDirectoryError(f"{path} is a directory", hint="name a file")
        if _takes_a_stream(path):
            _require_access(path, path, os.W_OK)
            return
        target = Path(os.path.realpath(path))
        if not target.parent.is_dir():
            raise RunDirectoryError(
                f"cannot write {path}: there is no directory {target.parent}",
                hint="make the directory first, or choose another place",
            )
        _require_access(target.parent, path, os.W_OK | os.X_OK)
        content = target.read_bytes() if target.exists() else b""
    except OSError as error:
        raise cannot_write(path, error) from None
    if content and not ours(content):
        raise RunDirectoryError(
            f"{path} exists, was not written by narrowcast, and was left as it is",
            hint="choose another file",
        )


def write_all(descriptor: int, content: bytes) -> None:
    """Write all of it, however little the other side takes at a time."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


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
        flush(temporary)
        temporary.replace(path)
        temporary = None
        flush(path.parent)
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
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    again = "free some disk space, then give the same command again (train: with --resume)"
    hint = again if full else "choose another place"
    return RunDirectoryError(f"cannot write {path}: {reason}", hint=hint)


def _takes_a_stream(path: Path) -> bool:
    """Whether this is to be written into and never replaced: a device, a pipe, /dev/stdout."""
    if not path.exists():
        return False
    whole = Path(os.path.abspath(path))  # noqa: PTH100 -- resolve() would follow the link
    leads_to_a_stream = whole.is_symlink() and (
        whole.parent in (Path("/dev"), Path("/dev/fd")) or whole.parts[1] == "proc"
    )
    return leads_to_a_stream or not stat.S_ISREG(path.stat().st_mode)


def _require_access(place: Path, path: Path, mode: int) -> None:
    if not os.access(place, mode):
        raise cannot_write(path, OSError(errno.EACCES, os.strerror(errno.EACCES)))


def flush(path: Path) -> None:
    """Make a file, or a rename in a directory, durable, where the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)
