"""Whether a training stayed within the budget that its plan was found for."""

from __future__ import annotations

from narrowcast.records.run import RunRecord

__all__ = ["budget_not_kept"]


def budget_not_kept(record: RunRecord) -> str:
    """Say by how much the peak exceeded the budget, or that it was not measured; "" if it fits."""
    budget, peak = record.budget_bytes, _peak(record)
    if budget is None:
        return ""
    if peak is None:
        return f"the budget of {budget:,} bytes was not checked: memory was not measured"
    if peak <= budget:
        return ""
    return (
        f"the peak of {peak:,} bytes exceeded the budget of {budget:,} by {peak - budget:,} "
        f"({peak / budget - 1:.1%})"
    )


def _peak(record: RunRecord) -> int | None:
    """Return what the training took; on a GPU that is what its allocator reserved."""
    reserved = record.memory.reserved_bytes if record.memory is not None else None
    known = [size for size in (record.peak_bytes, reserved) if size is not None]
    return max(known, default=None)
