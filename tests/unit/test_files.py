"""A file is whole or not there, and an error loses nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from narrowcast import files
from narrowcast.errors import RunDirectoryError
from narrowcast.files import write_atomically


def test_text_and_bytes_are_written_and_the_folder_is_made(tmp_path: Path) -> None:
    """Both kinds of content arrive, and other users may read them."""
    path = tmp_path / "deep" / "file.json"

    write_atomically(path, "é")
    write_atomically(path.with_name("raw"), b"\x00\xff")

    assert path.read_bytes() == "é".encode()
    assert path.with_name("raw").read_bytes() == b"\x00\xff"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_full_disk_leaves_the_old_content_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ENOSPC is one clear error; the previous file stands."""
    path = tmp_path / "run.json"
    write_atomically(path, "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(RunDirectoryError, match="No space left") as caught:
        write_atomically(path, "new")

    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]
    assert "--resume" in caught.value.hint


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    """The message holds the path that cannot be written."""
    (tmp_path / "taken").write_text("")

    with pytest.raises(RunDirectoryError, match="taken/file"):
        write_atomically(tmp_path / "taken" / "file", "x")
