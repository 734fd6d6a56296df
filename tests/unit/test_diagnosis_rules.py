"""Rules on evidence made by hand: what is accused, from which threshold on, and what never is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from narrowcast.diagnosis.course import Course, Point
from narrowcast.diagnosis.evidence import Evidence
from narrowcast.diagnosis.faint import lost_by_module
from narrowcast.diagnosis.judge import findings_of
from narrowcast.diagnosis.thrash import is_restless, thrashing
from narrowcast.diagnosis.updates import lost_updates
from narrowcast.diagnosis.verdict import persistent
from narrowcast.formats import float_format
from narrowcast.ranges.meter import WeightUpdates
from narrowcast.ranges.updates import UpdateLoss
from narrowcast.records.diagnosis import ExecutedOp, Finding, LostConstant
from narrowcast.records.ranges import TensorRange
from narrowcast.replay.step import StepTrace


def values(
    amax: float = 1.0,
    *,
    amin: float | None = None,
    dtype: str = "fp16",
    zeros: int = 0,
    infs: int = 0,
    nans: int = 0,
    numel: int = 100,
) -> TensorRange:
    return TensorRange(
        dtype=dtype,
        shape=(numel,),
        numel=numel,
        zeros=zeros,
        infs=infs,
        nans=nans,
        amax=amax,
        amin=amax / 4 if amin is None else amin,
    )


def op(index: int, name: str = "aten.mul.Tensor", **more: Any) -> ExecutedOp:
    given: dict[str, Any] = {
        "phase": "forward",
        "module": "body",
        "file": "model.py",
        "line": 10 + index,
        "dtype": "fp16",
        "inputs": (values(),),
        "outputs": (values(),),
        "fed_by": (index - 1,),
        "sources": ("",),
    }
    return ExecutedOp(index=index, op=name, **{**given, **more})


def trace(
    *events: ExecutedOp, loss: float = 1.0, scale: float = 1.0, **gradients: TensorRange
) -> StepTrace:
    named = {name.replace("_", "."): held for name, held in gradients.items()}
    return StepTrace(precision="fp16", scale=scale, loss=loss, gradients=named, events=events)


def evidence(low: StepTrace, reference: StepTrace | None = None, **more: Any) -> Evidence:
    given = {"step": 1, "compute": "fp16", "floor": 1.0, "scale": low.scale, **more}
    return Evidence(low=low, reference=reference or trace(), **given)


BROKEN = values(infs=3)
NAN = float("nan")


def test_the_first_operation_with_a_broken_result_is_an_overflow() -> None:
    """By phase; what only hands the infinity on is not accused."""
    events = (
        op(0, fed_by=(-1,), sources=("batch",)),
        op(1, "aten.addmm.default", outputs=(BROKEN,), module="body.wo"),
        op(2, inputs=(BROKEN,), outputs=(values(nans=9),), results=("loss",)),
    )

    (found,) = findings_of(evidence(trace(*events, loss=NAN)))

    assert (found.kind, found.module, found.line) == ("forward overflow", "body.wo", 11)
    assert found.figures["infinite"] == 3
    assert found.figures["largest number of the format"] == float_format("fp16").max


def test_an_overflow_in_backward_is_one_of_backward() -> None:
    """The operation is the gradient's, the line the forward operation's."""
    events = (
        op(0, results=("loss",), fed_by=(-1,)),
        op(1, phase="backward", outputs=(BROKEN,), results=("body.weight",)),
    )

    (found,) = findings_of(evidence(trace(*events, body_weight=BROKEN), scale=8.0))

    assert (found.kind, found.phase) == ("backward overflow", "backward")


def test_an_infinity_that_is_masked_away_is_not_accused() -> None:
    """It reaches neither the loss nor a gradient."""
    events = (
        op(0, outputs=(BROKEN,), fed_by=(-1,)),
        op(1, "aten.where.self", inputs=(BROKEN,), results=("loss",)),
    )

    assert findings_of(evidence(trace(*events))) == ()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        # x / (norm + 1e-8): the sum is 0, and the quotient NaN two operations further on
        (
            {
                "name": "aten.add.Tensor",
                "constants": (LostConstant(value=1e-8, becomes=0.0),),
                "outputs": (values(zeros=5),),
            },
            {"name": "aten.div.Tensor", "inputs": (values(zeros=5),), "outputs": (values(nans=5),)},
        ),
        # mask * -1e9, met by a softmax of a row that holds nothing else
        (
            {"constants": (LostConstant(value=-1e9, becomes=-float("inf")),), "outputs": (BROKEN,)},
            {"name": "aten._softmax.default", "inputs": (BROKEN,), "outputs": (values(nans=5),)},
        ),
        # finfo.min + score
        (
            {"name": "aten.add.Tensor", "inputs": (values(65504.0),), "outputs": (BROKEN,)},
            {"name": "aten._softmax.default", "inputs": (BROKEN,), "outputs": (values(nans=5),)},
        ),
        # a mask of one large number in fp32, cast to fp16
        (
            {
                "name": "aten._to_copy.default",
                "inputs": (values(1e9, amin=1e9, dtype="fp32"),),
                "outputs": (BROKEN,),
            },
            {"inputs": (BROKEN,), "outputs": (values(nans=5),)},
        ),
    ],
    ids=["epsilon", "mask", "edge", "cast"],
)
def test_a_constant_behind_the_failure_is_named_in_its_place(
    first: dict[str, Any], second: dict[str, Any]
) -> None:
    """Where it was lost, and not where the loss was noticed."""
    events = (op(0, fed_by=(-1,), **first), op(1, results=("loss",), **second))

    (found,) = findings_of(evidence(trace(*events, loss=NAN)))

    assert (found.kind, found.line) == ("constant out of range", 10)


def test_an_epsilon_that_was_lost_without_a_zero_is_not_blamed_for_an_overflow() -> None:
    """The quotient overflowed for another reason: nothing was divided by 0."""
    lost = (LostConstant(value=1e-8, becomes=0.0),)
    events = (
        op(0, "aten.add.Tensor", fed_by=(-1,), constants=lost),
        op(1, "aten.div.Tensor", outputs=(BROKEN,), results=("loss",)),
    )

    (found,) = findings_of(evidence(trace(*events, loss=NAN)))

    assert found.kind == "forward overflow"


@pytest.mark.parametrize(("collapsed", "accused"), [(0.0, 0), (0.04, 0), (0.05, 1), (0.9, 1)])
def test_whole_numbers_that_become_equal_collapse_from_a_twentieth_on(
    collapsed: float, accused: int
) -> None:
    """A few rare ones that meet are none."""
    cast = op(0, "aten._to_copy.default", collapsed=collapsed, fed_by=(-1,))

    found = findings_of(evidence(trace(cast, op(1, "aten.mm.default", results=("loss",)))))

    assert [f.kind for f in found] == ["positions collapse"] * accused


def test_a_cast_that_nobody_reads_is_not_accused() -> None:
    """What is lost in it is not used."""
    events = (op(0, results=("loss",), fed_by=(-1,)), op(1, collapsed=0.9, fed_by=(-1,)))

    assert findings_of(evidence(trace(*events))) == ()


@pytest.mark.parametrize(
    ("times", "absorbed", "accused"), [(7, 1.0, 0), (8, 0.49, 0), (8, 0.5, 1), (600, 1.0, 1)]
)
def test_a_sum_of_eight_times_or_more_is_long(times: int, absorbed: float, accused: int) -> None:
    """And absorbs if most of what is added last changes nothing."""
    events = [op(i, "aten.add.Tensor", line=5, absorbed=absorbed) for i in range(1, times + 1)]
    start = op(0, fed_by=(-1,), absorbed=None)

    found = findings_of(evidence(trace(start, *events)))

    assert [f.kind for f in found] == ["low-precision accumulation"] * accused


def test_residual_branches_of_many_blocks_are_no_long_sum() -> None:
    """Each block adds once, on a line that all share."""
    start = op(0, fed_by=(-1,))
    events = [
        op(i, "aten.add.Tensor", line=5, absorbed=1.0, module=f"blocks.{i}") for i in range(1, 30)
    ]

    assert findings_of(evidence(trace(start, *events))) == ()


@pytest.mark.parametrize(("source", "accused"), [("body.mean", 1), ("batch", 0), ("outside", 0)])
def test_a_buffer_that_takes_no_addend_is_accused(source: str, accused: int) -> None:
    """After the decay in place that a running average begins with."""
    events = (
        op(0, "aten.mul_.Tensor", fed_by=(-1,), sources=(source,)),
        op(1, "aten.add_.Tensor", fed_by=(0, -1), absorbed=0.8),
    )

    assert len(findings_of(evidence(trace(*events)))) == accused


@pytest.mark.parametrize(
    ("zeros", "accused"), [(10, []), (54, []), (55, ["body"]), (100, ["body"])]
)
def test_a_module_underflows_when_half_of_what_fp32_has_is_zero(
    zeros: int, accused: list[str]
) -> None:
    """Ten elements are 0 in fp32 as well: rows that a batch does not touch."""
    low = trace(body_weight=values(zeros=zeros), head_weight=values(), scale=1024.0)
    reference = trace(body_weight=values(1e-6, zeros=10), head_weight=values())

    found = findings_of(evidence(low, reference))

    assert [f.module for f in found if f.kind == "backward underflow"] == accused


def test_bf16_has_the_range_of_fp32_and_loses_no_gradient_below_it() -> None:
    """Zeros there have another reason."""
    low = trace(body_weight=values(zeros=100))

    assert findings_of(evidence(low, trace(body_weight=values()), compute="bf16")) == ()


def test_a_scale_is_too_low_where_a_higher_one_keeps_most_of_all_gradients() -> None:
    """Otherwise it is the module whose gradients are lost."""
    low = trace(body_weight=values(zeros=90), scale=4.0)
    reference = trace(body_weight=values())
    best = trace(body_weight=values(), scale=4096.0)

    (kept,) = findings_of(evidence(low, reference, best=best))
    (lost,) = findings_of(evidence(low, reference, best=replace(low, scale=4096.0)))

    assert (kept.kind, kept.figures["scale that keeps them"]) == ("scale too low", 4096.0)
    assert lost.kind == "backward underflow"
    assert "no scale serves both" in lost.explanation


def test_the_module_nearest_the_loss_comes_first() -> None:
    """What lies further back has lost its gradient for that reason."""
    names = ("head.weight", "body.weight", "stem.weight")
    events = [op(i, phase="backward", results=(name,)) for i, name in enumerate(names)]
    lost = {name.replace(".", "_"): values(zeros=100) for name in reversed(names)}
    whole = {name.replace(".", "_"): values() for name in reversed(names)}

    found = findings_of(evidence(trace(*events, **lost), trace(**whole)))

    assert [f.module for f in found] == ["head", "body", "stem"]


def test_a_parameter_without_any_gradient_has_lost_it_whole() -> None:
    """Where fp32 has one."""
    found = lost_by_module(trace(), trace(body_weight=values(zeros=20)))

    assert (found["body"].elements, found["body"].share) == (80, 1.0)


def updates(name: str, share: float, *, carried: float | None = 0.0, n: int = 100) -> WeightUpdates:
    loss = UpdateLoss(elements=n, updated=n, lost=round(share * n), ratio=1e-4, carried=carried)
    stored = "bf16 (stochastic)" if carried is None else "bf16"
    return WeightUpdates(name=name, stored=stored, weight=loss)


@pytest.mark.parametrize(
    ("shares", "accused"),
    [
        ({"a.weight": 0.9, "b.weight": 0.8}, ["", "a", "b"]),
        ({"a.weight": 0.1, "b.weight": 0.2}, []),
        ({"a.weight": 0.95, "b.weight": 0.0, "c.weight": 0.0}, ["a"]),
        ({"a.weight": 0.85, "b.weight": 0.0, "c.weight": 0.0}, []),
        ({"norm.weight": 1.0, "b.weight": 0.0, "c.weight": 0.0}, []),
    ],
)
def test_lost_updates_are_accused_by_their_share_of_all(
    shares: dict[str, float], accused: list[str]
) -> None:
    """The model if most of all are lost; a part only where it holds a matrix and hardly moves."""
    steps = [[updates(name, share) for name, share in shares.items()]]

    assert [f.module for f in lost_updates(steps, {"a", "b", "c"})] == accused


def test_updates_that_arrive_on_average_are_not_lost() -> None:
    """A store that rounds at random leaves most elements where they are, and loses nothing."""
    assert lost_updates([[updates("a.weight", 0.99, carried=1.0)]], {"a"}) == ()
    assert lost_updates([[updates("a.weight", 0.99, carried=None)]], {"a"}) == ()
    assert lost_updates([], {"a"}) == ()


def course(flags: str, scales: list[float] | None = None) -> Course:
    heights = scales or [1.0] * len(flags)
    return Course(
        points=tuple(
            Point(step=i + 1, loss=1.0, scale=scale, applied=flag == "+")
            for i, (flag, scale) in enumerate(zip(flags, heights, strict=True))
        )
    )


@pytest.mark.parametrize(
    ("flags", "restless"),
    [
        ("---" + "+" * 30, False),
        ("--++-+++++++++++++-+++++++", False),
        ("-++-++-++-++", True),
        ("+" * 60 + "-+-+-" + "+" * 60, False),
        ("-" * 9, False),
    ],
)
def test_a_scale_is_restless_after_three_rows_of_skips_and_a_twentieth_of_the_steps(
    flags: str, restless: bool
) -> None:
    """Those before the first applied step are how it is found."""
    assert is_restless(course(flags)) is restless


def test_a_restless_scale_thrashes_only_for_a_reason() -> None:
    """Gradients that no scale holds, or that outgrow it, or growth that is too eager."""
    few = course("-++-++-+++++-+++++++")
    many = course("+-" * 12)
    raised = course("+-" * 4, [8, 8, 4, 4, 8, 8, 4, 8])
    lost = Finding(kind="backward underflow", module="side", explanation="Side loses all.")

    assert thrashing(few, (), None, 2.0) is None
    assert thrashing(few, (lost,), None, 2.0).module == "side"
    assert "outgrow" in thrashing(many, (), None, 2.0).explanation
    assert "too short" in thrashing(raised, (), None, 2.0).explanation


def test_a_silent_fault_must_persist() -> None:
    """It is in the last kept step, and in half of all."""
    one = Finding(kind="positions collapse", module="a", explanation="")
    other = Finding(kind="positions collapse", module="b", explanation="")

    assert persistent([(one,), (one,)]) == (one,)
    assert persistent([(), (one,)]) == (one,)
    assert persistent([(), (), (other,)]) == ()
    assert persistent([(one,), (one,), ()]) == ()
    assert persistent([]) == ()
