"""The CNNs of the rows, with the modules and parameter shapes of torchvision's.

MnasNet-A1's simpler form B1 (Tan et al. 2019), MobileNetV3-Large (Howard et al. 2019) and ConvNeXt
(Liu et al. 2022).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ConvNeXt", "MnasNet", "MobileNetV3Large"]


class MnasUnit(nn.Module):
    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, growth: int) -> None:
        super().__init__()
        inner = inputs * growth
        self.adds = inputs == outputs and stride == 1
        self.layers = nn.Sequential(
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.ReLU(inplace=True),
            nn.Conv2d(inner, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + x if self.adds else self.layers(x)


class MnasNet(nn.Module):
    # outputs, kernel, stride, growth, repeats: table 1 of the paper's B1 at width 1.0.
    STAGES = ((24, 3, 2, 3, 3), (40, 5, 2, 3, 3), (80, 5, 2, 6, 3), (96, 3, 1, 6, 2),
              (192, 5, 2, 6, 4), (320, 3, 1, 6, 1))  # fmt: skip

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers = [*self._stem()]
        width = 16
        for outputs, kernel, stride, growth, repeats in self.STAGES:
            units = []
            for k in range(repeats):
                units.append(MnasUnit(width, outputs, kernel, stride if k == 0 else 1, growth))
                width = outputs
            layers.append(nn.Sequential(*units))
        layers += [nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU(inplace=True)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Dropout(0.2, inplace=True), nn.Linear(1280, classes))

    @staticmethod
    def _stem() -> Iterator[nn.Module]:
        yield from (
            nn.Conv2d(3, 32, 3, 2, 1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(inplace=True),
        )
        yield from (nn.Conv2d(32, 32, 3, 1, 1, groups=32, bias=False), nn.BatchNorm2d(32))
        yield from (nn.ReLU(inplace=True), nn.Conv2d(32, 16, 1, bias=False), nn.BatchNorm2d(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).mean([2, 3]))


class Squeeze(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.down, self.up = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, width, 1)
        self.relu, self.gate = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        scale = self.pool(x)
        scale = self.down(scale)
        scale = self.relu(scale)
        scale = self.up(scale)
        return self.gate(scale) * x


def eighths(value: float) -> int:
    """Round to a multiple of 8, not more than 10 % down (MobileNet's rule)."""
    rounded = max(8, int(value + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * value else rounded


class InvertedResidual(nn.Module):
    def __init__(
        self, inputs: int, kernel: int, inner: int, outputs: int, *, squeeze: bool, hard: bool,
        stride: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.adds = stride == 1 and inputs == outputs
        act = nn.Hardswish if hard else nn.ReLU
        layers: list[nn.Module] = []
        if inner != inputs:
            layers += [_unit(inputs, inner, 1, act=act)]
        layers += [_unit(inner, inner, kernel, stride=stride, groups=inner, act=act)]
        if squeeze:
            layers += [Squeeze(inner, eighths(inner // 4))]
        layers += [_unit(inner, outputs, 1)]
        self.block = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        result = self.block(x)
        if self.adds:
            result += x
        return result


def _unit(
    inputs: int, outputs: int, kernel: int, *, stride: int = 1, groups: int = 1,
    act: type[nn.Module] | None = None,
) -> nn.Sequential:  # fmt: skip
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    layers: list[nn.Module] = [conv, nn.BatchNorm2d(outputs, eps=0.001, momentum=0.01)]
    if act is not None:
        layers.append(act(inplace=True))
    return nn.Sequential(*layers)


class MobileNetV3Large(nn.Module):
    # kernel, inner, outputs, squeeze, hard-swish, stride: table 1 of the paper.
    UNITS = (
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2),
        (5, 120, 40, 1, 0, 1), (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1),
        (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2), (5, 960, 160, 1, 1, 1),
        (5, 960, 160, 1, 1, 1),
    )  # fmt: skip

    def __init__(self, classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [_unit(3, 16, 3, stride=2, act=nn.Hardswish)]
        width = 16
        for kernel, inner, outputs, squeeze, hard, stride in self.UNITS:
            flags = {"squeeze": bool(squeeze), "hard": bool(hard)}
            layers.append(InvertedResidual(width, kernel, inner, outputs, stride=stride, **flags))
            width = outputs
        layers.append(_unit(160, 960, 1, act=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(
            nn.Linear(960, 1280), nn.Hardswish(inplace=True), nn.Dropout(0.2, inplace=True),
            nn.Linear(1280, classes),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.features(x)), 1))


class ChannelNorm(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.order)


class NextBlock(nn.Module):
    def __init__(self, width: int, drop: float) -> None:
        super().__init__()
        self.drop = drop
        self.block = nn.Sequential(
            nn.Conv2d(width, width, 7, padding=3, groups=width),
            Permute(0, 2, 3, 1),
            nn.LayerNorm(width, eps=1e-6),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
            Permute(0, 3, 1, 2),
        )
        self.scale = nn.Parameter(torch.empty(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        result = self.scale * self.block(x)
        result = self._stochastic_depth(result)
        result += x
        return result

    def _stochastic_depth(self, x: Tensor) -> Tensor:
        if not self.training or self.drop == 0.0:
            return x
        noise = torch.empty((x.shape[0], 1, 1, 1), dtype=x.dtype).bernoulli_(1 - self.drop)
        noise.div_(1 - self.drop)
        return x * noise


class ConvNeXt(nn.Module):
    def __init__(
        self, widths: tuple[int, ...], depths: tuple[int, ...], *, drop: float, classes: int
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = [
            nn.Sequential(nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0], eps=1e-6))
        ]
        total, index = sum(depths), 0
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            blocks = [NextBlock(width, drop * (index + k) / (total - 1.0)) for k in range(depth)]
            index += depth
            layers.append(nn.Sequential(*blocks))
            if stage + 1 < len(widths):
                following = widths[stage + 1]
                layers.append(
                    nn.Sequential(ChannelNorm(width, eps=1e-6), nn.Conv2d(width, following, 2, 2))
                )
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Sequential(
            ChannelNorm(widths[-1], eps=1e-6), nn.Flatten(1), nn.Linear(widths[-1], classes)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.features(x)))
