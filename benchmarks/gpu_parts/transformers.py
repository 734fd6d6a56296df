"""Transformers whose sizes everybody knows, written here so that a measurement needs no package.

GPT-2 (Radford et al. 2019) from the blocks of the recipe `austen`, BERT (Devlin et al. 2019) and
T5 (Raffel et al. 2020) after their papers, with the parameter shapes of the published models.

Shape suffixes: B batch, T positions, S positions of the encoder, D width, N heads, K width of a
head, V vocabulary.
"""
# ruff: noqa: N803, N806 -- shape suffixes, as in src/narrowcast/recipes

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from narrowcast.recipes.austen import Block

__all__ = ["T5", "Bert", "Gpt", "Shape"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    layers: int
    width: int
    heads: int
    hidden: int
    positions: int
    vocabulary: int
    dropout: float = 0.0


def initialise(model: nn.Module) -> None:
    """Draw normal weights with a deviation of 0.02, as GPT-2 and BERT do."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            nn.init.normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


class Gpt(nn.Module):
    """Decoder with a tied head: 124M or 350M parameters by its shape."""

    task = "next token"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.blocks = nn.ModuleList(
            Block(shape.width, shape.heads, shape.dropout) for _ in range(shape.layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        initialise(self)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(positions_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return self.head(self.norm(x_BTD))


class SelfAttention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, shape.dropout
        self.query, self.key, self.value = (nn.Linear(shape.width, shape.width) for _ in range(3))
        self.out = nn.Linear(shape.width, shape.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BNTK, k_BNTK, v_BNTK = (
            part(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        y_BNTK = F.scaled_dot_product_attention(
            q_BNTK, k_BNTK, v_BNTK, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(y_BNTK.transpose(1, 2).flatten(2))


class EncoderLayer(nn.Module):
    """Attention and MLP, each added to what it reads and normalised after."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = SelfAttention(shape)
        self.norm_attention = nn.LayerNorm(shape.width, eps=1e-12)
        self.up = nn.Linear(shape.width, shape.hidden)
        self.down = nn.Linear(shape.hidden, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.norm_attention(x_BTD + self.dropout(self.attention(x_BTD)))
        return self.norm(x_BTD + self.dropout(self.down(F.gelu(self.up(x_BTD)))))


class Bert(nn.Module):
    """Encoder that guesses tokens everywhere, with a tied head."""

    task = "every token"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.positions, shape.width)
        self.segments = nn.Embedding(2, shape.width)
        self.norm = nn.LayerNorm(shape.width, eps=1e-12)
        self.dropout = nn.Dropout(shape.dropout)
        self.layers = nn.ModuleList(EncoderLayer(shape) for _ in range(shape.layers))
        self.transform = nn.Linear(shape.width, shape.width)
        self.norm_head = nn.LayerNorm(shape.width, eps=1e-12)
        self.head = nn.Linear(shape.width, shape.vocabulary)
        self.head.weight = self.tokens.weight
        initialise(self)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.tokens(tokens_BT) + self.positions(positions_T)
        x_BTD = x_BTD + self.segments(torch.zeros_like(tokens_BT))
        x_BTD = self.dropout(self.norm(x_BTD))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return self.head(self.norm_head(F.gelu(self.transform(x_BTD))))


class RelativeAttention(nn.Module):
    """Attention written out: no scale, and a bias by distance that the first layer learns."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.heads, self.dropout = shape.heads, nn.Dropout(shape.dropout)
        self.query, self.key, self.value, self.out = (
            nn.Linear(shape.width, shape.width, bias=False) for _ in range(4)
        )

    def forward(self, x_BTD: Tensor, y_BSD: Tensor, bias_NTS: Tensor) -> Tensor:
        q_BNTK = self.query(x_BTD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k_BNSK, v_BNSK = (
            part(y_BSD).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.key, self.value)
        )
        scores_BNTS = q_BNTK @ k_BNSK.transpose(2, 3) + bias_NTS
        weights_BNTS = self.dropout(scores_BNTS.float().softmax(dim=-1).to(v_BNSK.dtype))
        return self.out((weights_BNTS @ v_BNSK).transpose(1, 2).flatten(2))


class RelativeBias(nn.Module):
    """One number a head for each of 32 classes of distance (Raffel et al. 2020, section 2.1)."""

    CLASSES, FARTHEST = 32, 128

    def __init__(self, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.by_class = nn.Embedding(self.CLASSES, heads)

    def forward(self, length: int) -> Tensor:
        places_T = torch.arange(length, device=self.by_class.weight.device)
        distance_TT = places_T[None, :] - places_T[:, None]
        bias_NTT = self.by_class(self._classes(distance_TT)).permute(2, 0, 1)
        if self.causal:
            bias_NTT = bias_NTT.masked_fill(distance_TT > 0, torch.finfo(bias_NTT.dtype).min)
        return bias_NTT

    def _classes(self, distance_TT: Tensor) -> Tensor:
        """Number small distances one by one, and larger ones by their logarithm."""
        classes = self.CLASSES if self.causal else self.CLASSES // 2
        ahead_TT = 0 if self.causal else (distance_TT > 0).long() * classes
        away_TT = (-distance_TT).clamp(min=0) if self.causal else distance_TT.abs()
        exact = classes // 2
        scale = (classes - exact) / math.log(self.FARTHEST / exact)
        far_TT = exact + (torch.log(away_TT.clamp(min=1) / exact) * scale).long()
        return ahead_TT + torch.where(away_TT < exact, away_TT, far_TT.clamp(max=classes - 1))


class T5Layer(nn.Module):
    def __init__(self, shape: Shape, *, crosses: bool) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(shape.width, eps=1e-6)
        self.attention = RelativeAttention(shape)
        self.crossing = RelativeAttention(shape) if crosses else None
        self.norm_crossing = nn.RMSNorm(shape.width, eps=1e-6) if crosses else None
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)
        self.dropout = nn.Dropout(shape.dropout)

    def forward(self, x_BTD: Tensor, bias_NTT: Tensor, y_BSD: Tensor | None = None) -> Tensor:
        z_BTD = self.norm_attention(x_BTD)
        x_BTD = x_BTD + self.dropout(self.attention(z_BTD, z_BTD, bias_NTT))
        if self.crossing is not None and self.norm_crossing is not None and y_BSD is not None:
            z_BTD = self.norm_crossing(x_BTD)
            nothing = bias_NTT.new_zeros(())
            x_BTD = x_BTD + self.dropout(self.crossing(z_BTD, y_BSD, nothing))
        z_BTD = self.up(self.norm(x_BTD)).relu()
        return x_BTD + self.dropout(self.down(self.dropout(z_BTD)))


class T5(nn.Module):
    """Encoder and decoder over one embedding, which is the head as well."""

    task = "translation"

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.encoder_bias = RelativeBias(shape.heads, causal=False)
        self.decoder_bias = RelativeBias(shape.heads, causal=True)
        self.encoder = nn.ModuleList(T5Layer(shape, crosses=False) for _ in range(shape.layers))
        self.decoder = nn.ModuleList(T5Layer(shape, crosses=True) for _ in range(shape.layers))
        self.norm_encoder, self.norm = (nn.RMSNorm(shape.width, eps=1e-6) for _ in range(2))
        self.dropout = nn.Dropout(shape.dropout)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        initialise(self)

    def forward(self, tokens_BS: Tensor, before_BT: Tensor) -> Tensor:
        y_BSD = self.dropout(self.tokens(tokens_BS))
        bias = self.encoder_bias(tokens_BS.shape[1])
        for layer in self.encoder:
            y_BSD = layer(y_BSD, bias)
        y_BSD = self.dropout(self.norm_encoder(y_BSD))
        x_BTD = self.dropout(self.tokens(before_BT))
        bias = self.decoder_bias(before_BT.shape[1])
        for layer in self.decoder:
            x_BTD = layer(x_BTD, bias, y_BSD)
        x_BTD = self.dropout(self.norm(x_BTD))
        # Raffel et al. divide by the root of the width because head and embedding are one.
        return self.head(x_BTD * x_BTD.shape[-1] ** -0.5)
