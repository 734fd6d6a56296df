"""A file is whole or not there, and an error loses nothing."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from narrowcast import files
from narrowcast.errors import RunDirectoryError
from narrowcast.files import cannot_write, require_replaceable, write_atomically, write_for_user


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


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_quota_and_a_file_limit_count_as_a_full_disk(number: int) -> None:
    """All three are cured by making room; only a training has --resume, and the hint says so."""
    hint = cannot_write(Path("x"), OSError(number, os.strerror(number))).hint

    assert hint == "free some disk space, then give the same command again (train: with --resume)"


def _starts_with_ours(content: bytes) -> bool:
    return content.startswith(b"ours")


@pytest.mark.parametrize("before", [None, b"", b"ours, older"])
def test_a_new_an_empty_and_our_own_file_are_written(tmp_path: Path, before: bytes | None) -> None:
    """Nothing of the user's is lost by any of them."""
    path = tmp_path / "record"
    if before is not None:
        path.write_bytes(before)

    write_for_user(path, "ours", _starts_with_ours)

    assert path.read_text() == "ours"


def test_a_file_of_the_user_is_left_as_it_is(tmp_path: Path) -> None:
    """The check refuses it, and so does the writing."""
    path = tmp_path / "tiny.py"
    path.write_text("mine")

    for attempt in (
        lambda: require_replaceable(path, _starts_with_ours),
        lambda: write_for_user(path, "ours", _starts_with_ours),
    ):
        with pytest.raises(RunDirectoryError, match="not written by narrowcast"):
            attempt()

    assert path.read_text() == "mine"


def test_no_folder_is_made_for_a_user_named_file(tmp_path: Path) -> None:
    """A typing error in a path is an error and no new folder."""
    with pytest.raises(RunDirectoryError, match="there is no directory"):
        require_replaceable(tmp_path / "absent" / "x.json", _starts_with_ours)

    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    """It is refused by the check, not after the work."""
    with pytest.raises(RunDirectoryError, match="is a directory"):
        require_replaceable(tmp_path, _starts_with_ours)


def test_a_link_goes_on_being_a_link(tmp_path: Path) -> None:
    """The file that it leads to is replaced."""
    link, path = tmp_path / "latest", tmp_path / "record"
    link.symlink_to(path)

    write_for_user(link, "ours", _starts_with_ours)

    assert link.is_symlink()
    assert path.read_text() == "ours"


def test_a_pipe_is_written_into(tmp_path: Path) -> None:
    """What is no regular file is never replaced by one."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)

    write_for_user(path, "ours", _starts_with_ours)

    assert os.read(reader, 100) == b"ours"
    assert stat.S_ISFIFO(path.stat().st_mode)
    os.close(reader)


def test_a_full_device_is_one_error_and_stays_a_device() -> None:
    """/dev/full takes nothing, and is there afterwards."""
    path = Path("/dev/full")

    with pytest.raises(RunDirectoryError, match="No space left"):
        write_for_user(path, "ours", _starts_with_ours)

    assert stat.S_ISCHR(path.stat().st_mode)
