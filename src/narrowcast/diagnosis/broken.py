"""Rules for a step whose loss or gradients are not finite: where it begins, and by what.

Each operation with which non-finite values began is one finding. A constant that the format does
not hold is named in its place wherever it stands behind it: an epsilon that became 0 divides
several operations further on, and a mask that met minus infinity is noticed by the softmax.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from narrowcast.diagnosis.evidence import Evidence, ancestors
from narrowcast.formats import FORMATS, float_format
from narrowcast.memory.modules import ROOT
from narrowcast.records.diagnosis import ExecutedOp, Finding, Kind
from narrowcast.records.ranges import TensorRange
from narrowcast.replay.culprit import BadOp, bad_ops, fed

_LIMITS = frozenset(form.max for form in FORMATS.values())

__all__ = ["broken_findings", "called", "hidden_overflows", "named", "told"]


def broken_findings(evidence: Evidence) -> tuple[Finding, ...]:
    """Return a finding for each operation with which it began, in the order of execution."""
    events = evidence.low.events
    found: dict[tuple[str, str, int], Finding] = {}
    for bad in bad_ops(events):
        finding = _constant_behind(bad, events) or _overflow(bad, evidence)
        found.setdefault((finding.kind, finding.module, finding.line), finding)
    return tuple(found.values())


def hidden_overflows(evidence: Evidence) -> tuple[Finding, ...]:
    """Return a finding for each operation whose infinity was divided away before it was seen.

    ``x * rsqrt(mean(x * x))`` of large x is 0 and finite. Many such infinities do no harm, so these
    findings explain an accusation that there is, and are none by themselves.
    """
    events = evidence.low.events
    found: dict[tuple[str, str, int], Finding] = {}
    for op in events:
        made_here = any(values.infs for values in op.outputs) and all(
            values.is_finite for values in op.inputs
        )
        if op.phase != "forward" or not op.inputs or not made_here or op.infinite_constant:
            continue
        bad = BadOp(op=op, origin="operation", evidence=(*fed(op, events), op))
        finding = _constant_behind(bad, events) or _overflow(bad, evidence)
        found.setdefault((finding.kind, finding.module, finding.line), finding)
    return tuple(found.values())


def told(op: ExecutedOp) -> dict[str, object]:
    """Return the fields by which a finding names the place of an operation."""
    return {
        "module": named(op.module),
        "op": op.op,
        "phase": op.phase,
        "file": op.file,
        "line": op.line,
        "code": op.code,
    }


def _overflow(bad: BadOp, evidence: Evidence) -> Finding:
    """Accuse the operation itself."""
    op, loss = bad.op, evidence.reference.loss
    kind: Kind = "backward overflow" if op.phase == "backward" else "forward overflow"
    made = next((values for values in op.outputs if not values.is_finite), None)
    largest_input = max((values.amax for values in op.inputs), default=0.0)
    figures = {"largest finite input": largest_input, "loss in fp32": loss}
    parts = [
        f"{called(op)} is the first operation of the {op.phase} pass whose result is not finite"
    ]
    if made is not None:
        limit = float_format(made.dtype).max if made.dtype in FORMATS else 0.0
        figures |= {
            "infinite": made.infs,
            "nan": made.nans,
            "elements": made.numel,
            "largest finite result": made.amax,
            "largest number of the format": limit,
        }
        parts.append(
            f"{_broken(made)} of {made.numel} elements in {made.dtype}, which ends at {limit:g}"
        )
    read = [name for name in op.sources if name not in ("", "outside")]
    what = f" ({', '.join(dict.fromkeys(read))})" if read else ""
    where = f"from finite inputs{what} of up to {largest_input:.4g}"
    if bad.origin == "outside":
        where = f"from {bad.source or 'values'} that was not finite before the step"
    elif bad.origin == "infinite constant":
        where = "from an infinity that is a constant of the program"
    scale = ""
    if op.phase == "backward" and evidence.scale != 1:
        scale = f", at a loss scale of {evidence.low.scale:g}, the lowest there is"
        figures["loss scale"] = evidence.low.scale
    return Finding(
        kind=kind,
        explanation=(
            f"{parts[0]} ({'; '.join(parts[1:])}), {where}{scale}. In fp32 the same step gives a "
            f"loss of {loss:.4g} and finite gradients."
        ),
        figures={name: float(value) for name, value in figures.items()},
        evidence=bad.evidence,
        **told(op),  # type: ignore[arg-type]
    )


def _constant_behind(bad: BadOp, events: Sequence[ExecutedOp]) -> Finding | None:
    """Return a finding for the constant that the operation was spoilt by, if there is one."""
    meets_zero = any(values.zeros for values in bad.op.inputs)
    for op in ancestors(bad.op, events):
        for value, becomes, how in _spoilt_constants(op):
            if becomes == 0 and not meets_zero:
                continue  # whatever broke it was not a division, a root or a logarithm of 0
            shown = "0" if becomes == 0 else f"{becomes:g}"
            at = "" if op is bad.op else f"; {called(bad.op)} then gives {_outcome(bad.op)}"
            return Finding(
                kind="constant out of range",
                explanation=(
                    f"{value:g} is {shown} in {op.dtype}, {how}: {called(op)} loses it{at}. In "
                    "fp32 the same step is finite."
                ),
                figures={"constant": value, "becomes": becomes},
                evidence=(op, *(each for each in bad.evidence if each.index != op.index)),
                **told(op),  # type: ignore[arg-type]
            )
    return None


def _spoilt_constants(op: ExecutedOp) -> Iterator[tuple[float, float, str]]:
    """Yield (value, what became of it, how) for constants of which an operation lost the effect."""
    form = FORMATS.get(op.dtype)
    if form is None or not op.outputs:
        return
    made = op.outputs[0]
    for lost in op.constants:
        if lost.becomes == 0 and made.zeros:
            yield lost.value, 0.0, f"whose smallest number is {form.smallest_subnormal:.1e}"
        elif lost.becomes != 0 and made.infs:
            yield lost.value, lost.becomes, f"whose largest number is {form.max:g}"
    for values in op.inputs:
        if _is_one_number(values) and "_to_copy" in op.op:
            if values.amax > form.max and made.infs:
                yield values.amax, float("inf"), f"whose largest number is {form.max:g}"
            elif 0 < values.amax <= form.smallest_subnormal / 2 and made.zeros > values.zeros:
                yield values.amax, 0.0, f"whose smallest number is {form.smallest_subnormal:.1e}"
    is_sum = op.op.startswith(("aten.add", "aten.sub"))
    # Exactly the last number of some format is no result but torch.finfo(...).min, as a mask.
    ends = [v.amax for v in op.inputs if v.amax in _LIMITS and v.amax >= form.max]
    if is_sum and made.infs and ends:
        yield (
            -ends[0],
            float("-inf"),
            f"once a number is added to it: {op.dtype} ends at {form.max:g}",
        )


def _is_one_number(values: TensorRange) -> bool:
    """Whether all elements that are not 0 have one and the same magnitude: a mask, an epsilon."""
    return values.amax == values.amin > 0


def called(op: ExecutedOp) -> str:
    """Name an operation and its module in a sentence."""
    module = named(op.module)
    return f"{op.op} in module {module!r}" if module else op.op


def named(module: str) -> str:
    """Return a module's dotted name, which is '' for the model itself."""
    return "" if module == ROOT else module


def _broken(values: TensorRange) -> str:
    counts = [f"{values.infs} infinite"] if values.infs else []
    counts += [f"{values.nans} NaN"] if values.nans else []
    return " and ".join(counts)


def _outcome(op: ExecutedOp) -> str:
    made = next((values for values in op.outputs if not values.is_finite), None)
    return "values that are not finite" if made is None else f"{_broken(made)} values"
