"""Facts about the policy fp8: what it converts, what it leaves alone, and what it says."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.compiling import compiled_call
from narrowcast.engine.engine import Engine
from narrowcast.engine.levers import apply_levers
from narrowcast.engine.stores import planned_optimizer
from narrowcast.errors import UnknownName, UnsupportedPrecision, UsageError
from narrowcast.plan import PLANS, Plan, plan_named
from narrowcast.policy import POLICIES, Policy
from narrowcast.precision import device as devices
from narrowcast.precision import float8
from narrowcast.precision.cast import forward_context, full_precision
from narrowcast.precision.device import cuda_capabilities, require, resolve_plan
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.precision.float8 import convert_linears, restore_linears, what_it_saves
from narrowcast.precision.speed import matmul_seconds
from narrowcast.records.codec import from_json, to_json

CPU = torch.device("cpu")
EMULATED = POLICIES["fp8-emulated"]


class Net(nn.Module):
    """Layers of every kind that there is something to say of."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.odd = nn.Linear(32, 24)
        self.back = nn.Linear(24, 32)
        self.attention = nn.MultiheadAttention(32, 2, batch_first=True)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        x = self.back(self.odd(x))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x)


def classes(model: nn.Module) -> dict[str, str]:
    return {n: type(m).__name__ for n, m in model.named_modules() if isinstance(m, nn.Linear)}


def engine(model: nn.Module, plan: Plan) -> Engine:
    optimizer = planned_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), model, plan)
    return Engine(model, optimizer, plan)


def step(trained: Engine, x: Tensor) -> tuple[Tensor, ExecutedDtypes]:
    with ExecutedDtypes() as executed:
        with trained.forward():
            loss = trained.model(x).float().square().mean()
        trained.backward(loss)
    trained.step()
    return loss.detach(), executed


def test_layers_of_fitting_sizes_are_converted_and_all_others_are_named() -> None:
    """The head, sizes that fp8 products do not come in, and layers that are never called."""
    model = Net()
    notes = apply_levers(model, PLANS["fp8-emulated"]).notes

    assert [n for n, c in classes(model).items() if c == "_EmulatedFp8Linear"] == [
        "blocks.0",
        "blocks.1",
        "blocks.2",
    ]
    assert notes[0] == "fp8-emulated: the products of 3 linear layers, blocks.{0-2}"
    assert notes[1] == (
        "left in bf16: odd, back (not both sizes are multiples of 16); "
        "attention.out_proj (a NonDynamicallyQuantizableLinear); head (the head)"
    )


def test_names_of_numbered_layers_are_written_as_one() -> None:
    """A model of many layers does not fill the screen."""
    names = ["embed", *(f"blocks.{i}.up" for i in (0, 1, 2, 4)), "blocks.0.down", "3", "h.0.1"]

    assert float8._listed(names) == "embed, blocks.{0-2,4}.up, blocks.0.down, 3, h.0.1"


def test_names_parameters_hooks_and_state_stay() -> None:
    """No module is replaced: what others hold of the model, they still hold."""
    model = Net()
    modules, parameters = list(model.modules()), list(model.parameters())
    keys, called = list(model.state_dict()), []
    model.blocks[0].register_forward_hook(lambda *_: called.append(1))
    convert_linears(model, EMULATED)
    with forward_context(EMULATED, "cpu"):
        model(torch.randn(1, 4, 32))

    assert list(model.modules()) == modules
    assert list(map(id, model.parameters())) == list(map(id, parameters))
    assert list(model.state_dict()) == keys
    assert called == [1]


@pytest.mark.parametrize("name", ["fp8-emulated", "fp8"])
def test_another_precision_takes_it_back(name: str) -> None:
    """The same model under another plan computes in that plan's precision, and holds no trace."""
    if name == "fp8":
        pytest.importorskip("torchao")
    model, plain = Net(), Net()
    convert_linears(model, POLICIES[name])
    apply_levers(model, PLANS["bf16"])

    assert classes(model) == classes(plain)
    assert [vars(m).keys() for m in model.modules()] == [vars(m).keys() for m in plain.modules()]


@pytest.mark.parametrize("name", ["fp8-emulated", "fp8"])
def test_a_copy_computes_as_the_original_with_weights_of_its_own(name: str) -> None:
    """An EMA is a deep copy."""
    if name == "fp8":
        pytest.importorskip("torchao")
    layer, x = nn.Linear(32, 32), torch.randn(16, 32)
    convert_linears(layer, POLICIES[name])
    other = copy.deepcopy(layer)
    with forward_context(EMULATED, "cpu"):
        same = torch.equal(layer(x), other(x))
        nn.init.zeros_(other.weight)
        differs = not torch.equal(layer(x), other(x))

    assert same
    assert differs


def test_outside_autocast_and_in_full_precision_a_layer_is_an_ordinary_one() -> None:
    """fp8 stands for products in bf16, and for no others."""
    layer, x = nn.Linear(32, 32), torch.randn(16, 32)
    expected = layer(x)
    convert_linears(layer, EMULATED)
    with forward_context(EMULATED, "cpu"), full_precision(layer):
        inside = layer(x)

    assert torch.equal(layer(x), expected)
    assert torch.equal(inside, expected)


def test_an_empty_batch_has_an_empty_result() -> None:
    """There is no magnitude to scale by, and nothing to multiply."""
    layer = nn.Linear(32, 48)
    convert_linears(layer, EMULATED)
    with forward_context(EMULATED, "cpu"):
        output = layer(torch.empty(0, 32))

    assert output.shape == (0, 48)
    assert output.dtype == torch.bfloat16


def test_a_layer_that_is_kept_in_fp32_stays_so() -> None:
    """An island is left out, named, and multiplies in fp32."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    plan = PLANS["fp8-emulated"].with_policy(EMULATED.keeping_fp32("1"))
    trained = engine(model, plan)
    _, executed = step(trained, torch.randn(16, 32))
    is_honoured, notes = honoured(trained.policy, executed.counts)

    assert "left in bf16: 1 (kept in fp32)" in trained.levers.notes
    assert executed.counts["matmul"] == {"fp32": 3, "fp8-emulated": 2}
    assert is_honoured
    assert notes == (
        "2 of 5 matmul calls executed in fp8-emulated",
        "3 calls executed in fp32, in modules that are kept so: 1",
    )


def test_a_model_without_such_layers_is_refused() -> None:
    """A run in fp8 of which nothing is fp8 would be one in bf16 under a wrong name."""
    with pytest.raises(UsageError, match=r"no linear layer.*0 \(not both sizes") as error:
        engine(nn.Sequential(nn.Linear(10, 10)), PLANS["fp8-emulated"])

    assert "bf16" in error.value.hint


@pytest.mark.parametrize("plan", ["fp8-emulated", "fp8-split-emulated"])
def test_what_executed_is_said_to_be_emulated(plan: str) -> None:
    """Three products a layer, but for the input gradient of the first; 8 outputs stay bf16."""
    model = nn.ModuleDict(
        {"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "head": nn.Linear(32, 8)}
    )
    trained = engine(nn.Sequential(*model.values()), plan_named(plan))
    _, executed = step(trained, torch.randn(16, 32))
    is_honoured, notes = honoured(trained.policy, executed.counts)

    assert executed.counts["matmul"] == {"bf16": 3, "fp8-emulated": 5}
    assert is_honoured
    assert notes == ("5 of 8 matmul calls executed in fp8-emulated",)


@pytest.mark.parametrize(("emulate", "label"), [(True, "fp8-emulated"), (False, "fp8")])
def test_products_inside_torchaos_tensors_are_counted(emulate: bool, label: str) -> None:
    """They look like bf16 from above: the tensor says what is multiplied below."""
    pytest.importorskip("torchao")
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layer = convert_to_float8_training(
        nn.Linear(32, 32), config=Float8LinearConfig(emulate=emulate)
    )
    x = torch.randn(16, 32, dtype=torch.bfloat16, requires_grad=True)
    with ExecutedDtypes() as executed:
        layer(x).sum().backward()

    assert executed.counts["matmul"] == {label: 3}


def test_a_scaled_product_counts_as_fp8_whichever_of_its_formats_it_is_in() -> None:
    """e4m3 forward and e5m2 backward are one precision."""
    one = torch.ones(())
    with ExecutedDtypes() as executed:
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            a, b = torch.ones(16, 16).to(dtype), torch.ones(16, 16).to(torch.float8_e4m3fn)
            torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)

    assert executed.counts["matmul"] == {"fp8": 2}


@pytest.mark.parametrize("counts", [{"bf16": 9}, {"bf16": 9, "fp8-emulated": 3}])
def test_fp8_is_honoured_by_fp8_alone(counts: dict[str, int]) -> None:
    """Neither bf16 nor an emulation passes for it."""
    is_honoured, notes = honoured(POLICIES["fp8"], {"matmul": counts})

    assert not is_honoured
    assert "no matrix product executed in fp8" in notes


@pytest.mark.parametrize("name", ["fp8", "fp8-split"])
def test_a_device_without_fp8_refuses_and_names_the_emulation(name: str) -> None:
    """It is not replaced by one, and the way to have one is said."""
    with pytest.raises(UnsupportedPrecision, match="fp8 exists on CUDA devices only") as error:
        resolve_plan(name, CPU)

    assert f"--precision {name}-emulated" in error.value.hint
    assert error.value.exit_code == 3


@pytest.mark.parametrize(("version", "has"), [((8, 0), False), ((8, 9), True), ((9, 0), True)])
def test_fp8_begins_with_compute_capability_8_9(version: tuple[int, int], has: bool) -> None:
    """Ada and Hopper."""
    assert cuda_capabilities(version)["fp8"].supported is has


def test_without_torchao_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that could: the library is optional."""
    able = {**devices.capabilities(CPU), **cuda_capabilities((9, 0))}
    monkeypatch.setattr(devices, "capabilities", lambda _: able)
    monkeypatch.setattr(float8, "find_spec", lambda _: None)
    with pytest.raises(UnsupportedPrecision, match="torchao, which is not installed") as error:
        require(POLICIES["fp8"], CPU)

    assert "pip install 'narrowcast[fp8]'" in error.value.hint


def test_torchaos_layers_train_where_the_device_has_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a GPU, on a CPU that claims to be one: torch._scaled_mm exists there too.

    A batch of 5 rows has no size that fp8 products take.
    """
    pytest.importorskip("torchao")
    able = {**devices.capabilities(CPU), **cuda_capabilities((9, 0))}
    monkeypatch.setattr(devices, "capabilities", lambda _: able)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    twin = copy.deepcopy(model)
    trained, emulated = engine(model, PLANS["fp8"]), engine(twin, PLANS["fp8-emulated"])
    x = torch.randn(5, 32)
    (loss, executed), (other, _) = step(trained, x), step(emulated, x)

    assert executed.counts["matmul"] == {"fp8": 6}  # it makes the first layer's dx as well
    assert honoured(trained.policy, executed.counts)[0]
    torch.testing.assert_close(loss, other, rtol=2**-7, atol=0)  # one bf16 rounding of an output
    assert any("saves time, not memory" in note for note in trained.levers.notes)
    assert any("torchao's measurements" in note for note in trained.levers.notes)


def test_what_fp8_saves_is_said_before_the_run() -> None:
    """Time and not memory, but for the stores; and an emulation neither."""
    assert "fp8 saves time, not memory" in what_it_saves(POLICIES["fp8"])
    assert "fp8-split adds stores" in what_it_saves(POLICIES["fp8"])
    assert "memory is saved by the stores" in what_it_saves(PLANS["fp8-split"].policy)
    assert "time and peak memory are not" in what_it_saves(EMULATED)
    assert "saves time, not memory" in what_it_saves(EMULATED)
    assert what_it_saves(POLICIES["bf16"]) == ""


def test_fp8_composes_with_the_stores() -> None:
    """fp8-split is bf16-split with other products: no axis but one differs."""
    split, fp8 = to_json(PLANS["bf16-split"]), to_json(PLANS["fp8-split"])
    for axes in split, fp8:
        del axes["name"], axes["policy"]["name"], axes["policy"]["linears"]

    assert fp8 == split
    assert PLANS["fp8-split"].policy.linears == "fp8"


@pytest.mark.parametrize("lever", ["checkpoint", "remake", "int8", "e4m3"])
def test_fp8_trains_under_every_lever(lever: str) -> None:
    """What backward keeps of a converted layer passes the same hooks; exact levers stay exact."""
    losses = []
    for rules in ([], [{"modules": "0" if lever == "checkpoint" else "*", "lever": lever}]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32))
        plan = from_json(Plan, {**to_json(PLANS["fp8-emulated"]), "activations": rules})
        trained = engine(model, plan)
        x = torch.randn(16, 32)
        losses.append([step(trained, x)[0].item() for _ in range(3)])

    if lever in ("int8", "e4m3"):
        assert losses[1] == pytest.approx(losses[0], rel=0.05)
    else:
        assert losses[1] == losses[0]


def test_a_policy_that_emulates_says_so_in_its_name() -> None:
    """The label is in every record, since every record has the name."""
    with pytest.raises(UsageError, match="'fast' emulates fp8"):
        replace(EMULATED, name="fast")
    with pytest.raises(UsageError, match="plan 'fast' emulates fp8"):
        Plan(name="fast", policy=EMULATED)


def test_fp8_goes_with_bf16_alone() -> None:
    """There is no torchao recipe beside fp16, and fp32 beside fp8 makes no sense."""
    with pytest.raises(UsageError, match="computes all else in fp32"):
        Policy(name="fp8", linears="fp8")
    with pytest.raises(UnknownName, match="format of linear layers 'fp9'"):
        Policy(name="x", compute="bf16", linears="fp9")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["fp8", "fp8-emulated"])
def test_a_policy_comes_back_from_json(name: str) -> None:
    """And one that was written before there was fp8 is one without it."""
    written: dict[str, Any] = to_json(POLICIES[name])
    older = {key: value for key, value in to_json(POLICIES["bf16"]).items() if key != "linears"}

    assert from_json(Policy, written) == POLICIES[name]
    assert from_json(Policy, older) == POLICIES["bf16"]


def test_a_product_in_fp8_can_be_timed() -> None:
    """For `narrowcast doctor`, on devices that have it; torch has the operation on CPUs too."""
    assert matmul_seconds(CPU, "fp8", patience_s=0) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_torch_compile_leaves_every_bit() -> None:
    """Without a break of the graph, forward and backward."""
    layer = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    convert_linears(layer, EMULATED)
    found = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        layer.zero_grad()
        x = torch.linspace(-1, 1, 17 * 32).reshape(17, 32).requires_grad_()
        with forward_context(EMULATED, "cpu"):
            output = call(x)
        output.float().square().sum().backward()
        found.append((output, x.grad, layer[0].weight.grad))

    for eager, compiled in zip(*found, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's
def test_a_compiled_training_is_counted_as_the_same_in_eager_mode() -> None:
    """The graph calls emulated products by their own name, so that they are known in it."""
    found = []
    for backend in (False, "aot_eager"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        optimizer = torch.optim.AdamW(model.parameters())
        trained = Engine(model, optimizer, PLANS["fp8-emulated"], compile=backend)
        with ExecutedDtypes() if not backend else nullcontext() as executed:
            with trained.forward():
                loss = model(torch.randn(17, 32)).float().square().mean()
            trained.backward(loss)
        counts = (executed or compiled_call(model)).counts  # type: ignore[union-attr]
        found.append((loss.item(), counts["matmul"]))

    assert found[0] == found[1]
    assert found[0][1] == {"fp8-emulated": 5}


def test_restoring_an_ordinary_model_changes_nothing() -> None:
    """Engines do so for every model."""
    model = Net()
    restore_linears(model)

    assert classes(model) == classes(Net())


@pytest.mark.slow
def test_training_twice_from_one_seed_is_the_same(tmp_path: Path) -> None:
    """A run in emulated fp8, its record and its label."""
    from narrowcast.recipes.load import load_recipe
    from narrowcast.training.train import TrainOptions, train

    recipe = load_recipe("fashion")
    records = [
        train(
            recipe,
            PLANS["fp8-emulated"],
            TrainOptions(steps=3, watch=0),
            tmp_path / name,
            device=CPU,
        )
        for name in ("a", "b")
    ]

    first, second = records
    assert first.precision == "fp8-emulated"
    assert first.plan["policy"]["linears"] == "fp8-emulated"  # type: ignore[index, call-overload]
    assert first.precision_honoured
    assert any("fp8 is emulated" in said for said in first.warnings)
    assert first.final_loss == second.final_loss
    assert {e.precision for e in first.evaluations} == {"fp32", "fp8-emulated"}
