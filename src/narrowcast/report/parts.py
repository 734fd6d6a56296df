"""Parts that reports of comparisons, runs and memory share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from narrowcast.records.memory import CATEGORIES
from narrowcast.records.run import Environment, OptionValue
from narrowcast.report.shapes import Band, Block, Facts, LegendEntry, Prose, Segment, Shade
from narrowcast.report.wording import NOTHING, category_colour, moment, spaced

__all__ = [
    "PHASES",
    "category_legend",
    "environment_facts",
    "failure_blocks",
    "footer",
    "not_as_asked",
    "options_text",
    "ordered",
    "phase_bands",
    "phase_legend",
    "segments",
]

PHASES: tuple[Shade, ...] = ("forward", "backward", "optimizer")


def environment_facts(environment: Environment, *, command: str) -> Facts:
    """List where and with what the figures were obtained."""
    e = environment
    return Facts(
        pairs=(
            ("device", f"{e.device}: {e.device_name}"),
            ("threads", str(e.threads)),
            ("platform", e.platform),
            ("python", e.python),
            ("torch", e.torch),
            ("narrowcast", f"{e.narrowcast}{f' ({e.commit})' if e.commit else ''}"),
            ("command", command or NOTHING),
        )
    )


def footer(environment: Environment, finished: str) -> str:
    """Say with what and when the report's figures were obtained."""
    when = f", {moment(finished)}" if finished else ""
    return f"narrowcast {environment.narrowcast}, torch {environment.torch}{when}"


def failure_blocks(failure: str) -> tuple[Block, ...]:
    """Lay out why a run ended: a warning, the lines below it as they are, and a hint at the end."""
    message, *lines = failure.split("\n")
    hints = [line for line in lines[-1:] if line.startswith("hint: ")]
    code = tuple(lines[: len(lines) - len(hints)])
    return (
        Prose(lines=(message,), kind="warning"),
        *((Prose(lines=code, kind="code"),) if code else ()),
        *((Prose(lines=tuple(hints)),) if hints else ()),
    )


def not_as_asked(notes: Sequence[str], warnings: Sequence[str]) -> tuple[str, ...]:
    """Say that operations ran in another precision, unless the warnings say all of it already."""
    if notes and all(any(note in warning for warning in warnings) for note in notes):
        return ()
    what = "not every operation executed in the precision that was asked for"
    return (f"{what}: {'; '.join(notes)}" if notes else what,)


def options_text(options: Mapping[str, OptionValue]) -> str:
    """Write options as they are given to --set: 'lr=0.1 model=resnet'."""
    return " ".join(f"{name}={value}" for name, value in sorted(options.items())) or "none"


def ordered(categories: Mapping[str, int]) -> list[str]:
    """Sort category names as every table and chart shows them; unknown ones come last."""
    known = [name for name in CATEGORIES if name in categories]
    return known + sorted(set(categories) - set(CATEGORIES))


def segments(lines: Mapping[str, int]) -> tuple[Segment, ...]:
    """Turn bytes per category into the segments of a bar."""
    return tuple(
        Segment(label=spaced(name), group=name, colour=category_colour(name), value=lines[name])
        for name in ordered(lines)
        if lines[name]
    )


def category_legend(*lines: Mapping[str, int]) -> tuple[LegendEntry, ...]:
    """List the categories that occur, in their order."""
    present = {name: 1 for held in lines for name, size in held.items() if size}
    return tuple(
        LegendEntry(label=spaced(name), colour=category_colour(name), group=name, mark="block")
        for name in ordered(present)
    )


def phase_legend() -> tuple[LegendEntry, ...]:
    """List the shades of the phases of a step."""
    return tuple(LegendEntry(label=phase, colour=f"s-{phase}", mark="area") for phase in PHASES)


def phase_bands(phases: Sequence[str], positions: Sequence[float]) -> tuple[Band, ...]:
    """Turn the phase of each point into shaded stretches; unknown phases stay unshaded."""
    bands: list[Band] = []
    start = 0
    for i in range(1, len(phases) + 1):
        if i < len(phases) and phases[i] == phases[start]:
            continue
        shade = next((known for known in PHASES if known == phases[start]), None)
        if shade:
            end = positions[min(i, len(phases) - 1)]
            bands.append(Band(start=positions[start], end=end, label=shade, shade=shade))
        start = i
    return tuple(bands)
