"""Carrying a comparison out: order, reuse, failures, and the proof that arms began alike."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from comparisons import protocol
from narrowcast.comparison.protocol import PROTOCOL_FILE
from narrowcast.comparison.study import COMPARISON_FILE, Assignment, RunBegins, RunEnds, carry_out
from narrowcast.comparison.verdicts import judge
from narrowcast.errors import (
    PrecisionError,
    ProtocolError,
    RecipeError,
    RunDirectoryError,
)
from narrowcast.plan import PLANS
from narrowcast.records.codec import loads
from narrowcast.records.comparison import ComparisonRecord, Protocol
from narrowcast.records.run import Evaluation, RunRecord
from narrowcast.training.events import Ended
from narrowcast.training.run_directory import RunDirectory
from trainings import ENVIRONMENT, FakeTrainer, no_harm

SPEC = protocol(3, "fp16", "bf16", margin=0.5)
ORDER = [(arm, seed) for seed in (0, 1, 2) for arm in ("fp32", "fp32-perturbed", "fp16", "bf16")]


def run(
    directory: Path,
    trainer: Callable[..., RunRecord] | None = None,
    spec: Protocol = SPEC,
    **options: Any,
) -> ComparisonRecord:
    return carry_out(
        spec,
        {name: PLANS[name] for name in spec.arms},
        directory,
        train=trainer or FakeTrainer(),
        environment=options.pop("environment", ENVIRONMENT),
        **options,
    )


def test_every_arm_runs_on_every_seed_seeds_outermost(tmp_path: Path) -> None:
    """fp32, its control and each candidate take turns, so that drift in time hits all alike."""
    trainer = FakeTrainer()

    run(tmp_path, trainer)

    assert trainer.calls == ORDER


def test_the_record_is_what_lies_in_the_directory(tmp_path: Path) -> None:
    """comparison.json holds the record that is returned, with the JSON keys of docs/json.md."""
    record = run(tmp_path, command="narrowcast compare fake")
    text = (tmp_path / COMPARISON_FILE).read_text()
    data = json.loads(text)

    assert loads(ComparisonRecord, text) == record
    assert [a["precision"] for a in data["arms"]] == ["fp32", "fp16", "bf16"]
    for key in (
        "seeds",
        "metrics",
        "peak_bytes",
        "step_seconds",
        "skipped_steps",
        "executed_dtypes",
    ):
        assert key in data["arms"][0]
    for key in ("precision", "verdict", "difference", "interval", "margin", "n"):
        assert key in data["verdicts"][0]
    assert data["arms"][1]["metrics"]["loss"] == [
        pytest.approx(no_harm(_assignment("fp16", seed))) for seed in (0, 1, 2)
    ]
    assert data["protocol"]["hash"] == record.protocol.hash != ""
    assert record.command == "narrowcast compare fake"


def test_the_verdicts_follow_from_the_file_alone(tmp_path: Path) -> None:
    """Judging what comparison.json holds gives the verdicts that it holds."""
    run(tmp_path, FakeTrainer(diverges=lambda a: (a.arm, a.seed) == ("fp16", 1)))

    record = loads(ComparisonRecord, (tmp_path / COMPARISON_FILE).read_text())

    assert record.control is not None
    assert judge(record.protocol, record.arms, record.control.arm) == record.verdicts


def _assignment(precision: str, seed: int) -> Assignment:
    return Assignment(
        arm=precision,
        plan=PLANS[precision],
        seed=seed,
        steps=10,
        perturb=False,
        directory=Path(),
    )


def test_the_protocol_lies_there_before_the_first_step(tmp_path: Path) -> None:
    """When the first training begins, protocol.json is written, whole and hashed."""
    seen = []

    def trainer(assignment: Assignment, observe: Callable[[Any], None]) -> RunRecord:
        seen.append(json.loads((tmp_path / PROTOCOL_FILE).read_text())["hash"])
        return FakeTrainer()(assignment, observe)

    record = run(tmp_path, trainer)

    assert set(seen) == {record.protocol.hash}


def test_the_same_command_again_trains_nothing(tmp_path: Path) -> None:
    """Finished runs are reused, and the verdicts are the same."""
    first = run(tmp_path)
    again = FakeTrainer()

    second = run(tmp_path, again)

    assert again.calls == []
    assert second.verdicts == first.verdicts
    assert second.started == first.started


def test_an_interruption_loses_no_run_that_has_ended(tmp_path: Path) -> None:
    """Ctrl-C in the sixth run: the next call trains the sixth to the twelfth, no others."""
    stopped = FakeTrainer(change=lambda a: _interrupted(stopped, 6))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopped)
    assert not (tmp_path / COMPARISON_FILE).exists()
    again = FakeTrainer()

    record = run(tmp_path, again)

    assert stopped.calls[:5] + again.calls == ORDER
    assert record.verdicts == run(tmp_path / "other").verdicts


def test_ctrl_c_while_a_run_is_being_ended_stops_the_comparison(tmp_path: Path) -> None:
    """It comes too late for that run, which counts; the next one does not begin."""
    trainer = FakeTrainer()

    def late(assignment: Assignment, observe: Callable[[Any], None]) -> RunRecord:
        record = trainer(assignment, observe)
        observe(Ended(record=record, stop_asked=len(trainer.calls) == 2))
        return record

    events: list[Any] = []
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, late, observe=events.append)
    again = FakeTrainer()
    run(tmp_path, again)

    assert len([e for e in events if isinstance(e, RunEnds)]) == 2
    assert trainer.calls + again.calls == ORDER


def _interrupted(trainer: FakeTrainer, at: int) -> dict[str, Any]:
    return {"status": "interrupted"} if len(trainer.calls) == at else {}


def test_a_diverged_run_is_a_result_and_gets_no_second_chance(tmp_path: Path) -> None:
    """PrecisionError ends one run, not the comparison; the same command does not try again."""
    trainer = FakeTrainer(diverges=lambda a: (a.arm, a.seed) == ("fp16", 1))

    record = run(tmp_path, trainer)
    again = FakeTrainer()
    second = run(tmp_path, again)

    fp16, bf16 = record.verdicts
    assert (fp16.verdict, bf16.verdict) == ("FAILED", "EQUIVALENT")
    assert record.arms[1].metrics["loss"][1] is None
    assert record.arms[1].diverged == (1,)
    assert record.arms[1].failures == ("seed 1: the loss is NaN",)
    assert again.calls == []
    assert second.verdicts == record.verdicts


def test_a_metric_that_is_not_a_number_is_a_failure(tmp_path: Path) -> None:
    """A run that ended, with a NaN metric, counts as diverged and names the metric."""

    def change(a: Assignment) -> dict[str, Any]:
        nan = Evaluation(step=10, precision="fp32", metrics={"loss": math.nan}, examples=1)
        return {"evaluations": (nan,)} if (a.arm, a.seed) == ("bf16", 2) else {}

    record = run(tmp_path, FakeTrainer(change=change))

    assert record.arms[2].diverged == (2,)
    assert record.arms[2].failures == ("seed 2: loss is not a number",)
    assert record.verdicts[1].verdict == "FAILED"


def test_a_mistake_in_the_recipe_is_not_a_precision_failure(tmp_path: Path) -> None:
    """Errors that are not about numbers stop the comparison, and the run is tried again."""

    def broken(assignment: Assignment, observe: Callable[[Any], None]) -> RunRecord:
        change = {"status": "failed", "failure": "boom", "failure_kind": "RecipeError"}
        try:
            return FakeTrainer(change=lambda _: change)(assignment, observe)
        except PrecisionError:
            raise RecipeError("boom") from None

    with pytest.raises(RecipeError):
        run(tmp_path, broken)
    again = FakeTrainer()
    run(tmp_path, again)

    assert again.calls[0] == ("fp32", 0)


def test_an_error_before_the_first_step_is_an_error(tmp_path: Path) -> None:
    """A PrecisionError without a run behind it (nothing to perturb) is not a diverged run."""

    def broken(assignment: Assignment, observe: Callable[[Any], None]) -> RunRecord:
        raise PrecisionError("nothing can be perturbed")

    with pytest.raises(PrecisionError, match="nothing can be perturbed"):
        run(tmp_path, broken)


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("initial_weights_hash", "initial fp32 weights"),
        ("data_order_hash", "order of samples"),
    ],
)
def test_arms_that_did_not_start_alike_are_an_error(tmp_path: Path, field: str, words: str) -> None:
    """A differing hash stops the comparison at that run, before any verdict."""
    trainer = FakeTrainer(change=lambda a: {field: "other"} if a.arm == "bf16" else {})

    with pytest.raises(ProtocolError, match=f"bf16 did not have the same {words}"):
        run(tmp_path, trainer)
    assert not (tmp_path / COMPARISON_FILE).exists()


def test_a_run_that_failed_early_may_have_seen_fewer_samples(tmp_path: Path) -> None:
    """The data order of a shorter run is another hash and no error."""
    trainer = FakeTrainer(
        diverges=lambda a: a.arm == "fp16",
        change=lambda a: (
            {"completed_steps": 4, "data_order_hash": "prefix"} if a.arm == "fp16" else {}
        ),
    )

    assert run(tmp_path, trainer).verdicts[0].verdict == "FAILED"


def test_a_replaced_run_is_noticed(tmp_path: Path) -> None:
    """A run directory that holds another seed than the protocol asks for is a ProtocolError."""
    run(tmp_path)
    home = RunDirectory(tmp_path / "arms" / "bf16" / "seed-1")
    home.write_record(replace(home.read_record(), seed=7))

    with pytest.raises(ProtocolError, match="seed is 7, 1 asked"):
        run(tmp_path)


def test_an_edited_protocol_stops_everything(tmp_path: Path) -> None:
    """Changing the margin in protocol.json after the runs is a ProtocolError."""
    run(tmp_path)
    path = tmp_path / PROTOCOL_FILE
    path.write_text(path.read_text().replace('"margin": 0.5', '"margin": 5.0'))

    with pytest.raises(ProtocolError, match="was edited"):
        run(tmp_path)


def test_another_margin_needs_another_directory(tmp_path: Path) -> None:
    """The runs of one margin are not judged by another one."""
    run(tmp_path)

    with pytest.raises(RunDirectoryError, match="margin"):
        run(tmp_path, spec=replace(SPEC, margin=5.0))


def test_a_directory_with_something_else_is_not_touched(tmp_path: Path) -> None:
    """Not even a lock is left beside files that are no comparison, nor is a file replaced."""
    (tmp_path / "thesis.tex").write_text("years of work")

    with pytest.raises(RunDirectoryError, match=r"thesis\.tex"):
        run(tmp_path)
    with pytest.raises(RunDirectoryError, match="is a file"):
        run(tmp_path / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_two_comparisons_never_write_in_one_directory(tmp_path: Path) -> None:
    """The directory is locked while a comparison runs; another process is refused.

    (The lock belongs to the process, so the holder is another Python.)
    """
    code = (
        "import sys, pathlib; from narrowcast.training.run_directory import RunDirectory\n"
        f"with RunDirectory(pathlib.Path({str(tmp_path)!r})).lock():\n"
        "    print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(RunDirectoryError, match="in use"):
            run(tmp_path)
    finally:
        holder.communicate("")


def test_the_control_proves_that_it_perturbed(tmp_path: Path) -> None:
    """Loss curves of the control differ from fp32's, and their spread is the noise floor."""
    control = run(tmp_path).control

    assert control is not None
    assert control.loss_changed == (True, True, True)
    assert control.perturbation == "a weight"
    assert control.differences == pytest.approx((1e-6,) * 3)
    assert control.sd_of_difference == pytest.approx(0, abs=1e-12)


def test_a_control_that_perturbed_nothing_is_said(tmp_path: Path) -> None:
    """Equal loss curves of fp32 and its control are a warning, and among what was not tested."""
    same = FakeTrainer(loss=lambda a: no_harm(replace(a, perturb=False)))

    record = run(tmp_path, same)

    assert record.control is not None
    assert record.control.loss_changed == (False, False, False)
    assert any("changed no training loss on 3 of 3 seeds" in w for w in record.warnings)
    assert any("changed no loss on 3 of 3 seeds" in u for u in record.untested)


def test_arms_equal_to_the_reference_bit_for_bit_are_known_as_such(tmp_path: Path) -> None:
    """Whole loss curves are compared, so identity is seen, and a mere tie of metrics is not."""
    trainer = FakeTrainer(loss=lambda a: 1.0 + a.seed + (0.1 * a.seed if a.arm == "bf16" else 0))

    record = run(tmp_path, trainer)

    assert record.arms[1].same_as_reference == (True, True, True)
    assert record.arms[2].same_as_reference == (True, False, False)
    assert record.verdicts[0].verdict == "EQUIVALENT"


def test_warnings_of_runs_are_said_once_each(tmp_path: Path) -> None:
    """A caution that every seed repeats stands once, with its arm; the caller's come first."""
    trainer = FakeTrainer(change=lambda a: {"warnings": ("slow",)} if a.arm == "bf16" else {})

    record = run(tmp_path, trainer, warnings=("fp32 was added",))

    assert record.warnings == ("fp32 was added", "bf16: slow")


def test_runs_of_different_machines_are_not_mixed_silently(tmp_path: Path) -> None:
    """A comparison that was finished elsewhere says so: its speeds are not comparable."""
    elsewhere = replace(ENVIRONMENT, device_name="laptop")
    trainer = FakeTrainer(change=lambda a: {"environment": elsewhere} if a.seed == 2 else {})

    record = run(tmp_path, trainer)

    assert any("different machines" in w and "laptop" in w for w in record.warnings)


def test_the_observer_hears_of_every_run(tmp_path: Path) -> None:
    """Beginnings with their number, the training's own events, ends with whether it was reused."""
    events: list[Any] = []
    run(tmp_path, observe=events.append)
    begins = [e for e in events if isinstance(e, RunBegins)]
    assert [(e.index, e.total) for e in begins] == [(i, 12) for i in range(1, 13)]
    assert len(events) == 12 * (1 + 10 + 1)
    events.clear()

    run(tmp_path, observe=events.append)

    assert all(e.reused for e in events if isinstance(e, RunEnds))
    assert len(events) == 24


def test_what_was_not_tested_follows_from_the_facts(tmp_path: Path) -> None:
    """Horizon, seeds, machine; on a CPU also that its speed says nothing about GPUs."""
    on_cpu = " ".join(run(tmp_path / "cpu").untested)
    gpu = replace(ENVIRONMENT, device="cuda:0", device_name="H100")
    on_gpu = " ".join(run(tmp_path / "gpu", environment=gpu).untested)
    one = " ".join(run(tmp_path / "one", spec=protocol(1, "bf16")).untested)

    assert "every run took 10 steps" in on_cpu
    assert "3 runs without one still allow a failure rate of 63%" in on_cpu
    assert "Speed on a GPU" in on_cpu
    assert "Speed on a GPU" not in on_gpu
    assert "H100" in on_gpu
    assert "with one seed no difference can be told from chance" in one


def test_seeds_that_do_not_vary_the_weights_are_not_said_to(tmp_path: Path) -> None:
    """A recipe that seeds torch itself starts all runs from the same weights."""
    same = FakeTrainer(change=lambda a: {"initial_weights_hash": f"weights {a.perturb}"})

    ours = " ".join(run(tmp_path / "same", same).untested)
    others = " ".join(run(tmp_path / "varied").untested)

    assert "all seeds started from the same ones" in ours
    assert "the seeds vary data order and dropout of one recipe" in ours
    assert "the seeds vary initial weights, data order and dropout" in others


def test_a_failure_of_the_recipe_is_not_called_divergence(tmp_path: Path) -> None:
    """What it raised at step 1 tells nothing of the numbers; the verdict says who raised."""

    def raises(a: Assignment) -> bool:
        return a.arm == "fp16"

    trainer = FakeTrainer(
        diverges=lambda a: raises(a) or (a.arm, a.seed) == ("bf16", 1),
        change=lambda a: {"failure_kind": "RecipeError"} if raises(a) else {},
    )

    record = run(tmp_path, trainer)

    fp16, bf16 = record.verdicts
    assert record.arms[1].raised == (0, 1, 2)
    assert fp16.verdict == bf16.verdict == "FAILED"
    assert fp16.why.startswith("3 of 3 runs ended because the recipe raised, 3 of them on seeds")
    assert bf16.why.startswith("1 of 3 runs diverged")
