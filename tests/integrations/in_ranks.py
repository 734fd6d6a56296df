"""One host trains with our precision on the ranks of torchrun; rank by rank a line of JSON.

Words: the host, the precision, a folder. On rank 1 the loss of one micro-batch overflows.
"""

from __future__ import annotations

import json
import math
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from recipes import torchvision_on_cpu  # noqa: F401 -- before what imports torchvision
from small_training import small_model

RANK = int(os.environ["RANK"])
X = torch.randn(48, 16, generator=torch.Generator().manual_seed(1))
Y = torch.randint(0, 4, (48,), generator=torch.Generator().manual_seed(2))
BAD = 3
"""The batch of rank 1, from 0, whose loss is infinite."""


def loader() -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y), batch_size=4)


def loss_of(output: Tensor, targets: Tensor, batch: int) -> Tensor:
    loss = F.cross_entropy(output.float(), targets)
    return loss * math.inf if (RANK, batch) == (1, BAD) else loss


def accelerate(precision: str, folder: Path) -> dict[str, Any]:
    from accelerate import Accelerator

    from narrowcast.integrations.accelerate import attach

    words = precision if precision in ("fp16", "bf16") else "no"
    accelerator = Accelerator(cpu=True, mixed_precision=words)
    attached = attach(accelerator, precision)
    plain = small_model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    model, optimizer, batches = attached.prepare(plain, optimizer, loader())
    for i, (inputs, targets) in enumerate(batches):
        accelerator.backward(loss_of(model(inputs), targets, i))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    accelerator.save_state(str(folder))
    return ended(plain, attached)


def lightning(precision: str, folder: Path) -> dict[str, Any]:
    import lightning.pytorch as pl

    from narrowcast.integrations.lightning import trainer_precision

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_model()

        def training_step(self, batch: Any, index: int) -> Tensor:
            return loss_of(self.net(batch[0]), batch[1], index)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    plugin, module = trainer_precision(precision, device="cpu"), Module()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", plugins=[plugin], max_epochs=1, logger=False,
        gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, loader())
    return ended(module.net, plugin)


def transformers(precision: str, folder: Path) -> dict[str, Any]:
    from integrations.trainer_case import AcceleratorState, model, trainer
    from narrowcast.integrations.transformers import attach

    def made(**options: Any) -> tuple[Any, Any]:
        AcceleratorState._reset_state(reset_partial_state=False)
        one = trainer(folder, precision, net=model(), max_steps=3, ddp_backend="gloo", **options)
        return one, attach(one, precision)

    whole, callback = made(save_strategy="steps", save_steps=2)
    whole.train()
    resumed, _ = made()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    pairs = zip(whole.model.parameters(), resumed.model.parameters(), strict=True)
    return ended(whole.model, callback) | {"resumed": all(torch.equal(a, b) for a, b in pairs)}


def ended(model: nn.Module, precision: Any) -> dict[str, Any]:
    """Say what a rank came to: its weights, its skips, what it executed."""
    host_plan = getattr(precision, "host_plan", None) or precision.precision.host_plan
    return {
        "weights": [p.detach().double().sum().item() for p in model.parameters()],
        "skips": [(skip.step, skip.reason) for skip in precision.skips],
        "scale": host_plan.scaler.get_scale(),
        "executed": sorted(host_plan.first_pass.executed["matmul"]),
        "is_finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    }


HOSTS = {"accelerate": accelerate, "lightning": lightning, "transformers": transformers}

if __name__ == "__main__":
    warnings.simplefilter("ignore")  # the hosts' own
    host, precision, folder = sys.argv[1:]
    torch.set_num_threads(1)
    answer = HOSTS[host](precision, Path(folder))
    (Path(folder) / f"rank{RANK}.json").write_text(json.dumps(answer))
