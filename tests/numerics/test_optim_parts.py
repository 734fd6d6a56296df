"""Parts of parameters step, and their codes are cut anew, as the whole would be."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from narrowcast.blockwise import (
    INT4_SIGNED,
    INT4_UNSIGNED,
    INT8_SIGNED,
    INT8_UNSIGNED,
    BlockCode,
)
from narrowcast.errors import UsageError
from narrowcast.optim.adamw import AdamW
from narrowcast.optim.parts import Part, mark_part, part_of, whole_numel
from narrowcast.optim.recut import CodedPart, recut
from narrowcast.optim.reseat import require_elementwise, reseat
from narrowcast.parallel.shards import rows_of

CODES = {"int8": (INT8_SIGNED, INT8_UNSIGNED), "int4": (INT4_SIGNED, INT4_UNSIGNED)}
ALL_CODES = [INT8_SIGNED, INT8_UNSIGNED, INT4_SIGNED, INT4_UNSIGNED]


def coded(code: BlockCode, values: Tensor, start: int) -> CodedPart:
    codes, scales = code.zeros(values.numel(), values.device)
    if values.numel():
        code.encode(values, codes, scales, None)
    return CodedPart(start=start, count=values.numel(), codes=codes, scales=scales)


def values_for(code: BlockCode, numel: int) -> Tensor:
    values = torch.randn(numel)
    return values if code.signed else values.square()


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [0, 1, 2, 3, 5, 8, 65])
def test_rows_are_cut_as_torch_chunks_them(rows: int, ranks: int) -> None:
    """Every row is somebody's, in order; the last ranks may have none."""
    chunks = [tuple(c.tolist()) for c in torch.arange(rows).chunk(ranks)] if rows else []
    chunks += [()] * (ranks - len(chunks))
    own = [rows_of(rows, rank, ranks) for rank in range(ranks)]

    assert [tuple(range(first, first + count)) for first, count in own] == chunks


@pytest.mark.parametrize("code", ALL_CODES, ids=str)
@pytest.mark.parametrize("blocks", [(1,), (2, 1), (1, 3, 2)])
def test_parts_that_end_with_their_blocks_keep_their_codes(
    code: BlockCode, blocks: tuple[int, ...]
) -> None:
    """End to end they are those of the whole, and cut again at blocks those of its parts."""
    bounds = [0]
    for count in blocks:
        bounds.append(bounds[-1] + count * code.block)
    numel = bounds[-1] + 5  # the last block is not full
    values = values_for(code, numel)
    parts = [coded(code, values[a:b], a) for a, b in pairwise([*bounds, numel])]
    whole = coded(code, values, 0)

    codes, scales = recut(code, parts, 0, numel)
    assert (codes.dtype, scales.dtype) == (torch.uint8, torch.bfloat16)
    assert torch.equal(codes, whole.codes)
    assert torch.equal(scales, whole.scales)
    for part in parts:
        codes, scales = recut(code, [whole], part.start, part.count)
        assert torch.equal(
            code.decode(codes, scales, part.count), code.decode(part.codes, part.scales, part.count)
        )


@pytest.mark.parametrize("code", ALL_CODES, ids=str)
@pytest.mark.parametrize("cut", [1, 2, -1, 7])
def test_a_cut_inside_a_block_moves_elements_by_half_a_gap(code: BlockCode, cut: int) -> None:
    """Of the new block's grid, whose widest gap is its last, at a scale rounded up to bf16."""
    numel = 3 * code.block
    values = values_for(code, numel)
    middle = code.block + cut
    parts = [coded(code, values[:middle], 0), coded(code, values[middle:], middle)]
    held = torch.cat([code.decode(p.codes, p.scales, p.count) for p in parts])

    codes, scales = recut(code, parts, 0, numel)
    moved = (code.decode(codes, scales, numel) - held).abs().view(-1, code.block)
    gap = 1 - (1 - 1 / code.top) ** (2 if code.signed else 4)
    top = held.abs().view(-1, code.block).amax(1, keepdim=True) * (1 + 2.0**-7)
    # Values that a grid holds are hit within the rounding of fp32; 1e-6 of the largest is 16 ulp.
    assert bool((moved <= top * (gap / 2 + 1e-6)).all())


@pytest.mark.parametrize("code", ALL_CODES, ids=str)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_small_and_empty_parts_have_codes_of_their_size(code: BlockCode, count: int) -> None:
    """In the dtypes of the code, on its device."""
    values = values_for(code, 2 * code.block)
    codes, scales = recut(code, [coded(code, values, 0)], code.block, count)

    assert codes.numel() == code.code_bytes(count)
    assert scales.numel() == code.blocks(count)
    expected = coded(code, values, 0)
    decoded = code.decode(expected.codes, expected.scales, 2 * code.block)
    assert torch.equal(code.decode(codes, scales, count), decoded[code.block : code.block + count])


@pytest.mark.parametrize("states", ["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("weights", ["fp32", "split16", "split8", "stochastic"])
@pytest.mark.parametrize("rows", [64, 70])
def test_parts_step_as_the_whole_does(weights: str, states: str, rows: int) -> None:
    """Two parts of a parameter, three steps; with states in blocks where parts end with one.

    Rounding noise is that of the place in the whole. The first step does not read the states, so
    it is equal wherever the blocks lie.
    """
    aligned = rows == 64 or states not in CODES
    start = torch.randn(rows, 128)
    gradients = [torch.randn(rows, 128) for _ in range(3 if aligned else 1)]
    first = rows // 2

    def made(value: Tensor) -> tuple[nn.Parameter, Any]:
        parameter = nn.Parameter(value.clone())
        generator = torch.Generator().manual_seed(3)
        return parameter, AdamW(
            [parameter], lr=0.01, weights=weights, states=states, generator=generator
        )

    whole, optimizer = made(start)
    parts = [made(start[:first]), made(start[first:])]
    for (part, _), begin in zip(parts, (0, first * 128), strict=True):
        mark_part(part, Part(start=begin, whole=rows * 128))
        assert whole_numel(part) == rows * 128
    for gradient in gradients:
        whole.grad = gradient.to(whole.dtype)
        optimizer.step()
        for (part, own), piece in zip(parts, gradient.split([first, rows - first]), strict=True):
            part.grad = piece.to(part.dtype).contiguous()
            own.step()

    masters = torch.cat([own.master(part) for part, own in parts])
    assert torch.equal(masters, optimizer.master(whole))


def test_a_small_part_of_a_large_parameter_has_the_states_of_the_large_one() -> None:
    """Sizes decide by the whole, so that every rank and number of ranks has the same store."""
    part = nn.Parameter(torch.randn(4, 16))
    mark_part(part, Part(start=640, whole=8192))
    optimizer = AdamW([part], weights="split16", states="int8")
    part.grad = torch.ones_like(part)
    optimizer.step()

    assert optimizer.describe()[0].states == "int8"
    assert optimizer.state[part]["exp_avg_codes"].shape == (64,)


def test_reseating_cuts_remainders_and_keeps_group_dictionaries() -> None:
    """What a scheduler holds goes on to hold, and the master is that of the part's rows."""
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = AdamW([parameter], weights="split16", states="fp32")
    group, master = optimizer.param_groups[0], optimizer.master(parameter)
    part = nn.Parameter(parameter.detach()[2:4].clone())
    reseat(optimizer, {parameter: part}, lambda whole, _: whole[2:4].clone())

    assert optimizer.param_groups[0] is group
    assert torch.equal(optimizer.master(part), master[2:4])
    assert part_of(part) is None


def test_an_optimizer_that_has_stepped_is_not_reseated() -> None:
    """Its states are whole."""
    parameter = nn.Parameter(torch.randn(6, 4))
    optimizer = torch.optim.AdamW([parameter])
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()

    with pytest.raises(UsageError, match="has taken steps"):
        reseat(optimizer, {parameter: nn.Parameter(torch.randn(3, 4))}, lambda whole, _: whole)


def test_optimizers_that_look_at_whole_parameters_are_refused() -> None:
    """Known elementwise ones are not, nor are ours."""
    parameter = nn.Parameter(torch.randn(6, 4))
    require_elementwise(torch.optim.SGD([parameter], lr=0.1))
    require_elementwise(AdamW([parameter]))

    with pytest.raises(UsageError, match="Adafactor may need whole parameters"):
        require_elementwise(torch.optim.Adafactor([parameter]))
