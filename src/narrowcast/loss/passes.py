"""The two walks over the tiles: log-sum-exp forward, gradients backward.

Formulas: z logits, p softmax, g the gradient of a token's loss, lse log sum exp.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from narrowcast.loss.tiles import Problem, Tiling, blocks

__all__ = [
    "Coefficients",
    "Endings",
    "Head",
    "Settings",
    "Tally",
    "Targets",
    "gradients",
    "log_sum_exp",
]


@dataclass
class Tally:
    """Counts products of 16-bit factors that were widened first, and so executed in fp32."""

    widened: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class Targets:
    """The class of each token, whether it counts, and the weight of each class."""

    labels: Tensor
    counted: Tensor
    share: Tensor | None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Formats and choices that do not change between forward and backward."""

    compute: torch.dtype
    accumulate: torch.dtype
    smoothing: float
    chunk_bytes: int
    tally: Tally


class Head:
    """Blocks of both factors as products take them, and tiles of logits."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, settings: Settings
    ) -> None:
        self.settings = settings
        self.tokens, self.width = hidden.shape
        self.classes = weight.shape[0]
        self.narrow = _multiplies_narrow(hidden.device, settings.compute)
        self._hidden, self._weight = hidden, weight
        accumulate = settings.accumulate
        self._bias = None if bias is None else bias.detach().to(settings.compute).to(accumulate)

    def tiling(
        self, *, hidden: torch.dtype | None = None, weight: torch.dtype | None = None
    ) -> Tiling:
        """Return the cut for a pass that makes gradients in these formats, or none."""
        settings = self.settings
        problem = Problem(
            tokens=self.tokens,
            classes=self.classes,
            width=self.width,
            hidden=hidden or settings.compute,
            weight=self._weight.dtype,
            compute=settings.compute,
            accumulate=settings.accumulate,
            narrow=self.narrow,
            hidden_gradient=hidden is not None,
            weight_gradient=weight is not None,
        )
        return Tiling.fitting(problem, settings.chunk_bytes)

    def hidden(self, rows: slice) -> Tensor:
        return self._factor(self._hidden[rows])

    def weight(self, rows: slice) -> Tensor:
        return self._factor(self._weight[rows].to(self.settings.compute))

    def logits(self, hidden: Tensor, weight: Tensor, classes: slice) -> Tensor:
        """Return a tile in fp32 that nobody else holds."""
        tile = self.product(hidden, weight.T)
        return tile if self._bias is None else tile.add_(self._bias[classes])

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.narrow:
            return _narrow_product(a, b)
        self._count()
        return torch.mm(a, b)

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        if self.narrow:
            total.add_(_narrow_product(a, b))
        else:
            self._count()
            torch.addmm(total, a, b, out=total)

    def _count(self) -> None:
        settings = self.settings
        settings.tally.widened += settings.compute != settings.accumulate

    def _factor(self, block: Tensor) -> Tensor:
        return block if self.narrow else block.to(self.settings.accumulate)


def _multiplies_narrow(device: torch.device, compute: torch.dtype) -> bool:
    """Whether this build multiplies 16-bit factors into fp32 on this device: CUDA, not ROCm."""
    return device.type == "cuda" and compute.itemsize == 2 and torch.version.hip is None


def _narrow_product(a: Tensor, b: Tensor) -> Tensor:
    made: Tensor = torch.mm(a, b, out_dtype=torch.float32)
    return made


def log_sum_exp(head: Head, targets: Targets) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return, for each token, log sum exp of its logits, its target's, and their weighted sum.

    The sum is kept relative to the largest logit so far, as in online softmax (Milakov and
    Gimelshein 2018). It starts from the least finite number, not from -inf: a block of logits that
    are all -inf (a masked end of the vocabulary) would make -inf - -inf.
    """
    labels, share = targets.labels, targets.share
    tiling, accumulate = head.tiling(), head.settings.accumulate
    largest = labels.new_full((head.tokens,), torch.finfo(accumulate).min, dtype=accumulate)
    total, logit, block_largest, block_total, block_logit = (
        torch.zeros_like(largest) for _ in range(5)
    )
    weighted = torch.zeros_like(largest) if head.settings.smoothing else None
    for classes in blocks(head.classes, tiling.classes):
        weight = head.weight(classes)
        local = (labels - classes.start).clamp_(0, classes.stop - classes.start - 1)[:, None]
        for rows in blocks(head.tokens, tiling.tokens):
            tile = head.logits(head.hidden(rows), weight, classes)
            block_logit[rows] = tile.gather(1, local[rows])[:, 0]
            if weighted is not None:
                weighted[rows] += tile.sum(1) if share is None else tile.mv(share[classes])
            block_largest[rows] = tile.amax(1).maximum(largest[rows])
            block_total[rows] = tile.sub_(block_largest[rows, None]).exp_().sum(1)
            del tile  # before the next one is made
        del weight
        total.mul_(largest.sub_(block_largest).exp_()).add_(block_total)
        largest.copy_(block_largest)
        logit = torch.where(_inside(labels, classes), block_logit, logit)
    return total.log_().add_(largest), logit, weighted


def _inside(labels: Tensor, classes: slice) -> Tensor:
    return labels.ge(classes.start).logical_and_(labels.lt(classes.stop))


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """dz = softmax p - onehot [target] - smooth share, where each is one number a token."""

    labels: Tensor
    softmax: Tensor
    onehot: Tensor
    smooth: Tensor | None
    share: Tensor | None

    @classmethod
    def of(cls, gradient: Tensor, head: Head, targets: Targets) -> Coefficients:
        """Weigh the incoming gradient; what does not count is 0, also if the mean made it inf."""
        labels, share, smoothing = targets.labels, targets.share, head.settings.smoothing
        incoming = gradient.to(head.settings.accumulate).where(targets.counted, 0.0)
        onehot = incoming * (1 - smoothing)
        if share is not None:
            onehot = onehot * share[labels]
        softmax, smooth = onehot, None
        if smoothing:
            mean = 1.0 if share is None else share.mean()
            softmax = onehot + incoming * (smoothing * mean)
            smooth = incoming * (smoothing / head.classes)
        return cls(labels=labels, softmax=softmax, onehot=onehot, smooth=smooth, share=share)

    def logit_gradient(self, tile: Tensor, lse: Tensor, rows: slice, classes: slice) -> Tensor:
        """Turn a tile of logits into the tile of their gradients, in place."""
        tile.sub_(lse[:, None]).exp_().mul_(self.softmax[rows, None])
        labels = self.labels[rows]
        local = (labels - classes.start).clamp_(0, tile.shape[1] - 1)
        picked = self.onehot[rows].neg().where(_inside(labels, classes), 0.0)
        tile.scatter_add_(1, local[:, None], picked[:, None])
        if self.smooth is None:
            return tile
        if self.share is None:
            return tile.sub_(self.smooth[rows, None])
        return tile.addr_(self.smooth[rows], self.share[classes], alpha=-1)


@dataclass(frozen=True, kw_only=True)
class Endings:
    """The formats that gradients end in; None where none is asked for."""

    hidden: torch.dtype | None
    weight: torch.dtype | None
    bias: torch.dtype | None


def gradients(
    head: Head, each: Coefficients, lse: Tensor, endings: Endings
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of hidden, weight and bias."""
    tiling = head.tiling(hidden=endings.hidden, weight=endings.weight)
    walk = _Backward(head, each, lse, endings, tiling)
    if tiling.by_class:
        walk.by_class()
    else:
        walk.by_token()
    return (
        None if walk.hidden is None else walk.hidden.finish(),
        None if walk.weight is None else walk.weight.finish(),
        None if walk.bias is None else walk.bias.to(endings.bias),
    )


class _Sums:
    """Rows of a gradient, summed in `accumulate` whatever they end in.

    `whole`: all rows are summed at once. Else a block of rows is finished before the next begins.
    """

    def __init__(
        self, shape: tuple[int, int], ending: torch.dtype, like: Tensor, *, whole: bool
    ) -> None:
        self._accumulate, self._ending = like.dtype, ending
        self._rows = like.new_zeros(shape, dtype=like.dtype if whole else ending)

    @classmethod
    def of(
        cls, shape: tuple[int, int], ending: torch.dtype | None, like: Tensor, *, whole: bool
    ) -> _Sums | None:
        """Return sums in the format of `like`, or none where no gradient is asked for."""
        return None if ending is None else cls(shape, ending, like, whole=whole)

    def open(self, rows: slice) -> Tensor:
        """Return the sums of these rows to add to: the rows themselves where the format allows."""
        return self._rows[rows].to(self._accumulate)

    def close(self, rows: slice, sums: Tensor) -> None:
        """Round the finished sums of a block into place, if they are not there already."""
        if self._rows.dtype != self._accumulate:
            self._rows[rows].copy_(sums)

    def finish(self) -> Tensor:
        return self._rows.to(self._ending)


class _Backward:
    """One walk over all tiles that makes every gradient asked for."""

    def __init__(
        self, head: Head, each: Coefficients, lse: Tensor, endings: Endings, tiling: Tiling
    ) -> None:
        self._head, self._each, self._lse, self._tiling = head, each, lse, tiling
        by_class, width, bias = tiling.by_class, head.width, endings.bias
        self.hidden = _Sums.of((head.tokens, width), endings.hidden, lse, whole=by_class)
        self.weight = _Sums.of((head.classes, width), endings.weight, lse, whole=not by_class)
        self.bias = None if bias is None else lse.new_zeros(head.classes)

    def by_class(self) -> None:
        """Finish the weight's gradient block by block."""
        for classes in blocks(self._head.classes, self._tiling.classes):
            weight, sums = self._head.weight(classes), _opened(self.weight, classes)
            for rows in blocks(self._head.tokens, self._tiling.tokens):
                hidden = self._head.hidden(rows)
                self._tile(rows, classes, hidden, weight, (_opened(self.hidden, rows), sums))
                del hidden
            if self.weight is not None and sums is not None:
                self.weight.close(classes, sums)
            del weight, sums

    def by_token(self) -> None:
        """Finish the gradient of the hidden states block by block."""
        for rows in blocks(self._head.tokens, self._tiling.tokens):
            hidden, sums = self._head.hidden(rows), _opened(self.hidden, rows)
            for classes in blocks(self._head.classes, self._tiling.classes):
                weight = self._head.weight(classes)
                self._tile(rows, classes, hidden, weight, (sums, _opened(self.weight, classes)))
                del weight
            if self.hidden is not None and sums is not None:
                self.hidden.close(rows, sums)
            del hidden, sums

    def _tile(
        self,
        rows: slice,
        classes: slice,
        hidden: Tensor,
        weight: Tensor,
        into: tuple[Tensor | None, Tensor | None],
    ) -> None:
        head, (for_hidden, for_weight) = self._head, into
        tile = head.logits(hidden, weight, classes)
        tile = self._each.logit_gradient(tile, self._lse[rows], rows, classes)
        if self.bias is not None:
            self.bias[classes] += tile.sum(0)
        if head.narrow:
            tile = tile.to(head.settings.compute)
        if for_hidden is not None:
            head.add_product(for_hidden, tile, weight)
        if for_weight is not None:
            head.add_product(for_weight, tile.T, hidden)


def _opened(sums: _Sums | None, rows: slice) -> Tensor | None:
    return None if sums is None else sums.open(rows)
