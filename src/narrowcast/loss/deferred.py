"""A tensor that stands for logits and computes them only where something needs them.

It carries hidden states and head. Shape operations and casts to fp32 make another one of it
(``forms``). Cross-entropy over the classes, or log-softmax and then nll_loss, is computed in chunks
from what it carries. Every other operation gets the whole logits, computed from the head's inputs
by the very operations that were asked for, so that views alias and gradients flow as ever; its name
is recorded. Once somebody may hold a view of whole logits, or has changed them in place, they are
kept, and from then on they are what everything is computed from.

Code that never asks Python (a C++ extension, an autograd.Function given logits) sees an ordinary
tensor with a gradient: ``__torch_dispatch__`` and ``_Stand`` answer there.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_leaves, tree_map  # torch's only walker of nests

from narrowcast.errors import UsageError
from narrowcast.loss.cross_entropy import cross_entropy_in_chunks
from narrowcast.loss.forms import Form, rule_for
from narrowcast.loss.passes import Tally

__all__ = ["DeferredLogits", "Record"]


@dataclass
class Record:
    """What became of the logits of one head."""

    chunk_bytes: int
    deferred_calls: int = 0
    chunked_calls: int = 0
    tally: Tally = field(default_factory=Tally)
    operations: Counter[str] = field(default_factory=Counter)
    """Operations that needed the whole logits, by name."""


class DeferredLogits(Tensor):
    """Logits as hidden states and head; see the module."""

    hidden: Tensor
    weight: Tensor
    _form: Form
    _record: Record
    _parent: DeferredLogits | None
    _replay: Callable[[Tensor], Tensor] | None
    _whole: Tensor | None
    _versions: tuple[int, ...]

    @staticmethod
    def of(
        form: Form,
        record: Record,
        *,
        parent: DeferredLogits | None = None,
        replay: Callable[[Tensor], Tensor] | None = None,
    ) -> DeferredLogits:
        """Build the stand-in; `replay` makes its whole logits from those of `parent`."""
        made: DeferredLogits = _Stand.apply(  # type: ignore[no-untyped-call]
            form.hidden, form.weight, form.bias, form
        )
        made.hidden, made.weight = form.hidden, form.weight
        made._form, made._record = form, record
        made._parent, made._replay = parent, replay
        made._whole = None
        made._versions = _versions_of(form)
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        form = self._form
        return (
            f"DeferredLogits(shape={form.shape}, dtype={form.dtype}, device={form.hidden.device})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        """Name the tensors whose memory this one holds, for the ledger."""
        return ["hidden", "weight", *(["_whole"] if self._whole is not None else [])], None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        self = args[0] if args else kwargs.get("input")
        with torch._C.DisableTorchFunctionSubclass():
            if func in _METADATA:
                return func(*args, **kwargs)
            if isinstance(self, DeferredLogits) and not self._is_whole():
                made = self._deferred(func, args, kwargs)
                if made is not NotImplemented:
                    return made
            return _on_whole(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        if func._schema.is_mutable:
            raise UsageError(
                f"{func} would change deferred logits in place, below Python",
                hint="remove chunked_logits from this model",
            )

        def whole(value: Any) -> Any:
            if not isinstance(value, DeferredLogits):
                return value
            value._note(str(func))
            return value._keep().detach()

        return func(*tree_map(whole, args), **tree_map(whole, kwargs or {}))

    def _deferred(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Answer without logits: a loss in chunks, or another stand-in; else NotImplemented."""
        form = self._form
        if func in _LOSSES:
            options = _loss_options(func, form, args, kwargs)
            if options is None:
                return NotImplemented
            self._require_unchanged()
            self._record.chunked_calls += 1
            return cross_entropy_in_chunks(
                form.hidden,
                form.weight,
                bias=form.bias,
                chunk_bytes=self._record.chunk_bytes,
                compute=form.compute,
                tally=self._record.tally,
                **options,
            )
        rest, named = args[1:], {k: v for k, v in kwargs.items() if k != "input"}
        rule = rule_for(func, rest, named)
        forms = None if rule is None else rule(form)
        if forms is None:
            return NotImplemented
        if forms is form:
            return self
        self._require_unchanged()  # a child counts changes from now on

        def child(made: Form, place: int | None = None) -> DeferredLogits:
            def replay(whole: Tensor) -> Any:
                result = func(whole, *rest, **named)
                return result if place is None else result[place]

            return DeferredLogits.of(made, self._record, parent=self, replay=replay)

        if isinstance(forms, Form):
            return child(forms)
        return tuple(child(made, place) for place, made in enumerate(forms))

    def _is_whole(self) -> bool:
        """Whether whole logits of this one, or of one that it is made from, are kept."""
        return any(node._whole is not None for node in self._line())

    def _line(self) -> Iterator[DeferredLogits]:
        node: DeferredLogits | None = self
        while node is not None:
            yield node
            node = node._parent

    def _computed(self) -> list[tuple[DeferredLogits, Tensor]]:
        """Compute the whole logits from the head down to this one; this one's come last."""
        if self._whole is not None:
            return [(self, self._whole)]
        self._require_unchanged()
        # Under no_grad too: what is computed there may be kept, and used where gradients count.
        with torch.enable_grad():
            if self._parent is None or self._replay is None:
                return [(self, self._form.compute_logits())]
            line = self._parent._computed()
            return [*line, (self, self._replay(line[-1][1]))]

    def _keep(self) -> Tensor:
        return _kept(self._computed())

    def _note(self, operation: str) -> None:
        if not self._is_whole():
            self._record.operations[operation] += 1

    def _require_unchanged(self) -> None:
        """Raise UsageError if the logits would not be those that the head was asked for."""
        for name, made, now in zip(
            ("hidden states", "weight of their head", "bias of their head"),
            self._versions,
            _versions_of(self._form),
            strict=False,  # a head may have no bias
        ):
            if made != now:
                raise UsageError(
                    f"logits that were not computed yet are asked for after the {name} changed in "
                    "place",
                    hint="use the logits before that (before the optimizer steps), or remove "
                    "chunked_logits from this model",
                )


def _versions_of(form: Form) -> tuple[int, ...]:
    """Return how often hidden states, weight and bias were changed in place, as autograd counts."""
    inputs = (form.hidden, form.weight, form.bias)
    return tuple(0 if t.is_inference() else t._version for t in inputs if t is not None)


class _Stand(torch.autograd.Function):
    """Give a stand-in its place in the graph, for code that asks autograd and not Python."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, form: Form
    ) -> DeferredLogits:
        ctx.save_for_backward(hidden, weight, bias)
        ctx.rebuild = (form.compute, form.dtype, form.class_dim, form.is_log)
        made: DeferredLogits = Tensor._make_wrapper_subclass(
            DeferredLogits, form.shape, dtype=form.dtype, device=hidden.device
        )
        return made

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        compute, dtype, class_dim, is_log = ctx.rebuild
        with torch.enable_grad():
            hidden, weight, bias = (
                None if tensor is None else tensor.detach().requires_grad_(needed)
                for tensor, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=False)
            )
            assert hidden is not None
            assert weight is not None
            form = Form(
                hidden=hidden,
                weight=weight,
                bias=bias,
                compute=compute,
                dtype=dtype,
                class_dim=class_dim,
                is_log=is_log,
            )
            logits = form.compute_logits()
        inputs = [t for t in (hidden, weight, bias) if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(logits, inputs, gradient))
        wanted = (t if t is not None and t.requires_grad else None for t in (hidden, weight, bias))
        return *(None if t is None else next(found) for t in wanted), None


def _on_whole(func: Any, args: Any, kwargs: Any) -> Any:
    """Call a function with whole logits, record it, and keep them where they must stay the same."""
    lines: dict[int, list[tuple[DeferredLogits, Tensor]]] = {}

    def whole(value: Any) -> Any:
        if not isinstance(value, DeferredLogits):
            return value
        value._note(_name_of(func))
        if id(value) not in lines:
            lines[id(value)] = value._computed()
        return lines[id(value)][-1][1]

    args, kwargs = tree_map(whole, args), tree_map(whole, kwargs)
    before = {key: line[-1][1]._version for key, line in lines.items()}
    result = func(*args, **kwargs)
    for key, line in lines.items():
        logits = line[-1][1]
        if logits._version != before[key] or _may_hold(result, logits):
            _kept(line)
    return result


def _kept(line: list[tuple[DeferredLogits, Tensor]]) -> Tensor:
    """Keep computed logits all the way from the head, so that views of them alias."""
    for node, logits in line:
        node._whole = logits
    return line[-1][1]


def _may_hold(result: Any, logits: Tensor) -> bool:
    """Whether a result may be a view of the logits, or a promise about them (a hook)."""
    storage = logits.untyped_storage()._cdata
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor):
            strided = leaf.layout is torch.strided and type(leaf) is Tensor
            if not strided or leaf.untyped_storage()._cdata == storage:
                return True
        elif not isinstance(leaf, (bool, int, float, str, torch.dtype, torch.device)):
            return True
    return False


@lru_cache(maxsize=1024)
def _name_of(func: Any) -> str:
    return str(resolve_name(func) or getattr(func, "__name__", repr(func)))


_LOSSES = {F.cross_entropy: inspect.signature(F.cross_entropy),
           F.nll_loss: inspect.signature(F.nll_loss)}  # fmt: skip


def _loss_options(func: Any, form: Form, args: Any, kwargs: Any) -> dict[str, Any] | None:
    """Return the options of a loss over the classes, or None for one that needs the logits."""
    try:
        bound = _LOSSES[func].bind(*args, **kwargs)
    except TypeError:
        return None  # torch says what is wrong with the call
    bound.apply_defaults()
    given = bound.arguments
    target = given["target"]
    fits = (
        form.is_log == (func is F.nll_loss)
        and form.class_dim == min(1, len(form.leading))
        and isinstance(target, Tensor)
        and type(target) is not DeferredLogits
        and target.dtype == torch.int64
        and tuple(target.shape) == form.leading
        and given["size_average"] is None
        and given["reduce"] is None
    )
    if not fits:
        return None
    return {
        "target": target,
        "class_weight": given["weight"],
        "ignore_index": given["ignore_index"],
        "reduction": given["reduction"],
        "label_smoothing": given.get("label_smoothing", 0.0),
    }


def _metadata() -> set[Any]:
    """List what a stand-in knows of itself: everything but the numbers."""
    properties = (
        "shape dtype device layout ndim requires_grad grad_fn is_leaf output_nr is_cuda is_cpu "
        "is_meta is_sparse is_quantized is_nested is_mkldnn is_mps is_xpu itemsize nbytes names "
        "_version _backward_hooks"
    )
    methods = (
        "size dim ndimension numel nelement element_size stride is_contiguous is_floating_point "
        "is_complex is_signed get_device storage_offset __len__ __hash__ is_inference has_names"
    )
    found = {getattr(Tensor, name).__get__ for name in properties.split() if hasattr(Tensor, name)}
    found |= {getattr(Tensor, name) for name in methods.split() if hasattr(Tensor, name)}
    return found | {torch.is_floating_point, torch.is_complex, torch.numel, Tensor.__repr__}


_METADATA = _metadata()
