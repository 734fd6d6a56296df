"""From a traced training to what CUDA's allocator reports of its last step.

The trace is of fake CPU tensors in CUDA's order (``cuda_ops``). Three things make it a GPU's: the
model arrives before the first step as ``Module.to`` and a policy's cast move it, what stays in host
memory is left out, and the events are replayed through the allocator (``allocator``). As in a
measurement, ``requested`` and ``allocated`` are peaks of the third step, and ``reserved`` of all:
the second step's events are replayed once more, since in the second the allocator still finds room
that the first one left. Of 36 trainings two reserved a segment more in the third step, and none
more in the fourth (docs/predict.md).

The ledger's own lines count tensors, as on a GPU: scratch memory and workspaces are in the events
alone.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence, Set
from dataclasses import replace

from torch import Tensor, nn
from torch.optim import Optimizer

from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Holding, Role, tensors_in
from narrowcast.prediction.allocator import AllocatorPeaks, Replay
from narrowcast.prediction.gpus import Gpu
from narrowcast.prediction.trace import WholeTrace
from narrowcast.profiling import Bench
from narrowcast.records.memory import MemoryRecord
from narrowcast.units import format_bytes

__all__ = ["on_gpu"]

Event = tuple[Hashable, int]

# Scratch memory that no source tells (cub, partial sums of norms), and a segment more or less.
_MARGIN_SHARE = 0.02
_SEGMENT_BYTES = 20 * 2**20
# cuDNN chooses the workspace of a convolution when it runs. Traces without it were up to 17.5 %
# away from 20 CNNs that others measured (docs/predict.md).
_CONVOLUTION_MARGIN_SHARE = 0.2


def on_gpu(trace: WholeTrace, bench: Bench, gpu: Gpu) -> tuple[MemoryRecord, MemoryLedger]:
    """Return the record of the last step on a GPU, and its ledger of what is a tensor there."""
    ledger = trace.ledger
    on_host = _on_host(ledger, bench.optimizer)
    events = _events(trace, bench, on_host)
    ledger.leave_out(on_host | trace.beside)
    peaks = _replayed(*events)
    margin = _margin(peaks.reserved_bytes, bench.model)
    record = replace(
        ledger.record(),
        requested_bytes=peaks.requested_bytes,
        allocated_bytes=peaks.allocated_bytes,
        reserved_bytes=peaks.reserved_bytes,
        margin_bytes=margin,
        assumptions=tuple(_assumptions(gpu, bench.model)),
        notes=(_fit(peaks.reserved_bytes + margin, gpu),),
    )
    return record, ledger


def _events(
    trace: WholeTrace, bench: Bench, on_host: Set[Holding]
) -> tuple[list[Event], list[Event]]:
    """Return the events before the last step, and those of the last step."""
    log = trace.ledger.events()
    arrival = _arrival(log[: trace.entry], bench)
    before, last = log[trace.entry : trace.last_step], log[trace.last_step :]
    return (
        [event for event in (*arrival, *before) if event[0] not in on_host],
        [event for event in last if event[0] not in on_host],
    )


def _arrival(log: Sequence[tuple[Holding, int]], bench: Bench) -> Iterator[Event]:
    """Yield the events that bring model and optimizer to the device.

    Weights come in fp32, children first (``Module._apply``). A policy of 16-bit weights casts them
    there, one by one, each copy made before the original is let go.
    """
    by_key = {holding.key: (holding, size) for holding, size in log}
    casts = bench.policy.param != "fp32"
    moved: dict[int, tuple[Holding, int, int]] = {}
    for tensor in _children_first(bench.model):
        key = tensor.untyped_storage()._cdata
        if key in by_key and key not in moved:
            holding, size = by_key.pop(key)
            narrow = casts and tensor.is_floating_point() and tensor.element_size() == 2
            moved[key] = holding, size, 2 * size if narrow else size
    for holding, size, wide in moved.values():
        yield (holding if wide == size else ("fp32", holding)), wide
    for holding, size, wide in moved.values():
        if wide != size:
            yield holding, size
            yield ("fp32", holding), -wide
    yield from by_key.values()


def _children_first(module: nn.Module) -> Iterator[Tensor]:
    for child in module.children():
        yield from _children_first(child)
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)


def _on_host(ledger: MemoryLedger, optimizer: Optimizer) -> set[Holding]:
    """Find the step counts, which torch's optimizers keep in host memory unless they are fused."""
    keys = {
        tensor.untyped_storage()._cdata
        for group in optimizer.param_groups
        if not (group.get("fused") or group.get("capturable"))
        for parameter in group["params"]
        for tensor in tensors_in(optimizer.state.get(parameter, {}))
        if tensor.dim() == 0
    }
    return {h for h, _ in ledger.events() if h.key in keys and h.role == Role.OPTIMIZER}


def _replayed(before: list[Event], last: list[Event]) -> AllocatorPeaks:
    replay = Replay().feed(before).feed(last)
    replay.allocator.reset_peaks()
    return replay.feed(_again(last, known={key for key, _ in before})).allocator.peaks


def _again(step: list[Event], *, known: Set[Hashable]) -> list[Event]:
    """Return the events of the step after a step, which has the same sizes in the same order.

    What one step makes and leaves, the next one lets go, where it has let go of the same before.
    """
    totals: dict[Hashable, int] = defaultdict(int)
    for key, change in step:
        totals[key] += change
    left: dict[int, list[Hashable]] = defaultdict(list)
    for key, size in totals.items():
        if key not in known and size:
            left[size].append(key)
    renamed: dict[Hashable, Hashable] = {}
    for key, size in totals.items():
        if key not in known:
            renamed[key] = ("next", key)
        elif size < 0:
            same = left[-size]
            renamed[key] = same.pop(0) if same else ("gone", key)
    return [
        (renamed.get(key, key), change)
        for key, change in step
        if renamed.get(key, key) != ("gone", key)
    ]


def _margin(reserved: int, model: nn.Module) -> int:
    share = _CONVOLUTION_MARGIN_SHARE if _convolves(model) else _MARGIN_SHARE
    return int(reserved * share) + _SEGMENT_BYTES


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.modules.conv._ConvNd) for module in model.modules())


def _assumptions(gpu: Gpu, model: nn.Module) -> Iterator[str]:
    major, minor = divmod(gpu.sm, 10)
    yield (
        f"kernels, saved tensors and workspaces are those of torch on {gpu.title} (compute "
        f"capability {major}.{minor}), and its allocator has default settings and an empty device"
    )
    convolutions = (
        f", of which {_CONVOLUTION_MARGIN_SHARE:.0%} are for the workspaces of convolutions"
        if _convolves(model)
        else ""
    )
    yield (
        "the margin is for scratch memory that kernels take and no source tells"
        f"{convolutions}; the CUDA context of the process comes on top of all"
    )


def _fit(needed: int, gpu: Gpu) -> str:
    verdict = "fits" if needed <= gpu.usable_bytes else "does not fit"
    return (
        f"{format_bytes(needed)} with the margin: it {verdict} into {gpu.title}, of whose "
        f"{format_bytes(gpu.memory_bytes)} about {format_bytes(gpu.usable_bytes)} can be used"
    )
