"""Where the memory of a training step goes: the one shape for measured and predicted ledgers."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CATEGORIES", "BreakEven", "MemoryLine", "MemoryRecord", "ModuleMemory", "TimelinePoint"]

# In the order in which tables and stacked charts show them; the ledger uses no other name.
CATEGORIES: dict[str, str] = {
    "parameters": "weights that the forward pass reads",
    "master_weights": "fp32 copies or remainders that only the optimizer reads",
    "gradients": ".grad of the parameters",
    "optimizer_state": "moments, momentum, step counters",
    "activations": "tensors saved for backward",
    "autocast_casts": "low-precision copies of weights made by autocast, alive until backward",
    "buffers": "module buffers: running statistics, masks, positions",
    "inputs": "the batch",
    "temporaries": "everything else that an operation made and something still holds",
    "unattributed": "memory from before the step that belongs to nothing the ledger knows",
}


@dataclass(frozen=True, kw_only=True)
class MemoryLine:
    """Bytes of one category at the moment of the peak."""

    category: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class ModuleMemory:
    """Bytes at the peak that belong to one module (its own operations, not its children's)."""

    name: str
    bytes: int
    categories: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class TimelinePoint:
    """Live bytes after one recorded event; `index` counts operations from the step's start."""

    index: int
    phase: str
    module: str
    bytes: int
    categories: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class BreakEven:
    """From which batch size on autocast holds less than fp32 in forward and backward."""

    batch_size: float | None
    """Batch size above which autocast takes less; None if it never or always does: see why."""
    cast_bytes: int
    """Low-precision weight copies that live until backward, whatever the batch."""
    saved_bytes_per_sample: float
    """Activation bytes that autocast saves per sample of the batch (may be negative)."""
    why: str
    measured_at: int | None = None
    """A batch at or just above the break-even, at which both precisions were measured; None where
    it would have been too large to measure, and in records without a break-even batch."""
    measured_bytes: tuple[int, int] | None = None
    """Peak of forward and backward at ``measured_at``: under autocast, in fp32."""
    fp32_peak_bytes: int | None = None
    """Peak of the whole step in fp32 at the record's own batch size."""


@dataclass(frozen=True, kw_only=True)
class MemoryRecord:
    """One training step's ledger. ``sum(line.bytes for line in lines) == total_peak_bytes``.

    On every device the total is the bytes of tensor storages; ``allocated_bytes`` and its like are
    what CUDA's allocator made of them.
    """

    recipe: str
    precision: str
    device: str
    batch_size: int
    """Samples of a step, on all ranks together."""
    total_peak_bytes: int
    peak_phase: str
    """'forward', 'backward' or 'optimizer'."""
    peak_module: str
    lines: tuple[MemoryLine, ...]
    modules: tuple[ModuleMemory, ...]
    timeline: tuple[TimelinePoint, ...]
    requested_bytes: int | None = None
    allocated_bytes: int | None = None
    reserved_bytes: int | None = None
    """The three numbers of CUDA's caching allocator at its own peak; None on a CPU."""
    memtracker_peak_bytes: int | None = None
    """Peak that ``torch.distributed._tools.mem_tracker.MemTracker`` counts on a repeat of the step
    with the same batch; None where it was not asked, or could not follow."""
    break_even: BreakEven | None = None
    notes: tuple[str, ...] = ()
    predicted: bool = False
    """Whether the step was traced on tensors without contents; it was run and watched otherwise."""
    assumptions: tuple[str, ...] = ()
    """Of a prediction: what it takes for granted."""
    margin_bytes: int | None = None
    """Of a prediction for a GPU: what to leave free beyond ``reserved_bytes``; see assumptions."""
    options: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    parallel: str = ""
    """How several ranks share the training, of which this is one; empty in a process alone."""
    ranks: int = 1
    sent_bytes: dict[str, int] = field(default_factory=dict)
    """Of a prediction for several ranks: what one sends a step on a ring, by collective."""
