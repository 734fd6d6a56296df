"""Transformers' Trainer with a precision of ours: a tiny GPT-2 on a few sentences, offline.

python examples/hf_trainer/train.py --precision fp16
python examples/hf_trainer/train.py --precision lean --steps 60 --resume
"""

import argparse
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed

from narrowcast.integrations.transformers import attach

TEXT = (
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, "
    "must be in want of a wife. However little known the feelings or views of such a man may be "
    "on his first entering a neighbourhood, this truth is so well fixed in the minds of the "
    "surrounding families, that he is considered as the rightful property of some one or other "
    "of their daughters. "
)
LENGTH = 32


class Characters(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """All windows of 32 characters of the text."""

    def __init__(self) -> None:
        self.ids = torch.tensor([ord(character) for character in TEXT])

    def __len__(self) -> int:
        return len(self.ids) - LENGTH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.ids[index : index + LENGTH]
        return {"input_ids": window, "labels": window}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precision", default="fp16")
    parser.add_argument("--optimizer", default="adamw", help="adamw, lion or sgd")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("runs/hf_trainer"))
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    asked = parser.parse_args()

    set_seed(0)
    config = GPT2Config(
        vocab_size=128, n_positions=LENGTH, n_embd=64, n_layer=2, n_head=4,
        bos_token_id=None, eos_token_id=None, use_cache=False,
    )  # fmt: skip
    trainer = Trainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            output_dir=str(asked.folder),
            max_steps=asked.steps,
            per_device_train_batch_size=16,
            learning_rate=3e-3,
            fp16=asked.precision == "fp16",  # the Trainer's word for what attach() carries out
            bf16=asked.precision == "bf16",
            logging_steps=min(10, asked.steps),
            save_steps=20,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Characters(),
    )
    # The only line that differs: it says what computes, what steps, and how the loss is taken.
    callback = attach(trainer, asked.precision, optimizer=asked.optimizer, chunked_loss=True)
    trainer.train(resume_from_checkpoint=asked.resume)

    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    executed = callback.precision.host_plan.first_pass.executed
    print(f"step {trainer.state.global_step}, loss {losses[-1]:.3f}, executed {executed['matmul']}")
    if callback.memory is not None:
        peak = callback.memory.total_peak_bytes
        print(f"peak {peak / 2**20:.2f} MiB, {len(callback.skips)} steps skipped")


if __name__ == "__main__":
    main()
