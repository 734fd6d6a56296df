"""The planted faults and the healthy runs, with what a diagnosis is expected to say of each.

Every case is proved by `test_faults_are_real`, by trainings that know nothing of the diagnosis.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from narrowcast.records.diagnosis import Kind

HERE = Path(__file__).parent
FP32_TOO: tuple[Kind, ...] = ("not a precision problem",)

Symptom = Literal[
    "",
    "breaks",
    "raises",
    "learns less",
    "stands still",
    "gradients vanish",
    "skips for ever",
    "scale stays low",
]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One training: a recipe with options, a precision, and the truth about it."""

    name: str
    recipe: str
    """A file, relative to `tests/`."""
    options: tuple[str, ...] = ()
    precision: str = "fp16"
    steps: int = 30
    kinds: tuple[Kind, ...] = ("fine",)
    """Verdicts that are right; the first is the best one."""
    modules: tuple[str, ...] = ()
    """Places that are right; empty where the fault is everywhere, or at no module."""
    minimal: tuple[str, ...] | None = None
    """The smallest set to keep in fp32; None where no set of modules is a cure."""
    as_small: tuple[tuple[str, ...], ...] = ()
    """Other sets of that size that cure as well."""
    symptom: Symptom = ""
    still: tuple[str, ...] = ()
    """Tensors that should move and do not; where none is named, those of `modules`."""
    why: str

    @property
    def healthy(self) -> bool:
        return self.kinds[0] in ("fine", "nothing to diagnose")

    @property
    def path(self) -> Path:
        return HERE.parent / self.recipe


MLP, SERIES, GPT = "faults/mlp.py", "faults/series.py", "faults/gpt.py"
VIT, RESNET = "faults/vit.py", "faults/resnet.py"
LAYERS = "faults/layers.py"
T5, MOE = "recipes/t5_like_overflow.py", "recipes/moe_router.py"

_WO = tuple(f"encoder.block.{i}.layer.1.DenseReluDense.wo" for i in range(3))
_T5_ATTENTION = tuple(f"encoder.block.{i}.layer.0.SelfAttention" for i in range(3))

FORWARD = (
    Case(
        name="mlp-strong",
        recipe=MLP,
        options=("fault=strong",),
        kinds=("forward overflow",),
        modules=("blocks.2.fc2",),
        minimal=("blocks.2.fc2",),
        symptom="breaks",
        why="the layer gives 1e5, and the norm after it brings that back to 1",
    ),
    Case(
        name="mlp-two-strong",
        recipe=MLP,
        options=("fault=two_strong",),
        kinds=("forward overflow",),
        modules=("blocks.0.fc2",),
        minimal=("blocks.0.fc2", "blocks.3.fc2"),
        symptom="breaks",
        why="two layers overflow; the second hides behind the first",
    ),
    Case(
        name="mlp-bend",
        recipe=MLP,
        options=("fault=bend",),
        kinds=("forward overflow", "backward overflow"),
        modules=("mixer",),
        minimal=("mixer.project",),
        symptom="breaks",
        why="exp overflows where torch.where throws it away; its gradient there is 0 x inf = NaN",
    ),
    Case(
        name="mlp-unscaled-column",
        recipe=MLP,
        options=("fault=unscaled_column",),
        steps=60,
        kinds=("forward overflow",),
        modules=("stem",),
        minimal=("stem",),
        symptom="breaks",
        why="one column of the data is beyond 65504: the cast of the input overflows",
    ),
    Case(
        name="mlp-saturation",
        recipe=MLP,
        options=("fault=saturation", "rule=sgd", "lr=1"),
        kinds=("forward overflow",),
        modules=("", "head"),
        minimal=("head",),
        symptom="breaks",
        why="a sigmoid in fp16 reaches 1 exactly, and the loss takes log(1 - p); fp32 does not",
    ),
    Case(
        name="gpt-massive",
        recipe=GPT,
        options=("fault=massive", "depth=5"),
        kinds=("forward overflow",),
        modules=("blocks.3.mlp.fc2",),
        minimal=("blocks.3.mlp.fc2",),
        symptom="breaks",
        why="massive activations, deep in a block that is neither the first nor the last",
    ),
    Case(
        name="gpt-massive-pair",
        recipe=GPT,
        options=("fault=massive_pair", "depth=5"),
        kinds=("forward overflow",),
        modules=("blocks.1.attn.proj",),
        minimal=("blocks.1.attn.proj", "blocks.3.mlp.fc2"),
        symptom="breaks",
        why="two culprits of different kinds in different blocks",
    ),
    Case(
        name="gpt-products",
        recipe=GPT,
        options=("fault=products",),
        kinds=("forward overflow",),
        modules=("blocks.1.attn",),
        minimal=("blocks.1.attn",),
        symptom="breaks",
        why="queries times keys overflow before they are scaled, in a product that has no module",
    ),
    Case(
        name="gpt-logits",
        recipe=GPT,
        options=("fault=logits",),
        kinds=("forward overflow",),
        modules=("head",),
        minimal=("head",),
        symptom="breaks",
        why="the logits overflow before a small multiplier",
    ),
    Case(
        name="vit-kernel",
        recipe=VIT,
        options=("fault=kernel",),
        kinds=("forward overflow",),
        modules=("blocks.1.attn",),
        minimal=("blocks.1.attn",),
        symptom="breaks",
        why="exponentials of keys in linear attention; their ratio is harmless",
    ),
    Case(
        name="resnet-grown",
        recipe=RESNET,
        options=("fault=grown",),
        steps=12,
        kinds=("forward overflow",),
        modules=("layer2.0.conv2",),
        minimal=("layer2.0.conv2",),
        symptom="breaks",
        why="a convolution whose scale the batch norm after it hides",
    ),
    Case(
        name="resnet-response",
        recipe=RESNET,
        options=("fault=response",),
        steps=12,
        kinds=("forward overflow",),
        modules=("layer2.1.response",),
        minimal=("layer2.1.response",),
        as_small=(("layer2.1.conv2",),),
        symptom="breaks",
        why="a sum of squares over the picture overflows, the values do not",
    ),
    Case(
        name="t5-wo",
        recipe=T5,
        kinds=("forward overflow",),
        modules=_WO[:1],
        minimal=_WO,
        symptom="breaks",
        why="what transformers keeps in fp32 by hand",
    ),
    Case(
        name="t5-last-wo",
        recipe=T5,
        options=("large=last",),
        kinds=("forward overflow",),
        modules=_WO[-1:],
        minimal=_WO[-1:],
        symptom="breaks",
        why="one wo of three: the others may stay in fp16",
    ),
    Case(
        name="moe-penalty",
        recipe=MOE,
        options=("penalty=yes", "sharpness=100", "bias=0"),
        steps=60,
        kinds=("forward overflow",),
        modules=("layers.0.mlp.gate",),
        minimal=("layers.0.mlp.gate", "layers.1.mlp.gate"),
        symptom="breaks",
        why="the square of the router's logsumexp; transformers keeps gates in fp32 by hand",
    ),
)

BACKWARD = (
    Case(
        name="mlp-faint",
        recipe=MLP,
        options=("fault=faint",),
        steps=60,
        kinds=("backward overflow",),
        modules=("mixer.1", "mixer.0"),
        minimal=("mixer.0",),
        symptom="breaks",
        why="a norm of faint features multiplies gradients by 1 / 5e-6, which overflows at scale 1",
    ),
    Case(
        name="mlp-quotient",
        recipe=MLP,
        options=("fault=quotient",),
        steps=60,
        kinds=("backward overflow",),
        modules=("mixer", "mixer.project"),
        minimal=("mixer.project",),
        symptom="breaks",
        why="the gradient of a quotient of small numbers overflows at scale 1, the quotient not",
    ),
    Case(
        name="mlp-second-task",
        recipe=MLP,
        options=("fault=second_task",),
        kinds=("backward underflow",),
        modules=("second",),
        minimal=("second",),
        symptom="gradients vanish",
        why="a second task with a weight of 1e-13 and Adam with a tiny epsilon: in fp32 it learns",
    ),
    Case(
        name="vit-gate",
        recipe=VIT,
        options=("fault=gate",),
        kinds=("backward underflow",),
        modules=("blocks.1.side",),
        minimal=("blocks.1.side",),
        symptom="gradients vanish",
        why="a branch behind a gate of 1e-12: its gradients are 0 in fp16",
    ),
)

UPDATES = (
    Case(
        name="mlp-small-rate",
        recipe=MLP,
        options=("lr=1e-5",),
        precision="bf16-true",
        kinds=("lost updates",),
        symptom="stands still",
        why="steps of 1e-5 on bf16 weights of 0.1 round away, everywhere",
    ),
    Case(
        name="gpt-small-rate",
        recipe=GPT,
        options=("lr=1e-5",),
        precision="bf16-true",
        kinds=("lost updates",),
        symptom="stands still",
        why="the same in a GPT",
    ),
    Case(
        name="vit-small-rate",
        recipe=VIT,
        options=("lr=1e-5",),
        precision="bf16-true",
        kinds=("lost updates",),
        symptom="stands still",
        why="the same in a ViT, without weight decay",
    ),
    Case(
        name="gpt-wide-table",
        recipe=GPT,
        options=("fault=wide_table", "positions=rotary"),
        precision="bf16-true",
        kinds=("lost updates",),
        modules=("embed",),
        minimal=("embed",),
        symptom="stands still",
        why="only the embedding's weights are too large for the rate",
    ),
)

CONSTANTS = (
    Case(
        name="vit-empty-patches",
        recipe=VIT,
        options=("fault=empty", "border=yes"),
        steps=60,
        kinds=("constant out of range",),
        modules=("norm0",),
        minimal=("patches",),
        as_small=(("norm0",),),
        symptom="breaks",
        why="eps=1e-8 is 0 in fp16, and the norm of a black patch divides by it",
    ),
    Case(
        name="vit-unit-patches",
        recipe=VIT,
        options=("fault=unit", "border=yes"),
        kinds=("constant out of range",),
        modules=("norm0",),
        minimal=("patches",),
        symptom="breaks",
        why="F.normalize's own eps=1e-12 is 0 in fp16; the norm alone in fp32 moves it to backward",
    ),
    Case(
        name="resnet-pruned",
        recipe=RESNET,
        options=("fault=pruned",),
        kinds=("constant out of range",),
        modules=("pool",),
        minimal=("pool",),
        as_small=(("neck",),),
        symptom="breaks",
        why="sqrt(0 + 1e-8) is finite, but its derivative is not: seen in backward only",
    ),
    Case(
        name="gpt-padding",
        recipe=GPT,
        options=("fault=padding", "depth=3"),
        kinds=("constant out of range",),
        modules=("blocks.0.attn",),
        minimal=tuple(f"blocks.{i}.attn" for i in range(3)),
        symptom="breaks",
        why="-1e9 is -inf in fp16, and a row of padding has nothing else",
    ),
    Case(
        name="t5-empty-texts",
        recipe=T5,
        options=("large=none", "empty_texts=yes"),
        kinds=("constant out of range",),
        modules=_T5_ATTENTION[:1],
        minimal=_T5_ATTENTION,
        symptom="breaks",
        why="finfo(fp32).min added in place to fp16 scores, and a text without any token",
    ),
)

POSITIONS = (
    Case(
        name="series-time-bf16",
        recipe=SERIES,
        options=("longest=4000",),
        precision="bf16",
        steps=40,
        kinds=("positions collapse",),
        modules=("front",),
        minimal=("front",),
        symptom="learns less",
        why="whole seconds up to 4,000 in a product in bf16, which holds 256 of them",
    ),
    Case(
        name="series-time-fp16",
        recipe=SERIES,
        options=("longest=60000",),
        steps=40,
        kinds=("positions collapse",),
        modules=("front",),
        minimal=("front",),
        symptom="learns less",
        why="seconds up to 60,000 in fp16: below its largest number, and 32 apart",
    ),
    Case(
        name="gpt-rotary",
        recipe=GPT,
        options=("positions=rotary", "first_position=20000", "depth=2", "lr=1e-2"),
        precision="bf16",
        steps=100,
        kinds=("positions collapse",),
        modules=("rotary",),
        minimal=("rotary",),
        symptom="learns less",
        why="positions from 20,000 on are all the same in bf16, in spite of their .float()",
    ),
    Case(
        name="vit-coordinates",
        recipe=VIT,
        options=("fault=coordinates", "corner=4096"),
        precision="bf16",
        steps=80,
        kinds=("positions collapse",),
        modules=("place",),
        minimal=("place",),
        symptom="learns less",
        why="pixel coordinates of a large picture: four patches in a row are at the same place",
    ),
)

SUMS = (
    Case(
        name="series-account",
        recipe=SERIES,
        options=("fault=sum", "longest=100"),
        precision="bf16",
        steps=80,
        kinds=("low-precision accumulation",),
        modules=("front",),
        minimal=("front.project",),
        symptom="learns less",
        why="entries of 1 are absorbed by a balance of 2,048, one after the other",
    ),
    Case(
        name="series-average",
        recipe=SERIES,
        options=("fault=average", "longest=10"),
        precision="bf16-true",
        steps=40,
        kinds=("low-precision accumulation",),
        modules=("front",),
        minimal=("front",),
        symptom="stands still",
        why="a running mean of 23 in bf16 does not move by 0.02",
    ),
    Case(
        name="moe-bias",
        recipe=MOE,
        precision="bf16-true",
        steps=60,
        kinds=("low-precision accumulation", "lost updates"),
        modules=("layers.0.mlp.gate", "layers.1.mlp.gate"),
        minimal=("layers.0.mlp.gate", "layers.1.mlp.gate"),
        symptom="stands still",
        still=tuple(f"layers.{i}.mlp.gate.e_score_correction_bias" for i in range(2)),
        why="what transformers keeps in fp32 by hand: the bias of 60 does not move by 0.02",
    ),
)

SCALES = (
    Case(
        name="mlp-rising-weight",
        recipe=MLP,
        options=("fault=rising_weight",),
        steps=40,
        kinds=("scale thrashing",),
        symptom="skips for ever",
        why="gradients grow by 1.4 a step, and the scale comes down behind them; Adam is not hurt",
    ),
    Case(
        name="mlp-falling-weight",
        recipe=MLP,
        options=("fault=falling_weight", "rule=sign"),
        steps=40,
        kinds=("scale too low",),
        symptom="scale stays low",
        why="a loud beginning took the scale to 16, and of what comes after all gradients are 0",
    ),
)

NOT_PRECISION = (
    Case(
        name="mlp-rate-fp16",
        recipe=MLP,
        options=("rule=sgd", "lr=0.5"),
        kinds=FP32_TOO,
        symptom="breaks",
        why="diverges in fp32 at step 6, and in fp16 some steps earlier",
    ),
    Case(
        name="mlp-rate-bf16",
        recipe=MLP,
        options=("rule=sgd", "lr=0.1"),
        precision="bf16",
        kinds=FP32_TOO,
        symptom="breaks",
        why="diverges in fp32 and in bf16",
    ),
    Case(
        name="mlp-bad-sample",
        recipe=MLP,
        options=("fault=bad_sample",),
        kinds=FP32_TOO,
        symptom="breaks",
        why="a few samples hold an infinity; all steps between them are fine",
    ),
    Case(
        name="mlp-constant-column",
        recipe=MLP,
        options=("fault=constant_column",),
        kinds=FP32_TOO,
        symptom="breaks",
        why="the data were divided by a standard deviation of 0",
    ),
    Case(
        name="mlp-saturation-fast",
        recipe=MLP,
        options=("fault=saturation", "lr=0.5"),
        kinds=FP32_TOO,
        symptom="breaks",
        why="log(1 - p) of a sure prediction: fp32 fails as well, some steps later",
    ),
    Case(
        name="mlp-distance",
        recipe=MLP,
        options=("fault=distance",),
        kinds=FP32_TOO,
        symptom="breaks",
        why="the derivative of a root at 0: a gradient of NaN in every precision",
    ),
)

# Written when the diagnosis stood, and shown to it only then: the others it may have been built by.
LATE = (
    Case(
        name="layers-moments-fp16",
        recipe=LAYERS,
        options=("fault=moments",),
        steps=40,
        kinds=("forward overflow", "low-precision accumulation"),
        modules=("layer",),
        minimal=("layer.shift",),
        symptom="breaks",
        why="the mean of squares minus the square of the mean comes out negative under a root",
    ),
    Case(
        name="layers-moments-bf16",
        recipe=LAYERS,
        options=("fault=moments",),
        precision="bf16",
        steps=40,
        kinds=("forward overflow", "low-precision accumulation"),
        modules=("layer",),
        minimal=("layer.shift",),
        symptom="breaks",
        why="the same in bf16: a NaN that no range cures",
    ),
    Case(
        name="layers-units",
        recipe=LAYERS,
        options=("fault=units",),
        steps=40,
        kinds=("constant out of range", "forward overflow"),
        modules=("layer",),
        minimal=("layer.length",),
        symptom="breaks",
        why="a conversion by 1e6, there and back",
    ),
    Case(
        name="layers-clipped-units",
        recipe=LAYERS,
        options=("fault=clipped_units",),
        steps=40,
        kinds=("constant out of range",),
        modules=("layer",),
        symptom="raises",
        why="torch refuses to clamp fp16 at 5e6: an error, where fp32 trains",
    ),
    Case(
        name="layers-logit",
        recipe=LAYERS,
        options=("fault=logit",),
        steps=40,
        kinds=("constant out of range", "forward overflow"),
        modules=("layer",),
        minimal=("layer.gate",),
        symptom="breaks",
        why="1 - 1e-6 is 1 in fp16, so the clamp lets a probability of 1 through",
    ),
    Case(
        name="layers-spoilt-weight",
        recipe=LAYERS,
        options=("fault=spoilt_weight",),
        precision="bf16",
        steps=40,
        kinds=FP32_TOO,
        symptom="breaks",
        why="a checkpoint with a NaN in it",
    ),
)

FAULTS = (
    *FORWARD,
    *BACKWARD,
    *UPDATES,
    *CONSTANTS,
    *POSITIONS,
    *SUMS,
    *SCALES,
    *NOT_PRECISION,
    *LATE,
)

HEALTHY = (
    Case(name="mlp-fp16", recipe=MLP, why="plain"),
    Case(name="mlp-bf16", recipe=MLP, precision="bf16", why="plain"),
    Case(name="mlp-bf16-true", recipe=MLP, precision="bf16-true", why="a rate that bf16 can hold"),
    Case(name="mlp-lean", recipe=MLP, precision="lean", why="8-bit remainders, 4-bit states"),
    Case(
        name="mlp-fp32",
        recipe=MLP,
        precision="fp32",
        kinds=("nothing to diagnose",),
        why="everything is fp32",
    ),
    Case(name="mlp-dropout", recipe=MLP, options=("fault=dropout",), why="zeros that dropout made"),
    Case(
        name="mlp-zero-init",
        recipe=MLP,
        options=("fault=zero_init",),
        why="gradients are exactly 0 at first, in fp32 as well",
    ),
    Case(
        name="mlp-adapters",
        recipe=MLP,
        options=("fault=adapters",),
        why="frozen weights, and an adapter that begins at 0",
    ),
    Case(
        name="mlp-loud",
        recipe=MLP,
        options=("fault=loud",),
        why="seven skips in a row at the start, until the scale is found",
    ),
    Case(
        name="mlp-noisy",
        recipe=MLP,
        options=("fault=noisy",),
        precision="bf16",
        why="labels that are mostly noise: the loss hardly falls, in fp32 as well",
    ),
    Case(
        name="mlp-clamped",
        recipe=MLP,
        options=("fault=strong_but_clamped",),
        why="a layer overflows, and the clamp after it makes that 1,000, as in fp32",
    ),
    Case(
        name="mlp-large-but-finite",
        recipe=MLP,
        options=("fault=strong_but_finite",),
        why="activations of some 1e4, all below 65504",
    ),
    Case(
        name="mlp-discarded",
        recipe=MLP,
        options=("fault=bend_without_gradient",),
        why="exp overflows where torch.where throws it away, and has no gradient",
    ),
    Case(
        name="mlp-tiny-epsilon",
        recipe=MLP,
        options=("fault=tiny_epsilon",),
        why="eps=1e-9 is 0 in fp16, and never needed",
    ),
    Case(
        name="series-short-time",
        recipe=SERIES,
        options=("longest=200",),
        precision="bf16",
        steps=40,
        why="whole seconds up to 200, which bf16 holds exactly",
    ),
    Case(name="gpt-masked", recipe=GPT, why="-inf in a causal mask"),
    Case(
        name="gpt-padding-softly",
        recipe=GPT,
        options=("fault=padding_softly", "depth=3"),
        why="padding masked by -1e4, which fp16 holds",
    ),
    Case(
        name="gpt-padding-bf16",
        recipe=GPT,
        options=("fault=padding", "depth=3"),
        precision="bf16",
        why="-1e9 is finite in bf16: the fault of gpt-padding is none here",
    ),
    Case(
        name="gpt-vocabulary",
        recipe=GPT,
        options=("vocabulary=300",),
        why="most rows of the embedding are never used and have no gradient",
    ),
    Case(
        name="gpt-bf16-split",
        recipe=GPT,
        options=("lr=1e-5",),
        precision="bf16-split",
        why="a rate that bf16-true would lose; the remainder keeps it",
    ),
    Case(name="gpt-lean", recipe=GPT, precision="lean", why="lean, with checkpointed blocks"),
    Case(
        name="gpt-dropout",
        recipe=GPT,
        options=("dropout=0.1",),
        precision="bf16",
        why="random masks that a replay has to draw again",
    ),
    Case(
        name="vit-zero-init",
        recipe=VIT,
        options=("fault=zero_init",),
        why="residual branches and a head that begin at 0",
    ),
    Case(name="vit-dropout", recipe=VIT, options=("dropout=0.1",), steps=60, why="dropout in fp16"),
    Case(
        name="vit-border",
        recipe=VIT,
        options=("border=yes",),
        precision="bf16",
        steps=60,
        why="black patches, and no norm that minds",
    ),
    Case(name="resnet-fp16", recipe=RESNET, steps=12, why="batch norms"),
    Case(
        name="resnet-bf16-true",
        recipe=RESNET,
        precision="bf16-true",
        steps=12,
        why="batch norms stay in fp32",
    ),
    Case(
        name="resnet-dead",
        recipe=RESNET,
        options=("fault=dead",),
        why="NaN in backward where channels are dead, which the ReLU before throws away",
    ),
    Case(
        name="t5-bf16",
        recipe=T5,
        precision="bf16",
        why="what overflows in fp16 is well within bf16",
    ),
    Case(
        name="layers-online-softmax",
        recipe=LAYERS,
        options=("fault=online_softmax",),
        steps=40,
        why="a largest number so far that begins at -inf",
    ),
    Case(
        name="layers-mixture",
        recipe=LAYERS,
        options=("fault=mixture",),
        steps=40,
        why="log(0) of components that are switched off, inside a logsumexp",
    ),
    Case(
        name="layers-counts",
        recipe=LAYERS,
        options=("fault=counts", "largest=1000"),
        steps=40,
        why="whole numbers up to 1,000 in a product in fp16, which holds 2,048 of them",
    ),
    Case(name="moe-young", recipe=MOE, options=("bias=0",), steps=60, why="a router at its start"),
)

CASES = (*FAULTS, *HEALTHY)
