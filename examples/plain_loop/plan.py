"""The loop of engine.py under a plan: bf16 weights with their remainders, states in 8 bits."""

import torch
from torch import nn

from narrowcast import AdamW, Engine, plan_named

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
inputs, targets = torch.randn(64, 20, device=device), torch.randint(0, 3, (64,), device=device)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
plan = plan_named("bf16-split")
optimizer = AdamW(model.parameters(), lr=1e-2, weights=plan.weights, states=plan.states)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
engine = Engine(model, optimizer, plan, scheduler=scheduler, clip_norm=1.0)

for _ in range(100):
    with engine.forward():
        loss = nn.functional.cross_entropy(model(inputs), targets)
    engine.backward(loss)
    report = engine.step()
    if not report.applied:
        print(f"step {report.step} skipped: {report.reason} in {report.parameters}")

with engine.evaluating():  # in fp32, from the masters that the optimizer keeps
    accuracy = (model(inputs).argmax(1) == targets).float().mean()
print(f"loss {loss.item():.4f}, gradient norm {report.gradient_norm:.4f}, accuracy {accuracy:.2f}")
