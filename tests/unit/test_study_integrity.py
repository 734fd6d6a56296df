"""What counts as a result of a comparison, and what is refused because it was edited or broken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comparisons import arm, protocol
from narrowcast.comparison.protocol import PROTOCOL_FILE
from narrowcast.comparison.study import Assignment, carry_out
from narrowcast.comparison.verdicts import judge
from narrowcast.errors import PrecisionError, ProtocolError, RecipeError, RunDirectoryError
from narrowcast.plan import PLANS
from narrowcast.records.comparison import ComparisonRecord, VerdictRecord
from narrowcast.records.run import RunRecord
from narrowcast.training.run_directory import RunDirectory
from trainings import ENVIRONMENT, FakeTrainer

SPEC = protocol(3, "bf16", margin=0.5)


def run(directory: Path, trainer: Callable[..., RunRecord] | None = None) -> ComparisonRecord:
    return carry_out(
        SPEC,
        {name: PLANS[name] for name in SPEC.arms},
        directory,
        train=trainer or FakeTrainer(),
        environment=ENVIRONMENT,
    )


def raising(*arms: str, why: str = "raised AssertionError") -> Callable[..., RunRecord]:
    """Train as a recipe would whose own code raises at step 5 of some arms' second seed."""

    def chosen(a: Assignment) -> bool:
        return a.arm in arms and a.seed == 1

    def change(a: Assignment) -> dict[str, Any]:
        failed = {"failure": why, "failure_kind": "RecipeError", "completed_steps": 4}
        return failed if chosen(a) else {}

    def trainer(assignment: Assignment, observe: Callable[[Any], None]) -> RunRecord:
        try:
            return FakeTrainer(diverges=chosen, change=change)(assignment, observe)
        except PrecisionError:
            raise RecipeError(why) from None

    return trainer


def test_a_recipe_that_raises_in_a_candidate_is_a_result(tmp_path: Path) -> None:
    """fp32 finished on that seed, so the arm FAILED; the same command does not train it again."""
    record = run(tmp_path, raising("bf16"))
    again = FakeTrainer()
    second = run(tmp_path, again)

    assert record.verdicts[0].verdict == "FAILED"
    assert record.arms[1].failures == ("seed 1: raised at step 5: raised AssertionError",)
    assert again.calls == []
    assert second.verdicts == record.verdicts


def test_a_recipe_that_raises_in_fp32_stops_the_comparison(tmp_path: Path) -> None:
    """Without fp32 there is nothing to blame a precision with."""
    with pytest.raises(RecipeError):
        run(tmp_path, raising("fp32", "bf16"))


def test_too_little_memory_is_not_a_result(tmp_path: Path) -> None:
    """It is the machine's, and the run is tried again."""
    with pytest.raises(RecipeError):
        run(tmp_path, raising("bf16", why="raised OutOfMemoryError: 2 GiB"))
    again = FakeTrainer()

    record = run(tmp_path, again)

    assert ("bf16", 1) in again.calls
    assert record.verdicts[0].failed_runs == 0


@pytest.mark.parametrize("text", ["{", '{"recipe": 1}', "\x00"])
def test_a_broken_protocol_is_named(tmp_path: Path, text: str) -> None:
    """A protocol.json that is no protocol is a ProtocolError with its path."""
    run(tmp_path)
    (tmp_path / PROTOCOL_FILE).write_text(text)

    with pytest.raises(ProtocolError, match=r"protocol\.json is not a protocol"):
        run(tmp_path)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_broken_run_is_named(tmp_path: Path, content: bytes) -> None:
    """A run.json that is no record is a RunDirectoryError with its path."""
    run(tmp_path)
    (tmp_path / "arms" / "bf16" / "seed-1" / "run.json").write_bytes(content)

    with pytest.raises(RunDirectoryError, match=r"bf16/seed-1/run\.json is not the record"):
        run(tmp_path)


def test_edited_results_are_noticed(tmp_path: Path) -> None:
    """An evaluation in run.json that metrics.jsonl does not have names the run."""
    run(tmp_path)
    home = RunDirectory(tmp_path / "arms" / "bf16" / "seed-1")
    record = home.read_record()
    better = tuple(replace(e, metrics={"loss": 0.0}) for e in record.evaluations)
    home.write_record(replace(record, evaluations=better))

    with pytest.raises(ProtocolError, match=r"bf16/seed-1: the evaluations in run\.json"):
        run(tmp_path)


@pytest.mark.parametrize(
    "change",
    [{"recipe_digest": "other"}, {"plan": {"name": "other"}}],
    ids=lambda c: next(iter(c)),
)
def test_a_run_of_another_recipe_or_plan_is_noticed(tmp_path: Path, change: dict[str, Any]) -> None:
    """Both are compared with what the protocol asks for."""
    run(tmp_path)
    home = RunDirectory(tmp_path / "arms" / "bf16" / "seed-1")
    home.write_record(replace(home.read_record(), **change))

    with pytest.raises(ProtocolError, match=f"{next(iter(change))} is"):
        run(tmp_path)


REFERENCE = (10.0, 11.0, 12.0)


def judged(values: tuple[float, ...], **changes: Any) -> VerdictRecord:
    spec = protocol(len(values), plans={"bf16": {"policy": {"compute": "bf16"}}})
    arms = [arm("fp32", REFERENCE[: len(values)]), arm("bf16", values, **changes)]
    return judge(spec, arms)[0]


def test_a_precision_that_never_ran_gets_no_verdict() -> None:
    """Every product in fp32: INCONCLUSIVE, and the reason says where they ran."""
    verdict = judged(
        (10.1, 10.9, 12.0),
        precision_honoured=False,
        executed_dtypes={"matmul": {"fp32": 4}, "elementwise": {"bf16": 9}},
    )

    assert verdict.verdict == "INCONCLUSIVE"
    assert verdict.why == "bf16 was not executed: matmul in fp32, nothing in bf16"


@pytest.mark.parametrize(
    ("executed", "verdict"),
    [
        ({"elementwise": {"fp32": 4}, "loss": {"fp32": 1}, "cast": {"bf16": 1}}, "INCONCLUSIVE"),
        ({"elementwise": {"bf16": 4, "fp32": 1}}, "EQUIVALENT"),
        ({"matmul": {"bf16": 4}, "elementwise": {"fp32": 4}}, "EQUIVALENT"),
        ({}, "EQUIVALENT"),
    ],
    ids=["nothing in bf16", "elementwise in bf16", "matmul in bf16", "not measured"],
)
def test_a_model_without_products_is_judged_by_what_it_has(
    executed: dict[str, dict[str, int]], verdict: str
) -> None:
    """`precision_honoured` is True where nothing heavy ran; the verdict looks at what did."""
    found = judged((10.1, 10.9, 12.0), precision_honoured=True, executed_dtypes=executed)

    assert found.verdict == verdict
    if verdict == "INCONCLUSIVE":
        assert found.why == (
            "bf16 was not executed: elementwise in fp32; loss in fp32, nothing in bf16"
        )


def test_a_precision_that_ran_in_part_keeps_its_verdict() -> None:
    """Some strays: the verdict is of what ran, and its reason says so."""
    verdict = judged(
        (10.1, 10.9, 12.0),
        precision_honoured=False,
        executed_dtypes={"matmul": {"fp32": 1, "bf16": 3}},
    )

    assert verdict.verdict == "EQUIVALENT"
    assert "not all operations executed in bf16" in verdict.why


def test_two_seeds_reassure_nobody() -> None:
    """Below three seeds neither EQUIVALENT nor NON-INFERIOR is said, however close the values."""
    verdict = judged((10.001, 11.002))

    assert verdict.verdict == "INCONCLUSIVE"
    assert "needs at least 3 seeds" in verdict.why
    assert verdict.n_needed == 3
