"""The parts of the simulated allocator: blocks, the pools of free ones, and expandable segments.

A block is a stretch of addresses in a segment, linked to its neighbours there. A pool keeps the
free ones sorted by stream, size and address, which is the order of best fit. An expandable segment
is a range of addresses as large as the device of which only a part is mapped to memory.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

from narrowcast.prediction.allocator_config import SMALL_SEGMENT_BYTES, AllocatorConfig

__all__ = ["Block", "Expandable", "Pool"]

# A range without a device's size to derive it from; addresses cost nothing here.
_VAST_BYTES = 2**50


class Block:
    """A stretch of a segment: in use, free, or (expandable segments only) not mapped."""

    __slots__ = (
        "address",
        "after",
        "allocated",
        "before",
        "freed_at",
        "mapped",
        "origin",
        "pool",
        "requested",
        "size",
        "stream",
    )

    def __init__(self, address: int, size: int, pool: Pool, stream: int) -> None:
        self.address = address
        self.size = size
        self.pool = pool
        self.stream = stream
        self.requested = 0
        self.allocated = False
        self.mapped = True
        self.origin: int | None = None
        """Address of the expandable segment that the block is in, None in others."""
        self.freed_at = 0
        self.before: Block | None = None
        self.after: Block | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the block is all of its segment."""
        return self.before is None and self.after is None

    def split(self, size: int) -> Block:
        """Keep the first `size` bytes and return the rest as a block of its own."""
        rest = Block(self.address + size, self.size - size, self.pool, self.stream)
        rest.origin = self.origin
        rest.before, rest.after = self, self.after
        if self.after is not None:
            self.after.before = rest
        self.after = rest
        self.size = size
        return rest


class Pool:
    """Free blocks in the order of best fit, and the blocks in use that came from here."""

    def __init__(self, *, small: bool) -> None:
        self.small = small
        self.searches = 0
        self.active: set[Block] = set()
        self.unmapped: list[tuple[int, int, Block]] = []
        self._free: list[tuple[int, int, int, Block]] = []

    def __iter__(self) -> Iterator[Block]:
        """Yield the free blocks, by stream and then smallest first."""
        return (entry[-1] for entry in self._free)

    def insert(self, block: Block) -> None:
        """Add a block that has become free."""
        block.freed_at = self.searches
        # Addresses differ, so that blocks are never compared.
        insort(self._free, (block.stream, block.size, block.address, block))

    def remove(self, block: Block) -> None:
        """Take out a block that is about to be used, to change, or to be given back."""
        key = (block.stream, block.size, block.address)
        del self._free[bisect_left(self._free, key)]

    def insert_unmapped(self, block: Block) -> None:
        """Add addresses without memory."""
        insort(self.unmapped, (block.stream, block.address, block))

    def take(self, size: int, stream: int, config: AllocatorConfig) -> Block | None:
        """Take out the best fit (``get_free_block``)."""
        free = self._free
        at = bisect_left(free, (stream, size))
        if at == len(free) or free[at][0] != stream:
            return None
        if config.expandable_segments:
            while (
                at + 1 < len(free)
                and free[at + 1][0] == stream
                and _could_be(free[at + 1][-1]) < _could_be(free[at][-1])
            ):
                at += 1
        block = free[at][-1]
        most = config.max_split_bytes
        if most is not None:
            if size < most <= block.size:
                return None
            if size >= most and block.size >= size + config.max_non_split_rounding_bytes:
                return None
        del free[at]
        return block

    def absorb(self, block: Block, neighbour: Block | None) -> None:
        """Join a free neighbour to a block that is in no list (``try_merge_blocks``)."""
        if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
            return
        if neighbour.mapped:
            self.remove(neighbour)
        else:
            self.remove_unmapped(neighbour)
        if neighbour is block.before:
            block.address = neighbour.address
            block.before = neighbour.before
            if block.before is not None:
                block.before.after = block
        else:
            block.after = neighbour.after
            if block.after is not None:
                block.after.before = block
        block.size += neighbour.size

    def remove_unmapped(self, block: Block) -> None:
        """Take out addresses that are about to get memory, or to be joined to others."""
        del self.unmapped[bisect_left(self.unmapped, (block.stream, block.address))]

    def segments(self) -> Iterator[tuple[Block, ...]]:
        """Yield the blocks of each mapped stretch in the order of addresses."""
        blocks = [*self, *self.active]
        heads = [b for b in blocks if b.before is None or not b.before.mapped]
        for head in sorted(heads, key=lambda b: b.address):
            stretch = [head]
            while stretch[-1].after is not None and stretch[-1].after.mapped:
                stretch.append(stretch[-1].after)
            yield tuple(stretch)


class Expandable:
    """Segments that grow: memory is mapped where addresses are free, lowest first.

    Up to torch 2.15 in steps of 2 MiB for the small pool and of a large segment for the large one.
    """

    def __init__(self, config: AllocatorConfig) -> None:
        self.mapped_bytes = 0
        self._large_step = config.large_segment_bytes
        device = config.device_bytes
        # An eighth more than the device has, so that pages can be moved to the end.
        self._range = _VAST_BYTES if device is None else device + device // 8
        self._next_address = 0

    def take(self, pool: Pool, size: int, stream: int, *, room: int | None) -> Block | None:
        """Map what is missing for a block (``try_allocate_expandable_block``); None if no room."""
        block = self._find(pool, size, stream)
        if not block.mapped and not self._map(block, min(block.size, size), room):
            return None
        while block.size < size:
            following = block.after
            assert following is not None, "the addresses were counted"
            if not self._map(following, min(size - block.size, following.size), room):
                return None
            block = following
        pool.remove(block)
        return block

    def unmap(self, block: Block) -> int:
        """Give back the whole steps inside a free block; return how many bytes that is."""
        pool, step = block.pool, self._step(block.pool)
        assert block.origin is not None, "in an expandable segment"
        first = -(-(block.address - block.origin) // step) * step + block.origin
        last = (block.address + block.size - block.origin) // step * step + block.origin
        if first >= last:
            return 0
        pool.remove(block)
        if first > block.address:
            rest = block.split(first - block.address)
            pool.insert(block)
            block = rest
        if last < block.address + block.size:
            pool.insert(block.split(last - block.address))
        block.mapped = False
        for neighbour in (block.before, block.after):
            pool.absorb(block, neighbour)
        if not block.is_whole:
            pool.insert_unmapped(block)
        self.mapped_bytes -= last - first
        return last - first

    def _step(self, pool: Pool) -> int:
        return SMALL_SEGMENT_BYTES if pool.small else self._large_step

    def _find(self, pool: Pool, size: int, stream: int) -> Block:
        """Return the lowest stretch with enough free addresses (``find_expandable_block``)."""
        for owner, _, block in pool.unmapped:
            start = block
            if owner != stream:
                continue
            if block.before is not None and not block.before.allocated:
                start = block.before
            if _free_addresses(start, size) >= size:
                return start
        step = self._step(pool)
        fresh = Block(self._next_address, -(-self._range // step) * step, pool, stream)
        self._next_address += fresh.size
        fresh.origin = fresh.address
        fresh.mapped = False
        pool.insert_unmapped(fresh)
        return fresh

    def _map(self, block: Block, size: int, room: int | None) -> bool:
        pool, step = block.pool, self._step(block.pool)
        size = -(-size // step) * step
        if room is not None and self.mapped_bytes + size > room:
            return False
        pool.remove_unmapped(block)
        if size < block.size:
            rest = block.split(size)
            rest.mapped = False
            pool.insert_unmapped(rest)
        block.mapped = True
        for neighbour in (block.before, block.after):
            pool.absorb(block, neighbour)
        pool.insert(block)
        self.mapped_bytes += size
        return True


def _free_addresses(block: Block | None, wanted: int) -> int:
    """Count the addresses from a block on that no block in use takes, up to `wanted` or more."""
    count = 0
    while block is not None and not block.allocated and count < wanted:
        count += block.size
        block = block.after
    return count


def _could_be(block: Block) -> int:
    """Return the size to which a block can grow into unmapped addresses behind it."""
    after = block.after
    return block.size + (after.size if after is not None and not after.mapped else 0)
