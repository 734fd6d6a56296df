"""Lightning's Trainer with a precision of ours: a digit-like task, a checkpoint, and going on.

python examples/lightning/train.py --precision 16-mixed
python examples/lightning/train.py --precision bf16-split --epochs 6 --resume
"""

import argparse
from pathlib import Path

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from narrowcast.integrations.lightning import trainer_precision


class Digits(pl.LightningModule):
    """A small convolutional network; nothing in it knows of a precision."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
            nn.Dropout(0.1), nn.Linear(16 * 16, 10),
        )  # fmt: skip

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def pictures(count: int, seed: int) -> TensorDataset:
    """Make noisy copies of ten fixed 8 x 8 patterns."""
    patterns = torch.randn(10, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    chance = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (count,), generator=chance)
    return TensorDataset(patterns[labels] + torch.randn(count, 1, 8, 8, generator=chance), labels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="16-mixed")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path("runs/lightning"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    asked = parser.parse_args()

    pl.seed_everything(0)
    precision = trainer_precision(asked.precision)  # the only line that differs
    trainer = pl.Trainer(
        plugins=[precision],
        max_epochs=asked.epochs,
        gradient_clip_val=1.0,
        default_root_dir=asked.folder,
        callbacks=[pl.callbacks.ModelCheckpoint(dirpath=asked.folder, save_last=True)],
        accelerator="auto",
        devices=1,
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(
        Digits(),
        DataLoader(pictures(512, 1), batch_size=64, shuffle=True),
        DataLoader(pictures(256, 2), batch_size=256),
        ckpt_path=asked.folder / "last.ckpt" if asked.resume else None,
    )
    accuracy = trainer.callback_metrics["accuracy"].item()
    executed = precision.host_plan.first_pass.executed
    print(f"epoch {trainer.current_epoch}, accuracy {accuracy:.3f}, executed {executed['conv']}")
    for skip in precision.skips:
        print(f"step {skip.step} skipped: {skip.reason} at loss scale {skip.loss_scale:g}")


if __name__ == "__main__":
    main()
