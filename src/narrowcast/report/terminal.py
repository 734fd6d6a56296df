"""The terminal rendering of an outline: the same sections, tables and charts, in characters.

Every string of a record becomes a rich Text, never markup, so a name such as '[red]' stays a name;
without a terminal behind the console (a pipe, a file) rich leaves all colours out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel as Box
from rich.rule import Rule
from rich.table import Table as Grid
from rich.text import Text

from narrowcast.records.run import StepPoint
from narrowcast.report.outline import Reportable, outline_of
from narrowcast.report.shapes import (
    Block,
    Chart,
    Column,
    Facts,
    Listing,
    Outline,
    Prose,
    Section,
    Table,
    Verdict,
    Verdicts,
)
from narrowcast.report.sketches import sketch
from narrowcast.report.wording import TONES, printable

__all__ = ["render_summary", "render_terminal"]

_FOLDED = 26
"""A column of words is readable from this width on."""
_TONES = {"holds": "bold cyan", "fails": "bold red", "open": "bold yellow"}
_COLOURS = {
    "p-fp32": "bold",
    "p-tf32": "medium_purple",
    "p-fp16": "dark_orange",
    "p-bf16": "dodger_blue1",
    "p-bf16-true": "spring_green3",
}


def render_terminal(
    record: Reportable, console: Console, *, points: Sequence[StepPoint] = ()
) -> None:
    """Print the whole report of a record; `points` are the steps of a run."""
    outline = outline_of(record, points)
    _print(outline, outline.sections, console)


def render_summary(
    record: Reportable, console: Console, *, points: Sequence[StepPoint] = ()
) -> None:
    """Print what a reader needs at the end of a command: the outline's brief sections."""
    outline = outline_of(record, points)
    _print(outline, [section for section in outline.sections if section.brief], console)


def _print(outline: Outline, sections: Sequence[Section], console: Console) -> None:
    text = _Writer(console)
    console.print()
    console.print(text(outline.title, "bold"))
    console.print(text(outline.subtitle, "dim"))
    for section in sections:
        console.print()
        rule = Rule(text(section.title, "bold"), align="left", style="dim")
        console.print(rule, width=text.width)
        for block in section.blocks:
            console.print()
            for part in text.block(block):
                console.print(part, soft_wrap=isinstance(part, _Whole))
    console.print()
    console.print(text(outline.footer, "dim"))


class _Writer:
    """Turns blocks of an outline into renderables that fit one console."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.width = min(console.width, 120)
        self.encoding = console.encoding or "utf-8"
        self.colours = console.is_terminal

    def __call__(self, words: str, style: str = "") -> Text:
        """Make a string harmless, and writable in the console's encoding."""
        plain = printable(words)
        if not self.encoding.lower().startswith("utf"):
            plain = plain.translate(_IN_ASCII)
            plain = plain.encode(self.encoding, "backslashreplace").decode(self.encoding)
        return Text(plain, style=style)

    def block(self, block: Block) -> Iterator[RenderableType]:
        if isinstance(block, Prose):
            yield from self._prose(block)
        elif isinstance(block, Facts):
            yield self._facts(block.pairs)
        elif isinstance(block, Table):
            yield from self._table(block)
        elif isinstance(block, Listing):
            yield from self._listing(block)
        elif isinstance(block, Verdicts):
            yield from self._verdicts(block.verdicts)
        else:
            yield from self._chart(block)

    def _prose(self, block: Prose) -> Iterator[RenderableType]:
        if block.kind == "code":
            yield from (_Whole(self(line)) for line in block.lines)
            return
        sign, style = {"warning": ("!", "yellow"), "list": ("-", "")}.get(block.kind, ("", ""))
        for line in block.lines:
            yield self._hanging(sign, line, style) if sign else self(line)

    def _hanging(self, sign: str, line: str, style: str) -> Grid:
        """Set a sign before a paragraph, whose further lines stay indented."""
        grid = Grid.grid(padding=(0, 1))
        grid.add_row(self(sign, style), self(line, style))
        return grid

    def _facts(self, pairs: Sequence[tuple[str, str]]) -> Grid:
        grid = Grid.grid(padding=(0, 2))
        grid.add_column(style="dim", no_wrap=max((len(n) for n, _ in pairs), default=0) < 40)
        grid.add_column(overflow="fold")
        for name, value in pairs:
            grid.add_row(self(name), self(value))
        return grid

    def _verdicts(self, verdicts: Sequence[Verdict]) -> Iterator[RenderableType]:
        """Yield a box for each, all of the width that their lines need, if there is room for it."""
        bodies = [self._verdict(verdict) for verdict in verdicts]
        options = self.console.options
        needed = [Measurement.get(self.console, options, body).maximum + 4 for body in bodies]
        width = max(self.width, min(self.console.width, max(needed, default=0)))
        for verdict, body in zip(verdicts, bodies, strict=True):
            title = Text.assemble(
                self(verdict.precision, _COLOURS.get(verdict.colour, "")),
                ": ",
                self(verdict.word, _TONES[verdict.tone]),
            )
            yield Box(
                body, title=title, title_align="left", border_style="bright_black", width=width
            )

    def _verdict(self, verdict: Verdict) -> Grid:
        body = Grid.grid()
        body.add_row(self(verdict.estimate, "bold"))
        body.add_row(self(verdict.meaning))
        body.add_row(self(verdict.why))
        body.add_row(Padding(self._facts(verdict.facts), (1, 0, 0, 0)))
        return body

    def _table(self, table: Table) -> Iterator[RenderableType]:
        yield self(table.caption, "italic")
        if table.main and _natural_width(table) > self.width:
            table = _turned(table)
        rows = table.rows[: table.terminal_rows]
        for columns in _fitting(table, rows, self.width):
            yield self._grid(table, rows, columns)
        left_out = len(table.rows) - len(rows)
        if left_out:
            yield self(f"... and {left_out} more rows in the HTML report and in the JSON", "dim")

    def _grid(
        self, table: Table, rows: Sequence[Sequence[str]], columns: Sequence[int]
    ) -> RenderableType:
        grid = Grid(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
        for i in columns:
            column = table.columns[i]
            grid.add_column(
                self(column.title, _word_style(column.title) or "dim"),
                justify="right" if column.numeric else "left",
                overflow="fold",
            )
        for row in rows:
            grid.add_row(*(self(row[i], _word_style(row[i])) for i in columns))
        return grid

    def _listing(self, listing: Listing) -> Iterator[RenderableType]:
        """Print source in lines that are cut rather than folded, so that it reads as source."""
        yield self(listing.file, "italic")
        words = [[line.beside[i] for line in listing.lines] for i in range(len(listing.columns))]
        rooms = [max(len(c), *map(len, w)) + 2 for c, w in zip(listing.columns, words, strict=True)]
        numbers = max(len(str(line.number)) for line in listing.lines)
        free = max(self.width - sum(rooms) - numbers - 4, _FOLDED)
        heads = zip(listing.columns, rooms, strict=True)
        titles = "".join(f"  {title:<{room - 2}}" for title, room in heads)
        yield _Line(self(f"{'':<{numbers + 2 + free}}{titles}", "dim"))
        shift = min(
            (len(x.code) - len(x.code.lstrip()) for x in listing.lines if x.code.strip()), default=0
        )
        before = listing.lines[0].number - 1
        for line in listing.lines:
            if line.number != before + 1:
                yield self(f"{'...':>{numbers}}", "dim")
            before = line.number
            code = printable(line.code[shift:])
            code = code if len(code) <= free else code[: free - 3] + "..."
            beside = "".join(f"  {w:<{r - 2}}" for w, r in zip(line.beside, rooms, strict=True))
            text = f"{line.number:>{numbers}}  {code:<{free}}{beside}".rstrip()
            yield _Line(self(text, _TONES[line.tone] if line.tone else ""))

    def _chart(self, chart: Chart) -> Iterator[RenderableType]:
        yield self(chart.title, "bold")
        yield self(chart.summary, "dim")
        for line, colour in sketch(chart, self.width):
            yield _Line(self(line, _COLOURS.get(colour, "")))


class _Whole:
    """A line of code: it goes on past the edge, since what is copied from a terminal must run."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich__(self) -> Text:
        return self.text


class _Line:
    """A line of a picture: cut at the edge rather than wrapped, which would break the picture."""

    def __init__(self, text: Text) -> None:
        self.text = text

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.truncate(options.max_width)
        yield self.text


def _word_style(word: str) -> str:
    tone = next((tone for known, tone in TONES.items() if known == word), None)
    return _TONES[tone] if tone else _COLOURS.get(f"p-{word}", "")


def _natural_width(table: Table) -> int:
    return sum(_widths(table, table.rows))


def _widths(table: Table, rows: Sequence[Sequence[str]]) -> list[int]:
    """Return each column's width with the gap after it."""
    return [
        2 + max([len(column.title), *(len(row[i]) for row in rows)])
        for i, column in enumerate(table.columns)
    ]


def _least_widths(table: Table, rows: Sequence[Sequence[str]]) -> list[int]:
    """Return the width that each column must have: figures must not fold, words may."""
    widths = _widths(table, rows)
    return [
        width if column.numeric or i == 0 else min(width, _FOLDED)
        for i, (column, width) in enumerate(zip(table.columns, widths, strict=True))
    ]


def _turned(table: Table) -> Table:
    """Swap rows and columns: few precisions fit side by side where many figures do not."""
    return Table(
        caption=table.caption,
        columns=(
            Column(title=table.columns[0].title),
            *(Column(title=row[0]) for row in table.rows),
        ),
        rows=tuple(
            (column.title, *(row[i] for row in table.rows))
            for i, column in enumerate(table.columns)
            if i
        ),
    )


def _fitting(table: Table, rows: Sequence[Sequence[str]], width: int) -> Iterator[tuple[int, ...]]:
    """Share the columns out to tables that fit; each repeats the words that begin a row."""
    widths = _least_widths(table, rows)
    words = next((i for i, c in enumerate(table.columns) if c.numeric), len(widths))
    heads = tuple(range(max(words, 1)))
    if len(heads) == len(widths):
        yield heads
        return
    cuts = [heads[-1] + 1]
    used = sum(widths[: len(heads)])
    for i in range(len(heads), len(widths)):
        if used + widths[i] - 2 > width and i > cuts[-1]:
            cuts.append(i)
            used = sum(widths[: len(heads)])
        used += widths[i]
    cuts.append(len(widths))
    for start, end in pairwise(cuts):
        yield (*heads, *range(start, end))


_IN_ASCII = str.maketrans(
    "▁▂▃▄▅▆▇█━│┃┊●○←→\N{MULTIPLICATION SIGN}",
    "__..--==" + "=|#:oo<>" + "x",
)
