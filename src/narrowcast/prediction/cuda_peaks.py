"""From the ledger of traced steps to what the counters of torch.cuda would say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch.optim import Optimizer

from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Holding, Role
from narrowcast.prediction.allocator import AllocatorConfig, AllocatorPeaks, Replay

__all__ = ["cuda_peaks", "device_events"]

# A step count is one fp32 number, in the default dtype at most fp64.
_COUNT_BYTES = 8


def device_events(
    events: Iterable[tuple[Holding, int]], *, counts_on_device: bool = False
) -> Iterator[tuple[Holding, int]]:
    """Leave out the step counts of optimizers, which torch keeps in host memory.

    Optimizers that are ``fused`` or ``capturable`` keep them on the device: `counts_on_device`.
    Roles must be known, so ask once the optimizer has stepped.
    """
    for holding, change in events:
        counts = holding.role == Role.OPTIMIZER and abs(change) <= _COUNT_BYTES
        if counts_on_device or not counts:
            yield holding, change


def cuda_peaks(
    ledger: MemoryLedger,
    optimizers: Iterable[Optimizer] = (),
    *,
    config: AllocatorConfig | None = None,
    since: int = 0,
) -> AllocatorPeaks:
    """Replay what a ledger saw; return peaks since its event number `since`.

    The ledger was open inside ``FakeTensorMode`` and round ``cuda_kernels``, from before the model
    was claimed. Raises OutOfDeviceMemory if `config` gives less memory than the steps need.
    """
    on_device = any(
        group.get("fused") or group.get("capturable")
        for optimizer in optimizers
        for group in optimizer.param_groups
    )
    events = ledger.events()
    run = Replay(config)
    run.feed(device_events(events[:since], counts_on_device=on_device))
    run.allocator.reset_peaks()
    run.feed(device_events(events[since:], counts_on_device=on_device))
    return run.allocator.peaks
