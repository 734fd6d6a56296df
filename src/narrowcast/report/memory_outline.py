"""What a report says of a memory ledger: the peak in one sentence, then where it goes."""

from __future__ import annotations

from collections.abc import Iterator

from narrowcast.records.memory import CATEGORIES, MemoryRecord, TimelinePoint
from narrowcast.report.parts import (
    category_legend,
    options_text,
    ordered,
    phase_bands,
    segments,
)
from narrowcast.report.shapes import (
    Bar,
    BarPanel,
    Block,
    Chart,
    Column,
    Facts,
    LinePanel,
    Outline,
    Panel,
    Prose,
    Section,
    Series,
    Table,
)
from narrowcast.report.wording import category_colour, number, relative, spaced
from narrowcast.units import format_bytes

__all__ = ["memory_blocks", "outline_of_memory"]

_TERMINAL_MODULES = 12


def outline_of_memory(record: MemoryRecord) -> Outline:
    """Lay out one ledger."""
    what = "Predicted memory" if record.predicted else "Memory"
    predicted = "predicted " if record.predicted else ""
    shared = f", a rank of {record.ranks} ({record.parallel})" if record.parallel else ""
    sections = [
        Section(
            key="memory", title="Where the peak goes", blocks=memory_blocks(record), brief=True
        ),
        Section(key="modules", title="By module", blocks=module_blocks(record)),
        Section(
            key="step",
            title=f"The step that was {'predicted' if record.predicted else 'measured'}",
            blocks=(
                Facts(
                    pairs=(
                        ("recipe", record.recipe),
                        ("precision", record.precision),
                        ("batch size", str(record.batch_size)),
                        ("device", record.device),
                        *_ranks(record),
                        ("options", options_text(record.options)),
                    )
                ),
            ),
        ),
    ]
    return Outline(
        title=f"{record.recipe} in {record.precision}: "
        f"{predicted}{format_bytes(record.total_peak_bytes)}",
        subtitle=f"{what} of one training step, batch {record.batch_size}, "
        f"on {record.device}{shared}",
        sections=tuple(s for s in sections if s.blocks),
        footer="Categories are counted by storage and add up to the peak to the byte.",
    )


def _ranks(record: MemoryRecord) -> tuple[tuple[str, str], ...]:
    """Say how many ranks share the batch, and which of them this is about."""
    if not record.parallel:
        return ()
    return (("ranks", f"{record.ranks} ({record.parallel}); this is the memory of one"),)


def memory_blocks(record: MemoryRecord) -> tuple[Block, ...]:
    """Say where the peak lies and what it consists of, and draw the step."""
    # A name in parentheses, such as "(outside modules)", is the ledger's and not a module's.
    inside = record.peak_module and not record.peak_module.startswith("(")
    where = f", in {record.peak_module}" if inside else ""
    the = "The predicted" if record.predicted else "The"
    size = format_bytes(record.total_peak_bytes)
    peak = f"{the} peak of {size} lies in {record.peak_phase}{where}."
    lines = (peak, *_reserved(record), *_break_even(record))
    blocks: list[Block] = [Prose(lines=lines), _lines_table(record), _chart(record)]
    if record.allocated_bytes is not None:
        blocks.append(_allocator(record))
    assumed = tuple(f"assumed: {assumption}" for assumption in record.assumptions)
    if assumed or record.notes:
        blocks.append(Prose(lines=(*assumed, *record.notes), kind="list"))
    return tuple(blocks)


def _reserved(record: MemoryRecord) -> Iterator[str]:
    """Say what a GPU must have, which is more than its tensors."""
    if record.predicted and record.reserved_bytes is not None:
        margin = format_bytes(record.margin_bytes or 0)
        yield (
            f"On {record.device} the allocator reserves {format_bytes(record.reserved_bytes)} for "
            f"it; leave {margin} free beside that."
        )


def _break_even(record: MemoryRecord) -> Iterator[str]:
    """Say what fp32 takes for the same step, and from which batch on autocast takes less."""
    found = record.break_even
    if found is None:
        return
    if found.fp32_peak_bytes is not None:
        change = relative(record.total_peak_bytes, found.fp32_peak_bytes)
        yield f"The same step in fp32 takes {format_bytes(found.fp32_peak_bytes)}{change}."
    at = "" if found.batch_size is None else f" at batch {number(found.batch_size, 2)}"
    yield f"Break-even with fp32{at}: {found.why.rstrip('.')}."


def _lines_table(record: MemoryRecord) -> Table:
    rows = [
        (
            spaced(line.category),
            format_bytes(line.bytes),
            f"{line.bytes / record.total_peak_bytes:.1%}" if record.total_peak_bytes else "",
            CATEGORIES.get(line.category, ""),
        )
        for line in record.lines
    ]
    rows.append(("total", format_bytes(record.total_peak_bytes), "", "at the peak"))
    return Table(
        caption="Memory at the peak, by category",
        columns=(
            Column(title="category"),
            Column(title="size", numeric=True),
            Column(title="share", numeric=True),
            Column(title="what it is"),
        ),
        rows=tuple(rows),
    )


def _chart(record: MemoryRecord) -> Chart:
    """Draw the peak as one bar and, under it, the whole step with the same colours."""
    lines = {line.category: line.bytes for line in record.lines}
    bar = Bar(label=record.precision, segments=segments(lines), total=record.total_peak_bytes)
    panels: list[Panel] = [BarPanel(title="at the peak", unit="bytes", bars=(bar,))]
    if record.timeline:
        panels.append(_timeline(record))
    return Chart(
        key="memory",
        title="Memory by category",
        summary=f"{format_bytes(record.total_peak_bytes)} at the peak, in {record.peak_phase}, and "
        "the live memory after each operation of the step.",
        panels=tuple(panels),
        legend=category_legend(lines, *(point.categories for point in record.timeline)),
        beside=False,
    )


def _timeline(record: MemoryRecord) -> LinePanel:
    points = record.timeline
    names = ordered({name: 1 for point in points for name in point.categories})
    x = tuple(float(point.index) for point in points)
    peak = max(points, key=lambda point: point.bytes)
    return LinePanel(
        title="over the step: forward, backward, optimizer",
        x_title="operations of the step",
        unit="bytes",
        stacked=True,
        series=tuple(_layer(name, points) for name in names),
        bands=phase_bands([point.phase for point in points], x),
        mark=(float(peak.index), float(peak.bytes), f"peak {format_bytes(peak.bytes)}"),
    )


def _layer(category: str, points: tuple[TimelinePoint, ...]) -> Series:
    sizes = [point.categories.get(category, 0) for point in points]
    return Series(
        name=spaced(category),
        group=category,
        colour=category_colour(category),
        x=tuple(float(point.index) for point in points),
        y=tuple(float(size) for size in sizes),
        details=tuple(map(format_bytes, sizes)),
    )


def _allocator(record: MemoryRecord) -> Facts:
    return Facts(
        pairs=tuple(
            (name, "n/a" if size is None else format_bytes(size))
            for name, size in (
                ("requested by tensors", record.requested_bytes),
                ("allocated (rounded to blocks)", record.allocated_bytes),
                ("reserved from the device", record.reserved_bytes),
                *((("margin to leave free", record.margin_bytes),) if record.predicted else ()),
            )
        )
    )


def module_blocks(record: MemoryRecord) -> tuple[Block, ...]:
    """List the modules by what they hold at the peak, the largest first."""
    if not record.modules:
        return ()
    modules = sorted(record.modules, key=lambda module: -module.bytes)
    names = ordered({name: 1 for module in modules for name in module.categories})
    return (
        Table(
            caption="What each module holds at the peak",
            columns=(
                Column(title="module"),
                Column(title="size", numeric=True),
                *(Column(title=spaced(name), numeric=True) for name in names),
            ),
            rows=tuple(
                (
                    module.name or "(no module)",
                    format_bytes(module.bytes),
                    *(
                        format_bytes(module.categories[name]) if name in module.categories else ""
                        for name in names
                    ),
                )
                for module in modules
            ),
            terminal_rows=_TERMINAL_MODULES,
        ),
    )
