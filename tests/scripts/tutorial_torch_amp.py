"""The loop that everybody copies, with torch.amp: autocast, scale, backward, step, update."""

import torch
from torch import nn

batch_size, in_size, out_size, num_layers, num_batches, epochs = 512, 4096, 4096, 3, 50, 3
device = "cuda" if torch.cuda.is_available() else "cpu"


def make_model():
    layers = []
    for _ in range(num_layers - 1):
        layers += [nn.Linear(in_size, in_size), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(in_size, out_size)).to(device)


data = [torch.randn(batch_size, in_size, device=device) for _ in range(num_batches)]
targets = [torch.randn(batch_size, out_size, device=device) for _ in range(num_batches)]
pairs = list(zip(data, targets, strict=True))
loss_fn = nn.MSELoss().to(device)


def train(model, optimizer, scaler, scheduler):
    model.train()
    for epoch in range(epochs):
        for batch, target in pairs:
            with torch.autocast(device_type=device, dtype=torch.float16):
                output = model(batch)
                loss = loss_fn(output, target)
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=0.1)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

        scheduler.step()
        print(epoch, evaluate(model))


@torch.no_grad()
def evaluate(model):
    model.eval()
    total = sum(loss_fn(model(batch), target).item() for batch, target in pairs)
    model.train()
    return total / len(data)


def save(model, optimizer, scaler, path):
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
    }
    torch.save(state, path)


if __name__ == "__main__":
    net = make_model()
    opt = torch.optim.SGD(net.parameters(), lr=0.001)
    scaler = torch.amp.GradScaler(device)
    schedule = torch.optim.lr_scheduler.StepLR(opt, step_size=10)
    train(net, opt, scaler, schedule)
    save(net, opt, scaler, "checkpoint.pt")
