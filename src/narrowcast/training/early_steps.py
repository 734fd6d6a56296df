"""What is measured on two early steps of the real training: executed dtypes, and memory.

Both only observe: a training that is measured and one that is not are equal bit for bit (a test).
The first step makes the optimizer's state, so the second and third are the first that look like
all the others.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from narrowcast.engine.engine import Engine
from narrowcast.memory.measure import MemoryLedger
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.records.run import RunRecord

__all__ = ["DTYPES_AT", "MEMORY_AT", "EarlySteps", "PeakMemory"]

DTYPES_AT = 2
MEMORY_AT = 3


class EarlySteps:
    """The measurements of one run; a run of fewer steps is measured on its last."""

    def __init__(self, engine: Engine, optimizer: Optimizer, *, steps: int, wanted: bool) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._dtypes_at = min(DTYPES_AT, steps) if wanted else 0
        self._memory_at = min(MEMORY_AT, steps) if wanted else 0
        self._dtypes = ExecutedDtypes()
        self._ledger: MemoryLedger | None = None

    def measures(self, step: int) -> bool:
        """Whether this step is slowed down by being measured."""
        return step in (self._dtypes_at, self._memory_at)

    def memory(self, step: int) -> AbstractContextManager[object]:
        """Return the ledger to put round a whole step, or nothing."""
        if step != self._memory_at:
            return nullcontext()
        model, device = self._engine.model, self._engine.device
        self._ledger = MemoryLedger(model, self._optimizer, device=device)
        return self._ledger

    def dtypes(self, step: int) -> AbstractContextManager[object]:
        """Return what to put round forward and backward of each micro-batch of a step."""
        return self._dtypes if step == self._dtypes_at else nullcontext()

    def inputs(self, batch: Any) -> None:
        """Tell the ledger, if one is open, which tensors are the batch."""
        if self._ledger is not None:
            self._ledger.inputs(batch)

    def add_to(self, record: RunRecord, step: int) -> RunRecord:
        """Return the record with what was measured on the step that has just been taken."""
        if step == self._dtypes_at:
            is_honoured, notes = honoured(self._engine.policy, self._dtypes.counts)
            record = replace(
                record,
                executed_dtypes=self._dtypes.counts,
                precision_honoured=is_honoured,
                precision_notes=notes,
            )
        if step == self._memory_at and self._ledger is not None:
            memory = self._ledger.record(
                recipe=record.recipe,
                precision=record.precision,
                batch_size=record.batch_size,
            )
            record = replace(record, memory=replace(memory, options=record.options))
            self._ledger = None
            if self._engine.device.type != "cuda":
                record = replace(record, peak_bytes=memory.total_peak_bytes)
        return record


class PeakMemory:
    """The largest amount that torch's CUDA allocator held during training steps; None elsewhere."""

    def __init__(self, device: torch.device, known: int | None) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._largest = known or 0
        self.forget()

    def forget(self) -> None:
        """Leave out what was allocated since the last look: an evaluation, a checkpoint."""
        if self._is_cuda:
            torch.cuda.reset_peak_memory_stats(self._device)

    def look(self) -> None:
        """Take in what was allocated since the last look."""
        if self._is_cuda:
            self._largest = max(self._largest, torch.cuda.max_memory_allocated(self._device))

    def add_to(self, record: RunRecord) -> RunRecord:
        """Return the record with the peak so far."""
        return replace(record, peak_bytes=self._largest) if self._is_cuda else record
