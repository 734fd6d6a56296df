"""A LightningModule, data and trainers small enough for any test of the adapter."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes import torchvision_on_cpu  # noqa: F401 -- before lightning, which imports torchvision

with warnings.catch_warnings(action="ignore"):
    pytest.importorskip("lightning")
    import lightning.pytorch as pl
    from lightning.fabric import Fabric  # noqa: F401 -- for the tests of Fabric

STEPS = 6
X = torch.randn(STEPS * 8, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (STEPS * 8,), generator=torch.Generator().manual_seed(2))


class Classifier(pl.LightningModule):
    """MLP 16-16-4 with dropout, which calls its network and not itself."""

    def __init__(
        self,
        *,
        make: Any = torch.optim.AdamW,
        dropout: float = 0.0,
        overflow_at: int | None = None,
        factor: float = 1e36,
        scheduled: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.net = nn.Sequential(
            nn.Linear(16, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 4)
        )
        self._make, self._options = make, options
        self._overflow_at, self._factor, self._scheduled = overflow_at, factor, scheduled
        self.seen: list[Any] = []
        """What `on_before_optimizer_step` saw: the norm of the gradients."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return loss * self._factor if self.global_step == self._overflow_at else loss

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        norms = [p.grad.float().norm() for p in self.parameters() if p.grad is not None]
        self.seen.append(torch.stack(norms).norm().item())

    def configure_optimizers(self) -> Any:
        optimizer = self._make(self.parameters(), **({"lr": 1e-2} | self._options))
        if not self._scheduled:
            return optimizer
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (1 + n))
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


def loader(*, shuffle: bool = False) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=8, shuffle=shuffle)


def trainer(plugin: Any = None, *, folder: Path | None = None, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    if folder is not None:
        settings["default_root_dir"] = folder
    return pl.Trainer(plugins=[] if plugin is None else [plugin], **(settings | options))


def fitted(model: Classifier, plugin: Any, *, shuffle: bool = False, **options: Any) -> pl.Trainer:
    """Train a model; returns its trainer."""
    made = trainer(plugin, **options)
    made.fit(model, loader(shuffle=shuffle))
    return made
