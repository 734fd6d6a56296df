"""A simulator of CUDA's caching allocator: what a stream of allocations takes from the device.

The tensors of a training step say what is requested. What the device must have is decided by this
allocator: it rounds sizes, keeps freed memory in segments and reuses it by best fit, so that the
order of allocations counts. Rules of c10/cuda/CUDACachingAllocator.cpp, torch 2.11 to 2.15:

    malloc(size):
        round up to 512 B; up to 1 MiB from the small pool, else from the large one
        smallest free block of the pool that is large enough, lowest address first
        none: a new segment (2 MiB; 20 MiB below 10 MiB; else rounded up to 2 MiB), or, if the
              device has no room, the same after giving cached segments back
        split off what remains: 512 B or more if small, more than 1 MiB if large
    free(block): merge with free neighbours in the segment; it stays cached

``allocated`` counts whole blocks, so an unsplit remainder counts; ``requested`` does not.
Not modelled: private pools of CUDA graphs, and events of blocks that several streams use.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from narrowcast.errors import NarrowcastError
from narrowcast.prediction.allocator_config import (
    MIN_BLOCK_BYTES,
    MIN_LARGE_ALLOC_BYTES,
    SEGMENT_STEP_BYTES,
    SMALL_BYTES,
    SMALL_SEGMENT_BYTES,
    AllocatorConfig,
)
from narrowcast.prediction.allocator_pools import Block, Expandable, Pool
from narrowcast.units import format_bytes

__all__ = [
    "AllocatorConfig",
    "AllocatorPeaks",
    "CachingAllocator",
    "Counters",
    "OutOfDeviceMemory",
    "Replay",
    "replay",
    "round_size",
    "segment_size",
]


class OutOfDeviceMemory(NarrowcastError):
    """The stream of allocations does not fit into the memory that the device has."""


@dataclass(frozen=True, kw_only=True)
class Counters:
    """Bytes by the allocator's own names."""

    requested_bytes: int = 0
    """What was asked for."""
    allocated_bytes: int = 0
    """Blocks in use, rounding and unsplit remainders included: ``torch.cuda.memory_allocated``."""
    reserved_bytes: int = 0
    """What was taken from the device: ``torch.cuda.memory_reserved``."""


@dataclass(frozen=True, kw_only=True)
class AllocatorPeaks(Counters):
    """Each counter at its own highest, and what it took to get there."""

    segments: int = 0
    """Segments held at the end (mapped stretches, if expandable)."""
    retries: int = 0
    """How often cached segments had to be given back to make room."""


def round_size(size: int, config: AllocatorConfig) -> int:
    """Return the block size for a request (``DeviceCachingAllocator::round_size``)."""
    if size < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    divisions = config.divisions_at(size)
    if divisions > 1 and size > MIN_BLOCK_BYTES * divisions:
        floor = 1 << (size.bit_length() - 1)
        step = floor >> (divisions.bit_length() - 1)
        return -(-size // step) * step
    return -(-size // MIN_BLOCK_BYTES) * MIN_BLOCK_BYTES


def segment_size(block_size: int, config: AllocatorConfig) -> int:
    """Return what is taken from the device for a block (``get_allocation_size``)."""
    if block_size <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_size < MIN_LARGE_ALLOC_BYTES:
        return config.large_segment_bytes
    return -(-block_size // SEGMENT_STEP_BYTES) * SEGMENT_STEP_BYTES


class CachingAllocator:
    """The allocator of one device. Addresses are made up: each new segment lies above the last."""

    def __init__(self, config: AllocatorConfig | None = None) -> None:
        self.config = config or AllocatorConfig()
        self.retries = 0
        self._small, self._large = Pool(small=True), Pool(small=False)
        self._expandable = Expandable(self.config) if self.config.expandable_segments else None
        self._requested = self._allocated = self._reserved = 0
        self._peak = [0, 0, 0]
        self._next_address = 0

    @property
    def now(self) -> Counters:
        """The counters as they are."""
        return Counters(
            requested_bytes=self._requested,
            allocated_bytes=self._allocated,
            reserved_bytes=self._reserved,
        )

    @property
    def peaks(self) -> AllocatorPeaks:
        """Each counter at its own highest since the start or the last `reset_peaks`."""
        requested, allocated, reserved = self._peak
        return AllocatorPeaks(
            requested_bytes=requested,
            allocated_bytes=allocated,
            reserved_bytes=reserved,
            segments=sum(1 for _ in self.segments()),
            retries=self.retries,
        )

    def reset_peaks(self) -> None:
        """Count peaks from here on (``torch.cuda.reset_peak_memory_stats``)."""
        self._peak = [self._requested, self._allocated, self._reserved]

    def segments(self) -> Iterator[tuple[Block, ...]]:
        """Yield each segment as its blocks in the order of addresses; unmapped stretches excepted.

        With expandable segments, each mapped stretch between unmapped ones is one.
        """
        for pool in (self._small, self._large):
            yield from pool.segments()

    def malloc(self, size: int, stream: int = 0) -> Block:
        """Allocate. Raises OutOfDeviceMemory with the figures that torch prints."""
        rounded = round_size(size, self.config)
        pool = self._small if rounded <= SMALL_BYTES else self._large
        pool.searches += 1
        block = pool.take(rounded, stream, self.config) or self._grow(pool, rounded, stream)
        if block is None:
            raise self._does_not_fit(rounded)
        if self._splits(pool, block.size - rounded, rounded):
            pool.insert(block.split(rounded))
        block.allocated = True
        block.requested = size
        pool.active.add(block)
        self._requested += size
        self._allocated += block.size
        self._raise_peaks()
        return block

    def free(self, block: Block) -> None:
        """Give a block back to its pool; its memory stays reserved."""
        if not block.allocated:
            raise AssertionError(f"block at {block.address} was freed twice")
        self._requested -= block.requested
        self._allocated -= block.size
        block.allocated = False
        block.pool.active.remove(block)
        for neighbour in (block.before, block.after):
            block.pool.absorb(block, neighbour)
        block.pool.insert(block)

    def empty_cache(self) -> None:
        """Give back every segment without a block in use (``torch.cuda.empty_cache``)."""
        for pool in (self._large, self._small):
            for block in list(pool):
                if self._expandable is not None:
                    self._reserved -= self._expandable.unmap(block)
                elif block.is_whole:
                    self._release(block)

    def _grow(self, pool: Pool, size: int, stream: int) -> Block | None:
        """Take memory from the device, giving back what is cached if that is what it needs."""
        if self.config.garbage_collection_threshold and self.config.allowed_bytes is not None:
            self._collect_garbage(self.config.allowed_bytes)
        block = self._take_from_device(pool, size, stream)
        if block is None and self._release_oversize(pool, size, stream):
            block = self._take_from_device(pool, size, stream)
        if block is None:
            self.empty_cache()
            self.retries += 1
            block = self._take_from_device(pool, size, stream)
        return block

    def _take_from_device(self, pool: Pool, size: int, stream: int) -> Block | None:
        wanted = segment_size(size, self.config)
        allowed = self.config.allowed_bytes
        if allowed is not None and self._reserved + wanted > allowed:
            return None
        room = self.config.device_bytes
        if self._expandable is not None:
            before = self._expandable.mapped_bytes
            block = self._expandable.take(pool, size, stream, room=room)
            self._reserved += self._expandable.mapped_bytes - before
            return block
        if room is not None and self._reserved + wanted > room:
            return None
        block = Block(self._next_address, wanted, pool, stream)
        self._next_address += wanted
        self._reserved += wanted
        return block

    def _splits(self, pool: Pool, remaining: int, size: int) -> bool:
        """Whether what remains of a block becomes a block of its own (``should_split``)."""
        if pool.small or self._expandable is not None:
            return remaining >= MIN_BLOCK_BYTES
        most = self.config.max_split_bytes
        return remaining > SMALL_BYTES and (most is None or size < most)

    def _release(self, block: Block) -> None:
        block.pool.remove(block)
        self._reserved -= block.size

    def _release_oversize(self, pool: Pool, size: int, stream: int) -> bool:
        """Give back blocks that may not be split, largest first, until `size` is free.

        ``release_available_cached_blocks``; does nothing unless max_split_size is set.
        """
        most = self.config.max_split_bytes
        if most is None:
            return False
        wanted = max(size, most)
        large = [b for b in pool if b.stream == stream and b.size >= most]
        enough = [b for b in large if b.size >= wanted]
        if enough:
            self._release(enough[0])
            return True
        released = 0
        for block in reversed(large):
            if released >= wanted:
                break
            released += block.size
            self._release(block)
        return released >= wanted

    def _collect_garbage(self, allowed: int) -> None:
        """Give back whole cached segments older than the average, until below the threshold.

        Age is the number of searches since the block was freed; ``garbage_collect_cached_blocks``.
        """
        threshold = int(self.config.garbage_collection_threshold * allowed)
        if self._reserved <= threshold:
            return
        target, reclaimed = self._reserved - threshold, 0
        pool = self._large
        whole = [b for b in pool if b.is_whole and b.origin is None]
        while whole and reclaimed < target:
            average = sum(pool.searches - b.freed_at for b in whole) / len(whole)
            old = [b for b in whole if pool.searches - b.freed_at >= average]
            for block in old:
                reclaimed += block.size
                self._release(block)
            whole = [b for b in whole if b not in old]

    def _raise_peaks(self) -> None:
        peak = self._peak
        for i, value in enumerate((self._requested, self._allocated, self._reserved)):
            peak[i] = max(peak[i], value)

    def _does_not_fit(self, size: int) -> OutOfDeviceMemory:
        limits = [b for b in (self.config.device_bytes, self.config.allowed_bytes) if b is not None]
        return OutOfDeviceMemory(
            f"{format_bytes(size)} more do not fit into {format_bytes(min(limits))}: "
            f"{format_bytes(self._allocated)} are allocated and "
            f"{format_bytes(self._reserved - self._allocated)} are reserved but unallocated",
            hint="a smaller batch, a leaner plan, or a device with more memory",
        )


class Replay:
    """Feeds an allocator with changes of the sizes of storages, as ``MemoryLedger`` logs them."""

    def __init__(self, config: AllocatorConfig | None = None) -> None:
        self.allocator = CachingAllocator(config)
        self._blocks: dict[Hashable, tuple[int, Block]] = {}

    def feed(self, events: Iterable[tuple[Hashable, int]]) -> Replay:
        """Take (key, change in bytes) in order: new storages grow from nothing, dead ones shrink.

        A storage that is resized is moved: the new block is allocated before the old one is freed.
        """
        for key, change in events:
            size, block = self._blocks.pop(key, (0, None))
            size += change
            if size:
                self._blocks[key] = size, self.allocator.malloc(size)
            if block is not None:
                self.allocator.free(block)
        return self


def replay(
    events: Iterable[tuple[Hashable, int]], config: AllocatorConfig | None = None
) -> AllocatorPeaks:
    """Return the peaks of a stream of (key, change in bytes), in order, on an empty device."""
    return Replay(config).feed(events).allocator.peaks
