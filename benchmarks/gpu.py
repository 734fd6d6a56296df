"""What mixed precision buys on a GPU: speed and memory of our engine beside the hand-written loop.

Every workload is trained in fp32, tf32, bf16 and fp16, by the loop that everybody copies and by
`narrowcast.Engine`, in interleaved blocks of one run, so that clocks and heat affect both alike.
Peaks are those of CUDA's caching allocator over steady steps. Results go to
benchmarks/results/gpu.json with machine, versions, commit and date.

    python benchmarks/gpu.py                 # on a machine with a CUDA device
    python benchmarks/gpu.py --rehearse      # the same code on tiny models and the CPU, no figures
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from provenance import provenance, write_results

from narrowcast import Engine, policy_named
from narrowcast.precision.cast import numeric_settings
from narrowcast.recipes.load import load_recipe

Step = Callable[[], None]
LossOf = Callable[[nn.Module], Tensor]
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def gpt2(device: str, *, small: bool) -> tuple[nn.Module, LossOf, str]:
    """Build GPT-2 124M at 8 x 1024 tokens (small: the tiny recipe)."""
    overrides = ["size=tiny"] if small else ["size=gpt2", "batch_size=8"]
    label = "austen tiny, 16 x 64" if small else "austen gpt2, 8 x 1024"
    recipe = load_recipe("austen", overrides)
    train, _ = recipe.load_data()
    samples = [train[i] for i in range(recipe.batch_size)]
    batch = [torch.stack(column).to(device) for column in zip(*samples, strict=True)]
    return recipe.build_model(), lambda m: recipe.compute_loss(m, batch), label


def resnet50(device: str, *, small: bool) -> tuple[nn.Module, LossOf, str]:
    """Build ResNet-50 at 128 images of 224 pixels in channels_last (small: a narrow CNN)."""
    if small:
        layers = nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1)
        model: nn.Module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4, 10))
        count, pixels, classes = 2, 16, 10
        label = "one convolution, 2 x 16 px"
    else:
        import torchvision

        model, count, pixels, classes = torchvision.models.resnet50(), 128, 224, 1000
        label = "torchvision resnet50, 128 x 224 px"
    model = model.to(memory_format=torch.channels_last)
    x = torch.randn(count, 3, pixels, pixels, device=device).to(memory_format=torch.channels_last)
    y = torch.randint(0, classes, (count,), device=device)
    return model, lambda m: F.cross_entropy(m(x), y), label


def vit_base(device: str, *, small: bool) -> tuple[nn.Module, LossOf, str]:
    """Build ViT-B/16 at 64 images of 224 pixels (small: one encoder layer)."""
    if small:
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        x = torch.randn(2, 8, 16, device=device)
        return layer, lambda m: m(x).square().mean(), "one encoder layer"
    import timm

    x = torch.randn(64, 3, 224, 224, device=device)
    y = torch.randint(0, 1000, (64,), device=device)
    model = timm.create_model("vit_base_patch16_224")
    return model, lambda m: F.cross_entropy(m(x), y), "timm vit_base_patch16_224, 64 x 224 px"


WORKLOADS = {"gpt2": gpt2, "resnet50": resnet50, "vit_base": vit_base}


def hand_step(model: nn.Module, loss_of: LossOf, precision: str, device: str) -> Step:
    """Write the torch.amp loop out, with the TF32 flags that the precision asks for."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    dtype = AUTOCAST.get(precision)

    def step() -> None:
        with torch.autocast(device, dtype=dtype, enabled=dtype is not None):
            loss = loss_of(model)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step


def engine_step(model: nn.Module, loss_of: LossOf, precision: str, device: str) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    engine = Engine(model, optimizer, precision, device=device)

    def step() -> None:
        with engine.forward():
            loss = loss_of(model)
        engine.backward(loss)
        engine.step()

    return step


LOOPS = {"torch.amp": hand_step, "narrowcast": engine_step}


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def block(step: Step, steps: int, device: str) -> float:
    """Return seconds per step over a block of steps."""
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    synchronize(device)
    return (time.perf_counter() - begin) / steps


def peak_of(step: Step, device: str) -> dict[str, int]:
    """Return the allocator's peaks over two steady steps; nothing on a CPU."""
    if device != "cuda":
        return {}
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    step()
    step()
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return {
        f"{kind}_bytes": stats[f"{kind}_bytes.all.peak"]
        for kind in ("requested", "allocated", "reserved")
    }


def measure(
    name: str, precision: str, *, device: str, blocks: int, steps: int
) -> list[dict[str, Any]]:
    """Time both loops in alternating blocks; each has the GPU to itself when its peak is read."""
    timings: dict[str, list[float]] = {loop: [] for loop in LOOPS}
    memory: dict[str, dict[str, int]] = {}
    label = ""
    with numeric_settings(policy_named(precision)):
        for loop, build in LOOPS.items():
            torch.manual_seed(0)
            model, loss_of, label = WORKLOADS[name](device, small=device == "cpu")
            step = build(model.to(device).train(), loss_of, precision, device)
            for _ in range(3):
                step()
            memory[loop] = peak_of(step, device)
            del model, loss_of, step
            gc.collect()
        runners: dict[str, Step] = {}
        for loop, build in LOOPS.items():
            torch.manual_seed(0)
            model, loss_of, label = WORKLOADS[name](device, small=device == "cpu")
            runners[loop] = build(model.to(device).train(), loss_of, precision, device)
            block(runners[loop], 2, device)
        for _ in range(blocks):
            for loop, runner in runners.items():
                timings[loop].append(block(runner, steps, device))
    return [
        {"workload": label, "precision": precision, "loop": loop, "blocks": blocks,
         "steps_per_block": steps, "step_seconds_median": statistics.median(seconds),
         "step_seconds_min": min(seconds), "step_seconds_max": max(seconds), **memory[loop]}
        for loop, seconds in timings.items()
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--rehearse", action="store_true", help="tiny models on the CPU, no results"
    )
    parser.add_argument("--seconds", type=float, default=360, help="start no workload after this")
    arguments = parser.parse_args()
    if not arguments.rehearse and not torch.cuda.is_available():
        sys.exit("error: no CUDA device here\nhint: --rehearse runs the same code on a CPU")
    device = "cpu" if arguments.rehearse else "cuda"
    precisions = (
        ["fp32", "bf16", "fp16"] if arguments.rehearse else ["fp32", "tf32", "bf16", "fp16"]
    )
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    for name in WORKLOADS:
        for precision in precisions:
            if time.monotonic() - begin > arguments.seconds:
                rows.append({"workload": name, "precision": precision, "not_run": "out of time"})
                continue
            try:
                rows += measure(
                    name, precision, device=device, blocks=7, steps=1 if arguments.rehearse else 5
                )
            except (ImportError, torch.OutOfMemoryError) as error:
                rows.append(
                    {"workload": name, "precision": precision, "not_run": repr(error)[:300]}
                )
            gc.collect()
            if device == "cuda":
                torch.cuda.empty_cache()
    for row in rows:
        print(row)
    if not arguments.rehearse:
        write_results("gpu", rows)
    else:
        print("rehearsed on", provenance()["device_name"], "- no figures written")


if __name__ == "__main__":
    main()
