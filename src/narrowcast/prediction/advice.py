"""Whether a 16-bit precision pays: the same step in fp32, and from which batch size on.

Autocast adds what does not shrink with the batch and saves what grows with it, so it has a
break-even (``memory.break_even``), which is searched on sizes alone. A plan that keeps its weights
in 16 bits adds nothing; that it takes less is traced at the batch asked for and at the smallest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from narrowcast.errors import NarrowcastError
from narrowcast.memory.break_even import break_even_of
from narrowcast.memory.measure import MemoryLedger
from narrowcast.plan import Plan, plan_named
from narrowcast.prediction.trace import Stage, trace_steps
from narrowcast.profiling import Bench, Measurements, break_even_search, sides_of
from narrowcast.records.memory import BreakEven, MemoryRecord
from narrowcast.units import format_bytes

__all__ = ["advise"]

# Batch norm refuses a batch of one.
_LEAST = 2


def advise(
    record: MemoryRecord,
    bench: Bench,
    ledger: MemoryLedger,
    *,
    stage: Stage,
    build: Callable[[Plan, Stage], Bench],
) -> MemoryRecord:
    """Add the comparison with fp32 to a predicted record.

    A step that cannot be traced at another batch size leaves a note in its place.
    """
    try:
        if bench.policy.autocasts:
            found = _break_even(record, bench, ledger, stage)
        else:
            found = _without_casts(record, bench, stage, build)
    except NarrowcastError as error:
        note = f"no comparison with fp32: at another batch size, {error.message}"
        return replace(record, notes=(*record.notes, note))
    return replace(record, break_even=found)


def _break_even(
    record: MemoryRecord, bench: Bench, ledger: MemoryLedger, stage: Stage
) -> BreakEven:
    with stage:
        fp32 = bench.in_fp32()
    fp32_ledger = trace_steps(fp32, stage)
    size = record.batch_size
    traces = Measurements(
        bench,
        fp32.policy,
        known={size: sides_of(ledger, fp32_ledger)},
        surroundings=stage,
        fake=stage.fake,
        watching=stage.watching,
    )
    bracket = break_even_search(traces, size)
    return break_even_of(record, fp32_ledger.record(), bracket, traces.known, measured=set())


def _without_casts(
    record: MemoryRecord, bench: Bench, stage: Stage, build: Callable[[Plan, Stage], Bench]
) -> BreakEven:
    """Compare whole steps: nothing is there in 16 bits beside something in fp32."""
    plain = plan_named("fp32")
    policy = replace(plain.policy, keep_fp32=bench.policy.keep_fp32)
    fp32 = build(plain.with_policy(policy), stage)
    size, least = record.batch_size, min(_LEAST, record.batch_size)
    peaks = {size: (record.total_peak_bytes, _peak(fp32, stage, steps=2))}
    if least != size:
        # Both have stepped, so that their optimizers have all their state.
        narrow, full = (_peak(_at(one, least, stage), stage, steps=1) for one in (bench, fp32))
        peaks[least] = (narrow, full)
    saved = {batch: full - narrow for batch, (narrow, full) in peaks.items()}
    slope = (saved[size] - saved[least]) / (size - least) if size > least else saved[size] / size
    return BreakEven(
        batch_size=None,
        cast_bytes=0,
        saved_bytes_per_sample=slope,
        why=_sentence(record.precision, peaks),
        fp32_peak_bytes=peaks[size][1],
    )


def _sentence(precision: str, peaks: dict[int, tuple[int, int]]) -> str:
    traced = ", ".join(
        f"{format_bytes(narrow)} against {format_bytes(full)} at batch {batch}"
        for batch, (narrow, full) in sorted(peaks.items())
    )
    if all(narrow <= full for narrow, full in peaks.values()):
        return f"{precision} keeps no copies of its weights, so it always pays ({traced})"
    return f"{precision} does not always pay ({traced})"


def _at(bench: Bench, size: int, stage: Stage) -> Bench:
    with stage:
        batch: Any = stage.fake(bench.batch_of(size))
    return replace(bench, batch=batch)


def _peak(bench: Bench, stage: Stage, *, steps: int) -> int:
    return trace_steps(bench, stage, steps=steps).peak_bytes
