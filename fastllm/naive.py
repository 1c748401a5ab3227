"""The reference transformer's parts in plain PyTorch, as a textbook writes them: what the kernels are held against."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import fastllm.nn


class NaiveAttention(fastllm.nn.Attention):
    """The same module on the textbook's attention: keys repeated, all scores in memory, softmax, second product."""

    projection = nn.Linear

    def attend(self, q, k, v, mask, cu_seqlens=None):
        if cu_seqlens is not None:
            row = torch.arange(q.shape[2], device=q.device)
            number = torch.searchsorted(cu_seqlens, row, right=True)
            mask = number[:, None] == number  # rows of one sequence see each other
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)  # [B, H, T, S]
        hidden = torch.finfo(scores.dtype).min  # with -inf, padding that sees no key would become NaN
        if self.causal or self.window:
            T, S = scores.shape[-2:]
            i = torch.arange(S - T, S, device=q.device)[:, None]
            j = torch.arange(S, device=q.device)
            left, right = (-1 if side is None else side for side in self.window or (-1, -1))
            right = 0 if self.causal else right
            visible = (j >= i - left if left >= 0 else j >= 0) & (j <= i + right if right >= 0 else j >= 0)
            scores = scores.masked_fill(~visible, hidden)
        if mask is not None:
            scores = scores.masked_fill(~mask, hidden)
        p = F.dropout(scores.softmax(-1), self.dropout, self.training)
        return p @ v


class _AddThenNorm:
    """Drops, adds the residual and normalises in a pass over memory each, as PyTorch code does."""

    def forward(self, x, residual=None, *, dropout_p=0.0):
        x = F.dropout(x, dropout_p) if dropout_p else x
        h = x if residual is None else x + residual
        y = super().forward(h)
        return y if residual is None else (y, h)


class NaiveLayerNorm(_AddThenNorm, nn.LayerNorm):
    """fastllm.nn.LayerNorm on torch.nn.functional.layer_norm."""


class NaiveRMSNorm(_AddThenNorm, nn.RMSNorm):
    """fastllm.nn.RMSNorm on torch.nn.functional.rms_norm."""


class NaiveRotary(fastllm.nn.Rotary):
    """The same rotation in plain PyTorch operations."""

    def turn(self, x, position):
        at = position if isinstance(position, torch.Tensor) else slice(position, position + x.shape[2])
        cos, sin = self.cos[at], self.sin[at]  # [T, D / 2]
        wide = x if x.dtype == torch.float64 else x.float()
        a, b = wide.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def naive_swiglu(gate, up):
    return F.silu(gate) * up


def naive_activated(layer, x, activation):
    return getattr(F, activation)(layer(x))
