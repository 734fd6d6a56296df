"""Rules for what a forward pass loses without a word: positions that collapse, sums that stop.

Each rule reads one step's evidence and returns what it accuses, the earliest place first. The
thresholds are stated where they stand: each is far from what rounding does to a healthy training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median

from narrowcast.diagnosis.broken import called, told
from narrowcast.diagnosis.evidence import Evidence, gradient_errors, parent
from narrowcast.formats import FORMATS
from narrowcast.records.diagnosis import ExecutedOp, Finding
from narrowcast.replay.fidelity import SLOW, near

__all__ = ["MOST", "accumulations", "collapses", "swallowed"]

MOST = 0.5
"""'Most of it': a share above which what is left is the smaller part."""

# Of distinct whole numbers. A few rare large ones may well collide in a healthy training (a count
# of 300 among counts below 256); a table of positions loses much of itself at once.
_COLLAPSED = 0.05
# bf16 gradients of healthy models are off by some hundredths of their size, fp16 ones by less.
_ASTRAY = 0.25
# Sums of so many addends are long: in bf16 equal addends begin to be absorbed after 256, and any
# sum of fewer than eight keeps three bits of the smallest of equal ones.
_LONG = 8
# How averages are written: into the buffer, or beside it and then put in its place.
_IN_PLACE = ("aten.add_.", "aten.sub_.", "aten.lerp_.")
_SUMS = ("aten.add.", "aten.sub.", "aten.lerp.")
_SCALINGS = ("aten.mul.", "aten.mul_.", "aten._to_copy.", "aten.clone.", "aten.div.")
# From what a buffer held to the sum: a factor, a cast, a copy.
_MOST_STEPS = 4
# Of numbers beside a constant: a few that vanish are as many that are next to 0 anyway.
_NEARLY_ALL = 0.9


def collapses(evidence: Evidence) -> tuple[Finding, ...]:
    """Accuse casts of whole numbers after which distinct ones are equal, and which are used.

    A batch may hold so few of the numbers that none of them meet; then it counts that they were
    changed and that the step's gradients are other ones than in fp32.
    """
    events = evidence.low.events
    read = {index for op in events for index in op.fed_by}
    is_astray = _is_astray(evidence)
    found: dict[tuple[str, int], Finding] = {}
    for op in events:
        if op.phase != "forward" or op.collapsed is None or op.index not in read:
            continue
        changes = is_astray and bool(op.local_error)
        if op.collapsed < _COLLAPSED and not changes:
            continue
        largest = max((values.amax for values in (*op.inputs, *op.outputs)), default=0.0)
        form = FORMATS[op.dtype]
        step = form.ulp(largest)
        source = next((name for name in op.sources if name), "")
        finding = Finding(
            kind="positions collapse",
            explanation=(
                f"whole numbers of up to {largest:g}"
                f"{f' from {source}' if source else ''} become {op.dtype}, whose numbers are "
                f"{step:g} apart there: {_consequence(op, evidence)}."
            ),
            figures={"collapsed": op.collapsed, "largest": largest, "step": step},
            evidence=(op, *[each for each in events if op.index in each.fed_by][:2]),
            **told(op),  # type: ignore[arg-type]
        )
        found.setdefault((op.module, op.line), finding)
    return tuple(found.values())


def _is_astray(evidence: Evidence) -> bool:
    """Whether half of the gradients are off by more than a quarter of themselves."""
    errors = gradient_errors(evidence.low, evidence.reference).values()
    return bool(errors) and median(errors) >= _ASTRAY


def _consequence(op: ExecutedOp, evidence: Evidence) -> str:
    if (op.collapsed or 0) >= _COLLAPSED:
        return f"{op.collapsed:.0%} of the distinct ones are equal to others afterwards"
    errors = gradient_errors(evidence.low, evidence.reference).values()
    return (
        "they are rounded to multiples of it, and gradients differ from those of fp32 by "
        f"{median(errors):.0%} of their size (median over the parameters)"
    )


def accumulations(evidence: Evidence) -> tuple[Finding, ...]:
    """Accuse long sums that are carried in 16 bits and no longer take what is added to them."""
    events = evidence.low.events
    found = [*_loops(events), *_running_sums(events), *_running_averages(events)]
    return tuple(sorted(found, key=lambda finding: finding.evidence[0].index))


def swallowed(evidence: Evidence) -> tuple[Finding, ...]:
    """Accuse sums in which numbers vanish beside a constant, as small rates do in ``1 - rate``.

    ``1 + x`` of a small x does so in healthy models too: it counts where the gradients are others,
    and for whoever asks because the losses are.
    """
    if not _is_astray(evidence):
        return ()
    events = evidence.low.events
    read = {index for op in events for index in op.fed_by}
    return tuple(
        _absorbed(
            op,
            f"takes small numbers and a constant together in {op.dtype}: of its elements",
            op.swallowed,
            1,
        )
        for op in events
        if op.phase == "forward"
        and op.index in read
        and op.swallowed is not None
        and op.swallowed >= _NEARLY_ALL
    )


def _loops(events: Sequence[ExecutedOp]) -> Iterator[Finding]:
    """Find sums that one line of one module adds to again and again."""
    chains: dict[int, list[ExecutedOp]] = {}
    for op in events:
        if op.absorbed is None or not op.op.startswith(("aten.add", "aten.sub")):
            continue
        before = next((chains[i] for i in op.fed_by if i in chains and _alike(events[i], op)), [])
        chains[op.index] = [*before, op]
        if before:
            del chains[before[-1].index]
    for chain in chains.values():
        late = chain[-max(1, len(chain) // 4) :]
        absorbed = sum(op.absorbed or 0.0 for op in late) / len(late)
        if len(chain) >= _LONG and absorbed >= MOST:
            yield _absorbed(
                late[0],
                f"adds {len(chain)} times to one sum, which is kept in {late[0].dtype}: of the "
                f"last {len(late)} times",
                absorbed,
                len(chain),
            )


def _alike(a: ExecutedOp, b: ExecutedOp) -> bool:
    return (a.phase, a.module, a.file, a.line) == (b.phase, b.module, b.file, b.line)


def _running_sums(events: Sequence[ExecutedOp]) -> Iterator[Finding]:
    """Find cumulative sums whose steps vanish."""
    for op in events:
        if op.op.startswith("aten.cumsum") and (op.absorbed or 0) >= MOST:
            length = max((max(values.shape, default=1) for values in op.outputs), default=1)
            if length >= _LONG:
                what = f"stores its running sum in {op.dtype}: over all places"
                yield _absorbed(op, what, op.absorbed or 0.0, length)


def _running_averages(events: Sequence[ExecutedOp]) -> Iterator[Finding]:
    """Find buffers in 16 bits that a forward pass adds to in vain, in place or by a new tensor."""
    for op in events:
        if op.phase != "forward" or (op.absorbed or 0) < MOST or _has_arrived(op, events):
            continue
        if op.op.startswith(_IN_PLACE):
            buffer = _written_buffer(op, events)
        elif op.op.startswith("aten.copy_."):
            buffer = _stored_average(op, events)
        else:
            buffer = _replaced_buffer(op, events)
        if buffer:
            what = f"updates {buffer!r}, which is kept in {op.dtype}: of its elements"
            yield _absorbed(op, what, op.absorbed or 0.0, 1, whose=parent(buffer))


def _written_buffer(op: ExecutedOp, events: Sequence[ExecutedOp]) -> str:
    """Return the name of the weight or buffer that an operation in place writes into."""
    while op.fed_by and op.fed_by[0] >= 0:
        op = events[op.fed_by[0]]
        if not op.op.partition(".")[2].partition(".")[0].endswith("_"):
            return ""
    name = op.sources[0] if op.sources else ""
    return "" if name in ("batch", "outside") else name


def _has_arrived(op: ExecutedOp, events: Sequence[ExecutedOp]) -> bool:
    """Whether what is added is a factor times a distance from the mean that is as good as none."""
    if op.op.startswith(("aten.lerp", "aten.copy_.")) or not op.outputs:
        return False  # `fidelity` has looked at the distance itself; only slow ones are copied
    mean, eps = op.outputs[0].rms, FORMATS[op.dtype].eps
    for addend, writer in zip(op.inputs, op.fed_by, strict=False):
        distance, made = addend, events[writer] if writer >= 0 else None
        if made is not None and made.op.startswith(_SCALINGS) and made.fed_by:
            distance, writer = made.inputs[0], made.fed_by[0]
            made = events[writer] if writer >= 0 else None
        if made is None or not made.op.startswith("aten.sub."):
            continue
        # With alpha=... the addend is the distance itself, and the weight is not known.
        weight = addend.rms / distance.rms if distance.rms else 1.0
        if distance.rms <= near(weight, eps) * mean:
            return True
    return False


def _replaced_buffer(op: ExecutedOp, events: Sequence[ExecutedOp]) -> str:
    """Return the buffer that a sum is left in, where what it was is one of the addends."""
    if not op.op.startswith(_SUMS):
        return ""
    buffer = op.keeps
    for later in events[op.index + 1 :] if not buffer else ():
        if later.fed_by and later.fed_by[-1] == op.index and later.op.startswith("aten.copy_."):
            buffer = later.keeps or _written_buffer(later, events)
            break
    return buffer if buffer and _comes_from(buffer, op, events) else ""


def _stored_average(op: ExecutedOp, events: Sequence[ExecutedOp]) -> str:
    """Return the buffer that a slow average, carried in fp32, is copied into."""
    buffer, writer = _written_buffer(op, events), op.fed_by[-1]
    if not buffer or writer < 0 or not events[writer].op.startswith(_SUMS):
        return ""
    added = events[writer]
    smallest = min((values.rms for values in added.inputs), default=0.0)
    is_slow = smallest < SLOW * max((values.rms for values in added.outputs), default=0.0)
    return buffer if is_slow and _comes_from(buffer, added, events) else ""


def _comes_from(buffer: str, op: ExecutedOp, events: Sequence[ExecutedOp]) -> bool:
    """Whether an operation reads what a buffer held, multiplied and cast at most."""
    level = [op]
    for _ in range(_MOST_STEPS):
        if any(buffer in each.sources for each in level):
            return True
        feeding = [events[i] for each in level for i in each.fed_by if i >= 0]
        level = [each for each in feeding if each.op.startswith(_SCALINGS)]
    return False


def _absorbed(
    op: ExecutedOp, what: str, share: float, addends: int, *, whose: str | None = None
) -> Finding:
    place = told(op) | ({} if whose is None else {"module": whose})
    return Finding(
        kind="low-precision accumulation",
        explanation=(
            f"{called(op)} {what}, {share:.0%} of the addends that are not 0 changed nothing."
        ),
        figures={"absorbed": share, "addends": float(addends)},
        evidence=(op,),
        **place,  # type: ignore[arg-type]
    )
