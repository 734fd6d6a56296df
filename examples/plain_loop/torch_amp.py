"""Mixed precision by hand with torch.amp: the loop that everybody copies. See dropin.py."""

import torch
from torch import nn

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
inputs, targets = torch.randn(64, 20, device=device), torch.randint(0, 3, (64,), device=device)
model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 3)).to(device)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100)
scaler = torch.amp.GradScaler(device)

for _ in range(100):
    optimizer.zero_grad()
    with torch.autocast(device, dtype=torch.float16):
        loss = nn.functional.cross_entropy(model(inputs), targets)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)  # without this line the next one clips 65,536 times too hard
    norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:  # step() does not say whether it stepped
        scheduler.step()

model.eval()
with torch.no_grad():
    accuracy = (model(inputs).argmax(1) == targets).float().mean()
print(f"loss {loss.item():.4f}, gradient norm {norm:.4f}, accuracy {accuracy:.2f}")
