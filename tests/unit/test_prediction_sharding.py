"""A prediction for one of several ranks: what is divided, what is not, and what cannot be asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from typer.testing import CliRunner

from narrowcast.cli.app import app
from narrowcast.errors import RecipeError, UnknownName, UsageError
from narrowcast.parallel.shards import rows_of
from narrowcast.plan import plan_named
from narrowcast.prediction.predict import predict_memory
from narrowcast.recipes.load import load_recipe
from narrowcast.records.memory import MemoryRecord

PLANS = ("fp32", "bf16", "bf16-split", "lean")
PARAMETERS = sum(p.numel() for p in load_recipe("austen", []).build_model().parameters())


def predicted(plan: str = "bf16", **asked: Any) -> MemoryRecord:
    return predict_memory("austen", plan, break_even=False, **asked)


def lines_of(record: MemoryRecord) -> dict[str, int]:
    return {line.category: line.bytes for line in record.lines}


def held_at_start(record: MemoryRecord) -> dict[str, int]:
    """What lies there before the step's first operation."""
    return record.timeline[0].categories


@pytest.mark.parametrize("plan", ["fp32", "lean"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_the_record_says_of_which_ranks_it_is(kind: str, plan: str) -> None:
    """The same keys as for one process; the batch is that of all ranks together."""
    record = predicted(plan, world=4, parallel=kind)

    assert (record.parallel, record.ranks, record.batch_size) == (kind, 4, 16)
    assert record.predicted
    assert sum(line.bytes for line in record.lines) == record.total_peak_bytes
    assert any("the peak is that of rank 0" in note for note in record.notes)


def test_ddp_holds_all_weights_and_a_bucket_for_each_gradient() -> None:
    """Buckets are there from the step's beginning to its end: `gradient_as_bucket_view`."""
    alone, rank = predicted("fp32"), predicted("fp32", world=2, parallel="ddp")

    assert lines_of(rank)["parameters"] == lines_of(alone)["parameters"] == 4 * PARAMETERS
    assert held_at_start(rank)["gradients"] == 4 * PARAMETERS
    assert held_at_start(alone).get("gradients", 0) == 0
    assert lines_of(rank)["optimizer_state"] == lines_of(alone)["optimizer_state"]


@pytest.mark.slow
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("world", [1, 2, 3, 5, 1024])
def test_fsdp2_holds_the_rows_of_rank_0_padded(plan: str, world: int) -> None:
    """Chunks of dimension 0 whose number of rows is rounded up, in the plan's format."""
    model = load_recipe("austen", []).build_model()
    shards = [
        rows_of(p.shape[0], 0, world)[1] * (p.numel() // p.shape[0]) for p in model.parameters()
    ]
    width = 2 if plan_named(plan).policy.param == "bf16" else 4

    record = predicted(plan, world=world, parallel="fsdp2", batch_size=world)

    assert held_at_start(record)["parameters"] == width * sum(shards)


@pytest.mark.slow
def test_more_ranks_never_hold_more() -> None:
    """Of FSDP2, with as many samples on each rank, as long as there are rows for all of them."""
    peaks = [
        predicted("bf16-split", world=n, parallel="fsdp2", batch_size=2 * n).total_peak_bytes
        for n in (1, 2, 8, 32)
    ]

    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize(("plan", "world"), [("fp32", 2), ("bf16-split", 4)])
def test_ddp_sends_every_gradient_round_a_ring_twice(plan: str, world: int) -> None:
    """In the policy's reduction format, fp32 whatever the weights are."""
    record = predicted(plan, world=world, parallel="ddp")

    assert record.sent_bytes == {"all_reduce": 2 * (world - 1) * 4 * PARAMETERS // world}


def test_fsdp2_gathers_blocks_twice_and_the_rest_once() -> None:
    """The root is not let go of after forward, so that backward need not gather it again."""
    model = load_recipe("austen", []).build_model()
    whole = [(name, 4 * p.numel()) for name, p in model.named_parameters()]
    blocks = sum(size for name, size in whole if name.startswith("blocks."))
    total = sum(size for _, size in whole)

    sent = predicted("fp32", world=2, parallel="fsdp2").sent_bytes

    assert sent["all_gather"] == pytest.approx((total + blocks) / 2, rel=0.01)
    assert sent["all_to_all"] == total / 2


@pytest.mark.parametrize(("plan", "width"), [("fp32", 4), ("bf16", 4), ("bf16-split", 2)])
def test_fsdp2_sends_each_gradient_once_in_its_own_format(plan: str, width: int) -> None:
    """To each rank its rows, in the format of the weights; what stays here is not sent."""
    sent = predicted(plan, world=4, parallel="fsdp2").sent_bytes

    assert sent["all_to_all"] == width * PARAMETERS * 3 / 4


@pytest.mark.slow
def test_one_process_sends_nothing_and_is_predicted_as_ever() -> None:
    """A prediction for ranks leaves nothing behind: no group, no function that was replaced."""
    before = predicted("bf16")

    predicted("bf16", world=2, parallel="fsdp2")

    assert predicted("bf16") == before
    assert before.sent_bytes == {}
    assert (before.parallel, before.ranks) == ("", 1)
    assert not dist.is_initialized()


def test_a_comparison_with_fp32_is_left_out_and_said() -> None:
    """It is made for one process, and silence would look like an oversight."""
    record = predict_memory("austen", "bf16", world=2, parallel="ddp")

    assert record.break_even is None
    assert any("compared with fp32" in note for note in record.notes)


def test_a_gpu_that_is_not_there() -> None:
    """Ranks on a GPU: allocated and reserved bytes too, and what they leave out."""
    record = predicted("bf16", world=8, parallel="fsdp2", device="h200")

    assert record.reserved_bytes is not None
    assert record.allocated_bytes is not None
    assert record.reserved_bytes >= record.allocated_bytes >= record.total_peak_bytes
    assert any("before it is cut" in text for text in record.assumptions)


@pytest.mark.parametrize(
    ("asked", "error", "says"),
    [
        ({"world": 2}, UsageError, "--world was given without --parallel"),
        ({"parallel": "ddp"}, UsageError, "--parallel was given without --world"),
        ({"world": 2, "parallel": "fsdp"}, UnknownName, "unknown kind of parallel training 'fsdp'"),
        ({"world": 0, "parallel": "ddp"}, UsageError, "the number of ranks is 0"),
        ({"world": True, "parallel": "ddp"}, UsageError, "the number of ranks is True"),
        ({"world": 2.0, "parallel": "ddp"}, UsageError, "the number of ranks is 2.0"),
        ({"world": 7, "parallel": "ddp"}, UsageError, "a batch of 16 samples cannot be shared"),
    ],
)
def test_what_cannot_be_asked(asked: dict[str, Any], error: type[Exception], says: str) -> None:
    """One error that names the values, before anything is traced."""
    with pytest.raises(error, match=says):
        predicted(**asked)


def test_a_rank_of_a_real_group_is_refused() -> None:
    """There can be one default process group in a process."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        with pytest.raises(UsageError, match="is a rank of a torch"):
            predicted(world=2, parallel="ddp")
    finally:
        dist.destroy_process_group()


def test_the_group_is_gone_after_an_error(tmp_path: Path) -> None:
    """A recipe that cannot be traced does not leave the process in a group."""
    recipe = tmp_path / "reads.py"
    recipe.write_text(
        "from narrowcast.recipes import austen\n"
        "from narrowcast.recipes.austen import HIGHER_IS_BETTER, Options, data, metrics, model\n"
        "from narrowcast.recipes.austen import optimizer\n\n\n"
        "def loss(model, batch):\n"
        "    found = austen.loss(model, batch)\n"
        "    return found * found.item()\n"
    )

    with pytest.raises(RecipeError, match="cannot be traced"):
        predict_memory(recipe, "fp32", world=2, parallel="ddp")

    assert not dist.is_initialized()


def test_the_command_line_says_the_same(tmp_path: Path) -> None:
    """``--world`` and ``--parallel`` reach the record."""
    target = tmp_path / "peak.json"
    words = ["predict", "austen", "-p", "fp32", "--world", "2", "--parallel", "fsdp2"]

    ended = CliRunner().invoke(app, [*words, "--json", str(target)])

    assert ended.exit_code == 0, ended.output
    assert "a rank of 2 (fsdp2)" in ended.output
    found = json.loads(target.read_text())
    record = predicted("fp32", world=2, parallel="fsdp2")
    assert found["total_peak_bytes"] == record.total_peak_bytes
    assert (found["parallel"], found["ranks"]) == ("fsdp2", 2)
    assert found["sent_bytes"] == record.sent_bytes


def test_random_states_stay_as_they_are() -> None:
    """As in a prediction for one process."""
    torch.manual_seed(5)
    before = torch.get_rng_state()

    predicted(world=2, parallel="fsdp2")

    assert torch.equal(torch.get_rng_state(), before)
