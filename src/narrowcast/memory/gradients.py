"""Which storages are gradients: those that backward is about to put, or has put, into ``.grad``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from narrowcast.memory.modules import ModuleTrace
from narrowcast.memory.storages import Holding, Role, StorageBook

__all__ = ["GradientWatch"]


class GradientWatch:
    """Knows the storages that are, or become, the ``.grad`` of a parameter."""

    def __init__(self, book: StorageBook, trace: ModuleTrace) -> None:
        self._book = book
        self._trace = trace
        self._followed: dict[int, Tensor] = {}
        self._incoming: dict[int, Holding] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> GradientWatch:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._incoming.clear()

    def follow(self, parameter: Tensor) -> None:
        """Claim a parameter's gradient, now and whenever backward produces one."""
        self._claim(parameter)
        if id(parameter) in self._followed or not (parameter.requires_grad and parameter.is_leaf):
            return
        self._followed[id(parameter)] = parameter
        self._handles += [
            parameter.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._arrived(parameter, gradient)
            ),
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                self._accumulated
            ),
        ]

    def _claim(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._book.claim(parameter.grad, Role.GRADIENT, self._trace.owner_of(parameter))

    def _arrived(self, parameter: Tensor, gradient: Tensor) -> None:
        if parameter.grad is None:
            holding = self._book.find(gradient)
            if holding is not None:
                self._incoming[id(parameter)] = holding

    def _accumulated(self, parameter: Tensor) -> None:
        arrived = self._incoming.pop(id(parameter), None)
        if parameter.grad is not None:
            self._claim(parameter)
        elif arrived is not None:  # a hook that ran before this one has used the gradient up
            arrived.claim(Role.GRADIENT, self._trace.owner_of(parameter))
