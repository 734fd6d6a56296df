"""Facts about the count of dtypes in which operations really execute."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowcast.policy import Policy, policy_named
from narrowcast.precision.cast import forward_context, prepare_model
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.precision.islands import unused_islands

CPU = torch.device("cpu")


class Net(nn.Module):
    """One module of each kind: embedding, convolution, attention, norms, a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 16)
        self.norm = nn.LayerNorm(16)
        self.conv = nn.Conv1d(16, 16, 3, padding=1)
        self.batch = nn.BatchNorm1d(16)
        self.rnn = nn.LSTM(16, 16, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.norm(self.embed(ids))
        heads = x.unflatten(-1, (2, 8)).transpose(1, 2)
        x = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).flatten(2)
        x = self.batch(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(torch.softmax(self.rnn(x)[0], -1))


def counts_of(policy: Policy, model: nn.Module) -> dict[str, dict[str, int]]:
    prepare_model(model, policy, CPU)
    ids = torch.arange(10).reshape(2, 5)
    with ExecutedDtypes() as executed:
        with forward_context(policy, "cpu"):
            loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
        loss.backward()
    return executed.counts


@pytest.mark.parametrize("name", ["fp32", "bf16", "bf16-true"])
def test_heavy_operations_execute_in_the_compute_format(name: str) -> None:
    """Products, convolutions, attention and LSTM run in the policy's format, backward included."""
    policy = policy_named(name)

    counts = counts_of(policy, Net())

    assert {kind: set(counts[kind]) for kind in ("matmul", "conv", "attention", "rnn")} == {
        kind: {policy.compute} for kind in ("matmul", "conv", "attention", "rnn")
    }
    assert counts["conv"][policy.compute] == 2, "one forward, one backward"
    assert counts["matmul"][policy.compute] == 3, "head: one forward, two backward"
    assert honoured(policy, counts) == (True, ())


def test_light_operations_show_where_autocast_keeps_fp32() -> None:
    """Under bf16 autocast an embedding reads fp32 weights and the loss is computed in fp32."""
    counts = counts_of(policy_named("bf16"), Net())

    assert counts["embedding"] == {"fp32": 2}
    assert set(counts["loss"]) == {"fp32"}
    assert set(counts["cast"]) == {"bf16", "fp32"}


def test_rehearsed_rules_show_in_the_counts() -> None:
    """A CPU's softmax runs in bf16 under its own autocast and in fp32 under CUDA's lists."""
    native = policy_named("bf16")
    rehearsed = Policy(name="bf16", compute="bf16", autocast_rules="cuda")
    found = []
    for policy in (native, rehearsed):
        x = torch.randn(4, 4)
        with ExecutedDtypes() as executed, forward_context(policy, "cpu"):
            torch.softmax(x @ x, -1)
        found.append(executed.counts["softmax"])

    assert found == [{"bf16": 1}, {"fp32": 1}]


def test_an_island_is_counted_and_named() -> None:
    """Modules kept in fp32 run in fp32; the run counts as honoured, with a note that says so."""
    policy = policy_named("bf16").keeping_fp32("head")

    counts = counts_of(policy, Net())
    kept, notes = honoured(policy, counts)

    assert counts["matmul"] == {"fp32": 3}
    assert kept
    assert notes == ("3 calls executed in fp32, in modules that are kept so: head",)


def test_a_run_in_another_precision_is_not_honoured() -> None:
    """bf16 asked, fp32 executed: the notes name the kind, the calls and the format."""
    counts = counts_of(policy_named("fp32"), nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10)))

    kept, notes = honoured(policy_named("bf16"), counts)

    assert not kept
    assert notes[0] == "3 of 3 matmul calls executed in fp32, not in bf16"


def test_one_stray_product_is_enough() -> None:
    """A single product in another format is found among many in the right one."""
    counts = {"matmul": {"bf16": 99, "fp16": 1}, "conv": {"bf16": 4}}

    assert honoured(policy_named("bf16"), counts) == (
        False,
        ("1 of 100 matmul calls executed in fp16, not in bf16",),
    )


def test_keeping_everything_is_not_a_low_precision_run() -> None:
    """If every product is in an fp32 island, nothing ran in the precision of the label."""
    kept, notes = honoured(policy_named("bf16").keeping_fp32("*"), {"matmul": {"fp32": 6}})

    assert not kept
    assert "6 calls" in notes[0]


def test_no_products_means_nothing_to_honour() -> None:
    """A model without products or convolutions is honoured, and says that there was nothing."""
    policy = policy_named("bf16")
    with ExecutedDtypes() as executed, forward_context(policy, "cpu"):
        torch.randn(3).relu()

    kept, notes = honoured(policy, executed.counts)

    assert kept
    assert notes == ("nothing to execute in low precision: no matrix product or convolution ran",)


def test_attention_without_a_fused_kernel_is_told() -> None:
    """On a CPU, attention with dropout multiplies in fp32 under bf16 autocast; that is reported."""
    policy = policy_named("bf16")
    x = torch.randn(1, 2, 4, 8)
    with ExecutedDtypes() as executed, forward_context(policy, "cpu"):
        F.scaled_dot_product_attention(x, x, x, dropout_p=0.5)

    kept, notes = honoured(policy, executed.counts)

    assert not kept
    assert "scaled_dot_product_attention" in notes[-1]


def test_only_attention_is_explained_by_attention() -> None:
    """fp32 products of a model without attention, though with a softmax, get no such note."""
    counts = counts_of(policy_named("fp32"), nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 10)))

    notes = honoured(policy_named("bf16"), counts)[1]

    assert "softmax" in counts
    assert notes == ("3 of 3 matmul calls executed in fp32, not in bf16",)


class Borrowed(nn.Module):
    """`head` is kept and its weight is used without calling it; `attention`'s out_proj too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layers = nn.ModuleList([nn.Linear(8, 8)])
        self.spare = nn.Linear(8, 8)
        self.head = nn.Linear(8, 10)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = self.layers[0](self.attention(x, x, x)[0])
        return F.linear(x, self.head.weight)


def unused_of(*entries: str) -> dict[str, str]:
    """Return what `unused_islands` finds in one step of Borrowed."""
    policy, model = policy_named("bf16").keeping_fp32(*entries), Borrowed()
    prepare_model(model, policy, CPU)
    ids = torch.arange(10).reshape(2, 5)
    with ExecutedDtypes() as executed, forward_context(policy, "cpu"):
        model(ids)
    return unused_islands(model, executed.has_read)


@pytest.mark.parametrize(
    ("entry", "module"),
    [("he*", "head"), ("*.out_proj", "attention.out_proj"), ("layers", "layers")],
)
def test_an_island_that_is_never_called_is_found(entry: str, module: str) -> None:
    """Its weight was read elsewhere, in 16 bits: by name, with the entry that kept it."""
    assert unused_of(entry) == {module: entry}


@pytest.mark.parametrize("entry", ["attention*", "layers*", "spare", "*"])
def test_an_island_within_one_that_ran_is_in_use(entry: str) -> None:
    """So is a list whose members are islands; a branch that did not run is nobody's concern."""
    assert unused_of(entry) == {}


def test_an_island_without_effect_is_not_honoured() -> None:
    """The note names the entry, the module and the reason."""
    policy = policy_named("bf16").keeping_fp32("he*")

    kept, notes = honoured(policy, {"matmul": {"bf16": 3}}, {"head": "he*"})

    assert not kept
    assert notes[0].startswith('keep_fp32 "he*" had no effect on head: it is never called')


def test_moving_data_counts_nothing() -> None:
    """Views, copies and fills carry a dtype and compute in none."""
    x = torch.randn(4, 4)
    with ExecutedDtypes() as executed:
        torch.cat([x.t().clone(), torch.zeros_like(x)]).reshape(-1)[2:].contiguous()

    assert executed.counts == {}


def test_integers_are_not_counted() -> None:
    """Index arithmetic has no floating-point precision."""
    with ExecutedDtypes() as executed:
        torch.arange(4) + torch.arange(4)

    assert executed.counts == {}


def test_watching_changes_nothing() -> None:
    """A watched step computes the same loss and gradients, bit for bit."""
    policy = policy_named("bf16")
    gradients = []
    for watch in (False, True):
        torch.manual_seed(1)
        model = Net()
        if watch:
            counts_of(policy, model)
        else:
            ids = torch.arange(10).reshape(2, 5)
            with forward_context(policy, "cpu"):
                loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
            loss.backward()
        gradients.append([p.grad for p in model.parameters()])

    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_counts_add_up_over_micro_batches() -> None:
    """Entered again for the next micro-batch, the same object goes on counting."""
    x = torch.ones(2, 2)
    executed = ExecutedDtypes()

    for _ in range(3):
        with executed:
            x @ x

    assert executed.counts == {"matmul": {"fp32": 3}}
