"""Steps of a training on tensors that have a size and no contents.

The same bench that `narrowcast memory` measures (``profiling.Bench``) takes the same steps under a
stage, on which every tensor is fake: operations say what shape they return and compute nothing, so
that a model of any size takes no memory and a step a few seconds. The ledger watches storages, and
fake tensors have storages.

Two things are not in a size and are answered here. Kernels allocate otherwise than shapes say: that
is a device's to know (``cpu_kernels``, ``cuda_ops``). And once a step the engine reads a number,
the norm of the gradients, as optimizers read their step counts; they get one half, so that every
step is finite and applied. Anything else that asks for a value cannot be traced, and is refused
with the line that asked.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeCopyMode,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from narrowcast.errors import NarrowcastError, RecipeError
from narrowcast.memory.measure import MemoryLedger
from narrowcast.memory.storages import Holding
from narrowcast.prediction.fakes import modules_of_fakes, unlogged, work_that_differs
from narrowcast.prediction.recall import Recall
from narrowcast.prediction.sight import taken_beside
from narrowcast.prediction.sparse import sparse_rule
from narrowcast.profiling import Bench
from narrowcast.user_code import user_traceback

__all__ = ["Explained", "Stage", "WholeTrace", "explaining", "trace_from_start", "trace_steps"]

_READ = torch.ops.aten._local_scalar_dense.default
_DEVICE = torch.ops.prim.device.default
_WITHOUT_VALUES = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
# What torch says of its fake tensors where code leaves torch: NumPy, storages, format strings.
_OF_FAKES = ("tensor subclass", "FakeTensor", "'meta' device")
_AS_IN_A_RUN = (
    "a training should fail alike: `narrowcast memory` takes the step on real tensors and tells "
    "whether it does"
)


class Stage:
    """Context in which tensors are fake and kernels those of a device; re-entrant.

    `kernels` are modes that change what operations return, below a ledger. What `above` makes is
    entered with every ledger, above it: what it allocates while an operation runs is seen too.
    """

    def __init__(
        self,
        *kernels: AbstractContextManager[Any],
        above: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._answers = _Answers(Recall(self._mode))
        self._kernels = kernels
        self._above = above
        self._entered: list[ExitStack] = []

    @property
    def stepping(self) -> AbstractContextManager[Any]:
        """Return the context in which reading a value is answered; reusable."""
        return self._answers.open

    def above(self) -> AbstractContextManager[Any]:
        """Return what belongs above a ledger; entered, the kernels among it, if any."""
        return self._above()

    @contextmanager
    def watching(self, ledger: MemoryLedger) -> Iterator[None]:
        """Enter a ledger, and see to it that in the end it has seen tensors only."""
        with ledger, self.above() as kernels:
            beside = taken_beside(kernels, ledger)
            yield
        ledger.leave_out(beside)

    def fake(self, nest: Any) -> Any:
        """Return a nest of tensors without their contents; fake ones stay as they are."""
        return tree_map_only(
            Tensor, lambda t: t if isinstance(t, FakeTensor) else self._mode.from_tensor(t), nest
        )

    def copy(self, parts: Any) -> Any:
        """Copy models, optimizers and the like, with fake tensors in the place of real ones."""
        with FakeCopyMode(self._mode):
            return copy.deepcopy(parts)

    def __enter__(self) -> Stage:
        with ExitStack() as stack:
            stack.enter_context(unlogged())
            stack.enter_context(modules_of_fakes())
            stack.enter_context(work_that_differs())
            for mode in (self._mode, self._answers, *self._kernels):
                stack.enter_context(mode)
            self._entered.append(stack.pop_all())
        return self

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


class _Answers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Answers a read of a fake tensor's value, while `open`.

    One half is neither 0 nor 1, from which optimizers take the distance to divide by.
    """

    def __init__(self, recall: Recall) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open = _Open()
        self._recall = recall

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:
            return args[0].device
        if func is _READ and self.open.depth and isinstance(args[0], FakeTensor):
            dtype = args[0].dtype
            return dtype is torch.bool or (0.5 if dtype.is_floating_point else 1)
        rule = sparse_rule(func, args)
        if rule is not None:
            return rule(*args, **(kwargs or {}))
        return self._recall.call(func, args, kwargs or {})


class _Open:
    """Context that counts how often it is entered."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *_: object) -> None:
        self.depth -= 1


def trace_steps(bench: Bench, stage: Stage, *, steps: int = 2) -> MemoryLedger:
    """Take steps on a bench of fake tensors and return the ledger of the last one.

    The second step equals the third that `narrowcast memory` measures: only the first, which makes
    the optimizer's state, is different.
    """
    with stage:
        with stage.above():
            _take(bench, steps - 1)
        ledger = MemoryLedger(bench.model, bench.optimizer, device=bench.device)
        ledger.gradients(bench.buckets())
        with stage.watching(ledger):
            ledger.inputs(bench.batch)
            _take(bench, 1)
    return ledger


def trace_from_start(bench: Bench, stage: Stage, *, steps: int = 2) -> WholeTrace:
    """Take steps under one ledger, so that its events begin with the model."""
    with stage:
        ledger = MemoryLedger(bench.model, bench.optimizer, device=bench.device)
        with ledger, stage.above() as kernels:
            beside = taken_beside(kernels, ledger)
            entry = len(ledger.events())
            ledger.inputs(bench.batch)
            _take(bench, steps - 1)
            last = len(ledger.events())
            ledger.gradients(bench.buckets())
            ledger.begin_here()
            _take(bench, 1)
    return WholeTrace(ledger=ledger, entry=entry, last_step=last, beside=beside)


@dataclass(frozen=True, kw_only=True)
class WholeTrace:
    """A ledger of all steps, whose moments are the last step's."""

    ledger: MemoryLedger
    entry: int
    """How many events there were before the batch: the model's, and the optimizer's if any."""
    last_step: int
    """How many there were before the last step."""
    beside: set[Holding]
    """Workspaces and scratch memory of kernels, which a ledger on a GPU does not see."""


def _take(bench: Bench, steps: int) -> None:
    for _ in range(steps):
        applied = bench.step()
        assert applied, "no number that the engine reads from a fake tensor is infinite"


class Explained(RecipeError):
    """A recipe's mistake that is told already, as one of a trace or as one that any run has."""


@contextmanager
def explaining(name: str, path: Path | None = None) -> Iterator[None]:
    """Turn what the user's code raises into one error with the user's line.

    Where the cause is that tensors have no values, it says so; all else is told as a run tells it.
    """
    try:
        yield
    except Explained:
        raise
    except RecipeError as error:
        cause = error.__cause__
        if cause is None:  # what a part returned was wrong, with values or without
            raise
        if _is_for_want_of_values(cause):
            raise _untraceable(name, path, cause) from cause
        raise Explained(error.message, hint=error.hint or _AS_IN_A_RUN) from cause
    except NarrowcastError:
        raise
    except Exception as error:
        # The optimizer's step and backward are not called through the recipe; what has nothing to
        # do with either is a mistake of ours.
        lines = user_traceback(error, path)
        if not isinstance(error, _WITHOUT_VALUES) and not lines:
            raise
        if _is_for_want_of_values(error):
            raise _untraceable(name, path, error) from error
        raised = f"{name}: a training step raised {type(error).__name__}: {error}"
        raise Explained(f"{raised}\n{lines}", hint=_AS_IN_A_RUN) from error


def _is_for_want_of_values(error: BaseException) -> bool:
    return isinstance(error, _WITHOUT_VALUES) or any(words in str(error) for words in _OF_FAKES)


def _untraceable(name: str, path: Path | None, error: BaseException) -> Explained:
    if isinstance(error, _WITHOUT_VALUES):
        what = f"{error.func} needs the values of tensors, and a prediction has only sizes"
    else:
        what = f"on tensors that have sizes and no values it raised {type(error).__name__}: {error}"
    lines = user_traceback(error, path)
    return Explained(
        f"{name} cannot be traced: {what}" + (f"\n{lines}" if lines else ""),
        hint="`narrowcast memory` measures a step with real tensors; or keep item(), float(), an "
        "`if` on a tensor, nonzero() and boolean masks out of model and loss",
    )
