"""How fast a step could be on a device that is not there: its operations over the device's rates.

    seconds = sum over operations of  max(FLOPs / rate of the format, bytes / bandwidth,
                                          launch * micro-batches)
              + (bytes that the update reads and writes) / bandwidth

(Williams, Waterman and Patterson 2009.) On several ranks it is that of a rank's part of the batch,
or the time in which its link could pass on what it sends, whichever is longer: both go on at once.
The step is traced on tensors that have sizes and no contents. A roofline is a bound and not a
forecast: it ranks plans, and says so in the record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from narrowcast.data import MapDataset
from narrowcast.plan import OWN, Plan
from narrowcast.planning.axes import anonymous, short
from narrowcast.planning.peaks import model_without_contents
from narrowcast.planning.rates import RATES
from narrowcast.prediction.targets import target_named
from narrowcast.profiling import Bench
from narrowcast.recipes.load import Recipe

__all__ = ["Roofline", "Work"]

# What one kernel costs however little it does, where launches overlap with earlier kernels: about
# 4 us in NVIDIA's "Getting Started with CUDA Graphs" (2019). It ranks micro-batches, and no more.
_LAUNCH_S = 4e-6
_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Work:
    """What one operation has to do."""

    format: str
    flops: int
    bytes: int


class Roofline:
    """Bounds on the seconds of a step on a GPU by name."""

    def __init__(
        self,
        recipe: Recipe,
        target: str,
        batch: Any,
        *,
        data: MapDataset,
        say: Callable[[str], None],
    ) -> None:
        self._recipe = recipe
        self._target = target_named(target)
        self._rates = RATES[target]
        self._batch = batch
        self._data = data
        self._say = say
        self._works: dict[Plan, list[Work]] = {}

    def of(self, plan: Plan, *, elements: int, held_bytes: int, sent_bytes: int = 0) -> float:
        """Return a bound on the seconds of a step.

        `elements` is how many numbers of the weights a process updates, `held_bytes` what its
        optimizer holds beside them, `sent_bytes` what it sends as one of several ranks.
        """
        alone = replace(plan, weights=OWN, states=OWN, gradients="keep", micro_batches=1)
        bare = anonymous(self._target.traced(alone))
        if bare not in self._works:
            self._say(f"counting the operations of {short(bare)}")
            self._works[bare] = self._computing(bare)
        launch = _LAUNCH_S * plan.micro_batches
        seconds = sum(max(self._bound(plan, work), launch) for work in self._works[bare])
        seconds += self._update(plan, elements, held_bytes)
        return max(seconds, sent_bytes / self._rates.link_bytes_per_s)

    def _bound(self, plan: Plan, work: Work) -> float:
        is_tf32 = work.format == "fp32" and plan.policy.compute == "tf32"
        rate = self._rates.flops_in("tf32" if is_tf32 else work.format)
        return max(work.flops / rate, work.bytes / self._rates.bytes_per_s)

    def _update(self, plan: Plan, elements: int, held_bytes: int) -> float:
        """Return the seconds in which the update could read and write what it has to."""
        weights = elements * (2 if plan.policy.param == "bf16" else 4)
        return (2 * (weights + held_bytes) + weights) / self._rates.bytes_per_s

    def _computing(self, plan: Plan) -> list[Work]:
        """Count forward and backward of the whole batch."""
        stage = self._target.stage()
        model = model_without_contents(self._recipe, stage)
        with stage:
            bench = Bench.of(
                self._recipe, plan, _CPU, data=self._data, batch=stage.fake(self._batch),
                model=model, stepping=stage.stepping,
            )  # fmt: skip
            model.train()
            count = _Count()
            with stage.above(), count:
                with bench.engine.forward():
                    loss = bench.loss(bench.model, bench.batch)
                bench.engine.backward(loss)
        return count.works


class _Count(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the work of every operation that computes something; views do not."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.works: list[Work] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        inputs = _tensors((args, kwargs))
        outputs = _tensors(out)
        if inputs and outputs and not func.is_view:
            count = flop_registry.get(func._overloadpacket)
            flops = 0 if count is None else int(count(*args, **kwargs, out_val=out))
            size = sum(tensor.nbytes for tensor in (*inputs, *outputs))
            self.works.append(Work(_NAMES.get(inputs[0].dtype, "fp32"), flops, size))
        return out


def _tensors(nest: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]
