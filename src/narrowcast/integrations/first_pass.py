"""The first pass of a training in a foreign trainer, watched: whether the precision is carried out.

A trainer can be asked for fp16 and compute in fp32, or in bf16, and the label stays. So the first
pass is looked at below autocast, and a training of which nothing runs in the format that was asked
for ends there, before its first step.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from narrowcast.compiling import is_compiled
from narrowcast.errors import UnsupportedPrecision
from narrowcast.policy import Policy
from narrowcast.precision.executed import ExecutedDtypes, honoured
from narrowcast.precision.functions import unused_functions
from narrowcast.precision.islands import unused_islands

__all__ = ["FirstPass"]

_HEAVY = ("matmul", "conv", "attention", "rnn")
_COMPILED = (
    "compiled parts were looked at uncompiled, in the first pass alone; they go through backward "
    "under the autocast of their forward pass, unless torch._functorch.config."
    "backward_pass_autocast is 'off'"
)
_UNSEEN = (
    "what the first pass executed was not seen: it went round the model's own call, the model was "
    "in eval mode, or it is compiled as a whole"
)


class FirstPass:
    """Watches one pass, the first, and judges it; costs nothing afterwards."""

    def __init__(self, policy: Policy, widened: Callable[[], int]) -> None:
        self.executed: dict[str, dict[str, int]] = {}
        """Kind of operation -> format -> calls; empty before the first pass."""
        self.notes: tuple[str, ...] = ()
        """What was otherwise than the policy says, and why where that is known."""
        self._policy = policy
        self._widened = widened
        """Counts the products that a chunked loss has made in fp32 on purpose."""
        self._is_done = False

    @property
    def is_done(self) -> bool:
        """Whether there is nothing to watch any more."""
        return self._is_done

    def miss(self) -> None:
        """Say that the first pass is over and was not seen."""
        self._is_done = True
        self.notes = (_UNSEEN,)
        warnings.warn(f"policy {self._policy.name!r}: {_UNSEEN}", stacklevel=2)

    def watched(self, run: Callable[[], Any], model: nn.Module) -> Any:
        """Call `run` and return what it returns; watch and judge it if it is the first pass."""
        if self._is_done:
            return run()
        with _watching() as seen:
            returned = run()
        self.judge(seen, model)
        return returned

    def on_first_call(self, model: nn.Module) -> None:
        """Watch the first call of a model in training, by hooks that take themselves off."""
        if not self._is_done:
            _FirstCall(self, model)

    def judge(self, seen: ExecutedDtypes, model: nn.Module) -> None:
        """Raise UnsupportedPrecision if nothing ran as asked; warn of what else did not."""
        policy, self._is_done = self._policy, True
        self.executed = seen.counts
        heavy = {kind: self.executed[kind] for kind in _HEAVY if kind in self.executed}
        unused = unused_islands(model, seen.has_read) | unused_functions(model)
        is_honoured, self.notes = honoured(policy, self.executed, unused, widened=self._widened())
        narrow = policy.compute in ("fp16", "bf16")
        if narrow and heavy and not any(policy.compute in by for by in heavy.values()):
            ran = "; ".join(
                f"{n} {kind} in {f}" for kind, by in heavy.items() for f, n in by.items()
            )
            raise UnsupportedPrecision(
                f"policy {policy.name!r} computes in {policy.compute}, and nothing of the first "
                f"pass did: {ran}",
                hint="does something switch autocast off, or was the model prepared by another "
                "precision? `narrowcast doctor` says what the device can do",
            )
        if is_compiled(model):
            self.notes += (_COMPILED,)
        if not is_honoured:
            warnings.warn(f"policy {policy.name!r}: {'; '.join(self.notes)}", stacklevel=2)


class _FirstCall:
    """The hooks of one first call."""

    def __init__(self, first: FirstPass, model: nn.Module) -> None:
        self._first = first
        self._open: AbstractContextManager[ExecutedDtypes] | None = None
        self._seen = ExecutedDtypes()
        self._hooks = (
            model.register_forward_pre_hook(self._enter),
            # After exceptions too: the mode must not stay behind. The next call is then the first.
            model.register_forward_hook(self._leave, always_call=True),
        )

    def _enter(self, model: nn.Module, args: Any) -> None:
        is_inside = self._open is not None
        traced = torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None
        if model.training and torch.is_grad_enabled() and not traced and not is_inside:
            self._open = _watching()
            self._seen = self._open.__enter__()

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        opened, self._open = self._open, None
        if opened is None:
            return
        opened.__exit__(None, None, None)
        if output is not None:
            for hook in self._hooks:
                hook.remove()
            self._first.judge(self._seen, model)


@contextmanager
def _watching() -> Iterator[ExecutedDtypes]:
    """Watch what executes, and leave for later what is to be compiled.

    Torch never compiles what it first met under a mode that watches operations (2.11, 2.13), and
    says nothing.
    """
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:  # else nothing can be compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stack.enter_context(ExecutedDtypes())
