"""The verdict of a diagnosis on small trainings, each with one planted fault or with none."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diagnosed import (
    WIDTH,
    Adapter,
    Average,
    Clock,
    Counting,
    EdgeMask,
    Epsilon,
    Filled,
    Loop,
    Masked,
    Net,
    Rows,
    Strong,
    TwoTasks,
    Unseeded,
    batches,
    diagnosed,
    plain,
    squares,
    two_losses,
)
from narrowcast.diagnosis.diagnose import diagnose, diagnose_training
from narrowcast.errors import RecipeError, UsageError
from narrowcast.plan import PLANS, Plan
from narrowcast.records.codec import dumps, loads
from narrowcast.records.diagnosis import DiagnosisRecord
from narrowcast.scaling.scales import DynamicScale

# Trainings, and remedies that are tried: together beyond what `make check` waits for.
pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("body", "precision", "kind", "module", "code"),
    [
        (Strong, "fp16", "forward overflow", "body.first", "self.first(x)"),
        (Epsilon, "fp16", "constant out of range", "body", "1e-8"),
        (Filled, "fp16", "constant out of range", "body", "-1e9"),
        (EdgeMask, "fp16", "constant out of range", "body", "scores + mask"),
        (Clock, "bf16", "positions collapse", "body", "seconds @"),
        (Loop, "bf16", "low-precision accumulation", "body", "total + reading"),
        (Average, "bf16-true", "low-precision accumulation", "body", "add_("),
    ],
    ids=["overflow", "epsilon", "filled", "mask", "positions", "loop", "average"],
)
def test_a_planted_fault_is_named_with_its_module_and_its_line(
    body: Any, precision: str, kind: str, module: str, code: str
) -> None:
    """The verdict, the dotted name, and the source line that a reader would point at."""
    record = diagnosed(body, precision, steps=6)

    assert (record.verdict, record.finding.module) == (kind, module)
    assert code in record.finding.code
    assert record.finding.file.endswith("diagnosed.py")


@pytest.mark.parametrize(
    ("body", "precision"),
    [
        (plain, "fp16"),
        (plain, "bf16"),
        (plain, "bf16-true"),
        (plain, "bf16-split"),
        (plain, "lean"),
        (plain, replace(PLANS["bf16-split"], gradients="release")),
        (plain, Plan(name="halves", policy=PLANS["fp16"].policy, micro_batches=2)),
        (Adapter, "fp16"),
        (Adapter, "bf16-true"),
        (Masked, "fp16"),
        (Rows, "fp16"),
        (Rows, "bf16-true"),
        (lambda: nn.Sequential(plain(), nn.Dropout(0.3)), "fp16"),
        (lambda: nn.Sequential(plain(), nn.BatchNorm1d(WIDTH)), "fp16"),
        (lambda: Loop(12), "bf16"),
        (lambda: Clock(0), "bf16"),
    ],
)
def test_a_healthy_training_is_fine(body: Any, precision: Any) -> None:
    """Nothing is accused of what 16 bits do to every training."""
    record = diagnosed(body, precision)

    assert record.verdict == "fine", record.finding.explanation
    assert record.others == ()
    assert record.remedies == ()


def test_the_cures_are_tried_and_the_cheapest_that_works_comes_first() -> None:
    """Both strong layers have to be in fp32; neither CUDA's rules nor one of them alone helps."""
    record = diagnosed(Strong, "fp16", steps=6)
    works = {remedy.name: remedy.works for remedy in record.remedies}

    assert works["body.first, body.second in fp32"]
    assert works["bf16"]
    assert works["fp32"]
    assert not works["CUDA's autocast rules"]
    assert [remedy.works for remedy in record.remedies] == sorted(works.values(), reverse=True)
    for remedy in record.remedies:
        assert remedy.memory_bytes is not None
        assert remedy.time_ratio is not None
        assert remedy.time_ratio > 0


def test_lost_updates_are_of_the_whole_model_or_of_one_part() -> None:
    """At 1e-6 nothing moves; a table of large weights stands still alone."""

    def table() -> nn.Module:
        body = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
        with torch.no_grad():
            body[0].weight.copy_(body[0].weight.sign())
        return body

    whole = diagnosed(plain, "bf16-true", lr=1e-6)
    part = diagnosed(table, "bf16-true", lr=1e-3)

    assert (whole.verdict, whole.finding.module) == ("lost updates", "")
    assert (part.verdict, part.finding.module) == ("lost updates", "body.0")
    assert {r.name for r in whole.remedies if r.works} == {
        "weights as stochastic",
        "weights as split16",
        "fp32 masters",
        "fp32",
    }


def test_gradients_of_one_branch_that_no_scale_keeps_are_an_underflow_of_that_module() -> None:
    """The side head's gradients are 2^40 smaller than the main one's."""
    record = diagnosed(precision="fp16", loss=two_losses, model=TwoTasks)

    assert (record.verdict, record.finding.module) == ("backward underflow", "side")
    assert "no scale serves both" in record.finding.explanation


def test_a_fixed_scale_that_a_higher_one_would_better_is_too_low() -> None:
    """At a scale of 1 most gradients are 0; the scale that keeps them is named, and works."""
    record = diagnosed(plain, "fp16", loss=lambda m, b: squares(m, b) * 1e-6, scale=1.0)
    keeping = record.finding.figures["scale that keeps them"]

    assert record.verdict == "scale too low"
    assert keeping > 1
    assert record.remedies[0].works
    assert any(r.works and f"{keeping:.0f}" in r.name for r in record.remedies)


@pytest.mark.parametrize(
    "scale",
    [2.0**30, 1e9, DynamicScale(scale=2.0**32, floor=2.0**30)],
    ids=["power", "odd", "floor"],
)
def test_a_scale_that_cannot_come_down_is_too_high(scale: Any) -> None:
    """No module is at fault: a lower scale is the first cure, and costs nothing."""
    record = diagnosed(plain, "fp16", scale=scale)
    serves = record.finding.figures["scale that keeps them"]
    first = record.remedies[0]

    assert (record.verdict, record.finding.module) == ("scale too high", "")
    assert 1 < serves < 2.0**30
    assert math.log2(serves).is_integer()
    assert first.name == f"a lower loss scale of {serves:.0f}"
    assert (first.works, first.memory_bytes, first.time_ratio) == (True, 0, 1.0)
    assert f"scale={serves:.0f}" in first.how


def test_a_fixed_scale_that_overflows_now_and_then_is_too_high() -> None:
    """Every third batch is a thousand times as far off as the others."""
    data = [(x, y * (1 if i % 3 else 1000)) for i, (x, y) in enumerate(batches(30))]

    record = diagnosed(plain, "fp16", steps=30, data=data, lr=1e-4, scale=2.0**18)

    assert record.verdict == "scale too high"
    assert record.remedies[0].works
    assert "lower loss scale" in record.remedies[0].name


def test_gradients_beyond_fp16_without_any_scale_are_an_overflow() -> None:
    """At a scale of 1 there is none that would be lower."""
    record = diagnosed(plain, "fp16", loss=lambda m, b: squares(m, b) * 1e8)

    assert record.verdict == "backward overflow"


def test_a_scale_that_grows_after_two_steps_thrashes() -> None:
    """It overflows, comes down and is raised again, for ever."""
    record = diagnosed(plain, "fp16", steps=40, scale=DynamicScale(scale=2.0**17, interval=2))

    assert record.verdict == "scale thrashing"
    assert "interval of growth is too short" in record.finding.explanation


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_what_fails_in_fp32_as_well_is_no_precision_problem(precision: str) -> None:
    """A learning rate that diverges, and a batch that holds an infinity."""
    rate = diagnose_training(
        lambda: Net(plain()),
        lambda model: torch.optim.SGD(model.parameters(), 100.0),
        squares,
        batches(),
        precision,
        steps=20,
    )
    bad = batches(8)
    bad[5] = (torch.full((8, 4), math.inf), bad[5][1])
    data = diagnosed(plain, precision, data=bad, steps=8)

    assert rate.verdict == data.verdict == "not a precision problem"
    assert "fp32" in data.finding.explanation
    assert "step 6" in data.finding.explanation


def test_a_loss_that_is_weighted_more_and_more_has_not_diverged() -> None:
    """It rises in fp32 too, and the weights stay what they are."""

    class Fresh(Net):
        def __init__(self) -> None:
            super().__init__(plain())
            self.register_buffer("step", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.step += 0.5
            return super().forward(x)

    def weighted(model: Any, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]).float(), batch[1]) * 2**model.step

    record = diagnosed(precision="bf16", loss=weighted, model=Fresh)

    assert record.verdict == "fine", record.finding.explanation


def test_everything_in_fp32_is_nothing_to_diagnose() -> None:
    """By the plan, or because every module is kept so."""
    kept = Plan(name="kept", policy=PLANS["fp16"].policy.keeping_fp32("*"))

    for precision in ("fp32", kept):
        assert diagnosed(plain, precision).verdict == "nothing to diagnose"


@pytest.mark.parametrize(
    ("body", "words"), [(Unseeded, "no seed"), (Counting, "counter in a plain attribute")]
)
def test_what_cannot_be_replayed_is_said_with_what_differs(body: Any, words: str) -> None:
    """The loss that was, and the loss of the replay."""
    record = diagnosed(body, "bf16")

    assert record.verdict == "not reproducible"
    assert words in record.finding.explanation
    assert "the loss of step 20 was" in record.finding.explanation


def test_a_budget_that_is_too_short_is_inconclusive_and_names_one_that_would_do() -> None:
    """One step proves nothing; a scale that still comes down needs the steps that it needs."""
    one = diagnosed(plain, "fp16", steps=1)
    falling = diagnosed(plain, "fp16", steps=3, loss=lambda m, b: squares(m, b) * 200)

    assert one.verdict == falling.verdict == "inconclusive"
    assert one.finding.figures["steps that would do"] > 1
    assert "came down" in falling.finding.explanation
    enough = int(falling.finding.figures["steps that would do"])
    again = diagnosed(plain, "fp16", steps=enough, loss=lambda m, b: squares(m, b) * 200)
    assert again.verdict == "fine", again.finding.explanation


def test_activations_that_grow_towards_the_end_of_the_format_are_not_fine_yet() -> None:
    """They reach it within the training, though not within the budget."""

    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("gain", torch.full((), 100.0))
            self.mix, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            self.gain *= 1.4
            return self.norm(self.mix(x * self.gain))  # type: ignore[no-any-return]

    short = diagnosed(Growing, "fp16", steps=14)
    enough = int(short.finding.figures["steps that would do"])
    long = diagnosed(Growing, "fp16", steps=enough)

    assert short.verdict == "inconclusive"
    assert "grew from" in short.finding.explanation
    assert long.verdict == "forward overflow"


def test_the_smallest_set_is_searched_where_something_can_be_kept() -> None:
    """And a note says why not, where nothing is accused."""
    record = diagnosed(Strong, "fp16", steps=6, minimal_fp32=True)
    healthy = diagnosed(plain, "fp16", minimal_fp32=True)

    assert record.minimal_fp32 is not None
    assert set(record.minimal_fp32.modules) == {"body.first", "body.second"}
    assert all(dropped.failed for dropped in record.minimal_fp32.dropped)
    assert healthy.minimal_fp32 is None
    assert any("no smallest set" in note for note in healthy.notes)


def test_the_objects_of_the_caller_stay_as_they_are() -> None:
    """Weights, optimizer state, random state: a diagnosis works on copies."""
    model = Net(plain())
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    diagnose_training(model, optimizer, squares, batches(), "fp16", steps=8)

    assert torch.equal(state, torch.get_rng_state())
    assert optimizer.state_dict()["state"] == {}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_record_travels_as_json() -> None:
    """Whole: with its operations, ranges, cures and lines."""
    record = diagnosed(Strong, "fp16", steps=6)

    assert loads(DiagnosisRecord, dumps(record)) == record
    assert record.ranges
    assert record.lines
    assert record.finding.evidence


def test_bad_requests_get_one_clear_error() -> None:
    """No batch, no steps, an optimizer of another model, and what the recipe itself raises."""
    with pytest.raises(UsageError, match="no batch"):
        diagnosed(plain, "fp16", data=[])
    with pytest.raises(UsageError, match="steps is 0"):
        diagnosed(plain, "fp16", steps=0)
    optimizer = torch.optim.Adam(Net(plain()).parameters())
    with pytest.raises(UsageError, match="another model"):
        diagnose_training(lambda: Net(plain()), optimizer, squares, batches(), "fp16")
    with pytest.raises(RecipeError, match="loss"):
        diagnosed(plain, "fp16", loss=lambda m, b: m(b[0]).no_such_thing())
    with pytest.raises(UsageError, match="no recipe file"):
        diagnose("no_such_recipe.py", "fp16")


class SquareNorm(nn.Module):
    """RMSNorm as it is written in fp16 code: the squares of large values are infinite."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6)


def test_an_infinity_that_is_divided_away_is_named_before_what_it_makes_faint() -> None:
    """The norm gives 0, the layer behind it gets no gradient: the norm is why."""
    model = nn.Sequential(nn.Linear(8, 8), SquareNorm(), nn.Linear(8, 8), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.mul_(3000)
    x, y = torch.randn(8, 8), torch.randn(8, 1)

    record = diagnose_training(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-3),
        lambda m, b: nn.functional.mse_loss(m(b[0]).float(), b[1]),
        [(x, y)],
        "fp16",
        steps=20,
    )

    assert record.verdict == "forward overflow"
    assert record.finding.module == "1"


def test_an_infinity_that_is_divided_away_in_some_rows_is_named_where_the_loss_is_far_off() -> None:
    """The other rows keep every gradient alive, so that nothing is faint."""
    model = nn.Sequential(nn.Linear(8, 16), SquareNorm(), nn.Linear(16, 4))
    data = []
    for _ in range(5):
        x = torch.randn(32, 8)
        y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
        data.append((x * torch.tensor([2000.0, 1.0]).repeat(16)[:, None], y))

    record = diagnose_training(
        model,
        lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2),
        lambda m, b: F.cross_entropy(m(b[0]).float(), b[1]),
        data,
        "fp16",
        steps=40,
    )

    assert (record.verdict, record.finding.module) == ("forward overflow", "1")
    assert "more than noise" in record.symptom


class Picky(nn.Module):
    """Raises at a dtype, as code does that looks one up in a table of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x * {torch.float32: 1.0}[x.dtype]


def test_what_raises_in_low_precision_alone_says_at_which_step_and_that_fp32_went_through() -> None:
    """The error is the user's own; the hint is what the diagnosis has found out about it."""
    with pytest.raises(RecipeError, match="KeyError") as caught:
        diagnosed(Picky, "bf16", steps=5)

    assert "step 1 in bf16 raised it, and none did in fp32 (5 steps" in caught.value.hint


def test_a_bad_sample_later_does_not_excuse_an_overflow_before_the_first_update() -> None:
    """fp16 fails at once, fp32 at step 9 on a NaN in the data: two failures, and both are told."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    with torch.no_grad():
        model[0].weight.mul_(1e5)
    x, y = torch.randn(8, 8), torch.randn(8, 1)
    batches = [(x, y)] * 8 + [(x * float("nan"), y)]

    record = diagnose_training(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-14),
        lambda m, b: nn.functional.mse_loss(m(b[0]).float() / 1e5, b[1]),
        batches,
        "fp16",
        steps=12,
    )

    assert record.verdict == "forward overflow"
    assert record.finding.module == "0"
    assert any("fp32 fails too" in note for note in record.notes)


def test_a_loss_that_writes_into_its_batch_is_told_so_and_the_callers_data_stays() -> None:
    """No random numbers are accused of it."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))
    x, y = torch.randn(8, 8), torch.randn(8, 1)
    before = x.clone()

    def loss(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        b[0].mul_(0.9)
        return F.mse_loss(m(b[0]).float(), b[1])

    record = diagnose_training(
        model, torch.optim.SGD(model.parameters(), lr=1e-2), loss, [(x, y)], "bf16", steps=4
    )

    assert record.verdict == "not reproducible"
    assert "writes into its batch" in record.finding.explanation
    assert torch.equal(x, before)


def test_a_model_without_parameters_is_one_clear_error() -> None:
    """There is nothing to train."""
    with pytest.raises(UsageError, match="no parameters"):
        diagnose_training(
            nn.Flatten(), lambda m: torch.optim.SGD([], lr=1), lambda m, b: m(b), [1], "bf16"
        )


def test_complex_weights_can_be_diagnosed() -> None:
    """Their gradients are counted by real and imaginary parts."""

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64))
            self.head = nn.Linear(8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.fft.irfft(torch.fft.rfft(x.float()) * self.weight, n=8))

    model = Spectral()
    x, y = torch.randn(8, 8), torch.randn(8, 1)

    record = diagnose_training(
        model,
        torch.optim.SGD(model.parameters(), lr=1e-2),
        lambda m, b: F.mse_loss(m(b[0]).float(), b[1]),
        [(x, y)],
        "bf16",
        steps=6,
    )

    assert record.verdict == "fine"
