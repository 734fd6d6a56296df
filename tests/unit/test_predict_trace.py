"""Tracing a step: what is answered, what is refused, and that nothing stays changed."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor

from narrowcast import rounding
from narrowcast.errors import RecipeError, UnknownName, UnsupportedPrecision, UsageError
from narrowcast.loss.cross_entropy import linear_cross_entropy
from narrowcast.plan import plan_named
from narrowcast.prediction.cpu_kernels import CpuKernels
from narrowcast.prediction.predict import predict_memory, predict_step_memory
from narrowcast.prediction.trace import Stage, trace_from_start, trace_steps
from narrowcast.profiling import Bench, first_batch, measure_recipe
from narrowcast.recipes.load import load_recipe

CPU = torch.device("cpu")

SOURCE = """
from dataclasses import dataclass
import torch
from torch import nn
import torch.nn.functional as F
from torch.utils.data import TensorDataset

@dataclass
class Options:
    width: int = 8

def model(options):
    return nn.Sequential(nn.Linear(8, options.width), nn.ReLU(), nn.Linear(options.width, 8))

def data(options):
    x = torch.randn(50, 8)
    return TensorDataset(x, x), TensorDataset(x, x)

def loss(model, batch):
    x, y = batch
    LOSS
    return F.mse_loss(model(x), y)

def metrics(model, batch):
    return {"error": loss(model, batch)}
"""


def recipe(tmp_path: Path, loss: str = "pass", source: str = SOURCE) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(source.replace("LOSS", loss))
    return path


def bench(stage: Stage, precision: str = "bf16") -> Bench:
    loaded = load_recipe("tabular", ["batch_size=4"])
    data, batch = first_batch(loaded, 4, 0)
    with stage:
        return Bench.of(
            loaded,
            plan_named(precision),
            CPU,
            data=data,
            batch=stage.fake(batch),
            stepping=stage.stepping,
        )


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_from_the_second_step_on_all_steps_are_alike(precision: str) -> None:
    """Two steps are enough; one has no optimizer state before its update."""
    ledgers = []
    for steps in (1, 2, 3):
        stage = Stage(CpuKernels())
        ledgers.append(trace_steps(bench(stage, precision), stage, steps=steps).record())

    assert ledgers[1] == ledgers[2]
    assert ledgers[0] != ledgers[1]


def test_a_whole_trace_begins_with_the_model_and_shows_the_last_step() -> None:
    """Its lines are those of the step, but for the seed of the loss that the engine keeps."""
    stage = Stage(CpuKernels())
    whole = trace_from_start(bench(stage), stage, steps=2)
    other = Stage(CpuKernels())
    last = trace_steps(bench(other), other).record()

    record = whole.ledger.record()
    events = whole.ledger.events()
    held = sum(change for _, change in events[: whole.entry])
    assert held == {line.category: line.bytes for line in record.lines}["parameters"]
    assert whole.entry < whole.last_step < len(events)
    seed = 4  # one fp32 number, which a ledger of the last step finds and does not count
    assert record.total_peak_bytes == last.total_peak_bytes + seed
    assert len(record.timeline) == len(last.timeline) - 1  # it was entered a step before


@pytest.mark.parametrize(
    ("line", "operation"),
    [
        ("assert x.sum().item() < 1e9", "aten._local_scalar_dense"),
        ("x = x if x.sum() > 0 else -x", "aten._local_scalar_dense"),
        ("x, y = x[x[:, 0] > 0], y[x[:, 0] > 0]", "aten.nonzero"),
    ],
)
def test_reading_values_in_the_recipe_is_refused_with_the_operation_and_the_line(
    tmp_path: Path, line: str, operation: str
) -> None:
    """What a prediction cannot know, it does not guess; measuring is offered."""
    path = recipe(tmp_path, line)

    with pytest.raises(RecipeError) as raised:
        predict_memory(path, "fp32")

    assert operation in raised.value.message
    assert line in raised.value.message
    assert f'mine.py", line {path.read_text().splitlines().index("    " + line) + 1}' in (
        raised.value.message
    )
    assert "narrowcast memory" in raised.value.hint


def test_a_mistake_of_the_recipe_is_told_as_a_run_tells_it(tmp_path: Path) -> None:
    """It is one with values too: nothing is said of tracing, and no advice given against item()."""
    with pytest.raises(RecipeError, match=r"^mine.py: loss\(model, batch\) raised Run") as raised:
        predict_memory(recipe(tmp_path, "x = x[:, :3]"), "fp32")

    assert "in loss" in raised.value.message
    assert "fail alike" in raised.value.hint
    assert "item()" not in raised.value.hint


def test_a_mistake_with_a_known_cure_keeps_its_hint(tmp_path: Path) -> None:
    """What oneDNN says of an LSTM in fp16, where the workspace is asked for with real tensors."""
    line = 'raise RuntimeError("could not create a primitive descriptor")'
    with pytest.raises(RecipeError) as raised:
        predict_memory(recipe(tmp_path, line), "fp32")

    assert "no kernel for this layer in this precision" in raised.value.hint


@pytest.mark.parametrize("line", ["x.detach().numpy()", "f'{x.sum():.3f}'", "memoryview(x)"])
def test_leaving_torch_with_a_tensor_is_for_want_of_values(tmp_path: Path, line: str) -> None:
    """With values it would work, so that measuring is the way out."""
    with pytest.raises(RecipeError, match=r"^mine cannot be traced: on tensors that ") as raised:
        predict_memory(recipe(tmp_path, line), "fp32")

    assert "item()" in raised.value.hint


def test_a_wrong_return_value_keeps_its_own_error(tmp_path: Path) -> None:
    """It has nothing to do with tracing."""
    with pytest.raises(RecipeError, match="returned a float"):
        predict_memory(recipe(tmp_path, "return 3.0"), "fp32")


def test_a_model_that_needs_values_to_be_built_is_built_for_real(tmp_path: Path) -> None:
    """The note says that this took memory; the ledger is the same."""
    real = SOURCE.replace(
        "return nn.Seq", "assert torch.linspace(0, 1, 3)[1].item() == 0.5\n    return nn.Seq"
    )
    plain = predict_memory(recipe(tmp_path), "bf16", break_even=False)

    record = predict_memory(recipe(tmp_path, source=real), "bf16", break_even=False)

    assert record.lines == plain.lines
    assert record.timeline == plain.timeline
    assert any("in real memory" in note for note in record.notes)
    assert not any("in real memory" in note for note in plain.notes)


def test_a_buffer_from_outside_torch_loses_its_contents_too(tmp_path: Path) -> None:
    """torch.from_numpy makes a real tensor under fake ones."""
    source = SOURCE.replace(
        "    return nn.Sequential(nn.Linear(8",
        "    import numpy\n    part = nn.Identity()\n"
        "    part.register_buffer('table', torch.from_numpy(numpy.zeros((3, 4))))\n"
        "    return nn.Sequential(part, nn.Linear(8",
    )

    path = recipe(tmp_path, source=source)

    record = predict_memory(path, "fp32")

    measured = measure_recipe(load_recipe(path), plan_named("fp32"), CPU)
    assert record.lines == measured.lines
    assert {line.category: line.bytes for line in record.lines}["buffers"] > 0


def test_values_are_answered_only_while_the_engine_steps() -> None:
    """A number that the stage makes up reaches no code of the user's."""
    stage = Stage()

    with stage:
        fake = torch.zeros(3).sum()
        with pytest.raises(DataDependentOutputException):
            fake.item()
        with stage.stepping:
            assert fake.item() == 0.5
            assert fake.long().item() == 1
            assert bool(fake > 0)
        with pytest.raises(DataDependentOutputException):
            fake.item()


def test_modules_of_fake_parameters_move_cast_and_copy_as_real_ones() -> None:
    """An optimizer keeps its parameters through a cast, and a copy has one storage a tensor."""
    with Stage():
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        model.to(torch.bfloat16)
        copied = copy.deepcopy(model)

        assert optimizer.param_groups[0]["params"][0] is model.weight
        assert model.weight.dtype is torch.bfloat16
        assert model.weight.untyped_storage().nbytes() == 12
        for parameter in copied.parameters():
            assert isinstance(parameter, nn.Parameter)
            assert parameter.is_leaf
            assert parameter.requires_grad
            own, seen = parameter.untyped_storage(), parameter.view(-1).untyped_storage()
            assert own._cdata == seen._cdata
        assert copied.weight.untyped_storage()._cdata != model.weight.untyped_storage()._cdata


def test_a_shared_parameter_is_shared_by_the_copy() -> None:
    """Two names of one tensor stay two names of one tensor."""
    with Stage():
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight

        copied = copy.deepcopy(model)

    assert copied[0].weight is copied[1].weight


def test_a_real_module_is_cast_as_ever_while_another_thread_is_on_a_stage() -> None:
    """What the stage changes for modules holds for fake parameters only, and ends with it."""
    real = nn.Linear(3, 2)
    before = nn.Module._apply

    with Stage():
        other = threading.Thread(target=real.to, args=(torch.float64,))
        other.start()
        other.join()

    assert not isinstance(real.weight, FakeTensor)
    assert real.weight.dtype is torch.float64
    assert nn.Module._apply is before
    assert "__deepcopy__" not in vars(FakeTensor)


def test_a_real_loss_makes_all_its_tiles_while_another_thread_is_on_a_stage() -> None:
    """What a trace leaves out of loops over tiles is left out on its own thread alone."""
    hidden, weight = torch.randn(64, 8), torch.randn(1000, 8)
    target = torch.arange(64)
    expected = F.cross_entropy(hidden @ weight.T, target)
    found: list[Tensor] = []

    def compute() -> None:
        found.append(linear_cross_entropy(hidden, weight, target, chunk_bytes=2**14))

    with Stage(CpuKernels()):
        other = threading.Thread(target=compute)
        other.start()
        other.join()

    torch.testing.assert_close(found[0], expected)


def test_what_a_plan_leaves_out_of_a_model_is_said() -> None:
    """An MLP has no repeated blocks to recompute and no head to chunk; measured and predicted."""
    loaded = load_recipe("tabular", ["batch_size=4"])

    predicted = predict_memory(loaded, "lean", break_even=False)

    measured = measure_recipe(loaded, plan_named("lean"), CPU, break_even=False)
    assert predicted.notes == measured.notes
    assert any(note.startswith("without checkpoint") for note in predicted.notes)
    assert any(note.startswith("loss: whole") for note in predicted.notes)


def test_the_noise_of_a_trace_is_not_found_by_a_training() -> None:
    """Stochastic rounding keeps a tile of noise for each device, and a fake one is no noise."""
    predict_memory("tabular", "bf16-split", batch_size=4)

    assert not isinstance(rounding.noise16(1, 0, 4, CPU), FakeTensor)


def test_a_failed_trace_leaves_torch_as_it_was(tmp_path: Path) -> None:
    """Modes, patches and the ledger's hooks are gone, and the next trace works."""
    before = nn.Module._apply

    with pytest.raises(RecipeError):
        predict_memory(recipe(tmp_path, "x.sum().item()"), "fp32")

    assert nn.Module._apply is before
    assert type(torch.zeros(1)) is Tensor
    assert predict_memory("tabular", "fp32").total_peak_bytes > 0


def test_predicting_leaves_the_random_state_alone() -> None:
    """A prediction before a training must not change the training."""
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)

    predict_memory("tabular", "bf16")

    assert torch.equal(torch.rand(4), expected)


def test_the_batch_size_is_the_recipes_option() -> None:
    """As --set batch_size does; where there is no such option, so many samples are taken."""
    asked = predict_memory("tabular", "fp32", batch_size=5)

    assert asked == predict_memory("tabular", "fp32", options=["batch_size=5"])
    assert asked.batch_size == asked.options["batch_size"] == 5


def test_a_recipe_without_a_batch_size_can_be_asked_for_one(tmp_path: Path) -> None:
    """More samples than there are would not be served in training either, and a note says so."""
    path = recipe(tmp_path)

    assert predict_memory(path, "fp32", batch_size=7).batch_size == 7
    most = predict_memory(path, "fp32", batch_size=70)
    assert most.batch_size == 50
    assert any("70 were asked for" in note for note in most.notes)


@pytest.mark.parametrize("size", [0, -1, 2.5, True, "8"])
def test_a_batch_size_that_makes_no_sense_is_refused(size: object) -> None:
    """It is a whole number, at least 1."""
    with pytest.raises(UsageError, match="batch size"):
        predict_memory("tabular", "fp32", batch_size=size)  # type: ignore[arg-type]


def test_names_that_do_not_exist_are_refused_with_the_nearest() -> None:
    """Device, precision, recipe, option."""
    for arguments, near in (
        ({"device": "h20"}, "h200"),
        ({"precision": "bf15"}, "bf16"),
        ({"recipe": "tabluar"}, "tabular"),
        ({"options": ["widht=3"]}, "width"),
    ):
        asked = {"recipe": "tabular", "precision": "fp32", **arguments}
        with pytest.raises(UnknownName) as raised:
            predict_memory(**asked)  # type: ignore[arg-type]
        assert near in raised.value.hint


def test_options_of_a_loaded_recipe_are_refused() -> None:
    """They would be ignored."""
    with pytest.raises(UsageError, match="loaded already"):
        predict_memory(load_recipe("tabular"), "fp32", options=["width=3"])


def test_a_precision_that_the_device_lacks_is_refused() -> None:
    """A CPU has no TF32."""
    with pytest.raises(UnsupportedPrecision):
        predict_memory("tabular", "tf32")


def square(model: nn.Module, batch: Tensor) -> Tensor:
    return F.mse_loss(model(batch), batch)


def test_a_plain_step_leaves_model_and_optimizer_as_they_are() -> None:
    """They are copied without contents: weights, state and gradients stay."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    weight = model.weight.detach().clone()

    record = predict_step_memory(model, optimizer, square, torch.zeros(3, 4), "bf16-true")

    assert record.recipe == "step"
    assert model.weight.dtype is torch.float32
    assert torch.equal(model.weight, weight)
    assert not optimizer.state
    assert optimizer.param_groups[0]["params"][0] is model.weight


def test_an_optimizer_of_another_model_is_refused() -> None:
    """A model that is yet to be made has no optimizer yet."""
    optimizer = torch.optim.SGD(nn.Linear(4, 4).parameters(), 0.1)

    with pytest.raises(UsageError, match="made by a function"):
        predict_step_memory(lambda: nn.Linear(4, 4), optimizer, square, torch.zeros(3, 4))


def test_what_a_plain_step_raises_is_told_with_its_line() -> None:
    """The function is the user's here too."""

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).sum() * float(batch.sum())

    with pytest.raises(RecipeError, match=r"aten\._local_scalar_dense") as raised:
        predict_step_memory(
            lambda: nn.Linear(4, 4),
            lambda m: torch.optim.SGD(m.parameters()),
            loss,
            torch.ones(2, 4),
        )

    assert "float(batch.sum())" in raised.value.message


def reading_model() -> nn.Module:
    model = nn.Linear(64, 64)
    assert torch.linspace(0, 1, 3)[1].item() == 0.5
    return model


def test_a_function_that_needs_values_to_make_a_model_is_called_for_real() -> None:
    """As models do that call ``trunc_normal_``; a note says so, and the ledger is the same."""

    def adamw(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters())

    batch = torch.zeros(4, 64)
    plain = predict_step_memory(lambda: nn.Linear(64, 64), adamw, square, batch)

    record = predict_step_memory(reading_model, adamw, square, batch)

    assert record.lines == plain.lines
    assert any("in real memory" in note for note in record.notes)
    assert not any("in real memory" in note for note in plain.notes)


def test_a_plain_step_says_which_function_raised() -> None:
    """The model's and the optimizer's are not the step's."""

    def broken() -> nn.Module:
        raise ValueError("no such width")

    def reading(model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=float(torch.ones(2).sum()))

    with pytest.raises(RecipeError, match=r"^building the model raised ValueError: no such"):
        predict_step_memory(broken, reading, square, torch.ones(2, 4))
    with pytest.raises(RecipeError, match=r"^step: making the optimizer cannot be traced: aten"):
        predict_step_memory(lambda: nn.Linear(4, 4), reading, square, torch.ones(2, 4))


def test_torch_does_not_log_what_becomes_our_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its traceback of thirty lines would come before the user's one."""
    with pytest.raises(RecipeError, match=r"mine.py: loss"):
        predict_memory(recipe(tmp_path, "x = x[:, :3]"), "fp32")

    assert not caplog.records
