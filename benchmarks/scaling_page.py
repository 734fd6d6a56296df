"""docs/scaling.md from benchmarks/results/scaling.json: tables and a chart, nothing computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from results_page.page import Page, table
from results_page.svg import Bar, bars

from narrowcast.files import write_atomically
from narrowcast.units import format_bytes

__all__ = ["page"]

Rows = Sequence[dict[str, Any]]
_PLANS = ("fp32", "bf16", "bf16-split", "lean")
_NAMES = {"ddp": "DDP", "fsdp2": "FSDP2"}
_GIB = 2**30


def page(record: dict[str, Any], shapes: Mapping[str, dict[str, Any]], docs: Path) -> None:
    """Write the page and its charts."""
    text = Page(links="../benchmarks/results", pictures="images/scaling")
    rows: Rows = record["rows"]
    text.say("# More ranks, larger models: memory and traffic", _INTRODUCTION)
    text.source("scaling", record)
    text.say("## Shapes", _SHAPES, table(*_shapes(shapes)))
    text.say("## Memory of a rank", _MEMORY)
    for plan in _PLANS:
        text.say(f"**{plan}**", table(*_memory(rows, shapes, plan)))
    text.chart("memory", _chart(rows), "Memory of a rank of FSDP2 by number of ranks, 6.7B")
    text.say("## What lies there between steps", _HELD, table(*_held(rows, shapes)))
    text.say("## What a rank sends a step", _TRAFFIC)
    for kind in ("ddp", "fsdp2"):
        text.say(f"**{_NAMES[kind]}**", table(*_traffic(rows, shapes, kind)))
    text.say("## Held against what can be run", *_checks(record))
    text.say("## Limitations", _LIMITATIONS)
    pictures = docs / text.pictures
    pictures.mkdir(parents=True, exist_ok=True)
    for name, svg in text.charts.items():
        write_atomically(pictures / name, svg)
    write_atomically(docs / "scaling.md", "\n".join(text.text).rstrip() + "\n")
    print(f"wrote {docs / 'scaling.md'}")


def _ranks(rows: Rows) -> list[int]:
    return sorted({row["ranks"] for row in rows})


def _find(rows: Rows, **wanted: Any) -> dict[str, Any] | None:
    return next((r for r in rows if all(r[k] == v for k, v in wanted.items())), None)


def _size(row: dict[str, Any] | None, key: str = "peak_bytes") -> str:
    return "-" if row is None else format_bytes(row[key])


def _shapes(shapes: Mapping[str, dict[str, Any]]) -> tuple[Sequence[str], Iterator[list[object]]]:
    head = ("name", "parameters", "blocks", "width", "heads", "tokens on a rank")
    return head, (
        [n, f"{s['parameters']:,}", s["layers"], s["width"], s["heads"], f"{s['context']:,}"]
        for n, s in shapes.items()
    )


def _memory(
    rows: Rows, shapes: Mapping[str, Any], plan: str
) -> tuple[Sequence[str], Iterator[list[object]]]:
    ranks = _ranks(rows)
    head = ("parameters", "DDP, any", *(f"FSDP2, {n}" for n in ranks))

    def line(shape: str) -> list[object]:
        ddp = _find(rows, shape=shape, plan=plan, parallel="ddp", ranks=ranks[-1])
        cut = [_find(rows, shape=shape, plan=plan, parallel="fsdp2", ranks=n) for n in ranks]
        return [shape, _size(ddp), *map(_size, cut)]

    return head, (line(shape) for shape in shapes)


def _held(rows: Rows, shapes: Mapping[str, Any]) -> tuple[Sequence[str], Iterator[list[object]]]:
    """Bytes a parameter: of one rank of DDP, and of one of 64 of FSDP2 times 64."""
    largest = list(shapes)[-1]
    count = shapes[largest]["parameters"]

    def line(plan: str) -> list[object]:
        ddp = _find(rows, shape=largest, plan=plan, parallel="ddp", ranks=64)
        cut = _find(rows, shape=largest, plan=plan, parallel="fsdp2", ranks=64)
        if ddp is None or cut is None:
            return [plan, "-", "-", "-"]
        return [
            plan,
            f"{ddp['held_bytes'] / count:.2f}",
            f"{64 * cut['held_bytes'] / count:.2f}",
            format_bytes(cut["held_bytes"]),
        ]

    head = ("plan", "DDP, bytes/parameter", "FSDP2, bytes/parameter", f"{largest}, FSDP2, of 64")
    return head, (line(plan) for plan in _PLANS)


def _traffic(
    rows: Rows, shapes: Mapping[str, Any], kind: str
) -> tuple[Sequence[str], Iterator[list[object]]]:
    """Sums over the collectives; weights of 16 bits are gathered in 16 bits."""
    widths = {"fp32, bf16": "fp32", "bf16-split, lean": "lean"}
    chosen = {"any": "fp32"} if kind == "ddp" else widths
    ranks = [n for n in _ranks(rows) if n > 1]

    def lines_of(shape: str) -> Iterator[list[object]]:
        for said, plan in chosen.items():
            found = [_find(rows, shape=shape, plan=plan, parallel=kind, ranks=n) for n in ranks]
            sent = [
                "-" if row is None else format_bytes(sum(row["sent_bytes"].values()))
                for row in found
            ]
            yield [shape, said, *sent]

    head = ("parameters", "plan", *(f"{n} ranks" for n in ranks))
    return head, (line for shape in shapes for line in lines_of(shape))


def _chart(rows: Rows) -> str:
    drawn = []
    for ranks in _ranks(rows):
        for group, plan in enumerate(_PLANS):
            row = _find(rows, shape="6.7B", plan=plan, parallel="fsdp2", ranks=ranks)
            if row is not None:
                gib = row["peak_bytes"] / _GIB
                label = f"{plan}, {ranks:,} rank{'s' * (ranks > 1)}"
                drawn.append(Bar(label=label, value=gib, group=group))
    return bars("6.7B parameters, FSDP2: memory of a rank (computed)", drawn, axis="GiB")


def _checks(record: dict[str, Any]) -> Iterator[str]:
    depth, checks = record.get("depth"), record.get("checks")
    if not (depth and checks):
        yield "Not yet checked: `python benchmarks/scaling.py check`."
        return
    yield _DEPTH
    yield table(
        ("plan", "", "five blocks, extended", "all twelve, traced", "difference"),
        (
            [r["plan"], _NAMES[r["parallel"]], format_bytes(r["extended"]),
             format_bytes(r["whole"]), f"{r['extended'] / r['whole'] - 1:+.3%}"]
            for r in depth
        ),
    )  # fmt: skip
    yield _RANKS
    yield table(
        ("plan", "", "ranks", "extended", "predicted", "measured, least", "measured, most",
         "predicted against least"),
        (
            [r["plan"], _NAMES[r["parallel"]], r["ranks"], format_bytes(r["computed"]),
             format_bytes(r["predicted"]), format_bytes(min(r["measured"])),
             format_bytes(max(r["measured"])),
             f"{r['predicted'] / min(r['measured']) - 1:+.3%}"]
            for r in checks
        ),
    )  # fmt: skip
    yield from _quarters(record["quarters"])


def _quarters(rows: Rows) -> Iterator[str]:
    head = ("model", "state", "activations", "a quarter, and these", "FSDP2", "more")

    def line(row: dict[str, Any]) -> list[object]:
        got = row.get("measured_bytes", row["predicted_bytes"])
        how = "measured" if "measured_bytes" in row else "computed"
        sizes = (row["state_bytes"], row["activation_bytes"], row["expected_bytes"])
        more = f"{got / row['expected_bytes'] - 1:+.1%}"
        return [row["shape"], *map(format_bytes, sizes), f"{format_bytes(got)}, {how}", more]

    run = next(row for row in rows if "measured_bytes" in row)
    off = run["measured_bytes"] / run["expected_bytes"] - 1
    verdict = "met" if abs(off) <= 0.05 else "missed"
    yield (
        "**A quarter of the state.** Four ranks of FSDP2 with `lean` were to hold, within 5 %, a "
        "quarter of what one process holds that can be divided (weights, remainders, moments, "
        "gradients) and the activations: what its peak holds beside that, with one rank's part of "
        f"the batch. Measured on the GPT of six blocks: {off:+.1%}, **{verdict}**; the "
        "computed ones below, with embeddings of 50,304 tokens, are further off. What comes on "
        "top is whole: the block that computes, and the embedding, which is gathered from forward "
        "on and whose gradient is whole from the head to the lookup. With such "
        "embeddings this is most of it: the weight to no purpose while blocks go backward, as its "
        "storage could be let go of only if nothing that is not a block needed it again; and both "
        "parts of its gradient at the end, since they are one gradient, rounded before it meets, "
        "as with DDP. It does not grow with the number of blocks. (With FSDP2's own reduce-scatter "
        "and prefetch these were +45.3 %, and +62.1 %, +36.4 % and +32.0 %.)"
    )
    yield table(head, map(line, rows))


_INTRODUCTION = (
    "**Computed, not measured**, but for the last section. `narrowcast predict --world N "
    "--parallel ddp|fsdp2` takes torch's own DDP, or `fully_shard` and the exchange of gradients, "
    "through two steps on tensors without contents, with a process group of N ranks that sends "
    "nothing. What weights, masters "
    "and states take is what the stores themselves allocate there. Here that is done for an "
    "H200 (tensors, without allocator and context): for DDP with all blocks, for FSDP2 with four "
    "and with five, each stretch of the step extended by what the fifth block added. Ranks "
    "are alike, but that the last may hold less. `python benchmarks/scaling.py compute`, then "
    "`render`."
)
_SHAPES = (
    "GPT-2's blocks: pre-norm, attention of as many heads for keys as for queries, an MLP four "
    "times as wide, biases, learned positions, and a head that is the embedding of 50,304 tokens. "
    "Each rank takes one sequence, so that N ranks take a batch of N."
)
_MEMORY = (
    "Peak of a step by the ledger. DDP is the same for every number of ranks, and in bf16-split "
    "and lean the most that it can be, on a network slower than backward. `lean` recomputes "
    "blocks and never has all logits; the others keep what autograd saves. The last columns hardly "
    "fall: what is left is one sequence's activations, and what is gathered of a block and of the "
    "embedding.\n\n"
    "**Autocast does not divide.** In `bf16` the gathered fp32 weights are let go of after each "
    "block, and autocast's 16-bit copies of them are not: autograd has saved them, so that from "
    "forward to backward every rank holds two bytes for each weight of the whole model (the line "
    "`autocast_casts`). `bf16-split` and `lean`, whose weights are 16-bit, make no copies."
)
_HELD = (
    "Weights, masters, states, and DDP's buckets of gradients, which it never lets go of. FSDP2's "
    "gradients are there from backward to the update only."
)
_TRAFFIC = (
    "Bytes that one rank sends on a ring, counted on the tensors that meet: (N - 1)/N of what is "
    "gathered or scattered, and twice so much for DDP's sums (Patarasuk and Yuan 2009). DDP's "
    "gradients meet in fp32, whatever the weights are; with FSDP2 they are sent in the format of "
    "the weights, and added up in fp32 where they are wanted. FSDP2 gathers each block twice, and "
    "embedding, positions and the last norm once. Autocast gathers fp32 weights."
)
_DEPTH = (
    "**From five blocks to twelve**: GPT-2 124M on four ranks for an H200, extended and traced "
    "whole."
)
_RANKS = (
    "**Ranks that were run**: a GPT of six blocks, 256 wide, 128 tokens a rank, on gloo and CPUs. "
    "Threads of gloo let go of what they sent when they find the time, and may hold a gathered "
    "block for longer: most and least differ where they did. DDP's sums of 16-bit gradients are "
    "fp32 copies, and how many are under way at once depends on the network: here, and above, all "
    "are until backward ends. An earlier run measured 3.4 % less for `lean` on two ranks. Where "
    "a matrix is smaller than a message, FSDP2's gradients are sent together across blocks, and "
    "blocks do not all do alike: extended and predicted differ."
)
_LIMITATIONS = """\
- No GPU and no network was used for this page: nothing of it was measured beyond four ranks on one
  machine. CUDA's allocator and context, NCCL's buffers and fragmentation come on top.
- A ring's traffic; NCCL may choose trees. How long sending takes is not said, nor what of it hides
  behind computing.
- A training cuts the model after each rank has built it whole, in host memory and then on its GPU:
  models that do not fit there cannot be started, whatever this page says of the steps.
- FSDP2 on one flat mesh. No tensor, pipeline or expert parallelism, no hybrid of DDP and FSDP2."""
