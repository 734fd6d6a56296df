"""What is measured on a few steps of the real training: executed dtypes, and memory.

Both only observe: a training that is measured and one that is not are equal bit for bit (a test).
The first step makes the optimizer's state, so the second and third are the first that look like
all the others. Dtypes are looked at once more on the last step, since a model may switch autocast
off on the way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.optim import Optimizer

from narrowcast.engine.engine import Engine
from narrowcast.memory.measure import MemoryLedger
from narrowcast.parallel.replicas import Replicas
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.precision.functions import unused_functions
from narrowcast.precision.islands import unused_islands
from narrowcast.records.run import RunRecord

__all__ = ["DTYPES_AT", "MEMORY_AT", "EarlySteps", "PeakMemory"]

DTYPES_AT = 2
MEMORY_AT = 3


class EarlySteps:
    """The measurements of one run; a run of fewer steps is measured on its last."""

    def __init__(
        self,
        engine: Engine,
        optimizer: Optimizer,
        replicas: object = None,
        *,
        steps: int,
        dtypes: bool,
        memory: bool,
    ) -> None:
        self._engine = engine
        self._optimizer = optimizer
        self._replicas = replicas
        self._dtypes_at = {min(DTYPES_AT, steps), steps} if dtypes else set()
        # No ledger sees what compiled code allocates.
        self._memory_at = min(MEMORY_AT, steps) if memory and engine.compiled is None else 0
        self._dtypes = ExecutedDtypes()
        self._widened_before: int | None = None
        """What the chunked loss had widened when the watched step began."""
        self._ledger: MemoryLedger | None = None

    def measures(self, step: int) -> bool:
        """Whether this step is slowed down by being measured."""
        return step in self._dtypes_at or step == self._memory_at

    def memory(self, step: int) -> AbstractContextManager[object]:
        """Return the ledger to put round a whole step, or nothing."""
        if step != self._memory_at:
            return nullcontext()
        model, device = self._engine.model, self._engine.device
        self._ledger = MemoryLedger(model, self._optimizer, device=device)
        if isinstance(self._replicas, Replicas):
            self._ledger.gradients(self._replicas.buckets())
        return self._ledger

    def dtypes(self, step: int) -> AbstractContextManager[object]:
        """Return what to put round forward and backward of each micro-batch of a step."""
        if step in self._dtypes_at and self._widened_before is None:
            self._widened_before = self._engine.levers.widened_products()
        watches = step in self._dtypes_at and self._engine.compiled is None
        return self._dtypes if watches else nullcontext()

    def drawing(self) -> AbstractContextManager[None]:
        """Return what to draw a batch in: a ledger that is open does not look."""
        return nullcontext() if self._ledger is None else self._ledger.drawing()

    def inputs(self, batch: Any) -> None:
        """Tell the ledger, if one is open, which tensors are the batch."""
        if self._ledger is not None:
            self._ledger.inputs(batch)

    def add_to(self, record: RunRecord, step: int) -> RunRecord:
        """Return the record with what was measured on the step that has just been taken."""
        if step in self._dtypes_at:
            record = self._add_dtypes(record, step)
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

    def _add_dtypes(self, record: RunRecord, step: int) -> RunRecord:
        """Add a step's counts; honoured is what was so on every step that was watched.

        Each step is judged alone: joined, what a late one executed in fp32 could pass for the
        share of modules that are kept so.
        """
        model, seen = self._engine.model, self._engine.compiled or self._dtypes
        counts = seen.counts
        unused = unused_islands(model, seen.has_read) | unused_functions(model)
        self._dtypes = ExecutedDtypes()
        widened = self._engine.levers.widened_products() - (self._widened_before or 0)
        self._widened_before = None
        is_honoured, notes = honoured(self._engine.policy, counts, unused, widened=widened)
        if self._engine.compiled is not None:
            notes = (*notes, "counted in the graphs that were compiled, once each")
        if record.precision_honoured is not None and notes != record.precision_notes:
            notes = (*record.precision_notes, *(f"on step {step}: {note}" for note in notes))
        return replace(
            record,
            executed_dtypes=_either(record.executed_dtypes, counts),
            precision_honoured=is_honoured and record.precision_honoured is not False,
            precision_notes=notes,
        )


def _either(
    a: Mapping[str, Mapping[str, int]], b: Mapping[str, Mapping[str, int]]
) -> dict[str, dict[str, int]]:
    """Join the calls of two steps by kind and format, sorted; of equal ones, one step's."""
    total: dict[str, dict[str, int]] = {}
    for kind in sorted({*a, *b}):
        calls = Counter(a.get(kind, {})) | Counter(b.get(kind, {}))
        total[kind] = dict(sorted(calls.items()))
    return total


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
