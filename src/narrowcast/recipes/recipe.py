"""A recipe that has been loaded: its parts are called here, and what they return is checked here.

A user's mistake is answered where it shows first, in words that name the part and what it should
return, and not three layers further down.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sized
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.data import IterableDataset

from narrowcast.errors import DataError, RecipeError
from narrowcast.user_code import user_code

__all__ = ["DEFAULT_BATCH_SIZE", "DEFAULT_LR", "DEFAULT_STEPS", "Recipe"]

# What a recipe gets that does not say: a size that fits anywhere, a run that ends within a minute
# for a small model, and the rate that Adam was published with (Kingma and Ba 2015).
DEFAULT_BATCH_SIZE = 32
DEFAULT_STEPS = 200
DEFAULT_LR = 1e-3


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One training as its author wrote it, with its options filled in.

    Whatever the recipe's own code raises arrives as a RecipeError with the author's traceback.
    """

    name: str
    path: Path
    options: Any
    """An instance of the recipe's dataclass ``Options``."""
    source_hash: str
    """SHA-256 (hex) of the file and of the user's modules that it imports, so that a run is never
    continued with another recipe."""
    module: ModuleType = field(repr=False)
    overrides: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """The options that were given; `options` has the others at their defaults."""

    @property
    def batch_size(self) -> int:
        return int(getattr(self.options, "batch_size", DEFAULT_BATCH_SIZE))

    @property
    def steps(self) -> int:
        return int(getattr(self.options, "steps", DEFAULT_STEPS))

    @property
    def optimizer_choice(self) -> tuple[str, str]:
        """Which optimizer trains, and why that one."""
        if hasattr(self.module, "optimizer"):
            return "the recipe's own", "the recipe defines optimizer(model, options)"
        return (
            f"AdamW(lr={self._lr:g}, fused=True)",
            "the recipe defines no optimizer(model, options)",
        )

    @property
    def collate(self) -> Callable[[list[Any]], Any] | None:
        """The recipe's own way from a list of samples to a batch, if it has one."""
        if not hasattr(self.module, "collate"):
            return None

        def collate(samples: list[Any]) -> Any:
            with self._running("collate(samples)"):
                return self.module.collate(samples)

        return collate

    def build_model(self) -> nn.Module:
        """Make the model; its weights depend on torch's global seed alone."""
        with self._running("model(options)"):
            model = self.module.model(self.options)
        if not isinstance(model, nn.Module):
            raise self._wrong("model(options)", "a torch.nn.Module", model)
        lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
        if lazy:
            raise RecipeError(
                f"{self.path.name}: the size of parameter {lazy[0]} is not known yet",
                hint="use layers with sizes: a lazy one has nothing that could be seeded or saved",
            )
        if not any(p.requires_grad for p in model.parameters()):
            raise RecipeError(
                f"{self.path.name}: the model has no parameter to train",
                hint="keep its layers as attributes, and do not freeze all of them",
            )
        return model

    def load_data(self) -> tuple[Any, Any]:
        """Return the map-style datasets (training, evaluation).

        Raises RecipeError if data() returns no pair, and DataError if one of the two is empty or
        cannot be read by index.
        """
        with self._running("data(options)"):
            pair = self.module.data(self.options)
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise self._wrong("data(options)", "a pair (training data, evaluation data)", pair)
        train, evaluation = pair
        self._check_dataset("training", train)
        self._check_dataset("evaluation", evaluation)
        return train, evaluation

    def compute_loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Return the loss to minimise: one floating-point number, shape ()."""
        with self._running("loss(model, batch)"):
            loss = self.module.loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.is_floating_point():
            raise self._wrong("loss(model, batch)", "a tensor that holds one float", loss)
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise RecipeError(
                f"{self.path.name}: the loss does not depend on the model's parameters",
                hint="use no detach(), item() or no_grad() between the model and the loss",
            )
        return loss if loss.dim() == 0 else loss.reshape(())

    def compute_metrics(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """Return the metrics of one batch: per sample with shape (B,), or one number, shape ().

        The first one is the recipe's primary metric.
        """
        with self._running("metrics(model, batch)"):
            metrics = self.module.metrics(model, batch)
        if not isinstance(metrics, dict) or not metrics:
            raise self._wrong("metrics(model, batch)", "a dict of named numbers", metrics)
        return {str(name): self._as_metric(name, value) for name, value in metrics.items()}

    def metric_direction(self, metric: str) -> Literal["higher", "lower"]:
        """Which way is better; the loss is always better lower.

        Raises RecipeError for a metric whose direction the recipe does not declare: guessing it
        wrong would turn a verdict round.
        """
        declared = getattr(self.module, "HIGHER_IS_BETTER", {})
        if metric in declared:
            return "higher" if declared[metric] else "lower"
        if metric == "loss":
            return "lower"
        raise RecipeError(
            f"{self.path.name}: whether a higher or a lower {metric!r} is better is not declared",
            hint=f"add HIGHER_IS_BETTER = {{{metric!r}: True}} (or False) to the recipe",
        )

    def build_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Make the recipe's optimizer, or the AdamW that `optimizer_choice` names."""
        trained = [p for p in model.parameters() if p.requires_grad]
        if not hasattr(self.module, "optimizer"):
            with self._running(f"AdamW(lr={self._lr:g}, fused=True)"):
                return torch.optim.AdamW(trained, lr=self._lr, fused=True)
        with self._running("optimizer(model, options)"):
            optimizer: torch.optim.Optimizer = self.module.optimizer(model, self.options)
        self._check_optimizer(optimizer)
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if not any(id(p) in held for p in trained):
            raise RecipeError(
                f"{self.path.name}: the optimizer holds none of the model's parameters",
                hint="give it the parameters of the model that it is called with",
            )
        return optimizer

    def _check_optimizer(self, optimizer: Any) -> None:
        if not isinstance(optimizer, torch.optim.Optimizer):
            expected = "a torch.optim.Optimizer"
            if isinstance(optimizer, (tuple, list, dict)):
                expected += (
                    ", one: a GAN, or what else has several, needs a loop of its own with "
                    "narrowcast.Engine, which takes a mapping of them"
                )
            raise self._wrong("optimizer(model, options)", expected, optimizer)
        try:
            inspect.signature(type(optimizer).step).bind(optimizer)
        except TypeError as error:
            raise RecipeError(
                f"{self.path.name}: {type(optimizer).__name__}.step() is not complete without "
                f"arguments ({error}), and a training calls it once a batch with none",
                hint="return an optimizer whose step() takes nothing, such as AdamW or SGD; one "
                "that calls the model itself, as LBFGS does, needs a loop without narrowcast",
            ) from None

    def build_scheduler(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """Make the recipe's learning-rate scheduler for a run of `steps`; None if it has none."""
        if not hasattr(self.module, "scheduler"):
            return None
        with self._running("scheduler(optimizer, options, steps)"):
            scheduler = self.module.scheduler(optimizer, self.options, steps)
        if not all(callable(getattr(scheduler, name, None)) for name in ("step", "state_dict")):
            expected = "a scheduler with step() and state_dict()"
            raise self._wrong("scheduler(optimizer, options, steps)", expected, scheduler)
        return scheduler

    @property
    def _lr(self) -> float:
        lr = getattr(self.options, "lr", None)
        return DEFAULT_LR if lr is None else float(lr)

    def _running(self, part: str) -> user_code:
        return user_code(self.path, part)

    def _wrong(self, part: str, expected: str, got: Any) -> RecipeError:
        return RecipeError(
            f"{self.path.name}: {part} returned {_describe(got)}",
            hint=f"it must return {expected}",
        )

    def _as_metric(self, name: object, value: Any) -> Tensor:
        if isinstance(value, (bool, int, float)):
            return torch.tensor(float(value))
        if not isinstance(value, Tensor) or value.dim() > 1 or value.is_complex():
            raise RecipeError(
                f"{self.path.name}: metrics(model, batch)[{name!r}] is {_describe(value)}",
                hint="a metric is a tensor of shape (batch,), one value a sample, or one number",
            )
        return value

    def _check_dataset(self, which: str, dataset: Any) -> None:
        if isinstance(dataset, (tuple, dict)):
            raise DataError(
                f"{self.path.name}: the {which} data are {_describe(dataset)}",
                hint="wrap tensors that belong together: TensorDataset(inputs, targets)",
            )
        readable = isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")
        if not readable or isinstance(dataset, IterableDataset):
            raise DataError(
                f"{self.path.name}: the {which} data are {_describe(dataset)}, "
                "which has no length or cannot be read by index",
                hint="return map-style datasets, with __len__ and __getitem__",
            )
        with self._running(f"len() of the {which} data"):
            empty = len(dataset) == 0
        if empty:
            raise DataError(
                f"{self.path.name}: the {which} data are empty",
                hint="data(options) must return at least one sample of each",
            )


def _describe(value: Any) -> str:
    """Name a value by type, and by shape or length where it has one."""
    kind = type(value).__name__
    if isinstance(value, Tensor):
        return f"a {kind} of shape {tuple(value.shape)} and dtype {value.dtype}"
    if value is None:
        return "None"
    if isinstance(value, (tuple, list, dict)):
        return f"a {kind} of {len(value)}"
    return f"a {kind}"
