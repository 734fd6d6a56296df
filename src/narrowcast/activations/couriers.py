"""How bytes leave a device for the host's memory and come back, without keeping it waiting.

Out: copies run on a stream of their own. A source is let go once the computation has been told to
wait for its copy, which happens when three more have been started since, or when backward begins.
Back: with the bytes that are asked for, those that were sent before them are fetched ahead, since
backward asks in reverse. So there are at most four sources, or two returned buffers beside what
backward is using, on the device.

A source is freed only after a wait in the stream that computes, and is not handed to
``record_stream``: that would keep memory from being reused until the device has caught up with
Python, which at the peak of a step it has not.
"""

from __future__ import annotations

import weakref
from collections import deque
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "Courier",
    "CudaTransport",
    "QueueCourier",
    "Sent",
    "SimulatedCourier",
    "Transport",
    "cuda_courier",
]

_UNDER_WAY = 3


class Sent(Protocol):
    """Bytes that have left the device."""

    def get(self) -> Tensor:
        """Return them on the device again, as a 1-D tensor of uint8; the same while that lives."""
        ...


class Courier(Protocol):
    def send(self, flat: Tensor) -> Sent:
        """Take the bytes of a 1-D tensor of uint8 off the device."""
        ...


class SimulatedCourier:
    """Sends fake tensors, which have a size and no bytes: for predicting what a GPU will hold."""

    def send(self, flat: Tensor) -> Sent:
        assert isinstance(flat, FakeTensor)
        return _Simulated(flat)


class _Simulated:
    def __init__(self, flat: FakeTensor) -> None:
        self._size = flat.numel()
        self._device = flat.device
        self._mode = flat.fake_mode
        self._in_use: weakref.ref[torch.UntypedStorage] | None = None

    def get(self) -> Tensor:
        storage = self._in_use() if self._in_use is not None else None
        with self._mode:
            if storage is not None:
                # The cache of fake operations would keep a storage among its keys alive for ever.
                cached, self._mode.cache_enabled = self._mode.cache_enabled, False
                try:
                    return torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
                finally:
                    self._mode.cache_enabled = cached
            flat = torch.empty(self._size, dtype=torch.uint8, device=self._device)
        self._in_use = weakref.ref(flat.untyped_storage())
        return flat


class Transport(Protocol):
    """Copies beside the computation of one device."""

    def on_host(self, size: int) -> Tensor: ...

    def on_device(self, size: int) -> Tensor: ...

    def copy(self, source: Tensor, target: Tensor) -> Any:
        """Begin a copy after all that the computation has been given so far; returns its end."""
        ...

    def wait(self, done: Any) -> None:
        """Let all that the computation is given from now on wait for the end of a copy."""
        ...


class CudaTransport:
    """Pinned host memory, and one extra stream of one CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def on_host(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def on_device(self, size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def copy(self, source: Tensor, target: Tensor) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done: torch.cuda.Event = self._stream.record_event()
        return done

    def wait(self, done: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(done)


class QueueCourier:
    """Sends with a few copies under way at a time, and fetches in reverse, one ahead."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self._leaving: deque[tuple[Tensor, Any]] = deque()
        self._last: weakref.ref[_OnHost] | None = None

    def send(self, flat: Tensor) -> Sent:
        host = self.transport.on_host(flat.numel())
        self._leaving.append((flat, self.transport.copy(flat, host)))
        self.let_go(_UNDER_WAY)
        sent = _OnHost(host, self, self._last)
        self._last = weakref.ref(sent)
        return sent

    def let_go(self, most: int) -> None:
        """Free sources, oldest first, until `most` are left."""
        while len(self._leaving) > most:
            _, done = self._leaving[0]
            self.transport.wait(done)
            self._leaving.popleft()  # freed after the wait: what reuses the memory waits too


class _OnHost:
    """Bytes in the host's memory; on the device as well while they are fetched or in use."""

    def __init__(
        self, host: Tensor, courier: QueueCourier, before: weakref.ref[_OnHost] | None
    ) -> None:
        self._host = host
        self._courier = courier
        self._before = before
        self._ahead: tuple[Tensor, Any] | None = None
        self._in_use: weakref.ref[torch.UntypedStorage] | None = None

    def get(self) -> Tensor:
        self._courier.let_go(0)
        storage = self._in_use() if self._in_use is not None else None
        if storage is None:
            self.fetch()
            flat = self._arrived()
            self._in_use = weakref.ref(flat.untyped_storage())
        else:
            flat = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        before = self._before() if self._before is not None else None
        if before is not None:
            before.fetch()
        return flat

    def fetch(self) -> None:
        """Begin to bring the bytes back, unless that is under way or they are there."""
        if self._ahead is None and (self._in_use is None or self._in_use() is None):
            transport = self._courier.transport
            flat = transport.on_device(self._host.numel())
            self._ahead = flat, transport.copy(self._host, flat)

    def _arrived(self) -> Tensor:
        assert self._ahead is not None
        (flat, done), self._ahead = self._ahead, None
        self._courier.transport.wait(done)
        return flat

    def __del__(self) -> None:
        if self._ahead is not None:  # fetched and never asked for: its copy may be under way
            self._arrived()


@cache
def cuda_courier(device: torch.device) -> QueueCourier:
    """Return the courier of a device, the same one each time."""
    return QueueCourier(CudaTransport(device))
