"""The training loop: what it leaves behind, how it ends, and that a resumed run is the same run."""

from __future__ import annotations

import os
import random
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from narrowcast.errors import (
    CheckpointError,
    DataError,
    PrecisionError,
    RecipeError,
    RunDirectoryError,
    UsageError,
)
from narrowcast.plan import Plan, plan_named
from narrowcast.precision.speed import thread_count
from narrowcast.recipes.load import Recipe, load_recipe
from narrowcast.records.run import Evaluation, RunRecord, StepPoint
from narrowcast.training import checkpoint
from narrowcast.training.events import Ended, Event, Notice, Saved, Started
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.state_tree import leaves
from narrowcast.training.train import TrainOptions, train

SMALL = Path(__file__).parents[1] / "small_recipe.py"
PRECISIONS = ["fp32", "fp16", "bf16", "bf16-true", "bf16-split", "lean"]
CPU = torch.device("cpu")
# What the device does badly is measured by other tests; here it would only cost time.
PLAIN = TrainOptions(measure=False)


def small(*overrides: str) -> Recipe:
    return load_recipe(SMALL, overrides)


def policy(name: str) -> Plan:
    return plan_named(name)


def run(
    directory: Path, precision: str = "fp32", *, recipe: Recipe | None = None, **named: Any
) -> RunRecord:
    options = named.pop("options", PLAIN)
    return train(recipe or small(), policy(precision), options, directory, device=CPU, **named)


def untimed(directory: Path) -> list[StepPoint | Evaluation]:
    """The points of a run without their durations."""
    return [
        replace(p, seconds=0.0) if isinstance(p, StepPoint) else p
        for p in RunDirectory(directory).read_metrics()
    ]


def timeless(record: RunRecord) -> RunRecord:
    """A record without what two equal runs may differ in."""
    return replace(
        record,
        started="",
        finished="",
        resumed_at=(),
        step_seconds=None,
        samples_per_second=None,
        warnings=(),
        status="finished",
    )


def final_state(directory: Path) -> dict[str, Any]:
    state = checkpoint.load_latest(directory / "checkpoints")
    del state["record"], state["metrics_bytes"]
    return leaves(state)


def assert_same_run(a: Path, b: Path) -> None:
    """Weights, all other state, metrics and record are equal bit for bit, but for times."""
    assert (a / "weights.safetensors").read_bytes() == (b / "weights.safetensors").read_bytes()
    left, right = final_state(a), final_state(b)
    assert list(left) == list(right)
    for name, value in left.items():
        if isinstance(value, (torch.Tensor, np.ndarray)):
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(right[name])), name
        else:
            assert value == right[name], name
    assert untimed(a) == untimed(b)
    assert timeless(RunDirectory(a).read_record()) == timeless(RunDirectory(b).read_record())


def test_a_run_leaves_everything_that_was_promised(tmp_path: Path) -> None:
    """Record, metrics line by line, checkpoints, weights; and the record says what ran."""
    record = run(tmp_path / "run", "bf16", options=TrainOptions(evaluate_every=6))
    place = RunDirectory(tmp_path / "run")
    points = place.read_metrics()

    assert place.read_record() == record
    assert (record.status, record.completed_steps, record.applied_steps) == ("finished", 12, 12)
    assert [p.step for p in points if isinstance(p, StepPoint)] == list(range(1, 13))
    assert [(e.step, e.precision) for e in record.evaluations] == [
        (6, "fp32"), (6, "bf16"), (12, "fp32"), (12, "bf16"),
    ]  # fmt: skip
    assert record.evaluations == tuple(p for p in points if isinstance(p, Evaluation))
    assert list(record.evaluations[0].metrics) == ["accuracy", "loss"]
    assert record.evaluations[0].examples == 8
    assert "bf16" in record.executed_dtypes["matmul"]
    assert record.precision_honoured is True
    assert record.memory is not None
    assert record.peak_bytes == record.memory.total_peak_bytes > 0
    assert record.final_loss == [p.loss for p in points if isinstance(p, StepPoint)][-1]
    assert len(record.data_order_hash) == len(record.initial_weights_hash) == 64
    assert record.step_seconds is not None
    assert record.step_seconds > 0
    assert set(checkpoint.load_weights(place.weights_path)) == set(
        small().build_model().state_dict()
    )
    assert len(checkpoint.checkpoints_in(place.checkpoints)) == 2


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "stop_at", [0, 5, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 11))]
)
def test_a_resumed_run_is_the_run_that_was_never_stopped(
    tmp_path: Path, precision: str, stop_at: int
) -> None:
    """In every precision, in the middle of an epoch (4 batches) and of an evaluation interval."""
    options = replace(PLAIN, evaluate_every=4, clip_norm=1.0)
    run(tmp_path / "whole", precision, options=options)

    stopped = run(tmp_path / "parts", precision, options=options, stop_at=stop_at)
    random.seed(99)
    np.random.seed(99)  # noqa: NPY002 -- the global state is what is tested
    torch.manual_seed(99)
    resumed = run(tmp_path / "parts", precision, options=options, resume=True)

    assert (stopped.status, stopped.completed_steps) == ("interrupted", stop_at)
    assert resumed.resumed_at == (stop_at,)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_accumulation_is_resumed_exactly(tmp_path: Path) -> None:
    """Three micro-batches a step: the position is counted in micro-batches, the save in steps."""
    options = replace(PLAIN, accumulate=3, steps=6)
    run(tmp_path / "whole", "fp16", options=options)

    run(tmp_path / "parts", "fp16", options=options, stop_at=2)
    run(tmp_path / "parts", "fp16", options=options, resume=True)

    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_many_interruptions_are_no_different_from_one(tmp_path: Path) -> None:
    """Stopped after every single step."""
    run(tmp_path / "whole", "fp16")

    run(tmp_path / "parts", "fp16", stop_at=0)
    for step in range(1, 12):
        run(tmp_path / "parts", "fp16", resume=True, stop_at=step)
    record = run(tmp_path / "parts", "fp16", resume=True)

    assert record.resumed_at == tuple(range(12))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_measuring_evaluating_and_saving_change_no_bit(tmp_path: Path) -> None:
    """What only observes does not shift the training, even though metrics could draw numbers."""
    much = TrainOptions(evaluate_every=1, checkpoint_every=1, measure=True)
    little = TrainOptions(checkpoint_every=100, measure=False)

    run(tmp_path / "much", "fp16", options=much)
    run(tmp_path / "little", "fp16", options=little)

    weights = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("much", "little")]
    steps = [[p for p in untimed(tmp_path / n) if p.kind == "step"] for n in ("much", "little")]
    assert weights[0] == weights[1]
    assert steps[0] == steps[1]


def test_a_run_resumed_with_more_threads_keeps_its_own_number(tmp_path: Path) -> None:
    """Sums over threads round by their number, so the checkpoint's number counts."""
    seen: list[int] = []

    def listen(event: Event) -> None:
        seen.append(torch.get_num_threads())

    with thread_count(1):
        run(tmp_path / "run", stop_at=6)
    with thread_count(2):
        run(tmp_path / "run", resume=True, observe=listen)
        after = torch.get_num_threads()

    assert set(seen) == {1}
    assert after == 2


@pytest.mark.slow
def test_precisions_of_one_seed_start_from_the_same_weights_and_see_the_same_data(
    tmp_path: Path,
) -> None:
    """The hashes prove it; another seed has others."""
    records = [run(tmp_path / p, p) for p in PRECISIONS]
    other = run(tmp_path / "other", options=replace(PLAIN, seed=1))

    assert len({r.initial_weights_hash for r in records}) == 1
    assert len({r.data_order_hash for r in records}) == 1
    assert other.initial_weights_hash != records[0].initial_weights_hash
    assert other.data_order_hash != records[0].data_order_hash


def test_a_perturbed_run_starts_one_ulp_away_and_says_where(tmp_path: Path) -> None:
    """Another initial hash, the same data, another curve."""
    reference = run(tmp_path / "a")
    control = run(tmp_path / "b", options=replace(PLAIN, perturb=True))

    assert "in the last place" in control.perturbation
    assert control.initial_weights_hash != reference.initial_weights_hash
    assert control.data_order_hash == reference.data_order_hash
    assert untimed(tmp_path / "a") != untimed(tmp_path / "b")


def test_the_callers_random_states_and_settings_are_given_back(tmp_path: Path) -> None:
    """A notebook that trains draws the same numbers afterwards as one that does not."""
    torch.manual_seed(7)
    random.seed(7)
    expected = (torch.rand(()), random.random())
    torch.manual_seed(7)
    random.seed(7)

    run(tmp_path / "run")

    assert (torch.rand(()), random.random()) == expected
    assert not torch.are_deterministic_algorithms_enabled()


def test_events_tell_the_run_in_order(tmp_path: Path) -> None:
    """Start, first checkpoint, steps, evaluation, last checkpoint, end; each as it happens."""
    events: list[Event] = []

    run(
        tmp_path / "run", options=replace(PLAIN, steps=2, checkpoint_every=2), observe=events.append
    )

    assert [type(e) for e in events] == [
        Started, Saved, StepPoint, StepPoint, Evaluation, Saved, Ended,
    ]  # fmt: skip


def test_a_run_can_be_followed_while_it_runs(tmp_path: Path) -> None:
    """Each point is in the file before the observer hears of it, and run.json says running."""
    place = RunDirectory(tmp_path / "run")
    seen: list[tuple[int, str]] = []

    def follow(event: Event) -> None:
        if isinstance(event, StepPoint):
            seen.append((len(place.read_metrics()), place.read_record().status))

    run(place.path, options=replace(PLAIN, steps=3), observe=follow)

    assert seen == [(1, "running"), (2, "running"), (3, "running")]


def test_another_run_is_never_overwritten(tmp_path: Path) -> None:
    """The same command twice: the second is refused and every file is as it was."""
    run(tmp_path / "run")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    with pytest.raises(RunDirectoryError, match="holds another run: small_recipe in fp32, seed 0"):
        run(tmp_path / "run", "bf16")

    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("precision", "overrides", "options", "named"),
    [
        ("fp16", (), PLAIN, "policy.compute: 'bf16' there, 'fp16' here"),
        ("bf16", ("width=8",), PLAIN, "options.width: 16 there, 8 here"),
        ("bf16", (), replace(PLAIN, steps=24), "steps: 12 there, 24 here"),
        ("bf16", (), replace(PLAIN, seed=1), "seed: 0 there, 1 here"),
        ("bf16", (), replace(PLAIN, clip_norm=1.0), "clip_norm: None there, 1.0 here"),
    ],
    ids=["precision", "option", "steps", "seed", "clip"],
)
def test_a_run_is_not_continued_as_another(
    tmp_path: Path, precision: str, overrides: tuple[str, ...], options: TrainOptions, named: str
) -> None:
    """The error names each difference with both values; the run is untouched."""
    run(tmp_path / "run", "bf16", stop_at=6)
    before = (tmp_path / "run/metrics.jsonl").read_bytes()

    with pytest.raises(CheckpointError, match=named):
        run(tmp_path / "run", precision, recipe=small(*overrides), options=options, resume=True)

    assert (tmp_path / "run/metrics.jsonl").read_bytes() == before


def test_an_edited_recipe_is_another_recipe(tmp_path: Path) -> None:
    """Even if name and options are the same, the source decides."""
    file = tmp_path / "mine.py"
    file.write_text(SMALL.read_text())
    run(tmp_path / "run", recipe=load_recipe(file), stop_at=6)
    file.write_text(SMALL.read_text().replace("Dropout(0.2)", "Dropout(0.1)"))

    with pytest.raises(CheckpointError, match="recipe source"):
        run(tmp_path / "run", recipe=load_recipe(file), resume=True)


def test_a_version_of_torch_is_part_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another version may round differently, so that the run could not go on exactly."""
    run(tmp_path / "run", stop_at=6)
    monkeypatch.setattr(torch, "__version__", "9.9.9")

    with pytest.raises(CheckpointError, match=r"versions\.torch: .* there, '9\.9\.9' here"):
        run(tmp_path / "run", resume=True)


def test_resuming_nothing_begins_and_says_so(tmp_path: Path) -> None:
    """A job that restarts itself with --resume also starts itself; the record keeps the notice."""
    record = run(tmp_path / "run", resume=True)

    assert record.status == "finished"
    assert record.resumed_at == ()
    assert "nothing to resume" in record.warnings[0]


def test_resuming_a_finished_run_changes_nothing_that_counts(tmp_path: Path) -> None:
    """No step is taken twice, and its weights are as they were."""
    run(tmp_path / "run")
    weights = (tmp_path / "run/weights.safetensors").read_bytes()
    points = untimed(tmp_path / "run")

    record = run(tmp_path / "run", resume=True)

    assert (record.status, record.completed_steps) == ("finished", 12)
    assert (tmp_path / "run/weights.safetensors").read_bytes() == weights
    assert untimed(tmp_path / "run") == points


def test_a_run_without_its_checkpoints_cannot_be_resumed(tmp_path: Path) -> None:
    """It is not begun again over what is left of it."""
    run(tmp_path / "run", stop_at=6)
    for path in checkpoint.checkpoints_in(tmp_path / "run/checkpoints"):
        path.unlink()

    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        run(tmp_path / "run", resume=True)


def test_lost_metrics_are_found_on_resume(tmp_path: Path) -> None:
    """metrics.jsonl cut below what the checkpoint knows of."""
    run(tmp_path / "run", stop_at=6)
    (tmp_path / "run/metrics.jsonl").write_text("")

    with pytest.raises(CheckpointError, match="has 0 bytes, and the checkpoint was written at"):
        run(tmp_path / "run", resume=True)


def test_a_change_of_machine_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another processor may round differently: the run goes on, and its record says so."""
    run(tmp_path / "run", stop_at=6)
    monkeypatch.setattr("narrowcast.precision.device._cpu_name", lambda: "Another CPU")

    record = run(tmp_path / "run", resume=True)

    assert "and is 'Another CPU' from step 6 on" in record.warnings[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """After the step that is under way: checkpoint, status, and an exact continuation."""
    run(tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if isinstance(event, StepPoint) and event.step == 5:
            os.kill(os.getpid(), number)

    handler = signal.getsignal(number)
    record = run(tmp_path / "parts", observe=interrupt)
    run(tmp_path / "parts", resume=True)

    assert (record.status, record.completed_steps) == ("interrupted", 5)
    assert signal.getsignal(number) is handler
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_second_signal_ends_a_run_at_once(tmp_path: Path) -> None:
    """Ctrl-C twice is a KeyboardInterrupt; the last checkpoint still serves."""
    run(tmp_path / "whole")

    def interrupt(event: Event) -> None:
        if isinstance(event, StepPoint) and event.step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", observe=interrupt)
    status = RunDirectory(tmp_path / "parts").read_record().status
    run(tmp_path / "parts", resume=True)

    assert status == "interrupted"
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_an_interrupted_evaluation_is_made_up_for(tmp_path: Path) -> None:
    """A signal between two of its batches: it is dropped whole, and made whole on resume."""
    file = tmp_path / "evaluated.py"
    text = SMALL.read_text().replace("samples[-options.batch_size :]", "samples[-24:]")
    file.write_text(
        text.replace("    x, y = batch\n    return {", "    meet()\n    x, y = batch\n    return {")
    )
    calm, hasty = load_recipe(file), load_recipe(file)
    calm.module.meet = lambda: None
    hasty.module.meet = lambda: os.kill(os.getpid(), signal.SIGINT)
    run(tmp_path / "whole", recipe=calm)

    stopped = run(tmp_path / "parts", recipe=hasty)
    run(tmp_path / "parts", recipe=calm, resume=True)

    assert (stopped.status, stopped.completed_steps) == ("interrupted", 12)
    assert stopped.evaluations == ()
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_training_works_outside_the_main_thread(tmp_path: Path) -> None:
    """Where Python delivers no signals, the run goes without them."""
    done: list[RunRecord] = []
    thread = threading.Thread(target=lambda: done.append(run(tmp_path / "run")))

    thread.start()
    thread.join()

    assert done[0].status == "finished"


def broken(tmp_path: Path, old: str, new: str) -> Recipe:
    file = tmp_path / "broken.py"
    text = SMALL.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return load_recipe(file)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_loss_that_is_nan_from_the_start_is_one_clear_error(
    tmp_path: Path, precision: str
) -> None:
    """The run fails with the reason in run.json, and its weights are still the first ones."""
    recipe = broken(tmp_path, "F.cross_entropy(model(x), y)", "F.cross_entropy(model(x), y) * nan")
    recipe.module.nan = float("nan")

    with pytest.raises(PrecisionError, match="non-finite loss"):
        run(tmp_path / "run", precision, recipe=recipe)
    record = RunDirectory(tmp_path / "run").read_record()

    assert record.status == "failed"
    assert "non-finite loss" in record.failure
    assert record.applied_steps == 0
    assert not (tmp_path / "run/weights.safetensors").exists()


def test_a_run_that_applied_no_step_failed(tmp_path: Path) -> None:
    """Too short for the engine to give up, and still no training."""
    recipe = broken(tmp_path, "F.cross_entropy(model(x), y)", "F.cross_entropy(model(x), y) * nan")
    recipe.module.nan = float("nan")

    with pytest.raises(PrecisionError, match="none of the 2 steps was applied"):
        run(tmp_path / "run", recipe=recipe, options=replace(PLAIN, steps=2))

    assert RunDirectory(tmp_path / "run").read_record().status == "failed"


def test_a_recipe_that_raises_fails_with_its_own_traceback(tmp_path: Path) -> None:
    """In the middle of the run; the record keeps the reason and the checkpoints stay."""
    recipe = broken(
        tmp_path, "    x, y = batch\n    return F.cross", "    x, y = bitch\n    return F.cross"
    )

    with pytest.raises(RecipeError, match="name 'bitch' is not defined"):
        run(tmp_path / "run", recipe=recipe)
    record = RunDirectory(tmp_path / "run").read_record()

    assert (record.status, record.completed_steps) == ("failed", 0)
    assert "bitch" in record.failure


def test_empty_data_are_an_error_and_leave_no_run(tmp_path: Path) -> None:
    """The directory can be used at once for the next attempt."""
    recipe = broken(tmp_path, "return samples[: -options.batch_size]", "return samples[:0]")

    with pytest.raises(DataError, match="training data are empty"):
        run(tmp_path / "run", recipe=recipe)
    record = run(tmp_path / "run")

    assert record.status == "finished"


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": -3},
        {"accumulate": 0},
        {"evaluate_every": 0},
        {"checkpoint_every": 0},
        {"clip_norm": 0.0},
        {"clip_norm": float("nan")},
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    """Zero steps are no training; the error names option and value."""
    (name, value), = wrong.items()  # fmt: skip

    with pytest.raises(UsageError, match=f"{name} is {value}"):
        TrainOptions(**wrong)


def test_a_full_disk_ends_the_run_and_leaves_it_resumable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error says so, and after space was freed the run goes on exactly."""
    run(tmp_path / "whole")
    save_file, saves = checkpoint.save_file, 0

    def fills_up(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 4:
            raise OSError(28, "No space left on device")
        save_file(*arguments)

    monkeypatch.setattr(checkpoint, "save_file", fills_up)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        run(tmp_path / "parts")
    failed = RunDirectory(tmp_path / "parts").read_record()
    monkeypatch.undo()
    run(tmp_path / "parts", resume=True)

    assert failed.status == "failed"
    assert "No space left" in failed.failure
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_precision_that_was_not_carried_out_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says so, and so does a notice while it runs."""
    recipe = broken(
        tmp_path,
        "    return F.cross_entropy(model(x), y)",
        "    with torch.autocast('cpu', enabled=False):\n"
        "        return F.cross_entropy(model(x), y)",
    )
    notices: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    record = run(tmp_path / "run", "bf16", recipe=recipe, options=TrainOptions(), observe=listen)

    assert record.precision_honoured is False
    assert any("precision bf16 was not carried out" in text for text in notices)
    assert any("precision bf16 was not carried out" in text for text in record.warnings)


def test_an_operation_without_a_deterministic_kernel_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way out; and with deterministic=False it trains."""
    recipe = broken(
        tmp_path,
        "    return F.cross_entropy(model(x), y)",
        "    torch.utils.deterministic  # as torch's own refusal reads\n"
        "    if torch.are_deterministic_algorithms_enabled():\n"
        "        raise RuntimeError('foo_cuda does not have a deterministic implementation, but')\n"
        "    return F.cross_entropy(model(x), y)",
    )

    with pytest.raises(RecipeError, match="foo_cuda") as caught:
        run(tmp_path / "a", recipe=recipe)
    record = run(tmp_path / "b", recipe=recipe, options=replace(PLAIN, deterministic=False))

    assert "--no-deterministic" in caught.value.hint
    assert record.status == "finished"


def test_a_state_that_cannot_be_stored_is_refused_before_the_first_step(tmp_path: Path) -> None:
    """Not after hours of training, when the first checkpoint falls due."""
    recipe = broken(
        tmp_path,
        "    return torch.optim.AdamW(model.parameters(), lr=options.lr)",
        "    made = torch.optim.AdamW(model.parameters(), lr=options.lr)\n"
        "    made.param_groups[0]['note'] = object()\n    return made",
    )

    with pytest.raises(CheckpointError, match=r"builtins\.object at 'engine"):
        run(tmp_path / "run", recipe=recipe)

    assert RunDirectory(tmp_path / "run").read_metrics() == ()
