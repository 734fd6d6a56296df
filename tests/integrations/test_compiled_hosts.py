"""torch.compile inside the hosts: compiled is compiled, watched all the same, or it is said."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
import torch.nn.functional as F
from torch import Tensor, fx, nn

from integrations.lightning_case import STEPS, Classifier, Fabric, X, Y, fitted, loader, trainer
from narrowcast.dropin.grad_scaler import GradScaler
from narrowcast.errors import UnsupportedPrecision
from narrowcast.integrations import accelerate as our_accelerate
from narrowcast.integrations.host_watch import HostWatch
from narrowcast.integrations.lightning import fabric_precision, trainer_precision
from small_training import small_model

accelerate = pytest.importorskip("accelerate")
pytestmark = [
    pytest.mark.slow,  # for what the hosts' import takes
    pytest.mark.filterwarnings("ignore", "error:policy .*"),  # of the hosts' own making
]


class Backend:
    """A compiler that runs graphs as they are, and counts."""

    def __init__(self) -> None:
        dynamo.reset()
        self.runs = 0

    def __deepcopy__(self, _: dict[int, Any]) -> Backend:
        """Stay the one that counts: Fabric copies what torch.compile was called with."""
        return self

    def __call__(self, graph: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.runs += 1
            return graph(*args)

        return run


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("precision", ["fp16", "bf16-split"])
def test_a_compiled_network_under_lightning_is_compiled_and_was_watched(
    precision: str, whole: bool
) -> None:
    """The first pass is looked at uncompiled, and all others run graphs."""
    backend, model = Backend(), Classifier()
    plugin = trainer_precision(precision, device="cpu")
    if whole:
        trainer(plugin).fit(torch.compile(model, backend=backend), loader())
    else:
        model.net = torch.compile(model.net, backend=backend)
        fitted(model, plugin)

    assert backend.runs == STEPS - 1
    assert set(plugin.host_plan.first_pass.executed["matmul"]) == {precision.partition("-")[0]}
    assert any("looked at uncompiled" in note for note in plugin.notes)


def trained_by_fabric(model: nn.Module, plugin: Any) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, plugins=[plugin])
    model, optimizer = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for inputs, targets in zip(X.split(8), Y.split(8), strict=True):
        fabric.backward(F.cross_entropy(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()


def test_a_compiled_part_under_fabric_is_compiled_and_was_watched() -> None:
    """As under the Trainer."""
    backend, model = Backend(), small_model()
    model[0] = torch.compile(model[0], backend=backend)
    plugin = fabric_precision("fp16", device="cpu")
    trained_by_fabric(model, plugin)

    assert backend.runs == STEPS - 1
    assert set(plugin.host_plan.first_pass.executed["matmul"]) == {"fp16"}


def test_a_model_that_is_compiled_as_a_whole_under_fabric_is_said_to_be_unseen() -> None:
    """Fabric compiles it again around our hooks: no label without a word."""
    backend = Backend()
    plugin = fabric_precision("fp16", device="cpu")

    with pytest.warns(UserWarning, match="what the first pass executed was not seen"):
        trained_by_fabric(torch.compile(small_model(), backend=backend), plugin)

    assert backend.runs == STEPS
    assert "compiled as a whole" in plugin.notes[0]


def test_an_accelerator_that_compiles_is_refused() -> None:
    """What its model executes and holds could not be seen: the way to a compiled one is named."""
    accelerate.state.AcceleratorState._reset_state(True)
    made = accelerate.Accelerator(cpu=True, mixed_precision="fp16", dynamo_backend="aot_eager")

    with pytest.raises(UnsupportedPrecision, match="compiles the whole model") as refused:
        our_accelerate.attach(made, "fp16")

    assert "narrowcast.Engine(..., compile=True)" in str(refused.value.hint)
    accelerate.state.AcceleratorState._reset_state(True)


def test_a_trainer_that_compiles_is_refused(tmp_path: Path) -> None:
    """TrainingArguments(torch_compile=True) is the same request."""
    from integrations.trainer_case import trainer as transformers_trainer
    from narrowcast.integrations import transformers as our_transformers

    made = transformers_trainer(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")

    with pytest.raises(UnsupportedPrecision, match="torch_compile"):
        our_transformers.attach(made, "fp32")


def test_a_watch_that_cannot_look_says_so() -> None:
    """Compiled modules call no hooks inside."""
    model = small_model()
    model[0] = torch.compile(model[0], backend=Backend())

    assert "not watched" in HostWatch(model, GradScaler("cpu"), 100).notes[0]
    assert HostWatch(model, GradScaler("cpu"), 0).notes == ()
    assert HostWatch(small_model(), GradScaler("cpu"), 100).notes == ()
