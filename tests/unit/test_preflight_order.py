"""Rules on the order of a scaled step: each fires where it must, and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.marked import check_marks

FORWARD = """
for x, y in loader:
    optimizer.zero_grad()
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
"""

FIRES = {
    "clip after the step": FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # !NC122
    scaler.update()
""",
    "clip after the step and the update, gradients cleared at the end": """
for x, y in loader:
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)  # !NC122
    optimizer.zero_grad()
""",
    "clip after gradients were cleared": """
for x, y in loader:
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)  # !NC122
""",
    "clip before unscale_": FORWARD
    + """
    scaler.scale(loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # !NC101
    scaler.step(optimizer)
    scaler.update()
""",
    "clip by hand before unscale_": FORWARD
    + """
    scaler.scale(loss).backward()
    for p in model.parameters():
        p.grad.data.clamp_(-1, 1)  # !NC101
    scaler.step(optimizer)
    scaler.update()
""",
    "clip before unscale_, of a scaled loss with a name": FORWARD
    + """
    scaled = scaler.scale(loss)
    scaled.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)  # !NC101
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
""",
    "clip before unscale_, backward in a function": """
def backward(loss, grads):
    grads.scale(loss).backward()
"""
    + FORWARD
    + """
    backward(loss, scaler)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # !NC101
    scaler.step(optimizer)
    scaler.update()
""",
    "unscale_ twice": FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.unscale_(optimizer)  # !NC102
    scaler.step(optimizer)
    scaler.update()
""",
    "unscale_ after step": FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.unscale_(optimizer)  # !NC102
    scaler.update()
""",
    "unscale_ in every micro-batch": """
for i, (x, y) in enumerate(loader):
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y) / 4
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # !NC102
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if (i + 1) % 4 == 0:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
""",
    "optimizer.step past the scaler": FORWARD
    + """
    scaler.scale(loss).backward()
    optimizer.step()  # !NC103
    scaler.update()
""",
    "backward past the scaler": FORWARD
    + """
    loss.backward()
    scaler.step(optimizer)  # !NC104
    scaler.update()
""",
    "scaled loss thrown away": FORWARD
    + """
    scaler.scale(loss)
    loss.backward()
    scaler.step(optimizer)  # !NC104
    scaler.update()
""",
    "update between two optimizers": """
other = optim.SGD(model.parameters(), lr=0.1)
"""
    + FORWARD
    + """
    other.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scaler.step(other)  # !NC105
    scaler.update()
""",
    "update in every micro-batch": """
for i, (x, y) in enumerate(loader):
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y) / 4
    scaler.scale(loss).backward()
    if (i + 1) % 4 == 0:
        scaler.step(optimizer)
        optimizer.zero_grad()
    scaler.update()  # !NC106
""",
    "step in every micro-batch": """
for i, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)  # !NC107
    if i % 4 == 0:
        scaler.update()
""",
    "scheduler first": """
scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    scheduler.step()  # !NC110
    scaler.step(optimizer)
    scaler.update()
""",
    "scheduler after a step that may be skipped": """
scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    scheduler.step()  # !NC111
""",
    "norm of scaled gradients": FORWARD
    + """
    scaler.scale(loss).backward()
    print(sum(p.grad.norm() for p in model.parameters()))  # !NC118
    scaler.step(optimizer)
    scaler.update()
""",
}

QUIET = {
    "unscale_ before clip": FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
""",
    "the norm after the step, without a limit": FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
    scaler.update()
""",
    "clip for the other optimizer, after the step of the first": """
other = optim.SGD(head.parameters(), lr=0.1)
for x, y in loader:
    optimizer.zero_grad()
    other.zero_grad()
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.unscale_(other)
    scaler.step(optimizer)
    nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    scaler.step(other)
    scaler.update()
""",
    "clip what goes on adding up between the steps": """
for i, (x, y) in enumerate(loader):
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    if (i + 1) % 4 == 0:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    nn.utils.clip_grad_value_(model.parameters(), 6e4)
""",
    "clip at the head of the loop what the last one left": """
for x, y in loader:
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    with autocast("cuda", dtype=torch.bfloat16):
        loss = F.mse_loss(model(x), y)
    loss.backward()
""",
    "clip in the branch without scaler": """
scaler = GradScaler("cuda") if use_amp else None
"""
    + FORWARD
    + """
    if scaler is not None:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    else:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
""",
    "two branches that test the same": FORWARD
    + """
    if use_amp:
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
    else:
        loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if use_amp:
        scaler.step(optimizer)
        scaler.update()
    else:
        optimizer.step()
""",
    "a branch that leaves": FORWARD
    + """
    if not use_amp:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        continue
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "a scaler that is switched off where the step is plain": """
scaler = GradScaler("cuda", enabled=dtype == "float16")
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    if dtype == "float16":
        scaler.step(optimizer)
    else:
        optimizer.step()
    scaler.update()
""",
    "a scaler that is off": """
scaler = GradScaler("cuda", enabled=False)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
""",
    "accumulation as it should be": """
for i, (x, y) in enumerate(loader):
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y) / 4
    scaler.scale(loss).backward()
    if (i + 1) % 4 == 0:
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
""",
    "micro-batches in an inner loop": """
for batch in loader:
    for x, y in batch:
        with autocast("cuda"):
            loss = F.mse_loss(model(x), y) / 4
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""",
    "the rest of the micro-batches after the loop": """
for i, (x, y) in enumerate(loader):
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y) / 4
    scaler.scale(loss).backward()
    if (i + 1) % 4 == 0:
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
if (i + 1) % 4 != 0:
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""",
    "two optimizers, one update": """
other = optim.SGD(model.parameters(), lr=0.1)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.step(other)
    scaler.update()
""",
    "two losses, each with its own update": """
other = optim.SGD(model.parameters(), lr=0.1)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    other.zero_grad()
    with autocast("cuda"):
        second = F.l1_loss(model(x), y)
    scaler.scale(second).backward()
    scaler.step(other)
    scaler.update()
""",
    "several optimizers in a loop": FORWARD
    + """
    scaler.scale(loss).backward()
    for one in optimizers:
        scaler.unscale_(one)
    for i in range(2):
        scaler.step(optimizers[i])
    scaler.update()
""",
    "one optimizer that steps less often": """
other = optim.SGD(model.parameters(), lr=0.1)
for i, (x, y) in enumerate(loader):
    optimizer.zero_grad()
    other.zero_grad()
    with autocast("cuda"):
        loss = F.mse_loss(model(x), y)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    if i % 5 == 0:
        scaler.step(other)
    scaler.update()
""",
    "a plain optimizer with a loss of its own": """
other = optim.SGD(model.parameters(), lr=0.1)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    second = F.l1_loss(model(x), y)
    second.backward()
    other.step()
""",
    "a scheduler that waits for taken steps": """
scheduler = optim.lr_scheduler.OneCycleLR(optimizer, 0.1, 100)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scale = scaler.get_scale()
    scaler.update()
    if scaler.get_scale() >= scale:
        scheduler.step()
""",
    "a scheduler by epochs": """
scheduler = optim.lr_scheduler.StepLR(optimizer, 10)
for epoch in range(3):
    for x, y in loader:
        optimizer.zero_grad()
        with autocast("cuda"):
            loss = F.mse_loss(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    scheduler.step()
""",
    "a scheduler of one's own, which steps first": FORWARD
    + """
    lr = schedule_of_mine.step()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
""",
    "norms after unscale_ and after the step": FORWARD
    + """
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    print(sum(p.grad.norm() for p in model.parameters()))
    scaler.step(optimizer)
    print(sum(p.grad.norm() for p in model.parameters()))
    scaler.update()
""",
    "an unscale_ that may hide in another file": FORWARD
    + """
    scaler.scale(loss).backward()
    prepare_gradients(scaler, optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
""",
    "a helper that unscales, called in two places of which one leaves": """
def unscale(optimizers):
    for one in optimizers:
        scaler.unscale_(one)
"""
    + FORWARD
    + """
    scaler.scale(loss).backward()
    if sharded:
        unscale([optimizer])
        for part in parts:
            if part.clips:
                break
    unscale([optimizer])
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
""",
    "a loss that the caller may have scaled": """
def step(loss):
    loss.backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
""",
}


@pytest.mark.parametrize("name", FIRES)
def test_a_misordered_step_is_found_at_its_line(name: str, tmp_path: Path) -> None:
    """The rule fires once, at the marked line, and no other rule fires."""
    check_marks(tmp_path, FIRES[name])


@pytest.mark.parametrize("name", QUIET)
def test_an_ordered_step_is_not_accused(name: str, tmp_path: Path) -> None:
    """No rule fires at all."""
    check_marks(tmp_path, QUIET[name])
