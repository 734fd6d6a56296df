"""Rules on whether there is a scaler, of what kind, and what it is used with."""

from __future__ import annotations

from pathlib import Path

import pytest

from narrowcast.preflight.check import check
from scripts.marked import check_marks

IMPORTS = """
import torch
from torch import nn, optim
import torch.nn.functional as F
from torch.amp import GradScaler, autocast
"""
SETUP = (
    IMPORTS
    + """
model = nn.Linear(8, 8).cuda()
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
"""
)
LOOP = """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
"""
SCALED = """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""

FIRES = {
    "no update": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # !NC108
""",
    "no step": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    scaler.update()  # !NC109
""",
    "a scaler in every step": SETUP
    + """
for x, y in loader:
    optimizer.zero_grad()
    scaler = GradScaler("cuda")  # !NC112
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
"""
    + SCALED,
    "fp16 by default": SETUP
    + LOOP
    + """
    loss.backward()  # !NC113
    optimizer.step()
""",
    "fp16 by an option": SETUP
    + """
dtype = torch.bfloat16 if options.bf16 else torch.float16
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=dtype):
        loss = F.mse_loss(model(x), y)
    loss.backward()  # !NC113
    optimizer.step()
""",
    "fp16 weights": IMPORTS
    + """
model = nn.Linear(8, 8).cuda()
model.half()  # !NC114
optimizer = optim.SGD(model.parameters(), lr=1e-3)
scaler = GradScaler("cuda")
"""
    + LOOP
    + SCALED,
    "fp16 weights from a library": IMPORTS
    + """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("gpt2", torch_dtype=torch.float16)  # !NC114
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
scaler = GradScaler("cuda")
"""
    + LOOP
    + SCALED,
    "a scaler in bf16": SETUP
    + """
scaler = GradScaler("cuda")
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()  # !NC115
    scaler.step(optimizer)
    scaler.update()
""",
    "a closure by name": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer, closure=closure)  # !NC116
    scaler.update()
""",
    "LBFGS": IMPORTS
    + """
model = nn.Linear(8, 8).cuda()
optimizer = optim.LBFGS(model.parameters())
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # !NC116
    scaler.update()
""",
    "a penalty on scaled gradients": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    grads = torch.autograd.grad(  # !NC117
        scaler.scale(loss), model.parameters(), create_graph=True
    )
    loss = loss + sum(g.pow(2).sum() for g in grads).sqrt()
"""
    + SCALED,
    "a clip that raises": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(  # !NC119
        model.parameters(), 1.0, error_if_nonfinite=True
    )
    scaler.step(optimizer)
    scaler.update()
""",
    "anomaly mode": SETUP
    + """
scaler = GradScaler("cuda")
torch.autograd.set_detect_anomaly(True)  # !NC120
"""
    + LOOP
    + SCALED,
    "gradients that pile up": SETUP
    + """
for x, y in loader:
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()  # !NC121
""",
}

QUIET = {
    "update in a function of another file": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    after_step(scaler)
""",
    "step in a function of another file": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    scaler.scale(loss).backward()
    optimizers.step_all(scaler)
    scaler.update()
""",
    "a scaler for each fold": SETUP
    + """
for fold in range(5):
    scaler = GradScaler("cuda")
    for x, y in loader:
        optimizer.zero_grad()
        with autocast("cuda"):
            loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
""",
    "bf16 without a scaler": SETUP
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
    "the CPU's autocast, which is bf16": IMPORTS
    + """
model = nn.Linear(8, 8)
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cpu"):
        loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
    "a device that only the run knows": SETUP
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast(options.device):
        loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
    "fp16 scaled by Accelerate": SETUP
    + """
from accelerate import Accelerator
accelerator = Accelerator(mixed_precision="fp16")
"""
    + LOOP
    + """
    accelerator.backward(loss)
    optimizer.step()
""",
    "fp16 under autocast that is off": SETUP
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", enabled=False):
        loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
    "half weights made whole again": IMPORTS
    + """
model = nn.Linear(8, 8).cuda()
model.half().float()
optimizer = optim.SGD(model.parameters(), lr=1e-3)
scaler = GradScaler("cuda")
"""
    + LOOP
    + SCALED,
    "a half copy that is saved": SETUP
    + """
import copy
scaler = GradScaler("cuda")
"""
    + LOOP
    + SCALED
    + """
torch.save({"model": copy.deepcopy(model).half()}, "model.pt")
""",
    "a half model for evaluation in another function": SETUP
    + """
scaler = GradScaler("cuda")
def export(path):
    model = load(path)
    model.half()
    return model
"""
    + LOOP
    + SCALED,
    "a scaler for whichever dtype was asked": SETUP
    + """
dtype = torch.bfloat16 if options.bf16 else torch.float16
scaler = GradScaler("cuda", enabled=dtype == torch.float16)
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=dtype):
        loss = F.mse_loss(model(x), y)
"""
    + SCALED,
    "a penalty on gradients that are divided": SETUP
    + """
scaler = GradScaler("cuda")
"""
    + LOOP
    + """
    grads = torch.autograd.grad(scaler.scale(loss), model.parameters(), create_graph=True)
    inverse = 1.0 / scaler.get_scale()
    loss = loss + sum((g * inverse).pow(2).sum() for g in grads).sqrt()
"""
    + SCALED,
    "LBFGS without a scaler, with gradients cleared": IMPORTS
    + """
model = nn.Linear(8, 8)
optimizer = optim.LBFGS(model.parameters())
for x, y in loader:
    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss
    optimizer.step(closure)
""",
    "another library with the same names": """
import paddle
for x, y in loader:
    loss = model(x, y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    lr_scheduler.step()
""",
    "anomaly mode that is off": SETUP
    + """
scaler = GradScaler("cuda")
torch.autograd.set_detect_anomaly(False)
"""
    + LOOP
    + SCALED,
    "gradients of torch.distributed's own kind": SETUP
    + """
for x, y in loader:
    loss = F.mse_loss(model(x), y)
    dist_autograd.backward(context, [loss])
    optimizer.step(context)
""",
    "gradients set to None": SETUP
    + """
for x, y in loader:
    for p in model.parameters():
        p.grad = None
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
}


@pytest.mark.parametrize("name", FIRES)
def test_a_scaler_that_does_harm_is_found(name: str, tmp_path: Path) -> None:
    """The rule fires once, at the marked line, and no other rule fires."""
    check_marks(tmp_path, FIRES[name], preamble="")


@pytest.mark.parametrize("name", QUIET)
def test_a_scaler_that_serves_is_not_accused(name: str, tmp_path: Path) -> None:
    """No rule fires at all."""
    check_marks(tmp_path, QUIET[name], preamble="")


@pytest.mark.parametrize(
    ("backward", "divide", "accused"),
    [
        ("(loss * 1024).backward()", "p.grad.div_(1024)", False),
        ("scaled = loss * S; scaled.backward()", "p.grad /= S", False),
        ("loss.mul(S).backward()", "p.grad.data.div_(S)", False),
        ("loss.backward()", "p.grad.div_(world_size)", True),
    ],
)
def test_a_loss_that_is_scaled_by_hand_is_not_accused(
    backward: str, divide: str, *, accused: bool, tmp_path: Path
) -> None:
    """``(loss * scale).backward()``, and gradients divided by it: a scaler of one's own."""
    script = tmp_path / "by_hand.py"
    script.write_text(
        "import torch\n"
        "model = torch.nn.Linear(4, 1).cuda()\n"
        "optimizer = torch.optim.SGD(model.parameters(), lr=0.1)\n"
        "for x in batches:\n"
        "    optimizer.zero_grad()\n"
        "    with torch.autocast('cuda', dtype=torch.float16):\n"
        "        loss = model(x).mean()\n"
        f"    {backward}\n"
        "    for p in model.parameters():\n"
        f"        {divide}\n"
        "    optimizer.step()\n"
    )

    rules = [finding.rule for finding in check(script).findings]

    assert rules == (["NC113 fp16-without-scaler"] if accused else [])
