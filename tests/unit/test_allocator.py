"""The simulated allocator: worked examples, invariants, and a naive twin as the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narrowcast.errors import UnknownName, UsageError
from narrowcast.prediction.allocator import (
    AllocatorConfig,
    CachingAllocator,
    OutOfDeviceMemory,
    Replay,
    replay,
    round_size,
    segment_size,
)
from narrowcast.prediction.allocator_pools import Block

KIB, MIB = 2**10, 2**20
PLAIN = AllocatorConfig()
EXPANDABLE = AllocatorConfig(expandable_segments=True)

SIZES = st.one_of(
    st.integers(1, 4 * KIB),
    st.integers(MIB - 600, MIB + 600),
    st.integers(1, 64).map(lambda n: n * MIB // 2),
    st.integers(10 * MIB - 600, 10 * MIB + 600),
)
# A step allocates (a size) or frees (a share of the blocks held, by position).
STEPS = st.lists(st.one_of(SIZES, st.floats(0, 0.999)), max_size=60)
CONFIGS = st.sampled_from(
    [
        PLAIN,
        EXPANDABLE,
        AllocatorConfig(max_split_bytes=20 * MIB),
        AllocatorConfig(roundup_power2_divisions=(4,) * 16),
        AllocatorConfig(allowed_bytes=200 * MIB, garbage_collection_threshold=0.5),
        AllocatorConfig(device_bytes=200 * MIB),
    ]
)


def carry_out(
    allocator: CachingAllocator,
    steps: list[int | float],
    after_each: Callable[[list[Block]], None] = lambda _: None,
) -> list[Block]:
    held: list[Block] = []
    for step in steps:
        try:
            if isinstance(step, int):
                held.append(allocator.malloc(step))
            elif held:
                allocator.free(held.pop(int(step * len(held))))
        except OutOfDeviceMemory:
            continue
        after_each(held)
    return held


@pytest.mark.parametrize(
    ("asked", "rounded"),
    [(1, 512), (511, 512), (512, 512), (513, 1024), (MIB, MIB), (MIB + 1, MIB + 512)],
)
def test_requests_are_rounded_up_to_512_bytes(asked: int, rounded: int) -> None:
    """Every block is a multiple of 512 bytes, and none is empty."""
    assert rounded == round_size(asked, PLAIN)


@pytest.mark.parametrize(
    ("asked", "rounded"), [(1200 * MIB, 1280 * MIB), (1024 * MIB, 1024 * MIB), (513, 1024)]
)
def test_power_of_two_divisions_round_further(asked: int, rounded: int) -> None:
    """With 4 divisions 1200 becomes 1280, a power of two stays, and tiny requests are exempt."""
    config = AllocatorConfig.parse("roundup_power2_divisions:4")

    assert rounded == round_size(asked, config)


@pytest.mark.parametrize(
    ("block", "segment"),
    [
        (512, 2 * MIB),
        (MIB, 2 * MIB),
        (MIB + 512, 20 * MIB),
        (10 * MIB - 512, 20 * MIB),
        (10 * MIB, 10 * MIB),
        (10 * MIB + 512, 12 * MIB),
        (21 * MIB, 22 * MIB),
    ],
)
def test_segments_come_in_three_sizes(block: int, segment: int) -> None:
    """2 MiB for small blocks, 20 MiB up to 10 MiB, and a multiple of 2 MiB above."""
    assert segment == segment_size(block, PLAIN)


def test_a_remainder_of_at_most_1_mib_stays_with_a_large_block() -> None:
    """Allocated counts the whole block: 1.5 MiB in a hole of 2.5 MiB take 2.5 MiB."""
    allocator = CachingAllocator()
    hole = allocator.malloc(5 * MIB // 2)
    allocator.malloc(6 * MIB)
    allocator.free(hole)

    allocator.malloc(3 * MIB // 2)

    assert allocator.now.requested_bytes == 15 * MIB // 2
    assert allocator.now.allocated_bytes == 17 * MIB // 2


def test_the_best_fit_is_the_smallest_hole_and_then_the_lowest() -> None:
    """Of holes of 6, 4 and 4 MiB a request for 3 MiB takes the first of 4."""
    allocator = CachingAllocator()
    blocks = [allocator.malloc(size * MIB) for size in (6, 2, 4, 2, 4, 2)]
    first_of_four = blocks[2].address
    for hole in (blocks[0], blocks[4], blocks[2]):
        allocator.free(hole)

    assert first_of_four == allocator.malloc(int(3.5 * MIB)).address


def test_neighbours_merge_into_one_block() -> None:
    """Three blocks freed in any order leave one hole as large as the segment."""
    allocator = CachingAllocator()
    blocks = [allocator.malloc(6 * MIB) for _ in range(3)]
    for block in (blocks[0], blocks[2], blocks[1]):
        allocator.free(block)

    assert [b.size for segment in allocator.segments() for b in segment] == [20 * MIB]


def test_small_and_large_blocks_never_share_a_segment() -> None:
    """A free large segment does not serve a small request."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(5 * MIB))

    allocator.malloc(512)

    assert allocator.now.reserved_bytes == 22 * MIB


def test_a_stream_does_not_use_the_blocks_of_another() -> None:
    """The free list is by stream."""
    allocator = CachingAllocator()
    allocator.free(allocator.malloc(5 * MIB, stream=1))

    allocator.malloc(5 * MIB, stream=2)

    assert allocator.now.reserved_bytes == 40 * MIB


def test_empty_cache_keeps_segments_that_are_partly_in_use() -> None:
    """Whole cached segments go back; a hole beside a block in use stays reserved."""
    allocator = CachingAllocator()
    first = allocator.malloc(5 * MIB)
    allocator.malloc(5 * MIB)
    whole = allocator.malloc(30 * MIB)
    allocator.free(first)
    allocator.free(whole)

    allocator.empty_cache()

    assert allocator.now.reserved_bytes == 20 * MIB


def test_a_full_device_gets_its_cached_segments_back() -> None:
    """Where cudaMalloc fails, cached segments are released and it is tried again."""
    allocator = CachingAllocator(AllocatorConfig(device_bytes=50 * MIB))
    allocator.free(allocator.malloc(30 * MIB))

    allocator.malloc(40 * MIB)

    assert (allocator.now.reserved_bytes, allocator.retries) == (40 * MIB, 1)
    assert allocator.peaks.reserved_bytes == 40 * MIB


@pytest.mark.parametrize(
    "config",
    [
        AllocatorConfig(device_bytes=50 * MIB),
        AllocatorConfig(allowed_bytes=50 * MIB),
        AllocatorConfig(device_bytes=50 * MIB, expandable_segments=True),
    ],
)
def test_what_does_not_fit_is_an_error_with_the_figures(config: AllocatorConfig) -> None:
    """The message names the request, the limit and what is held."""
    allocator = CachingAllocator(config)
    allocator.malloc(30 * MIB)

    with pytest.raises(OutOfDeviceMemory, match=r"30.*50.*30"):
        allocator.malloc(30 * MIB)


def test_blocks_above_max_split_size_stay_whole() -> None:
    """A small request does not take an oversize block, and a large one no much larger block."""
    config = AllocatorConfig(max_split_bytes=20 * MIB)
    allocator = CachingAllocator(config)
    allocator.free(allocator.malloc(60 * MIB))
    allocator.malloc(12 * MIB)
    allocator.malloc(30 * MIB)

    assert allocator.now.reserved_bytes == (60 + 12 + 30) * MIB


def test_oversize_blocks_are_released_before_everything_else() -> None:
    """With max_split_size only as many oversize blocks go back as the request needs."""
    config = AllocatorConfig(max_split_bytes=20 * MIB, device_bytes=130 * MIB)
    allocator = CachingAllocator(config)
    for block in [allocator.malloc(size * MIB) for size in (60, 10, 40)]:
        allocator.free(block)

    allocator.malloc(25 * MIB)
    before = allocator.now.reserved_bytes
    allocator.malloc(50 * MIB)

    assert (before, allocator.retries) == (110 * MIB, 0)
    assert allocator.now.reserved_bytes == 110 * MIB


def test_garbage_collection_gives_back_the_older_half() -> None:
    """Above the threshold, whole cached segments of at least average age are released."""
    config = AllocatorConfig(allowed_bytes=200 * MIB, garbage_collection_threshold=0.3)
    allocator = CachingAllocator(config)
    old, young, _ = (allocator.malloc(size * MIB) for size in (22, 32, 5))
    allocator.free(old)
    allocator.free(allocator.malloc(5 * MIB))  # a search passes
    allocator.free(young)
    assert allocator.now.reserved_bytes == (22 + 32 + 20) * MIB

    allocator.malloc(64 * MIB)

    assert allocator.now.reserved_bytes == (32 + 20 + 64) * MIB


def test_an_expandable_segment_grows_by_what_is_missing() -> None:
    """30 MiB after a freed 25 MiB map 40 MiB in all, where plain segments would take 56."""
    events = [("a", 25 * MIB), ("a", -25 * MIB), ("b", 30 * MIB)]

    assert replay(events, EXPANDABLE).reserved_bytes == 40 * MIB
    assert replay(events, PLAIN).reserved_bytes == 56 * MIB


def test_empty_cache_unmaps_the_whole_steps_of_an_expandable_segment() -> None:
    """Of 100 MiB free behind a block of 5 MiB, the steps of 20 MiB that it does not touch go."""
    allocator = CachingAllocator(EXPANDABLE)
    allocator.malloc(5 * MIB)
    allocator.free(allocator.malloc(95 * MIB))
    assert allocator.now.reserved_bytes == 100 * MIB

    allocator.empty_cache()

    assert allocator.now.reserved_bytes == 20 * MIB


def test_a_resized_storage_is_moved() -> None:
    """Growing in place is allocating anew and then freeing: both are held for a moment."""
    peaks = replay([("a", 20 * MIB), ("a", 10 * MIB)])

    assert (peaks.requested_bytes, peaks.allocated_bytes) == (50 * MIB, 50 * MIB)


def test_a_storage_of_no_bytes_takes_nothing() -> None:
    """CUDA's allocator is not asked for an empty tensor."""
    assert replay([("a", 0)]).reserved_bytes == 0


def test_peaks_can_be_counted_anew() -> None:
    """Peaks of a phase start from what is held at its beginning."""
    run = Replay().feed([("a", 40 * MIB), ("b", 20 * MIB), ("a", -40 * MIB)])
    run.allocator.reset_peaks()
    run.feed([("c", 10 * MIB)])

    assert run.allocator.peaks.allocated_bytes == 30 * MIB
    assert run.allocator.peaks.reserved_bytes == 60 * MIB


def test_a_block_cannot_be_freed_twice() -> None:
    """Freeing what is free is a mistake of the caller, not a state."""
    allocator = CachingAllocator()
    block = allocator.malloc(5)
    allocator.free(block)

    with pytest.raises(AssertionError, match="freed twice"):
        allocator.free(block)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, config=CONFIGS)
def test_blocks_tile_their_segments(steps: list[int | float], config: AllocatorConfig) -> None:
    """No overlap, no gap, no two free neighbours; the counters are the sums of the blocks."""
    allocator = CachingAllocator(config)

    def check(held: list[Block]) -> None:
        segments = list(allocator.segments())
        blocks = [block for segment in segments for block in segment]
        for segment in segments:
            for left, right in itertools.pairwise(segment):
                assert left.address + left.size == right.address
                assert left.allocated or right.allocated
        used = [block for block in blocks if block.allocated]
        assert set(used) == set(held)
        assert sum(b.size for b in used) == allocator.now.allocated_bytes
        assert sum(b.size for b in blocks) == allocator.now.reserved_bytes
        assert sum(b.requested for b in used) == allocator.now.requested_bytes

    carry_out(allocator, steps, check)


@settings(max_examples=200, deadline=None)
@given(steps=STEPS, config=CONFIGS)
def test_everything_goes_back_when_all_is_freed(
    steps: list[int | float], config: AllocatorConfig
) -> None:
    """After freeing all blocks every segment is one hole, and empty_cache leaves nothing."""
    allocator = CachingAllocator(config)
    for block in carry_out(allocator, steps):
        allocator.free(block)
    assert all(len(segment) == 1 for segment in allocator.segments())

    allocator.empty_cache()

    assert 0 == allocator.now.reserved_bytes == allocator.now.allocated_bytes
    assert list(allocator.segments()) == []


@settings(max_examples=100, deadline=None)
@given(steps=STEPS, config=CONFIGS)
def test_peaks_only_rise_and_bound_the_counters(
    steps: list[int | float], config: AllocatorConfig
) -> None:
    """requested <= allocated <= reserved at every moment, and no peak ever falls."""
    allocator = CachingAllocator(config)
    last = [0, 0, 0]

    def check(_: list[Block]) -> None:
        now, peaks = allocator.now, allocator.peaks
        assert now.requested_bytes <= now.allocated_bytes <= now.reserved_bytes
        found = [peaks.requested_bytes, peaks.allocated_bytes, peaks.reserved_bytes]
        assert all(a >= b for a, b in zip(found, last, strict=True))
        last[:] = found

    carry_out(allocator, steps, check)


class NaiveAllocator:
    """The rules for default options over plain lists: [size, used] for each block, in order."""

    def __init__(self) -> None:
        self.segments: list[tuple[bool, list[list[int]]]] = []

    def malloc(self, size: int) -> list[int]:
        size = max(-(-size // 512) * 512, 512)
        small = size <= MIB
        holes = [
            (block[0], i, j)
            for i, (kind, blocks) in enumerate(self.segments)
            for j, block in enumerate(blocks)
            if kind == small and not block[1] and block[0] >= size
        ]
        if not holes:
            exact = -(-size // (2 * MIB)) * 2 * MIB
            wanted = 2 * MIB if small else 20 * MIB if size < 10 * MIB else exact
            self.segments.append((small, [[wanted, 0]]))
            holes = [(0, len(self.segments) - 1, 0)]
        _, i, j = min(holes)
        block, rest = self.segments[i][1][j], self.segments[i][1][j][0] - size
        if rest >= 512 if small else rest > MIB:
            self.segments[i][1].insert(j + 1, [rest, 0])
            block[0] = size
        block[1] = 1
        return block

    def free(self, block: list[int]) -> None:
        block[1] = 0
        for _, blocks in self.segments:
            for j in range(len(blocks) - 1, 0, -1):
                if not blocks[j][1] and not blocks[j - 1][1]:
                    blocks[j - 1][0] += blocks.pop(j)[0]

    def counters(self) -> tuple[int, int]:
        blocks = [block for _, blocks in self.segments for block in blocks]
        return sum(b[0] for b in blocks if b[1]), sum(b[0] for b in blocks)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS)
def test_the_simulator_equals_a_naive_one(steps: list[int | float]) -> None:
    """Allocated and reserved agree after every step with rules written as plainly as they read."""
    allocator, naive = CachingAllocator(), NaiveAllocator()
    held: list[tuple[Block, list[int]]] = []
    for step in steps:
        if isinstance(step, int):
            held.append((allocator.malloc(step), naive.malloc(step)))
        elif held:
            ours, theirs = held.pop(int(step * len(held)))
            allocator.free(ours)
            naive.free(theirs)

        now = allocator.now
        assert (now.allocated_bytes, now.reserved_bytes) == naive.counters()


def test_options_are_read_as_torch_writes_them() -> None:
    """Every option that changes a size arrives in its field; those that do not are accepted."""
    config = AllocatorConfig.parse(
        "max_split_size_mb:128, garbage_collection_threshold:0.6,expandable_segments:True,"
        "max_non_split_rounding_mb:30,large_segment_size_mb:40,pinned_use_background_threads:True,"
        "backend:native",
        device_bytes=10,
    )

    assert config == AllocatorConfig(
        max_split_bytes=128 * MIB,
        garbage_collection_threshold=0.6,
        expandable_segments=True,
        max_non_split_rounding_bytes=30 * MIB,
        large_segment_bytes=40 * MIB,
        device_bytes=10,
    )


def test_divisions_are_spread_over_intervals_as_torch_spreads_them() -> None:
    """The first entry covers what lies below it, and > begins at the interval before it."""
    config = AllocatorConfig.parse("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")

    assert config.roundup_power2_divisions == (1,) * 9 + (2,) + (8,) * 6


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_split_size_mb", "not a list"),
        ("max_split_size_mb:19", "is 19"),
        ("max_split_size_mb:x", "'x'"),
        ("large_segment_size_mb:10", "is 10"),
        ("expandable_segments:yes", "'yes'"),
        ("garbage_collection_threshold:1.5", "1.5"),
        ("roundup_power2_divisions:3", "3"),
        ("roundup_power2_divisions:[100:2]", "'100'"),
        ("backend:cudaMallocAsync", "cudaMallocAsync"),
    ],
)
def test_nonsense_options_are_refused(text: str, said: str) -> None:
    """The error has the option and its value."""
    with pytest.raises(UsageError, match=said):
        AllocatorConfig.parse(text)


def test_an_unknown_option_gets_its_nearest_match() -> None:
    """A typing error is not silently ignored."""
    with pytest.raises(UnknownName, match="did you mean 'max_split_size_mb'"):
        AllocatorConfig.parse("max_splt_size_mb:64")
