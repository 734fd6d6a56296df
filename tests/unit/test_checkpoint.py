"""A checkpoint is whole, verified, of this run, and never runs code."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from narrowcast.errors import CheckpointError, RunDirectoryError
from narrowcast.training import checkpoint
from narrowcast.training.state_tree import leaves

IDENTITY = {"recipe": "fashion", "policy": {"compute": "bf16"}, "narrowcast": "0.1.0"}


def a_state() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scale": 65536.0,
        "narrow": torch.randn(7).bfloat16(),
    }


def assert_same(a: Any, b: Any) -> None:
    left, right = leaves(a), leaves(b)
    assert list(left) == list(right)
    for name, value in left.items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == right[name].dtype, name
            assert torch.equal(value, right[name]), name
        else:
            assert value == right[name], name


def test_a_state_comes_back_bit_for_bit(tmp_path: Path) -> None:
    """Weights, buffers, moments, step counters and numbers, in their true dtypes."""
    state = a_state()

    path = checkpoint.save(tmp_path, state, step=7, identity=IDENTITY)

    assert path == tmp_path / "step-00000007.safetensors"
    assert_same(checkpoint.load_latest(tmp_path, identity=IDENTITY), state)


def test_the_optimizer_accepts_what_was_stored(tmp_path: Path) -> None:
    """Integer keys of the optimizer's state are still integers, or it would drop the moments."""
    state = a_state()
    checkpoint.save(tmp_path, state, step=1, identity=IDENTITY)
    fresh = torch.optim.AdamW(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).parameters())

    fresh.load_state_dict(checkpoint.load_latest(tmp_path)["optimizer"])

    assert_same(fresh.state_dict()["state"], state["optimizer"]["state"])


def test_any_reader_of_safetensors_opens_it(tmp_path: Path) -> None:
    """The weights are found by their names, without narrowcast."""
    state = a_state()

    path = checkpoint.save(tmp_path, state, step=1, identity=IDENTITY)

    assert torch.equal(
        safetensors.torch.load_file(path)["model.0.weight"], state["model"]["0.weight"]
    )


def test_the_newest_and_the_one_before_it_are_kept(tmp_path: Path) -> None:
    """Steps order by number, not by name, and two checkpoints stay."""
    for step in (2, 99_999_999, 100_000_000):
        checkpoint.save(tmp_path, {"step": step}, step=step, identity=IDENTITY)

    assert [p.name for p in checkpoint.checkpoints_in(tmp_path)] == [
        "step-99999999.safetensors",
        "step-100000000.safetensors",
    ]
    assert checkpoint.load_latest(tmp_path) == {"step": 100_000_000}


def test_a_directory_without_checkpoints_is_an_error(tmp_path: Path) -> None:
    """Also one that does not exist."""
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load_latest(tmp_path / "absent")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"recipe": "austen"}, "recipe: 'fashion' there, 'austen' here"),
        ({"policy": {"compute": "fp16"}}, "policy.compute: 'bf16' there, 'fp16' here"),
        ({"narrowcast": "0.2.0"}, "narrowcast: '0.1.0' there, '0.2.0' here"),
        ({"lr": 0.1}, r"lr: '\(absent\)' there, 0.1 here"),
    ],
)
def test_a_checkpoint_of_another_run_names_what_differs(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    """Policy, recipe, version or an option: the error shows both values and leaves the file."""
    path = checkpoint.save(tmp_path, {"step": 1}, step=1, identity=IDENTITY)
    before = path.read_bytes()

    with pytest.raises(CheckpointError, match=named):
        checkpoint.load_latest(tmp_path, identity={**IDENTITY, **change})

    assert path.read_bytes() == before


def test_another_format_version_is_named(tmp_path: Path) -> None:
    """A file of a later narrowcast is not guessed at."""
    path = tmp_path / "step-00000001.safetensors"
    safetensors.torch.save_file(
        {"x": torch.zeros(1)}, path, {"narrowcast_checkpoint": "9", "state": "{}"}
    )

    with pytest.raises(CheckpointError, match="format 9, and this version of narrowcast reads"):
        checkpoint.load(path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999], ids=lambda x: f"{x:.1%}")
def test_a_truncated_checkpoint_is_an_error_that_names_it_and_the_one_before(
    tmp_path: Path, kept: float
) -> None:
    """No crash truncates a checkpoint, so the one before it is offered and not taken silently."""
    checkpoint.save(tmp_path, a_state(), step=1, identity=IDENTITY)
    path = checkpoint.save(tmp_path, a_state(), step=2, identity=IDENTITY)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])

    with pytest.raises(CheckpointError, match=str(path)) as caught:
        checkpoint.load_latest(tmp_path, identity=IDENTITY)

    assert "truncated" in caught.value.hint
    assert f"delete {path} to continue from step-00000001.safetensors" in caught.value.hint


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """In the header, the JSON state, the tensors or the digest itself: 200 places spread evenly."""
    path = checkpoint.save(tmp_path, a_state(), step=1, identity=IDENTITY)
    sound = path.read_bytes()
    accepted = []

    for place in range(0, len(sound), max(1, len(sound) // 200)):
        damaged = bytearray(sound)
        damaged[place] ^= 0x10
        path.write_bytes(damaged)
        try:
            checkpoint.load(path)
            accepted.append((place, sound[max(0, place - 20) : place + 20]))
        except CheckpointError:
            pass

    assert accepted == []


def test_an_edited_number_in_the_state_is_found(tmp_path: Path) -> None:
    """A loss scale changed by hand no longer matches the digest."""
    path = checkpoint.save(tmp_path, {"scale": 65536.0}, step=1, identity=IDENTITY)
    path.write_bytes(path.read_bytes().replace(b"65536.0", b"32768.0"))

    with pytest.raises(CheckpointError, match="does not match its SHA-256 digest"):
        checkpoint.load(path)


def test_a_removed_tensor_is_found(tmp_path: Path) -> None:
    """A file rebuilt without one of its tensors, and otherwise perfectly sound."""
    path = checkpoint.save(tmp_path, a_state(), step=1, identity=IDENTITY)
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    del tensors["narrow"]
    safetensors.torch.save_file(tensors, path, metadata)

    with pytest.raises(CheckpointError, match="does not match its SHA-256 digest"):
        checkpoint.load(path)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["pickle", "torch.save"])
@pytest.mark.parametrize("reader", ["checkpoint", "weights"])
def test_a_pickle_with_code_in_it_does_not_run(tmp_path: Path, kind: str, reader: str) -> None:
    """It is refused by name, as a checkpoint and as weights, and its code leaves no trace."""
    proof = tmp_path / "the code ran"
    path = tmp_path / "step-00000001.safetensors"
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"model": Bomb(proof)}))
    else:
        torch.save({"model": Bomb(proof)}, path)

    with pytest.raises(CheckpointError) as caught:
        (checkpoint.load if reader == "checkpoint" else checkpoint.load_weights)(path)

    assert "it is a pickle" in caught.value.hint
    assert not proof.exists()


def test_a_state_that_needs_pickle_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """The error names the place, and the previous checkpoint is still the newest."""
    checkpoint.save(tmp_path, {"step": 1}, step=1, identity=IDENTITY)

    with pytest.raises(CheckpointError, match=r"'scheduler\.lr_lambdas\.0'"):
        checkpoint.save(
            tmp_path, {"scheduler": {"lr_lambdas": [lambda: 1]}}, step=2, identity=IDENTITY
        )

    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_a_full_disk_leaves_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says that the disk is full and what to do; no half-written file stays."""
    checkpoint.save(tmp_path, {"step": 1}, step=1, identity=IDENTITY)

    def full(*_: object) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunDirectoryError, match=os.strerror(errno.ENOSPC)) as caught:
        checkpoint.save(tmp_path, {"step": 2}, step=2, identity=IDENTITY)

    assert "free some disk space" in caught.value.hint
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]
    assert checkpoint.load_latest(tmp_path) == {"step": 1}


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from narrowcast.training import checkpoint
from narrowcast.errors import RunDirectoryError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    checkpoint.save(Path(sys.argv[1]), {"x": torch.zeros(100_000)}, step=2, identity={})
except RunDirectoryError as error:
    print(error.message)
"""


@pytest.mark.slow
def test_a_system_that_refuses_to_write_leaves_the_previous_checkpoint(tmp_path: Path) -> None:
    """A real refusal in the middle of the file, by a limit on its size."""
    checkpoint.save(tmp_path, {"step": 1}, step=1, identity={})

    out = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )

    assert "step-00000002.safetensors: File too large" in out.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.safetensors"]


def test_exported_weights_are_as_stored_and_tied_ones_once(tmp_path: Path) -> None:
    """bf16 stays bf16, and safetensors' own loader of models understands the tied names."""
    model = nn.ModuleDict({"wte": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["wte"].weight
    model.to(torch.bfloat16)
    path = tmp_path / "weights.safetensors"

    checkpoint.save_weights(path, model.state_dict())
    stored = safetensors.torch.load_file(path)
    back = checkpoint.load_weights(path)

    assert list(stored) == ["wte.weight"]
    assert stored["wte.weight"].dtype == torch.bfloat16
    assert sorted(back) == ["head.weight", "wte.weight"]
    assert all(torch.equal(t, model["wte"].weight) for t in back.values())


def test_the_weights_of_safetensors_own_writer_are_read(tmp_path: Path) -> None:
    """Weights that another program exported, tied ones included, can be evaluated."""
    model = nn.ModuleDict({"wte": nn.Embedding(8, 4), "head": nn.Linear(4, 8, bias=False)})
    model["head"].weight = model["wte"].weight
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(model, str(path))

    model.load_state_dict(checkpoint.load_weights(path))  # strict: every name is there


def test_the_state_is_json_in_the_metadata(tmp_path: Path) -> None:
    """A person can read what a checkpoint belongs to with any safetensors tool."""
    path = checkpoint.save(tmp_path, {"step": 1}, step=1, identity=IDENTITY)
    with safetensors.safe_open(path, framework="pt") as file:
        body = json.loads(file.metadata()["state"])

    assert body == {"identity": IDENTITY, "state": {"dict": [["step", 1]]}}
