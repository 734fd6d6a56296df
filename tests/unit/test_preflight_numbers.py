"""Rules on numbers that 16 bits cannot hold, and on checkpoints that lack the scaler."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from narrowcast.preflight.number_rules import lost_share
from scripts.marked import PREAMBLE, check_marks

IMPORTS = """
import torch
from torch import nn, optim
import torch.nn.functional as F
"""
PLAIN = """
for x, y in loader:
    optimizer.zero_grad()
    loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
"""
SCALED = """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
"""
ATTENTION = """
class Attention(nn.Module):
    def forward(self, q, k, v, mask):
        scores = q @ k.transpose(-2, -1) / 8
        scores = {fill}
        return scores.softmax(-1) @ v
"""

FIRES = {
    "Adam's eps on fp16 weights": IMPORTS
    + """
model = nn.Linear(8, 8).cuda().half()
optimizer = optim.Adam(model.parameters(), lr=1e-2)  # !NC301
"""
    + PLAIN,
    "lost updates": IMPORTS
    + """
model = nn.Linear(8, 8).to("cuda", torch.bfloat16)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5)  # !NC302
"""
    + PLAIN,
    "accumulation in bf16": IMPORTS
    + """
model = nn.Linear(8, 8).cuda()
model = model.to(torch.bfloat16)
optimizer = optim.SGD(model.parameters(), lr=0.1)
STEPS = 64
for i, (x, y) in enumerate(loader):
    loss = F.mse_loss(model(x), y) / STEPS
    loss.backward()  # !NC305
    if (i + 1) % STEPS == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    "a mask below fp16": PREAMBLE
    + ATTENTION.format(fill="scores.masked_fill(mask == 0, -1e9)  # !NC303")
    + SCALED,
    "a mask on what a layer returned": PREAMBLE
    + """
head = nn.Linear(8, 8).cuda()
head = head.to("cuda")
for x, y in loader:
    with autocast("cuda"):
        loss = F.mse_loss(head(x).masked_fill(y == 0, -1e9), y)  # !NC303
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "a mask on what a model that ends in a layer returned": PREAMBLE
    + """
net = torch.compile(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU()))
for x, y in loader:
    with autocast("cuda"):
        q = net(x).squeeze(-1)
        q = q.masked_fill(y == 0, -1e9)  # !NC303
        loss = q.sum()
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "a mask on the scores of additive attention": PREAMBLE
    + """
class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.score = nn.Linear(8, 1)

    def forward(self, x, mask):
        scores = self.score(torch.tanh(x)).squeeze(-1)
        return scores.masked_fill(mask, -1e9).softmax(-1)  # !NC303
"""
    + SCALED,
    "fp32's lowest as a mask": PREAMBLE
    + """
def attend(q, k, mask):
    scores = torch.matmul(q, k)
    return scores.masked_fill(mask, torch.finfo(torch.float32).min).softmax(-1)  # !NC303
"""
    + SCALED,
    "log of a narrow sigmoid": PREAMBLE
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda"):
        p = torch.sigmoid(model(x))
        loss = -(y * torch.log(p + 1e-8) + (1 - y) * (1 - p).log()).mean()  # !NC304 !NC304
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "a scaler that is not saved": PREAMBLE
    + SCALED
    + """
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
torch.save(state, "last.pt")  # !NC401
""",
    "a scaler that is not passed on": PREAMBLE
    + SCALED
    + """
utils.save_checkpoint(model, optimizer, epoch, "last.pt")  # !NC401
""",
    "a save in a function of its own": PREAMBLE
    + """
def keep(state, path):
    torch.save(state, path)  # !NC401
"""
    + SCALED
    + """
keep(dict(net=model.state_dict(), optim=optimizer.state_dict()), "last.pt")
""",
    "an optimizer in a file of its own": PREAMBLE
    + SCALED
    + """
torch.save(model.state_dict(), "model.pt")
torch.save(optimizer.state_dict(), "optimizer.pt")  # !NC401
""",
    "states gathered in an object": PREAMBLE
    + SCALED
    + """
def save_snapshot(path):
    snapshot = Snapshot(model=model.state_dict(), optimizer=optimizer.state_dict())  # !NC401
    torch.save(asdict(snapshot), path)
""",
    "a scaler that is not restored": PREAMBLE
    + """
state = torch.load("last.pt")
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])  # !NC402
"""
    + SCALED
    + """
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict()}, "last.pt")
""",
}

QUIET = {
    "a mask on what a layer returned in fp32 or bf16": PREAMBLE
    + """
head = nn.Linear(8, 8).cuda()
norm = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
with torch.no_grad():
    q = head(x).masked_fill(mask, -1e9)
for x, y in loader:
    q = head(x)
    with autocast("cuda"):
        a = q.masked_fill(y == 0, -1e9)
        b = norm(x).masked_fill(y == 0, -1e9)
        c = head(x).float().masked_fill(y == 0, -1e9)
        d = unknown(x).masked_fill(y == 0, -1e9)
        with autocast("cuda", enabled=False):
            e = head(x.float()).masked_fill(y == 0, -1e9)
        loss = (a + b + c + d + e).sum()
    with autocast("cuda", dtype=torch.bfloat16):
        f = head(x).masked_fill(y == 0, -1e9)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "Adam with a large eps on fp16 weights": IMPORTS
    + """
model = nn.Linear(8, 8).cuda().half()
optimizer = optim.Adam(model.parameters(), lr=1e-2, eps=1e-4)
"""
    + PLAIN,
    "bf16 weights at a large rate": IMPORTS
    + """
model = nn.Linear(8, 8).cuda().bfloat16()
optimizer = optim.AdamW(model.parameters(), lr=1e-3)
"""
    + PLAIN,
    "bf16 weights at a rate that only the run knows": IMPORTS
    + """
model = nn.Linear(8, 8).cuda().bfloat16()
optimizer = optim.AdamW(model.parameters(), lr=options.lr)
"""
    + PLAIN,
    "bf16 weights under an optimizer with masters": IMPORTS
    + """
from narrowcast import AdamW
model = nn.Linear(8, 8).cuda().bfloat16()
optimizer = AdamW(model.parameters(), lr=1e-5)
"""
    + PLAIN,
    "frozen bf16 weights with adapters": IMPORTS
    + """
from peft import get_peft_model
model = nn.Linear(8, 8).cuda().bfloat16()
model = get_peft_model(model, config)
optimizer = optim.AdamW(model.parameters(), lr=1e-5)
"""
    + PLAIN,
    "few micro-batches in bf16": IMPORTS
    + """
model = nn.Linear(8, 8).cuda().bfloat16()
optimizer = optim.SGD(model.parameters(), lr=0.1)
for i, (x, y) in enumerate(loader):
    loss = F.mse_loss(model(x), y) / 2
    loss.backward()
    if (i + 1) % 2 == 0:
        optimizer.step()
        optimizer.zero_grad()
""",
    "a mask that the format knows": PREAMBLE
    + ATTENTION.format(fill="scores.masked_fill(mask == 0, torch.finfo(scores.dtype).min)")
    + SCALED,
    "a mask of minus infinity": PREAMBLE
    + ATTENTION.format(fill='scores.masked_fill(mask == 0, float("-inf"))')
    + SCALED,
    "a mask on fp32 scores": PREAMBLE
    + ATTENTION.format(fill="scores.float().masked_fill(mask == 0, -1e9)")
    + SCALED,
    "the same mask where nothing is fp16": IMPORTS
    + ATTENTION.format(fill="scores.masked_fill(mask == 0, -1e9)"),
    "log of a wide sigmoid, and one with an eps that holds": PREAMBLE
    + """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda"):
        z = model(x)
        p = torch.sigmoid(z.float())
        q = torch.sigmoid(z)
        loss = -(y * torch.log(p) + (1 - y) * torch.log(1 - q + 1e-4)).mean()
        loss = loss - F.logsigmoid(z).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "weights alone": PREAMBLE
    + SCALED
    + """
torch.save(model.state_dict(), "model.pt")
utils.save_model(model, "model.pt")
""",
    "a scaler added later": PREAMBLE
    + SCALED
    + """
state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
if use_amp:
    state["scaler"] = scaler.state_dict()
torch.save(state, "last.pt")
""",
    "a state that more is unpacked into": PREAMBLE
    + SCALED
    + """
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), **more}, "last.pt")
""",
    "states gathered elsewhere, to be compared": PREAMBLE
    + SCALED
    + """
def compare(path):
    return Difference(model=model.state_dict(), optimizer=optimizer.state_dict())
""",
    "a scaler that a setting of the file switches off": PREAMBLE
    + """
use_amp = False
scaler = GradScaler("cuda") if use_amp else None
"""
    + SCALED
    + """
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.pt")
""",
    "everything saved and restored": PREAMBLE
    + """
state = torch.load("last.pt")
model.load_state_dict(state["model"])
optimizer.load_state_dict(state["optimizer"])
scaler.load_state_dict(state["scaler"])
"""
    + SCALED
    + """
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict()}, "last.pt")
""",
    "a training without a scaler": IMPORTS
    + """
model = nn.Linear(8, 8).cuda()
optimizer = optim.SGD(model.parameters(), lr=0.1)
"""
    + PLAIN
    + """
torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, "last.pt")
""",
}


@pytest.mark.parametrize("name", FIRES)
def test_a_number_or_a_checkpoint_that_fails_is_found(name: str, tmp_path: Path) -> None:
    """The rule fires at the marked line, and no other rule fires."""
    check_marks(tmp_path, FIRES[name], preamble="")


@pytest.mark.parametrize("name", QUIET)
def test_what_16_bits_hold_is_not_accused(name: str, tmp_path: Path) -> None:
    """No rule fires at all."""
    check_marks(tmp_path, QUIET[name], preamble="")


@pytest.mark.parametrize(
    ("format_", "lr", "expected"),
    [("bf16", 1e-4, 0.118), ("bf16", 1e-5, 0.844), ("bf16", 1e-6, 0.981), ("fp16", 1e-5, 0.118)],
)
def test_the_share_of_lost_updates_is_the_computed_one(
    format_: str, lr: float, expected: float
) -> None:
    """Within 0.2 points of rates counted on random weights.

    Left out are weights at a power of two, whose lower neighbour is twice as near: 0.12 % of all.
    """
    assert abs(lost_share(lr, format_) - expected) < 2e-3


def test_lost_updates_are_counted_as_they_happen() -> None:
    """Of 2^20 normal weights, each moved by `lr` up or down, the share that stays is as predicted.

    Within 0.3 points: 0.06 for weights at powers of two that go down, and five standard deviations
    sqrt(p (1 - p) / n) = 0.035.
    """
    weights = (0.02 * torch.randn(2**20)).bfloat16()
    moved = weights.float() + 1e-5 * (2.0 * torch.randint(2, weights.shape) - 1.0)
    stayed = (moved.bfloat16() == weights).double().mean().item()

    assert abs(stayed - lost_share(1e-5, "bf16")) < 3e-3


def test_adam_in_fp16_divides_by_zero() -> None:
    """What NC301 says is so: a weight without a gradient becomes NaN in the first step."""
    weight = torch.zeros(3, dtype=torch.float16, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=1e-2, foreach=False)
    weight.grad = torch.zeros(3, dtype=torch.float16)

    optimizer.step()

    assert weight.isnan().all()
