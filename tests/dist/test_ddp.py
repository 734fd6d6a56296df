"""DDP on two and four ranks against one process on the same global batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dist.cases import PLANS, RECIPE, run
from dist.conftest import Seen
from narrowcast.data import BatchStream
from narrowcast.plan import plan_named
from narrowcast.randomness import seed_everything
from narrowcast.recipes.load import load_recipe
from narrowcast.training.checkpoint import checkpoints_in, load
from narrowcast.training.run_directory import RunDirectory

pytestmark = pytest.mark.slow

U = 2.0**-24
"""Unit roundoff of fp32."""


def weights_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "weights.safetensors")


def assert_equal(one: Path, other: Path) -> None:
    first, second = weights_of(one), weights_of(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def alone(directory: Path, plan: str, *settings: str, parts: int = 2, **options: Any) -> Any:
    """Train in this process, the batch cut into as many micro-batches as there were ranks."""
    chosen = replace(plan_named(plan), micro_batches=parts)
    return run(None, directory, chosen, *settings, **options)


@pytest.mark.parametrize("plan", PLANS)
def test_two_ranks_are_one_process_with_two_micro_batches(
    two: Seen, tmp_path: Path, plan: str
) -> None:
    """Bit for bit in every plan: a sum of two does not depend on its order."""
    record = alone(tmp_path / "one", plan)

    assert_equal(tmp_path / "one", two.root / plan)
    there = two[plan]
    assert there["evaluations"] == record["evaluations"]
    assert there["data_order_hash"] == record["data_order_hash"]
    assert there["initial_weights_hash"] == record["initial_weights_hash"]
    assert there["skipped"] == record["skipped"]
    assert (there["parallel"], there["ranks"], there["batch_size"]) == ("ddp", 2, 8)


def test_clipping_is_by_the_norm_over_all_ranks(two: Seen, tmp_path: Path) -> None:
    """The clipped steps, and the norms that are reported, are those of one process."""
    alone(tmp_path / "one", "fp32", clip_norm=0.1)

    assert_equal(tmp_path / "one", two.root / "clipped")
    one, other = (
        [p.gradient_norm for p in RunDirectory(d).read_metrics() if p.kind == "step"]
        for d in (tmp_path / "one", two.root / "clipped")
    )
    assert one == other
    assert min(one) > 0.1


@pytest.mark.parametrize("case", ["sgd", "fsdp2-sgd"])
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_the_gradient_is_that_of_the_global_batch_within_its_rounding(
    request: pytest.FixtureRequest, ranks: str, case: str
) -> None:
    """One step of SGD on a linear model against fp64, within the bound of fp32 dot products.

    With d inputs and B samples an error r = x.w - y is off by at most (d + 2) u (|x|.|w| + |y|),
    and a gradient, a sum of B products 2 x r / (B outputs) in any order, by at most (B + d + 6) u
    of the sum of their largest sizes. The step adds two roundings of the weight.
    """
    seen: Seen = request.getfixturevalue(ranks)
    recipe = load_recipe(RECIPE, ("plain_sgd=true",))
    seed_everything(0, "model")
    weight = recipe.build_model().weight.detach().double()
    _, (inputs, targets) = next(BatchStream(recipe.load_data()[0], 8, seed=0))
    x, y = inputs[:, :8].double(), targets.double()
    gradient = 2 * (x @ weight.T - y).T @ x / y.numel()
    size = 2 * (x.abs() @ weight.abs().T + y.abs()).T @ x.abs() / y.numel()
    expected = weight - 0.1 * gradient
    bound = 0.1 * (8 + 8 + 8) * U * size + 2 * U * (weight.abs() + expected.abs())

    found = weights_of(seen.root / case)["weight"].double()

    assert bool(((found - expected).abs() <= bound).all())


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("plan", PLANS)
def test_accumulating_and_clipping_works_in_every_plan(
    request: pytest.FixtureRequest, ranks: str, plan: str
) -> None:
    """Micro-batches before the last one are not exchanged, and all ranks end with equal weights.

    That they are equal is checked by the run itself at every checkpoint.
    """
    seen: Seen = request.getfixturevalue(ranks)
    record = seen[f"{plan}-accumulated"]

    assert record["status"] == "finished", record
    assert record["completed_steps"] == 6
    assert all(e["examples"] == 26 for e in record["evaluations"])


def test_an_accumulated_step_is_that_of_one_process(two: Seen, tmp_path: Path) -> None:
    """Loss and norm of the first step agree to the rounding of a sum of four instead of two pairs.

    Of k numbers any two orders of summation differ by at most 2 (k - 1) u of the sum of their
    sizes (Higham 2002, section 4.2); a norm inherits the relative error, and cancellation between
    four gradients of one model and near samples is less than tenfold.
    """
    alone(tmp_path / "one", "fp32", accumulate=2, clip_norm=0.5)

    one, other = (
        RunDirectory(d).read_metrics()[0] for d in (tmp_path / "one", two.root / "fp32-accumulated")
    )
    assert one.kind == other.kind == "step"
    assert other.loss == pytest.approx(one.loss, rel=6 * U)
    assert other.gradient_norm == pytest.approx(one.gradient_norm, rel=60 * U)


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("kind", ["", "fsdp2-"])
@pytest.mark.parametrize(
    ("case", "reason"), [("overflow", "gradient overflow"), ("infinite", "non-finite loss")]
)
def test_what_breaks_on_one_rank_is_skipped_on_all(
    request: pytest.FixtureRequest, ranks: str, case: str, reason: str, kind: str
) -> None:
    """The odd sample is the last rank's; every rank records the same skip for the same reason.

    Of shards each rank sees a part of the broken gradients, and names the parameters of all.
    """
    seen: Seen = request.getfixturevalue(ranks)
    assert seen[kind + case]["skipped"] == seen[case]["skipped"]
    case = kind + case
    skips = [rank[case]["skipped"] for rank in seen.ranks]

    assert skips[0][0]["step"] == 1
    assert skips[0][0]["reason"] == reason
    assert all(each == skips[0] for each in skips)
    assert seen[case]["status"] == "finished"


def test_parameters_without_a_part_stay_without_a_gradient(two: Seen, tmp_path: Path) -> None:
    """A layer that the loss never reaches does not stop DDP, and does not decay, as in one
    process."""
    alone(tmp_path / "one", "fp32", "unused=true")

    assert_equal(tmp_path / "one", two.root / "unused")


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_buffers_are_rank_0s_in_any_dtype(request: pytest.FixtureRequest, ranks: str) -> None:
    """Batch norms on ranks are told of, and every rank evaluates with the same statistics."""
    seen: Seen = request.getfixturevalue(ranks)
    record = seen["buffers"]

    assert record["status"] == "finished", record
    assert any("batch norms normalise by the samples of their own" in w for w in record["warnings"])
    assert all(rank["buffers"]["evaluations"] == record["evaluations"] for rank in seen.ranks)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_resumed_run_is_the_run_that_was_not_stopped(
    request: pytest.FixtureRequest, ranks: str
) -> None:
    """Bit for bit, with dropout and bf16-split: every rank's random stream goes on."""
    seen: Seen = request.getfixturevalue(ranks)

    assert seen["cut"]["status"] == "interrupted"
    assert seen["resumed"]["resumed_at"] == [3]
    assert seen["resumed"]["warnings"] == seen["whole"]["warnings"]
    assert_equal(seen.root / "whole", seen.root / "resumed")


@pytest.mark.parametrize("ranks", ["two", "four"])
@pytest.mark.parametrize("plan", ["fp32", "bf16-split"])
def test_a_resumed_run_has_the_buffers_of_one_that_was_not_stopped(
    request: pytest.FixtureRequest, ranks: str, plan: str
) -> None:
    """With micro-batches that write a buffer which the forward pass reads: rank 0's is shared at
    the first of each step, as it is after a checkpoint."""
    seen: Seen = request.getfixturevalue(ranks)

    assert seen[f"felt-{plan}-resumed"]["resumed_at"] == [3]
    assert_equal(seen.root / f"felt-{plan}-whole", seen.root / f"felt-{plan}-resumed")


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_a_step_sends_one_message_beside_its_gradients(
    request: pytest.FixtureRequest, ranks: str
) -> None:
    """The losses of all micro-batches, and whether a rank was asked to stop, in two steps; DDP
    itself sends which parameters were used."""
    seen: Seen = request.getfixturevalue(ranks)

    assert [rank["messages"] for rank in seen.ranks] == [{"all_gather": 2}] * len(seen.ranks)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_each_rank_draws_from_a_stream_of_its_own(
    request: pytest.FixtureRequest, ranks: str
) -> None:
    """The random states in a checkpoint are as many as ranks, and all differ."""
    seen: Seen = request.getfixturevalue(ranks)
    state = load(checkpoints_in(seen.root / "whole" / "checkpoints")[-1])
    streams = [state["random"], *state["random_of_other_ranks"]]

    assert len(streams) == len(seen.ranks)
    assert len({each["torch"].numpy().tobytes() for each in streams}) == len(streams)


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_one_process_goes_on_from_the_checkpoint_of_many(
    request: pytest.FixtureRequest, ranks: str
) -> None:
    """The order of samples is that of the run in one process, and the change is said."""
    seen: Seen = request.getfixturevalue(ranks)
    record = run(None, seen.root / "left", "fp32", resume=True)

    assert record["status"] == "finished"
    assert record["data_order_hash"] == seen["fp32"]["data_order_hash"]
    assert (record["parallel"], record["ranks"]) == ("", 1)
    assert any(f"saved by {len(seen.ranks)} ranks" in text for text in record["warnings"])


def test_measuring_and_watching_on_ranks_changes_no_bit(two: Seen) -> None:
    """The peak of every rank is recorded, and the run is that of one without measurements."""
    record = two["measured"]

    assert_equal(two.root / "measured", two.root / "bf16")
    assert record["precision_honoured"] is True
    assert len(record["rank_peak_bytes"]) == 2
    assert all(peak > 0 for peak in record["rank_peak_bytes"])
    assert record["watched_at"] > 0


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("indivisible", "a batch of 7 samples cannot be shared equally by 2 ranks"),
        ("released", "plan 'released' releases gradients, and with ddp"),
        ("unseeded", "model(options) made other weights on rank 1 than on rank 0"),
        ("mismatch", "rank 1 was started for another training than rank 0"),
    ],
)
def test_what_cannot_be_is_one_error_of_rank_0(two: Seen, case: str, said: str) -> None:
    """The other rank follows in silence, with rank 0's exit code."""
    main, other = (rank[case] for rank in two.ranks)

    assert said in main["message"]
    assert other["error"] == "PeerFailed"
    assert other["message"] == f"rank 0: {main['message']}"


@pytest.mark.parametrize("ranks", ["two", "four"])
def test_every_collective_answers_alike_on_every_rank(
    request: pytest.FixtureRequest, ranks: str
) -> None:
    """Flags, values and sums are the same everywhere, in the dtype that went in.

    Bytes of rank 0 arrive from any place among those of others.
    """
    seen: Seen = request.getfixturevalue(ranks)
    size = len(seen.ranks)
    expected = {
        "any": [True, False],
        "each": [True, False, True],
        "gather": [rank * 10 for rank in range(size)],
        "means": [[(size - 1) / 2, 0.1], True],
        "sums": [[size * (size + 1) / 2] * 3, [size * (size - 1) / 2] * 4],
        "dtypes": ["torch.float32", "torch.bfloat16"],
        "main's": [[True, True, True], [[0, 0], [1, 2]], [], 0.5],
    }

    assert [rank["collectives"] for rank in seen.ranks] == [expected] * size
