"""The watch over a run: it changes no bit, fills the record, and says where a run broke."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from narrowcast.cli.precision import adjusted
from narrowcast.errors import PrecisionError, UsageError
from narrowcast.plan import Plan, plan_named
from narrowcast.recipes.load import load_recipe
from narrowcast.records.codec import from_json, to_json
from narrowcast.records.run import RunRecord
from narrowcast.training import lookout
from narrowcast.training.events import Event, Notice
from narrowcast.training.run_directory import RunDirectory
from narrowcast.training.train import TrainOptions, train

SMALL = Path(__file__).parents[1] / "small_recipe.py"
FORWARD = "            x = x * (1 + self.seen / 1000)\n"


def run(
    directory: Path,
    precision: str = "fp32",
    *,
    recipe: Path = SMALL,
    overrides: tuple[str, ...] = (),
    options: TrainOptions | None = None,
    **named: Any,
) -> RunRecord:
    return train(
        load_recipe(recipe, overrides),
        plan_named(precision),
        options or TrainOptions(measure=False),
        directory,
        device=torch.device("cpu"),
        **named,
    )


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """Return a copy of the small recipe with a part replaced."""
    file = tmp_path / "changed.py"
    text = SMALL.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    return file


def losses(directory: Path) -> list[float]:
    return [p.loss for p in RunDirectory(directory).read_metrics() if p.kind == "step"]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "bf16-split", "lean"])
def test_a_watched_run_is_the_same_bit_for_bit(precision: str, tmp_path: Path) -> None:
    """Weights and losses of a run that is looked at each step, and of one that never is."""
    for every in (0, 1):
        run(tmp_path / str(every), precision, options=TrainOptions(measure=False, watch=every))

    plain, watched = (load_file(RunDirectory(tmp_path / n).weights_path) for n in "01")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert losses(tmp_path / "0") == losses(tmp_path / "1")


def test_the_record_holds_the_newest_values_that_were_looked_at(tmp_path: Path) -> None:
    """Each border, forward and then backward; read back from run.json as it was written."""
    record = run(tmp_path / "run", options=TrainOptions(measure=False, watch=3))

    assert record.watched_at == 10  # 4, 7, 10 of 12 steps
    assert [one.module for one in record.watched if one.phase == "forward"] == [
        *("layers.0", "layers.1", "layers.2", "layers.3", "layers", ""),
    ]
    assert {one.phase for one in record.watched} == {"forward", "backward"}
    first = record.watched[0]
    assert (first.dtype, first.numel, first.nonfinite) == ("fp32", 8 * 16, 0)
    assert 0 < first.amin <= first.rms <= first.amax
    assert from_json(RunRecord, to_json(record)) == record
    assert RunDirectory(tmp_path / "run").read_record() == record


def test_without_the_watch_nothing_is_recorded(tmp_path: Path) -> None:
    """0 turns it off; a negative number makes no sense."""
    record = run(tmp_path / "run", options=TrainOptions(measure=False, watch=0))

    assert (record.watched_at, record.watched) == (0, ())
    with pytest.raises(UsageError, match="watch is -1"):
        TrainOptions(watch=-1)


def test_measured_steps_are_not_sampled(tmp_path: Path) -> None:
    """What counting calls is in no count of executed operations, and in no ledger."""
    records = [
        run(tmp_path / str(every), "bf16", options=TrainOptions(watch=every)) for every in (0, 1)
    ]

    plain, watched = records
    assert plain.executed_dtypes == watched.executed_dtypes
    assert plain.memory is not None
    assert watched.memory is not None
    assert plain.memory.total_peak_bytes == watched.memory.total_peak_bytes
    assert watched.watched_at == 11  # the last step, the twelfth, is measured


def test_a_resumed_run_may_be_watched_otherwise(tmp_path: Path) -> None:
    """How often values are looked at is no part of what a run is, and changes no bit of it."""
    run(tmp_path / "whole", options=TrainOptions(measure=False, watch=0))
    run(tmp_path / "parts", options=TrainOptions(measure=False, watch=2), stop_at=5)
    run(tmp_path / "parts", options=TrainOptions(measure=False, watch=1), resume=True)

    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


def test_a_run_that_gives_up_says_where_and_what_to_do(tmp_path: Path) -> None:
    """The module whose output was the first that is not finite, and the command to run."""
    recipe = changed(tmp_path, FORWARD, f"{FORWARD}            x = x / (self.seen < 3)\n")
    with pytest.raises(PrecisionError, match="non-finite loss") as caught:
        run(
            tmp_path / "run",
            "bf16",
            recipe=recipe,
            overrides=("width=8",),
            options=TrainOptions(measure=False, seed=2),
        )

    hint = caught.value.hint
    assert "the output of module 'layers.0' is the first that is not finite" in hint
    command = f"narrowcast diagnose {recipe} --precision bf16 --steps 10 --seed 2 --set width=8"
    assert f"`{command}`" in hint
    assert RunDirectory(tmp_path / "run").read_record().failure_kind == "PrecisionError"


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (plan_named("lean"), ["--precision", "lean"]),
        (
            adjusted(plan_named("fp16"), rules="cuda", keep_fp32=["layers.0", "layers.1:linear"]),
            [
                "--precision",
                "fp16",
                "--keep-fp32",
                "layers.0",
                "--keep-fp32",
                "layers.1:linear",
                "--autocast-rules",
                "cuda",
            ],
        ),
        (replace(plan_named("fp16"), micro_batches=2), ["--policy", "FILE"]),
        (replace(plan_named("fp16"), name="mine"), ["--policy", "FILE"]),
    ],
    ids=["name", "adjusted", "changed", "own"],
)
def test_the_command_asks_for_the_same_precision(plan: Plan, words: list[str]) -> None:
    """By name and options where these say it all, and else by a file."""
    assert lookout._asking_for(plan) == words


def test_a_run_that_breaks_in_backward_says_so(tmp_path: Path) -> None:
    """A derivative that is infinite at any scale: the gradient of the module's output."""
    recipe = changed(
        tmp_path,
        "        return self.layers(x)\n",
        "        x = self.layers(x)\n        return x + (x - x).abs().sqrt()\n",
    )
    with pytest.raises(PrecisionError) as caught:
        run(tmp_path / "run", recipe=recipe)

    assert "the gradient of the output of module 'layers" in caught.value.hint


def test_a_run_that_breaks_unwatched_raises_the_engines_error_alone(tmp_path: Path) -> None:
    """Without the watch there is no batch to look at again."""
    recipe = changed(tmp_path, FORWARD, f"{FORWARD}            x = x / (self.seen < 3)\n")
    with pytest.raises(PrecisionError, match="non-finite loss") as caught:
        run(tmp_path / "run", recipe=recipe, options=TrainOptions(measure=False, watch=0))

    assert "narrowcast diagnose" not in caught.value.hint


def test_a_recipe_that_cannot_be_taken_again_does_not_hide_the_error(tmp_path: Path) -> None:
    """What the second look raises is said in the hint; the run still ends with its own error."""
    recipe = changed(
        tmp_path,
        FORWARD,
        f"{FORWARD}            x = x / (self.seen < 1)\n"
        "            self.calls = getattr(self, 'calls', 0) + 1\n"
        "            assert self.calls < 9\n",
    )
    with pytest.raises(PrecisionError, match="8 optimizer steps") as caught:
        run(tmp_path / "run", recipe=recipe)

    assert "could not be taken again" in caught.value.hint


@pytest.mark.parametrize(("precision", "told"), [("bf16", 1), ("fp32", 0)])
def test_a_loss_that_is_not_fp32s_is_told_once(precision: str, told: int, tmp_path: Path) -> None:
    """The run goes on, and the notice has both losses and the command that finds out why."""
    recipe = changed(
        tmp_path,
        "    return F.cross_entropy(model(x), y)\n",
        "    drowned = model(x).mul(0.0).add(0.3).add(1e5).sub(1e5)\n"
        "    return F.cross_entropy(model(x), y) + drowned.float().mean()\n",
    )
    events: list[Event] = []
    record = run(
        tmp_path / "run",
        precision,
        recipe=recipe,
        options=TrainOptions(measure=False, steps=12, watch=4, shadow=True),
        observe=events.append,
    )

    notices = [e.text for e in events if isinstance(e, Notice) and "in fp32:" in e.text]
    assert len(notices) == told
    assert all("narrowcast diagnose" in text and text in record.warnings for text in notices)


def test_a_shadow_without_a_watch_is_refused() -> None:
    """It is taken at the steps that the watch looks at."""
    with pytest.raises(UsageError, match="the watch is off"):
        TrainOptions(watch=0, shadow=True)


@pytest.mark.slow
def test_a_loss_above_its_beginning_is_told_once(tmp_path: Path) -> None:
    """The run goes on, with a notice that names the command."""
    recipe = changed(
        tmp_path,
        "    return F.cross_entropy(model(x), y)\n",
        "    late = model.seen > 40\n"
        "    return F.cross_entropy(model(x), y) * (1 - model.seen / 100) + 9.0 * late\n",
    )
    events: list[Event] = []
    record = run(
        tmp_path / "run",
        recipe=recipe,
        options=TrainOptions(measure=False, steps=70),
        observe=events.append,
    )

    notices = [e.text for e in events if isinstance(e, Notice) and "all above the first" in e.text]
    assert len(notices) == 1
    assert "narrowcast diagnose" in notices[0]
    assert notices[0] in record.warnings
