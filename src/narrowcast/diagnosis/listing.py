"""The model's own source with the values of the replayed step beside each line.

Which lines: those on which something was computed, and what stands between them where that is
little, so that a reader finds the places again.
"""

from __future__ import annotations

import linecache
from collections import defaultdict
from collections.abc import Iterator, Sequence

from narrowcast.ranges.what_if import merged
from narrowcast.records.diagnosis import ExecutedOp, Finding, SourceLine
from narrowcast.records.ranges import TensorRange

__all__ = ["annotated_source"]

# Lines between two that computed are shown with them, up to so many.
_GAP = 3
# They hand values on as they are; a cast of a weight is no value of its line.
_NO_VALUES = ("aten._to_copy", "aten.view", "aten._unsafe_view", "aten.t.", "aten.transpose",
              "aten.permute", "aten.expand", "aten.detach", "aten.slice", "aten.select",
              "aten.split", "aten.unbind", "aten.clone", "aten.empty", "aten.zeros", "aten.ones",
              "aten.squeeze", "aten.unsqueeze", "aten.alias", "aten.as_strided")  # fmt: skip

Place = tuple[str, int]


def annotated_source(
    events: Sequence[ExecutedOp], accused: Sequence[Finding] = ()
) -> tuple[SourceLine, ...]:
    """Return the lines on which a replayed step computed, with their values, file by file.

    `accused` are the findings whose lines are to be marked.
    """
    forward, backward = _by_line(events, "forward"), _by_line(events, "backward")
    marked = {(finding.file, finding.line) for finding in accused}
    return tuple(
        SourceLine(
            file=file,
            line=line,
            code=linecache.getline(file, line).rstrip("\n"),
            module=_largest(forward.get((file, line), [])),
            forward=_values(forward.get((file, line), [])),
            backward=_values(backward.get((file, line), [])),
            accused=(file, line) in marked,
        )
        for file, line in _places({*forward, *backward})
    )


def _by_line(events: Sequence[ExecutedOp], phase: str) -> dict[Place, list[ExecutedOp]]:
    found: defaultdict[Place, list[ExecutedOp]] = defaultdict(list)
    for event in events:
        is_placed = event.phase == phase and event.line and not event.recomputed
        if is_placed and event.outputs and not event.op.startswith(_NO_VALUES):
            found[event.file, event.line].append(event)
    return dict(found)


def _places(computed: set[Place]) -> Iterator[Place]:
    """Yield the places in order, with the lines between those that lie near each other."""
    before: Place | None = None
    for file, line in sorted(computed):
        if before is not None and before[0] == file and line - before[1] <= _GAP:
            yield from ((file, between) for between in range(before[1] + 1, line))
        yield file, line
        before = file, line


def _values(events: Sequence[ExecutedOp]) -> TensorRange | None:
    outputs = [values for event in events for values in event.outputs if values.numel]
    return merged(outputs) if outputs else None


def _largest(events: Sequence[ExecutedOp]) -> str:
    """Name the module in which the line gave the largest values; not finite is larger than all."""

    def size(event: ExecutedOp) -> tuple[bool, float]:
        broken = any(not values.is_finite for values in event.outputs)
        return broken, max(values.amax for values in event.outputs)

    return max(events, key=size).module if events else ""
