"""The other set-ups behind the rows: which model, which loop, and where in it was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from narrowcast.prediction.gpus import gpu_named
from peaks.cnns import ConvNeXt, MnasNet, MobileNetV3Large
from peaks.decoder import Decoder, LoopAdamW, Shape, attend, token_loss
from peaks.gpt import Gpt, GptShape, batch_loss, generate
from peaks.older_kernels import BEFORE_2_2, BEFORE_2_7
from peaks.process import Process
from peaks.vit import VisionTransformer

__all__ = ["attention_modules", "classifiers", "decoder_xl", "gpts", "vits"]

Predictions = Iterator[tuple[int, int]]

_XL = Shape(width=2560, layers=32, heads=32, hidden=10240, vocabulary=10000, context=128)
_LENGTHS = (256, 1024, 4096, 8192, 16384)
_SIZES = (16, 32, 64, 128)


def decoder_xl() -> Predictions:
    """EnzoDing-rgb/cs336-assignment2-systems: 3.4 B parameters on an A800, a peak a phase."""
    for first, autocast in ((337, False), (342, True)):
        yield first, _xl_forward(autocast=autocast)
        yield from enumerate(_xl_train(autocast=autocast), first + 1)


def _autocast(autocast: bool) -> torch.autocast | nullcontext[None]:
    return torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()


def _xl_forward(*, autocast: bool) -> int:
    process = Process(gpu_named("a800-80gb"))
    with process.run():
        model = process.to_gpu(lambda: Decoder(_XL))
        ids = torch.randint(0, _XL.vocabulary, (4, 128))
        for _ in range(2):
            with _autocast(autocast):
                model(ids)
        process.empty_cache()
        process.reset_peaks()
        with _autocast(autocast):
            logits = model(ids)
        del logits
        return process.peaks().allocated_bytes


def _xl_train(*, autocast: bool) -> list[int]:
    process = Process(gpu_named("a800-80gb"))
    with process.run():
        model = process.to_gpu(lambda: Decoder(_XL))
        optimizer = LoopAdamW(model.parameters())
        ids, targets = (torch.randint(0, _XL.vocabulary, (4, 128)) for _ in range(2))

        def step() -> list[int]:
            peaks = []
            optimizer.zero_grad(set_to_none=True)
            process.reset_peaks()
            with _autocast(autocast):
                logits = model(ids)
            peaks.append(_peak(process))
            with _autocast(autocast):
                loss = token_loss(logits, targets)
            peaks.append(_peak(process))
            loss.backward()
            peaks.append(_peak(process))
            optimizer.step()
            return [*peaks, _peak(process)]

        step()
        step()
        process.empty_cache()
        return step()


def _peak(process: Process) -> int:
    peak = process.peaks().allocated_bytes
    process.reset_peaks()
    return peak


# First rows of damek's table, in the order of sizes and lengths; four rows each.
_DAMEK = {
    16: (412, 420, 428, 436, 444),
    32: (452, 460, 468, 476, 484),
    64: (492, 500, 508, 516, 524),
    128: (532, 540, 548, 556, 564),
}


def attention_modules() -> Predictions:
    """damek's and MarkMrLi's cs336-assignment2-systems: attention by hand, batch 8, no mask."""
    row = 680
    for size in _SIZES:
        for length, first in zip(_LENGTHS, _DAMEK[size], strict=True):
            yield from enumerate(_damek(size, length), first)
            yield row, _mark(size, length)
            row += 1


def _qkv(size: int, length: int) -> list[Tensor]:
    return [torch.randn(8, length, size, requires_grad=True) for _ in range(3)]


def _damek(size: int, length: int) -> tuple[int, int, int, int]:
    process = Process(gpu_named("a100-80gb"), rules=BEFORE_2_7)
    with process.run():
        inputs = _qkv(size, length)

        def step() -> tuple[Tensor, Tensor]:
            out = attend(*inputs)
            loss = out.sum()
            loss.backward()
            for tensor in inputs:
                tensor.grad = None
            return out, loss

        held = step()  # the script's own names keep both of the warm-up
        process.reset_peaks()
        for _ in range(2):
            attend(*inputs).sum()
        forward = process.peaks().allocated_bytes
        with_inputs = process.counters().allocated_bytes
        out = attend(*inputs)
        held = (out, out.sum())
        before = process.counters().allocated_bytes
        process.reset_peaks()
        step()
        step()
        backward = process.peaks().allocated_bytes
        del held, out
        return with_inputs, before, forward, backward


def _mark(size: int, length: int) -> int:
    process = Process(gpu_named("gh200"), rules=BEFORE_2_7)
    with process.run():
        inputs = _qkv(size, length)
        peak = 0
        for _ in range(3):
            process.reset_peaks()
            out = attend(*inputs)
            out = out.sum()
            peak = process.peaks().allocated_bytes
            out.backward()
        return peak


def gpts() -> Predictions:
    """rasbt/LLMs-from-scratch, ch05: 124 M on an A100, reserved at the end of an epoch."""
    fused = {"fused_modules": True}
    flash = {**fused, "fused_attention": True}
    wide = {**flash, "vocabulary": 50304}
    plain = _gpt(GptShape(), bf16=False, fused=False)
    yield from ((711, plain), (712, plain))  # step 2 changes no size
    other = _gpt(GptShape(), bf16=False, fused=True)
    yield from ((713, other), (714, other))  # step 4 pins host memory
    for row, shape in ((715, {}), (716, fused), (717, flash), (719, wide)):
        yield row, _gpt(GptShape(**shape), bf16=True, fused=True)


def _gpt(shape: GptShape, *, bf16: bool, fused: bool) -> int:
    process = Process(gpu_named("a100-80gb"), rules=BEFORE_2_7)
    with process.run():
        model = process.to_gpu(lambda: Gpt(shape))
        if bf16:
            _convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1, fused=fused or None)
        loss_of = partial(batch_loss, model, 8, shape.context, shape.vocabulary)
        loss = None
        for step in range(3):
            optimizer.zero_grad()
            loss = loss_of()
            loss.backward()
            optimizer.step()
            if step != 1:
                with torch.no_grad():
                    model.eval()
                    for _ in range(2):
                        loss_of()
                    model.train()
        del loss
        model.eval()
        generate(model, 4, 2, shape.vocabulary)
        return process.counters().reserved_bytes


def _convert(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data = torch.empty_like(parameter, dtype=torch.bfloat16)


def vits() -> Predictions:
    """rasbt/pytorch-memory-optim: ViT-L/16 on an A100, a nightly of torch 2.1, an epoch."""
    for row, precision in ((722, "fp32"), (724, "fp16"), (725, "bf16")):
        yield row, _vit(precision)


def _vit(precision: str) -> int:
    process = Process(gpu_named("a100-80gb"), rules=BEFORE_2_2)
    with process.run():
        model = process.to_gpu(lambda: VisionTransformer(10))
        if precision == "bf16":
            _convert(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=5e-5)

        def logits_of(images: Tensor) -> Tensor:
            if precision == "bf16":
                images = images.to(torch.bfloat16)
            autocast = precision == "fp16"
            with torch.autocast("cpu", torch.float16) if autocast else nullcontext():
                logits = model(images)
            return logits.float()

        features = targets = logits = loss = None
        for _ in range(3):
            features, targets = torch.randn(64, 3, 224, 224), torch.randint(0, 10, (64,))
            logits = logits_of(features)
            loss = F.cross_entropy(logits, targets)
            optimizer.zero_grad()
            (loss * 65536.0 if precision == "fp16" else loss).backward()
            optimizer.step()
        del features, targets, logits, loss
        return process.peaks().reserved_bytes


_CNNS: dict[str, Callable[[], nn.Module]] = {
    "MnasNet": lambda: MnasNet(1000),
    "MobileNetV3Large": lambda: MobileNetV3Large(1000),
    "ConvNeXtTiny": lambda: ConvNeXt((96, 192, 384, 768), (3, 3, 9, 3), drop=0.1, classes=1000),
    "ConvNeXtBase": lambda: ConvNeXt((128, 256, 512, 1024), (3, 3, 27, 3), drop=0.5, classes=1000),
}


def classifiers() -> Predictions:
    """Stone-ResearchLife/xMem: CNNs on an RTX 3060, 86 px, four iterations, by NVML."""
    sgd, adam = torch.optim.SGD, torch.optim.Adam
    wide = _cnn("MnasNet", 700, adam)
    yield from ((1087, _cnn("MnasNet", 300, sgd)), (1088, _cnn("MnasNet", 400, sgd)))
    yield from ((1089, wide), (1090, wide))
    yield 1091, _cnn("MobileNetV3Large", 300, adam)
    yield 1092, _cnn("ConvNeXtTiny", 300, sgd)
    yield 1093, _cnn("ConvNeXtBase", 300, sgd)


def _cnn(name: str, batch: int, optimizer: type[torch.optim.Optimizer]) -> int:
    process = Process(gpu_named("rtx3060"), rules=BEFORE_2_7)
    with process.run():
        model = process.to_gpu(_CNNS[name])
        steps = optimizer(model.parameters(), lr=1e-3)
        for _ in range(4):
            steps.zero_grad()
            images, targets = torch.randn(batch, 3, 86, 86), torch.randint(0, 10, (batch,))
            loss = F.cross_entropy(model(images), targets)
            loss.backward()
            steps.step()
        return process.peaks().reserved_bytes
