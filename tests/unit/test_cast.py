"""Facts about making a module obey a policy, and about evaluating it in full precision."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from narrowcast.errors import UnknownName, UsageError
from narrowcast.policy import POLICIES, Policy, policy_named
from narrowcast.precision.cast import (
    backward_context,
    format_name,
    forward_context,
    full_precision,
    numeric_settings,
    prepare_model,
    settings_hold,
    torch_dtype,
)

BF16, FP32 = torch.bfloat16, torch.float32
REHEARSED = Policy(name="bf16", compute="bf16", autocast_rules="cuda")


class Seen(nn.Module):
    """Passes its input on and remembers the dtype and the autocast state that it met."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []
        self.autocast: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.dtypes.append(x.dtype)
        self.autocast.append(torch.is_autocast_enabled("cpu"))
        return x


def net() -> nn.Sequential:
    """Linear, an island to be (with its own Linear), Linear; a Seen before and inside."""
    island = nn.Sequential(Seen(), nn.Linear(4, 4))
    return nn.Sequential(nn.Linear(4, 4), Seen(), island, Seen(), nn.Linear(4, 2))


def fail_if(wanted: bool) -> None:
    if wanted:
        raise ZeroDivisionError


def own_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16", "e4m3", "e5m2"])
def test_dtype_and_name_are_inverse(name: str) -> None:
    """Every stored format has one dtype, and that dtype has that name."""
    assert format_name(torch_dtype(name)) == name


def test_tf32_is_stored_as_fp32() -> None:
    """TF32 is a way to multiply fp32 numbers."""
    assert torch_dtype("tf32") == FP32


def test_other_dtypes_keep_torchs_name() -> None:
    """A dtype that is no format of ours is named as torch names it."""
    assert format_name(torch.int64) == "int64"


def test_an_unknown_format_names_the_nearest() -> None:
    """A typing error is answered with the name that was meant."""
    with pytest.raises(UnknownName, match="did you mean 'bf16'"):
        torch_dtype("bf61")


@pytest.mark.parametrize("name", list(POLICIES))
def test_weights_take_the_storage_format(name: str) -> None:
    """Floating-point weights and buffers are stored as the policy says; counters stay integers."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).bfloat16()
    weights = list(model.parameters())

    prepare_model(model, policy_named(name), "cpu")

    wanted = torch_dtype(policy_named(name).param)
    assert {p.dtype for p in model[0].parameters()} == {wanted}
    # Statistics in 16 bits would stop moving; torch's kernels take 16-bit inputs beside them.
    assert {p.dtype for p in model[1].parameters()} == {FP32}
    assert model[1].running_mean.dtype == FP32
    assert model[1].num_batches_tracked.dtype == torch.int64
    assert all(a is b for a, b in zip(weights, model.parameters(), strict=True))


@pytest.mark.parametrize("name", list(POLICIES))
def test_fp64_weights_are_refused(name: str) -> None:
    """Half of their digits would be lost; the model is left as it was."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1).double())

    with pytest.raises(UsageError, match=r"1\.weight, 1\.bias are fp64") as caught:
        prepare_model(model, policy_named(name), "cpu")

    assert "model.float()" in caught.value.hint
    assert model[1].weight.dtype is torch.float64


def test_fp64_buffers_stay_as_in_a_plain_loop() -> None:
    """A policy that stores fp32 leaves them alone: 1e300 is still a number."""
    model = nn.Linear(2, 2)
    model.register_buffer("big", torch.tensor(1e300, dtype=torch.float64))

    notes = prepare_model(model, policy_named("bf16"), "cpu")

    assert model.big.item() == 1e300
    assert notes == ()


def test_fp64_buffers_that_become_bf16_are_told() -> None:
    """As ``model.to(torch.bfloat16)`` does, and with their names."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.register_buffer("count", torch.tensor(3.0, dtype=torch.float64))
    model[0].register_buffer("scale", torch.ones(2, dtype=torch.float64))

    notes = prepare_model(model, policy_named("bf16-true"), "cpu")

    assert model.count.dtype is BF16
    assert "fp64 buffers became bf16: count, 0.scale" in notes


def test_existing_gradients_follow_their_weights() -> None:
    """A gradient present at the time of the cast has the dtype of its weight afterwards."""
    model = nn.Linear(2, 2)
    model(torch.ones(1, 2)).sum().backward()

    prepare_model(model, policy_named("bf16-true"), "cpu")

    assert model.weight.grad is not None
    assert model.weight.grad.dtype == BF16


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


@dataclass
class Output:
    logits: Tensor
    ids: Tensor


class Nested(nn.Module):
    """Takes and returns nests, as real models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.seen: dict[str, Any] = {}

    def forward(self, pair: Pair, *, extra: dict[str, Any]) -> tuple[Output, list[Tensor]]:
        self.seen = {"left": pair.left.dtype, "x": extra["x"][0].dtype, "ids": extra["ids"].dtype}
        return Output(self.linear(pair.left), extra["ids"]), [pair.right]


def test_nested_inputs_and_outputs_are_cast_where_weights_are_bf16() -> None:
    """bf16-true: floats in tuples, dicts and dataclasses enter in bf16 and leave in fp32."""
    model = Nested()
    prepare_model(model, policy_named("bf16-true"), "cpu")
    ids = torch.arange(3)
    pair = Pair(torch.ones(1, 2), torch.ones(1))

    output, rest = model(pair, extra={"x": [torch.ones(2)], "ids": ids, "flag": True})

    assert model.seen == {"left": BF16, "x": BF16, "ids": torch.int64}
    assert output.logits.dtype == FP32
    assert output.ids is ids
    assert rest[0].dtype == FP32
    assert pair.left.dtype == FP32, "the caller's own nest is untouched"


def test_bf16_true_trains_in_bf16() -> None:
    """Gradients arrive in the storage format, through the casts at both ends."""
    model = nn.Linear(2, 2)
    prepare_model(model, policy_named("bf16-true"), "cpu")
    x = torch.ones(1, 2, requires_grad=True)

    model(x).sum().backward()

    assert model.weight.grad is not None
    assert x.grad is not None
    assert (model.weight.grad.dtype, x.grad.dtype) == (BF16, FP32)


@pytest.mark.parametrize("name", ["bf16", "bf16-true"])
def test_preparing_twice_is_preparing_once(name: str) -> None:
    """The second call leaves one set of hooks, and the same result."""
    policy = policy_named(name).keeping_fp32("2")
    model, x = net(), torch.randn(2, 4)
    prepare_model(model, policy, "cpu")
    once, hooks = model(x), own_hooks(model)

    prepare_model(model, policy, "cpu")

    assert own_hooks(model) == hooks
    assert torch.equal(model(x), once)


def test_preparing_again_replaces_the_policy() -> None:
    """After bf16-true, preparing for fp32 removes our hooks and nobody else's."""
    model = net()
    model.register_forward_hook(lambda *_: None)
    prepare_model(model, policy_named("bf16-true").keeping_fp32("2"), "cpu")

    prepare_model(model, policy_named("fp32"), "cpu")

    assert own_hooks(model) == 1
    assert {p.dtype for p in model.parameters()} == {FP32}


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copied_model_keeps_its_precision(clone: Any) -> None:
    """A deep copy and a pickled model obey the same policy, independently of the original."""
    model, x = net(), torch.randn(2, 4)
    prepare_model(model, policy_named("bf16-true").keeping_fp32("2"), "cpu")

    twin = clone(model)
    with full_precision(model):
        result = twin(x)

    assert torch.equal(result, model(x))


@pytest.mark.parametrize("policy", [policy_named("bf16"), policy_named("fp16"), REHEARSED])
def test_an_island_runs_in_fp32_with_autocast_off(policy: Policy) -> None:
    """Inside: fp32 inputs, no autocast. Before and after: autocast as it was."""
    model = net()
    prepare_model(model, policy.keeping_fp32("2"), "cpu")

    with forward_context(policy, "cpu"):
        output = model(torch.randn(2, 4))
        assert torch.is_autocast_enabled("cpu")

    before, inside, after = model[1], model[2][0], model[3]
    low = torch_dtype(policy.compute)
    assert (before.dtypes, before.autocast) == ([low], [True])
    assert (inside.dtypes, inside.autocast) == ([FP32], [False])
    assert (after.dtypes, after.autocast) == ([FP32], [True])
    assert output.dtype == low


def test_an_island_among_bf16_weights_gives_its_neighbours_bf16() -> None:
    """bf16-true: the island has fp32 weights and fp32 inputs, the module behind it gets bf16."""
    policy = policy_named("bf16-true").keeping_fp32("2")
    model = net()

    prepare_model(model, policy, "cpu")
    model(torch.randn(2, 4)).sum().backward()

    assert model[2][1].weight.dtype == FP32
    assert model[2][1].weight.grad.dtype == FP32
    assert model[0].weight.dtype == BF16
    assert (model[2][0].dtypes, model[3].dtypes) == ([FP32], [BF16])


def test_a_model_kept_whole_is_an_fp32_model() -> None:
    """keep_fp32=('*',): weights, inputs and results are those of fp32, bit for bit."""
    model, x = net(), torch.randn(2, 4)
    expected = model(x)

    for name in ("bf16", "bf16-true"):
        policy = policy_named(name).keeping_fp32("*")
        prepare_model(model, policy, "cpu")
        with forward_context(policy, "cpu"):
            found = model(x)

        assert torch.equal(found, expected)


def test_classes_and_their_subclasses_can_be_kept() -> None:
    """A class in keep_fp32 keeps every instance of it, subclasses included."""

    class MyNorm(nn.LayerNorm):
        pass

    model = nn.Sequential(nn.Linear(4, 4), MyNorm(4))
    prepare_model(model, policy_named("bf16-true").keeping_fp32(nn.LayerNorm), "cpu")

    assert [p.dtype for p in model[1].parameters()] == [FP32, FP32]
    assert model[0].weight.dtype == BF16


@pytest.mark.parametrize(
    ("entry", "near"),
    [
        ("layers.9.*", "did you mean 'layers.0'"),
        ("class:torch.nn.Liner", "did you mean 'class:torch.nn.modules.linear.Linear'"),
    ],
)
def test_an_entry_that_matches_nothing_is_an_error(entry: str, near: str) -> None:
    """A misspelt island is refused with the nearest name that exists; the model is untouched."""
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2)])})

    with pytest.raises(UsageError, match="matches no module") as error:
        prepare_model(model, policy_named("bf16-true").keeping_fp32(entry), "cpu")

    assert near in error.value.hint
    assert {p.dtype for p in model.parameters()} == {FP32}


def test_an_entry_that_resembles_nothing_gets_the_names() -> None:
    """No guess is made from afar; the hint lists modules, and no more than fit in two lines."""
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(14)))

    with pytest.raises(UsageError, match="matches no module") as error:
        prepare_model(model, policy_named("bf16").keeping_fp32("nope*"), "cpu")

    assert "did you mean" not in error.value.hint
    assert error.value.hint.endswith("modules: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, and 2 more")


def test_a_weight_cannot_be_in_and_out_of_an_island() -> None:
    """A tied weight with one end in an island is refused, since it has one dtype."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight

    with pytest.raises(UsageError, match=r"0\.weight is shared with 1\.weight"):
        prepare_model(model, policy_named("bf16-true").keeping_fp32("1"), "cpu")


def test_autocast_returns_after_an_exception_in_an_island() -> None:
    """An island that raises leaves autocast as it found it."""

    class Broken(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise ZeroDivisionError

    policy = policy_named("bf16").keeping_fp32("0")
    model = nn.Sequential(Broken())
    prepare_model(model, policy, "cpu")

    with forward_context(policy, "cpu"):
        with pytest.raises(ZeroDivisionError):
            model(torch.ones(1))
        assert torch.is_autocast_enabled("cpu")


def test_islands_nest() -> None:
    """An island within an island gives autocast back only at the outer border."""
    policy = policy_named("bf16").keeping_fp32("2", "2.*")
    model = net()
    prepare_model(model, policy, "cpu")

    with forward_context(policy, "cpu"):
        model(torch.randn(2, 4))

    assert model[2][0].autocast == [False]
    assert model[3].autocast == [True]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("policy", [policy_named("bf16"), REHEARSED])
def test_checkpointing_repeats_the_same_casts(policy: Policy, reentrant: bool) -> None:
    """Recomputation in backward meets the same islands and lists: gradients agree bit for bit."""
    policy = policy.keeping_fp32("2")
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.Sequential(nn.Softmax(-1), nn.Linear(4, 4)),
        nn.Linear(4, 4),
    )
    prepare_model(model, policy, "cpu")
    x = torch.randn(8, 4, requires_grad=True)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        with forward_context(policy, "cpu"):
            y = checkpoint(model, x, use_reentrant=reentrant) if recompute else model(x)
            loss = y.float().exp().sum()
        with backward_context(policy, "cpu"):
            loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["fp16", "bf16"])
def test_forward_context_is_torchs_autocast(name: str) -> None:
    """Inside: the same state as torch.autocast sets. Outside: what was before, after errors too."""
    dtype = torch_dtype(name)
    before = torch.get_autocast_dtype("cpu")
    with torch.autocast("cpu", dtype):
        expected = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"))
    context = forward_context(policy_named(name), "cpu")

    with contextlib.suppress(ZeroDivisionError), context:
        assert (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")) == expected
        fail_if(True)

    assert not torch.is_autocast_enabled("cpu")
    assert torch.get_autocast_dtype("cpu") == before


@pytest.mark.parametrize("policy", [policy_named("bf16"), REHEARSED])
def test_forward_context_can_be_entered_within_itself(policy: Policy) -> None:
    """One object serves nested and repeated use."""
    context = forward_context(policy, "cpu")

    for _ in range(2):
        with context:
            with context:
                pass
            assert torch.is_autocast_enabled("cpu")
        assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16-true"])
def test_policies_without_autocast_share_one_empty_context(name: str) -> None:
    """No object is made and no state touched where there is nothing to do."""
    context = forward_context(policy_named(name), "cpu")

    assert context is forward_context(policy_named("fp32"), "cuda")
    with context:
        assert not torch.is_autocast_enabled("cpu")


def test_weights_are_cast_once_a_region_and_anew_in_the_next() -> None:
    """The cast of a weight is cached within a forward pass and dropped at its end."""
    layer = nn.Linear(2, 2, bias=False)
    context = forward_context(policy_named("bf16"), "cpu")
    x = torch.ones(1, 2, dtype=BF16)
    with context:
        first = layer(x)
        with torch.no_grad():
            layer.weight.data.zero_()
        same = layer(x)

    with context:
        fresh = layer(x)

    assert torch.equal(first, same), "within the region the cached cast is used"
    assert not fresh.any(), "in the next region the weight is read again"


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-true"])
def test_full_precision_is_fp32_from_the_stored_weights(name: str) -> None:
    """Even inside an autocast, results equal those of an fp32 copy of the stored weights."""
    policy = policy_named(name).keeping_fp32("2")
    model, x = net(), torch.randn(2, 4)
    model.append(nn.BatchNorm1d(2)).eval()
    prepare_model(model, policy, "cpu")
    plain = nn.Sequential(*copy.deepcopy(net()), nn.BatchNorm1d(2)).eval()
    plain.load_state_dict({k: v.float() for k, v in model.state_dict().items()}, strict=True)

    with torch.autocast("cpu", BF16), full_precision(model):
        found = model(x)

    assert found.dtype == FP32
    assert torch.equal(found, plain(x))


class Centred(nn.Module):
    """Takes a running mean off, which it keeps in the format of the weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - self.running_mean
        if self.training:
            self.running_mean.lerp_(x.detach().mean(dim=0), 0.1)
        return centred


@pytest.mark.parametrize("fail", [False, True])
def test_full_precision_restores_every_bit(fail: bool) -> None:
    """Afterwards weights and buffers are the same storage with the same bits, and hooks work."""
    model, x = nn.Sequential(nn.Linear(4, 4), Centred(4)), torch.randn(3, 4)
    prepare_model(model, policy_named("bf16-true"), "cpu")
    tensors = [t for t in model.state_dict(keep_vars=True).values() if t.is_floating_point()]
    before = [(t.data_ptr(), t.dtype, t.detach().clone()) for t in tensors]
    expected = copy.deepcopy(model)(x)

    refused = pytest.raises(ZeroDivisionError if fail else UsageError)
    with refused, full_precision(model):
        model(x)  # in training mode this moves the running statistics
        fail_if(fail)

    after = [(t.data_ptr(), t.dtype) for t in tensors]
    assert after == [b[:2] for b in before]
    assert all(torch.equal(t, b[2]) for t, b in zip(tensors, before, strict=True))
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_state_loaded_in_full_precision_is_refused(assign: bool, around: Any) -> None:
    """The change would be lost; the error names what it was, and the model is as before."""
    model = nn.Linear(2, 2)
    prepare_model(model, policy_named("bf16-true"), "cpu")
    weight, before = model.weight, model.weight.detach().clone()
    state = {"weight": torch.ones(2, 2), "bias": torch.ones(2)}

    with (
        pytest.raises(UsageError, match="weight, bias changed"),
        around(),
        full_precision(model),
    ):
        model.load_state_dict(state, assign=assign)

    assert model.weight is weight
    assert torch.equal(weight, before)


class Renormed(nn.Module):
    """Writes rows of its embedding, and a buffer of a child, whenever it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4, max_norm=1.0)
        self.child = Centred(4)

    def forward(self, x: Tensor) -> Tensor:
        self.child.running_mean.add_(1)
        return self.child(self.embedding(x))


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_what_a_forward_pass_writes_is_scratch_and_named(around: Any) -> None:
    """In evaluation mode it ends with the block: the stored values stay, and the names are told."""
    model = Renormed().eval()
    prepare_model(model, policy_named("bf16-true"), "cpu")
    before = {name: t.clone() for name, t in model.state_dict().items()}

    with around(), full_precision(model) as rewritten:
        for _ in range(2):
            model(torch.arange(8))

    assert rewritten == ["embedding.weight", "child.running_mean"]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.children())


def test_a_child_may_be_called_alone_in_full_precision() -> None:
    """Whichever module the caller enters first is a forward pass of the model's own."""
    model = Renormed().eval()
    prepare_model(model, policy_named("bf16-true"), "cpu")

    with torch.no_grad(), full_precision(model) as rewritten:
        model.embedding(torch.arange(8))

    assert rewritten == ["embedding.weight"]


def test_a_load_between_two_forward_passes_is_refused() -> None:
    """What the model writes does not hide what somebody else wrote."""
    model, x = Renormed().eval(), torch.arange(8)
    prepare_model(model, policy_named("bf16-true"), "cpu")

    def load_in_between() -> None:
        model(x)
        model.embedding.weight.fill_(1)
        model(x)

    refused = pytest.raises(UsageError, match=r"embedding\.weight changed")
    with refused, torch.no_grad(), full_precision(model):
        load_in_between()


def test_a_forward_pass_that_raises_leaves_no_hook() -> None:
    """The next block counts its passes from none."""
    model = Renormed().eval()
    prepare_model(model, policy_named("bf16-true"), "cpu")

    with pytest.raises(IndexError), torch.no_grad(), full_precision(model):
        model(torch.tensor([99]))
    with torch.no_grad(), full_precision(model) as rewritten:
        model(torch.arange(8))

    assert rewritten == ["embedding.weight", "child.running_mean"]


def test_a_cache_may_change_in_full_precision() -> None:
    """A buffer outside the state dict is scratch, and one that is replaced is not lost."""
    model = nn.Linear(2, 2)
    model.register_buffer("scratch", torch.zeros(2), persistent=False)
    model.register_buffer("table", torch.zeros(2))
    prepare_model(model, policy_named("bf16-true"), "cpu")

    with full_precision(model):
        model.scratch.fill_(1)
        model.table = torch.ones(4)

    assert model.scratch.tolist() == [0, 0]
    assert model.table.tolist() == [1, 1, 1, 1]


def test_full_precision_keeps_gradients_and_mode() -> None:
    """Gradients that wait for the optimizer survive, and training mode is not touched."""
    model = nn.Linear(2, 2)
    prepare_model(model, policy_named("bf16-true"), "cpu")
    model(torch.ones(1, 2)).sum().backward()
    gradient = model.weight.grad

    with full_precision(model):
        assert model.training
        model(torch.ones(1, 2))

    assert model.weight.grad is gradient


def test_full_precision_nests() -> None:
    """The inner context does not end the outer one."""
    model = nn.Linear(2, 2)
    prepare_model(model, policy_named("bf16-true"), "cpu")
    x = torch.full((1, 2), 1 + 2**-12)  # bf16 would round it to 1

    with full_precision(model):
        expected = model(x)
        with full_precision(model):
            pass
        assert torch.equal(model(x), expected)

    assert not torch.equal(model(x), expected)


GET = torch._C._get_fp32_precision_getter
SWITCHES = [(b, op) for b in ("cuda", "mkldnn") for op in ("all", "matmul", "conv", "rnn")]


def legacy() -> tuple[object, ...]:
    """Read the older flags; a refusal to read them is part of the state."""
    found: list[object] = []
    for read in (
        lambda: torch.backends.cuda.matmul.allow_tf32,
        lambda: torch.backends.cudnn.allow_tf32,
        torch.get_float32_matmul_precision,
    ):
        try:
            found.append(read())
        except RuntimeError:
            found.append("refused")
    return tuple(found)


def state() -> tuple[object, ...]:
    return (GET("generic", "all"), *(GET(*s) for s in SWITCHES), *legacy())


@pytest.fixture
def _default_switches() -> Iterator[None]:
    """Put torch's own defaults back, whatever a test did."""
    yield
    put = torch._C._set_fp32_precision_setter
    for switch in (("generic", "all"), *SWITCHES):
        put(*switch, "none")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = True
    for backend, op in SWITCHES:
        put(backend, op, "tf32" if backend == "cuda" and op in ("conv", "rnn") else "none")


def set_nothing() -> None:
    pass


def set_legacy() -> None:
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = False


def set_medium() -> None:
    torch.set_float32_matmul_precision("medium")


def set_new() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.conv.fp32_precision = "bf16"


def set_generic() -> None:
    torch.backends.fp32_precision = "tf32"


@pytest.mark.usefixtures("_default_switches")
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("setup", [set_nothing, set_legacy, set_medium, set_new, set_generic])
def test_switches_are_set_inside_and_restored(name: str, setup: Any) -> None:
    """Whichever of torch's APIs set them, the switches say what the policy says, and go back."""
    setup()
    before = state()

    with numeric_settings(policy_named(name)):
        inside = {s: GET(*s) for s in SWITCHES if s[1] != "all"}
        assert settings_hold(policy_named(name), "cpu")
        assert settings_hold(policy_named(name), "cuda")

    tf32 = name == "tf32"
    assert {v for (b, _), v in inside.items() if b == "mkldnn"} <= {"ieee", "none"}
    assert {v for (b, _), v in inside.items() if b == "cuda"} <= (
        {"tf32"} if tf32 else {"ieee", "none"}
    )
    assert state() == before


@pytest.mark.usefixtures("_default_switches")
@pytest.mark.parametrize("setup", [set_nothing, set_legacy, set_medium])
def test_older_flags_stay_readable_and_agree(setup: Any) -> None:
    """Code that reads allow_tf32 inside is not refused by torch, and is told the truth."""
    setup()

    with numeric_settings(policy_named("fp32")):
        assert legacy() == (False, False, "highest")


@pytest.mark.usefixtures("_default_switches")
def test_switches_return_after_an_exception() -> None:
    """A run that fails does not leave its switches behind."""
    before = state()

    with contextlib.suppress(ZeroDivisionError), numeric_settings(policy_named("tf32")):
        assert state() != before
        fail_if(True)

    assert state() == before


def test_an_interrupt_in_an_island_leaves_no_trap() -> None:
    """Ctrl-C inside an island skips its exit hook; the next step still finds its way out."""

    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.times = 0

        def forward(self, x: Tensor) -> Tensor:
            self.times += 1
            if self.times == 1:
                raise KeyboardInterrupt
            return x

    policy = policy_named("bf16").keeping_fp32("0", "1")
    model = nn.Sequential(nn.Linear(4, 4), Interrupted(), Seen())
    prepare_model(model, policy, "cpu")
    context = forward_context(policy, "cpu")

    for _ in range(2):
        with contextlib.suppress(KeyboardInterrupt), context:
            model(torch.ones(1, 4))

    assert model[2].autocast == [True]
    assert not torch.is_autocast_enabled("cpu")
