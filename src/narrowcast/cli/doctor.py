"""`narrowcast doctor`: what this machine can do in each precision, and which one it should use."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from narrowcast.cli.common import DeviceOption, JsonOption, console, emit_json, result_console
from narrowcast.units import format_bytes, format_duration

if TYPE_CHECKING:
    from narrowcast.records.device import DeviceRecord, FormatSpeed

__all__ = ["register"]

# Speeds this close to fp32's are the noise of a measurement of milliseconds.
_CLOSE = 0.15


def register(app: typer.Typer) -> None:
    """Add the verb to the application."""
    app.command("doctor")(doctor)


def doctor(device: DeviceOption = None, json: JsonOption = None) -> None:
    """Measure what this machine can do in each precision, in seconds, and recommend one.

    Times a matrix product and a convolution's training step in fp32, tf32, fp16 and bf16,
    and a matrix product in fp8.
    """
    from narrowcast.precision.device import device_at_hand, measure_device

    target = device_at_hand(device)
    with console().status("measuring matrix products and convolutions"):
        record = measure_device(target)
    emit_json(record, json)
    if json != "-":
        _print(record, result_console(json))


def _print(record: DeviceRecord, out: Console) -> None:
    about = record.environment
    threads = "1 thread" if record.threads == 1 else f"{record.threads} threads"
    out.print(Text(record.name, style="bold"), highlight=False)
    out.print(
        f"{record.device}, {format_bytes(record.memory_bytes)}, {threads}; "
        f"torch {about.torch}, Python {about.python}",
        style="dim",
        highlight=False,
    )
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("format", style="bold")
    for heading in ("GFLOP/s", "matmul", "conv"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    for row in record.formats:
        table.add_row(*_row(row))
    out.print(table)
    out.print(
        f"speed{' of one thread' if record.device == 'cpu' else ''}; matmul and conv (a training "
        f"step of a 3x3 layer) relative to fp32; measured in {format_duration(record.seconds)}",
        style="dim",
        highlight=False,
    )
    for caution in record.cautions:
        out.print(Text.assemble(("caution  ", "yellow"), caution))
    out.print(
        Text.assemble(("use      ", "green"), (record.recommended, "bold"), f": {record.why}")
    )


def _row(row: FormatSpeed) -> tuple[Text, ...]:
    """Lay one format out: name, speeds, and what they rest on."""
    if row.matmul_gflops is None:
        return (Text(row.format), *(Text("-", style="dim"),) * 3, Text(f"no: {row.why}"))
    note = row.why if row.native else f"runs without hardware for it: {row.why}"
    return (
        Text(row.format),
        Text(f"{row.matmul_gflops:,.0f}"),
        _speed(row.matmul_relative),
        _speed(row.conv_relative),
        Text(note, style="dim"),
    )


def _speed(relative: float | None) -> Text:
    if relative is None:
        return Text("-", style="dim")
    style = "green" if relative > 1 + _CLOSE else "red" if relative < 1 - _CLOSE else ""
    return Text(f"{relative:.3f}x" if relative < 0.1 else f"{relative:.2f}x", style=style)
