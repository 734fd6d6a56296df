"""Rules on what stands inside an autocast, and on what an autocast was asked for."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from scripts.marked import check_marks

BF16 = """
import torch
from torch import nn, optim
import torch.nn.functional as F
from torch.amp import autocast, custom_bwd, custom_fwd
model = nn.Linear(8, 8).cuda()
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
"""
TRAIN = """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
"""

FIRES = {
    "the loop inside": BF16
    + """
with autocast("cuda", dtype=torch.bfloat16):  # !NC201
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
""",
    "a decorated training function": BF16
    + """
@autocast("cuda", dtype=torch.bfloat16)  # !NC201
def train():
    for x, y in loader:
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
""",
    "backward inside": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
        loss.backward()  # !NC202
    optimizer.step()
""",
    "the step inside": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
        loss.backward()  # !NC202
        optimizer.step()  # !NC203
""",
    "never entered": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    torch.autocast("cuda", dtype=torch.bfloat16)  # !NC204
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
    "CUDA's autocast and nothing on CUDA": """
import torch
from torch import nn, optim
model = nn.Linear(8, 8)
optimizer = optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):  # !NC205
        loss = nn.functional.mse_loss(model(x.to("cpu")), y)
    loss.backward()
    optimizer.step()
""",
    "BCE, the function": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.binary_cross_entropy(torch.sigmoid(model(x)), y)  # !NC206
    loss.backward()
    optimizer.step()
""",
    "BCE, the module": BF16
    + """
criterion = nn.BCELoss()
def compute(x, y):
    return criterion(torch.sigmoid(model(x)), y)  # !NC206
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = compute(x, y)
    loss.backward()
    optimizer.step()
""",
    "a function that multiplies in backward": BF16
    + """
class Product(torch.autograd.Function):  # !NC207
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t().mm(x)
"""
    + TRAIN,
    "evaluation under autocast only": BF16
    + TRAIN
    + """
@torch.no_grad()
def evaluate():
    model.eval()
    with autocast("cuda", dtype=torch.bfloat16):  # !NC208
        return [F.mse_loss(model(x), y).item() for x, y in validation]
""",
    "deprecated": """
import torch
from torch.cuda import amp
from torch.cuda.amp import autocast
scaler = amp.GradScaler()  # !NC209
def forward(model, x):
    with autocast():
        return model(x)
""",
}

QUIET = {
    "a step of one iteration in its own autocast, left before backward": BF16 + TRAIN,
    "an autocast that is off in a branch": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16, enabled=use_amp):
        loss = F.mse_loss(model(x), y)
        if not use_amp:
            loss.backward()
            optimizer.step()
""",
    "backward where autocast is switched off again": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
        with autocast("cuda", enabled=False):
            loss.backward()
    optimizer.step()
""",
    "a loop of forward passes inside": BF16
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = 0
        for part in x.chunk(4):
            loss = loss + F.mse_loss(model(part), y)
    loss.backward()
    optimizer.step()
""",
    "entered by hand": BF16
    + """
torch.autocast("cuda", dtype=torch.bfloat16).__enter__()
""",
    "a model that is moved where the run says": """
import torch
from torch import nn, optim
model = nn.Linear(8, 8).to(device)
optimizer = optim.SGD(model.parameters(), lr=0.1)
for x, y in loader:
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = nn.functional.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
""",
    "BCE of logits, and BCE outside": BF16
    + """
criterion = nn.BCELoss()
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        p = model(x)
        loss = F.binary_cross_entropy_with_logits(p, y)
        with autocast("cuda", enabled=False):
            loss = loss + F.binary_cross_entropy(torch.sigmoid(p.float()), y)
    loss = loss + criterion(torch.sigmoid(p.float()), y)
    loss.backward()
    optimizer.step()
""",
    "BCE under the CPU's autocast, which allows it": """
import torch
import torch.nn.functional as F
def compute(model, x, y):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.binary_cross_entropy(torch.sigmoid(model(x)), y)
""",
    "a function that is wrapped, and one that only moves data": BF16
    + """
class Product(torch.autograd.Function):
    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return x @ w.t()

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx, g):
        x, w = ctx.saved_tensors
        return g @ w, g.t().mm(x)

class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return -g
"""
    + TRAIN,
    "evaluation in fp32, and evaluation in either": BF16
    + TRAIN
    + """
@torch.no_grad()
def evaluate(use_amp):
    model.eval()
    if use_amp:
        with autocast("cuda", dtype=torch.bfloat16):
            return model(x)
    else:
        return model(x)

def validate():
    model.eval()
    return model(x)
""",
    "a script that only generates": """
import torch
model.eval()
with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
    print(model(x))
""",
    "a type that is named and not used": """
from __future__ import annotations
import torch
def train(scaler: torch.cuda.amp.GradScaler) -> None:
    scaler.update()
""",
    "an autocast of another file": """
import torch
from helpers import get_autocast
autocast = get_autocast("amp")
for x, y in loader:
    optimizer.zero_grad()
    with autocast():
        loss = model(x, y)
        loss.backward()
    optimizer.step()
""",
}


@pytest.mark.parametrize("name", FIRES)
def test_a_misused_autocast_is_found_at_its_line(name: str, tmp_path: Path) -> None:
    """The rule fires once, at the marked line, and no other rule fires."""
    check_marks(tmp_path, FIRES[name], preamble="")


@pytest.mark.parametrize("name", QUIET)
def test_an_autocast_in_its_place_is_not_accused(name: str, tmp_path: Path) -> None:
    """No rule fires at all."""
    check_marks(tmp_path, QUIET[name], preamble="")


@pytest.mark.parametrize("inside", [False, True])
def test_a_loop_inside_autocast_trains_on_old_weights(inside: bool) -> None:
    """What NC201 says is so: the loss does not change at all, while per-step autocast learns."""
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(64, 8)
    losses = []

    def step() -> None:
        optimizer.zero_grad()
        loss = (model(x).float() - x.sum(1, keepdim=True)).pow(2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    around = torch.autocast("cpu", dtype=torch.bfloat16) if inside else nullcontext()
    with around:
        for _ in range(10):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                step()

    assert (len(set(losses)) == 1) is inside
