"""FSDP2 against DDP on the same ranks, and its checkpoints against those of everybody else."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dist.cases import PLANS, run
from dist.conftest import Seen
from narrowcast.blockwise import INT8_SIGNED, INT8_UNSIGNED
from narrowcast.errors import CheckpointError
from narrowcast.training.checkpoint import checkpoints_in, load, load_latest
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.shard_files import remove_orphans, shards_of

pytestmark = pytest.mark.slow

U = 2.0**-24
"""Unit roundoff of fp32."""


def assert_equal(one: Path, other: Path) -> None:
    first, second = (load_file(d / "weights.safetensors") for d in (one, other))
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in second.items()}
    for name in first:
        assert torch.equal(first[name], second[name]), name


def final_state(directory: Path) -> dict[str, Any]:
    return load_latest(RunDirectory(directory).checkpoints)


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_with_shards_are_two_ranks_with_the_whole_model(two: Seen, plan: str) -> None:
    """Bit for bit in every plan: weights, evaluations, skips, order of data."""
    there, here = two[plan], two[f"fsdp2-{plan}"]

    assert_equal(two.root / plan, two.root / f"fsdp2-{plan}")
    for what in ("evaluations", "skipped", "data_order_hash", "initial_weights_hash"):
        assert here[what] == there[what], what
    assert (here["parallel"], here["ranks"], here["batch_size"]) == ("fsdp2", 2, 8)


@pytest.mark.parametrize("plan", PLANS)
def test_micro_batches_are_summed_as_ddp_sums_them(two: Seen, plan: str) -> None:
    """In the reduction format, and exchanged once; 16-bit gradients too."""
    assert_equal(two.root / f"ddp-{plan}-summed", two.root / f"fsdp2-{plan}-summed")


@pytest.mark.parametrize("plan", PLANS)
def test_clipping_is_by_the_norm_over_all_shards(two: Seen, plan: str) -> None:
    """The first applied step's norm is DDP's, within the rounding of its sums.

    A norm of n elements is summed in fp32 by ddp and over shards in parts: (n + 2) u / 2 apart at
    most, with n = 144 for the largest parameter. Where gradients are 16-bit ddp takes the norm of
    the fp32 sums and fsdp2 that of the rounded ones: a 512th of each element.
    """
    one, other = (
        next(p for p in RunDirectory(two.root / name).read_metrics() if getattr(p, "applied", 0))
        for name in (f"{plan}-accumulated", f"fsdp2-{plan}-clipped")
    )
    assert one.kind == other.kind == "step"
    assert one.step == other.step
    is_narrow = plan in ("bf16-true", "bf16-split", "lean")
    bound = 2.0**-9 if is_narrow else 146 * U

    assert other.loss == one.loss
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=bound)
    assert two[f"fsdp2-{plan}-clipped"]["status"] == "finished"


@pytest.mark.parametrize("plan", ["fp32", "bf16-split", "lean"])
def test_rows_that_divide_by_nothing_are_stepped_as_whole_ones(two: Seen, plan: str) -> None:
    """Odd rows, fewer rows than ranks, parameters without dimensions, tied ones; one step.

    Weights are computed before states are rounded, and their own noise is that of the whole
    parameter: bit for bit, although the blocks of the states lie elsewhere.
    """
    assert_equal(two.root / f"ddp-odd-{plan}", two.root / f"fsdp2-odd-{plan}")


@pytest.mark.parametrize("plan", ["fp32", "bf16-split", "lean"])
def test_shards_that_end_with_a_block_have_the_states_of_whole_parameters(
    two: Seen, plan: str
) -> None:
    """Six steps bit for bit, with fp32 batch norms between 16-bit weights, and states in blocks."""
    assert_equal(two.root / f"ddp-even-{plan}", two.root / f"fsdp2-even-{plan}")
    assert two[f"fsdp2-even-{plan}"]["evaluations"] == two[f"ddp-even-{plan}"]["evaluations"]


@pytest.mark.parametrize("plan", ["fp32", "bf16-split", "lean"])
def test_frozen_parameters_are_cut_and_stay_what_they_are(two: Seen, plan: str) -> None:
    """A whole block of them, some beside trained ones, and one that has no elements."""
    assert_equal(two.root / f"ddp-frozen-{plan}", two.root / f"fsdp2-frozen-{plan}")
    assert two[f"fsdp2-frozen-{plan}"]["evaluations"] == two[f"ddp-frozen-{plan}"]["evaluations"]


@pytest.mark.parametrize("case", ["tied", "tied-islands"])
def test_a_weight_that_two_units_use_has_one_gradient(two: Seen, case: str) -> None:
    """One of a block that is used outside of it too; one of two fp32 islands."""
    assert_equal(two.root / f"ddp-{case}", two.root / f"fsdp2-{case}")
    assert two[f"fsdp2-{case}"]["evaluations"] == two[f"ddp-{case}"]["evaluations"]


@pytest.mark.parametrize("case", ["islands", "uncut-summed"])
def test_what_has_another_format_is_gathered_by_itself_or_not_cut(two: Seen, case: str) -> None:
    """A block in fp32, layers in fp32 that share a weight; small parameters, over micro-batches."""
    assert_equal(two.root / f"ddp-{case}", two.root / f"fsdp2-{case}")
    assert two[f"fsdp2-{case}"]["evaluations"] == two[f"ddp-{case}"]["evaluations"]


def test_states_whose_blocks_lie_elsewhere_are_within_the_gaps_of_their_grids(two: Seen) -> None:
    """After one step, gathered from shards of 33 and 32 rows of 80: masters exact, states bounded.

    A whole moment was rounded into one gap of its block's grid, a part's into one gap of another
    block's, and gathering rounds to half a gap of a third. The widest gap is the last one of the
    grid, times a scale of at most the largest moment rounded up to bf16.
    """
    there, here = (final_state(two.root / f"{k}-odd-bf16-split") for k in ("ddp", "fsdp2"))
    ours, theirs = (s["engine"]["lanes"]["optimizer"]["optimizer"]["state"] for s in (here, there))
    compared = 0
    for name, value in there["model"].items():
        assert torch.equal(here["model"][name], value), name
    for index, entry in theirs.items():
        assert torch.equal(ours[index]["remainder"], entry["remainder"])
        for key, code in (("exp_avg", INT8_SIGNED), ("exp_avg_sq", INT8_UNSIGNED)):
            if f"{key}_codes" not in entry:
                continue
            found, expected = (
                code.decode(e[f"{key}_codes"], e[f"{key}_scales"], entry["remainder"].numel())
                for e in (ours[index], entry)
            )
            power = 2 if code.signed else 4
            gap = 1 - (1 - 1 / code.top) ** power
            bound = 2.5 * gap * float(expected.abs().max()) * (1 + 2.0**-7)
            assert float((found - expected).abs().max()) <= bound
            compared += int(not torch.equal(found, expected))
    assert compared


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
@pytest.mark.parametrize("saved", ["fsdp2", "ddp"])
@pytest.mark.parametrize("plan", ["bf16-split", "lean"])
def test_a_run_goes_on_from_either_kind_of_checkpoint(
    two: Seen, plan: str, saved: str, kind: str
) -> None:
    """With as many ranks it is the run that was not stopped, dropout and rounding included."""
    record = two[f"{saved}-to-{kind}-{plan}"]

    assert_equal(two.root / f"{saved}-to-{kind}-{plan}", two.root / f"fsdp2-whole-{plan}")
    assert record["resumed_at"] == [3]
    assert record["parallel"] == kind


@pytest.mark.parametrize("kind", ["fsdp2", "ddp"])
@pytest.mark.parametrize("plan", ["bf16-split", "lean"])
def test_a_run_of_one_process_goes_on_as_ranks(two: Seen, plan: str, kind: str) -> None:
    """With the same samples, and it says that sums and random numbers differ."""
    record = two[f"one-to-{kind}-{plan}"]

    assert record["status"] == "finished", record
    assert record["data_order_hash"] == two[f"fsdp2-whole-{plan}"]["data_order_hash"]
    assert any("saved by 1 rank" in text for text in record["warnings"])


def test_shards_go_on_as_one_process(two: Seen, tmp_path: Path) -> None:
    """Put together from all of them."""
    shutil.copytree(two.root / "left-by-fsdp2-bf16-split", tmp_path / "run")
    record = run(None, tmp_path / "run", "bf16-split", "dropout=0.3", resume=True)

    assert record["status"] == "finished"
    assert (record["parallel"], record["ranks"]) == ("", 1)


def test_two_ranks_shards_are_exact_on_four(four: Seen, two: Seen) -> None:
    """With a learning rate of zero, weights and remainders end as they began, cut anew."""
    assert four["grown"]["status"] == "finished", four["grown"]
    assert (four["grown"]["ranks"], four["grown"]["resumed_at"]) == (4, [3])
    assert_equal(four.root / "grown", four.root / "fsdp2-still")
    left = load(checkpoints_in(two.root / "fsdp2-still" / "checkpoints")[-1])
    weights = load_file(four.root / "grown" / "weights.safetensors")
    for name, value in weights.items():  # masters of the checkpoint's bf16 weights
        assert torch.equal(value.to(left["model"][name].dtype), left["model"][name]), name


@pytest.mark.parametrize("plan", ["fp32", "lean"])
def test_four_ranks_train_with_fewer_rows_than_ranks(four: Seen, plan: str) -> None:
    """Some have nothing of a parameter; all finish, with one record."""
    for case in (f"fsdp2-{plan}", f"fsdp2-odd-{plan}", f"fsdp2-{plan}-clipped"):
        assert all(rank[case]["status"] == "finished" for rank in four.ranks), four[case]
        assert all(rank[case]["evaluations"] == four[case]["evaluations"] for rank in four.ranks)


def test_a_shard_that_was_damaged_or_deleted_is_named(two: Seen, tmp_path: Path) -> None:
    """By one process and by ranks; the checkpoint before it is not taken in its stead."""
    shutil.copytree(two.root / "left-by-fsdp2-lean", tmp_path / "run")
    path = checkpoints_in(tmp_path / "run" / "checkpoints")[-1]
    first, second = sorted(shards_of(path).iterdir())
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)

    with pytest.raises(CheckpointError, match="does not match its SHA-256 digest") as caught:
        load(path)
    assert first.name in caught.value.message
    first.unlink()
    with pytest.raises(CheckpointError, match="is missing") as caught:
        load(path)
    assert first.name in caught.value.message
    assert second.exists()


def test_shards_without_their_checkpoint_are_no_checkpoint(two: Seen, tmp_path: Path) -> None:
    """What a rank that was killed left is not found, and deleted with the next checkpoint."""
    shutil.copytree(two.root / "left-by-fsdp2-lean", tmp_path / "run")
    place = tmp_path / "run" / "checkpoints"
    kept, newest = checkpoints_in(place)
    newest.unlink()

    assert checkpoints_in(place) == [kept]
    remove_orphans(place)
    assert not shards_of(newest).exists()
    assert shards_of(kept).exists()


def test_measuring_and_watching_shards_changes_no_bit(two: Seen) -> None:
    """The peak of every rank is recorded, and below that of ddp with the whole model."""
    record, whole = two["fsdp2-measured"], two["measured"]

    assert_equal(two.root / "fsdp2-measured", two.root / "fsdp2-bf16")
    assert record["precision_honoured"] is True
    assert len(record["rank_peak_bytes"]) == 2
    assert record["watched_at"] > 0
    held = {line["category"]: line["bytes"] for line in record["memory"]["lines"]}
    of_whole = {line["category"]: line["bytes"] for line in whole["memory"]["lines"]}
    # AdamW's two moments of 178 parameters in fp32, cut in two, beside its step counters.
    assert held["optimizer_state"] < 0.6 * of_whole["optimizer_state"]


@pytest.mark.parametrize("case", ["unused", "buffers"])
def test_models_that_ddp_can_train_are_trained_alike(two: Seen, case: str) -> None:
    """A layer without a part in the loss has no gradient; buffers are rank 0's."""
    assert_equal(two.root / case, two.root / f"fsdp2-{case}")
    assert two[f"fsdp2-{case}"]["evaluations"] == two[case]["evaluations"]


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("released", "plan 'released' releases gradients, and with fsdp2"),
        ("adafactor", "Adafactor may need whole parameters"),
        ("strided", "parameter wide.weight of shape (65, 80) is not contiguous"),
        ("fickle", "a parameter takes part in the loss on some ranks only"),
        ("crossed", "the blocks of the model run in another order"),
        ("thawing", "was frozen when training began and is not any more"),
        ("leaving", "the last micro-batch of a step does not use blocks.1, which an earlier one"),
        ("shadow", "a shadow in fp32 needs whole weights"),
    ],
)
def test_what_cannot_be_is_one_error_of_rank_0(two: Seen, case: str, said: str) -> None:
    """The other rank follows in silence, with rank 0's exit code."""
    main, other = (rank[f"fsdp2-{case}"] for rank in two.ranks)

    assert said in main["message"]
    assert other["error"] == "PeerFailed"
    assert other["message"] == f"rank 0: {main['message']}"
