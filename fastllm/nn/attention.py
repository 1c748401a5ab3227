"""Attention between its projections: rotary positions, a cache, and sequences spread over processes."""

import torch
from torch import nn

from fastllm.nn.linear import Linear
from fastllm.ops.attention import attention
from fastllm.ops.ring import ring_attention
from fastllm.ops.rope import rope
from fastllm.ops.varlen import attention_varlen


class Rotary(nn.Module):
    """Rotates x [B, H, T, D] by its position p: (a, b) to (a cos pf - b sin pf, b cos pf + a sin pf).

    f_i = base^(-2i / D); a and b are the two halves of the head (the GPT-NeoX and Llama order). The tables are fp32,
    for `max_len` positions, and no part of the state dict; the rotation is computed in fp32 and rounded once.
    Raises ValueError for an odd D and for a position past max_len. Source: Su et al. 2021, arXiv:2104.09864.
    """

    def __init__(self, head_dim, max_len=4096, base=10000.0):
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"Rotary: head_dim must be even, got {head_dim}")
        self.max_len = max_len
        frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angles = torch.arange(max_len, dtype=torch.float64)[:, None] * frequencies  # [max_len, D / 2]
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    def turn(self, x, position):
        """x [B, H, T, D] from `position` on, or at the positions [T]: what another implementation overrides."""
        if isinstance(position, torch.Tensor):
            return rope(x, None, self.cos[position], self.sin[position])
        return rope(x, None, self.cos, self.sin, offset=position)

    def forward(self, x, position=0):
        if isinstance(position, torch.Tensor):  # not looked at: on a GPU that would wait for it
            return self.turn(x, position)
        end = position + x.shape[2]
        if end > self.max_len:
            raise ValueError(f"Rotary: position {end} is past max_len={self.max_len}")
        return self.turn(x, position)


class KeyValues:
    """The keys and values of one attention layer for the positions seen so far: [B, Hkv, S, D] each, or nothing yet."""

    def __init__(self):
        self.k = self.v = None

    def __len__(self):
        return 0 if self.k is None else self.k.shape[2]

    def append(self, k, v):
        """Keep k, v [B, Hkv, T, D] behind what is there and return all of it."""
        if self.k is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
        self.k, self.v = k, v
        return k, v

    def cut(self, count):
        """Keep the first `count` positions only."""
        if self.k is not None:
            self.k, self.v = self.k[:, :, :count], self.v[:, :, :count]


class Attention(nn.Module):
    """o = out(attention(query(x), key(c), value(c))) with c = context, or x itself: projection, attention, projection.

    x [B, T, d_model]; context [B, S, d_model] makes it cross-attention (no rotation, not causal). `heads` query heads
    share `kv_heads` key heads (GQA; default: as many), each of `head_dim` (default d_model / heads). causal and
    window=(left, right) are those of `fastllm.attention`, as is dropout, the dropout of attention probabilities, which
    is off in eval(). rotary is a `Rotary` or None. forward's mask is boolean, True = attend, and broadcasts to
    [B, H, T, S]; [B, S] stands for a padding mask and means [B, 1, 1, S].

    cache is a `KeyValues`: x then continues the positions in it; for cross-attention it keeps the projected context, so
    that it is projected once. Returns [B, T, d_model]. Computed in x's dtype; attention itself in fp32 inside.
    cu_seqlens [sequences + 1] packs sequences into one, x [1, T, d_model], as in `fastllm.attention_varlen`; each is
    alone, with positions of its own. sequence, a `Shards` or None, says that x, context and mask are this rank's part
    (`sequence_parallel` sets it).
    Raises ValueError for heads that do not divide, for a causal or windowed module that is given a context and for a
    cache of a part, and what `fastllm.attention` raises. Held by tests/test_nn.py and tests/test_ring.py.
    Source: Vaswani et al. 2017, arXiv:1706.03762.
    """

    sequence = None
    projection = Linear  # what another implementation overrides, as it does `attend`

    def __init__(
        self,
        d_model,
        heads,
        kv_heads=None,
        *,
        head_dim=None,
        bias=True,
        causal=False,
        window=None,
        dropout=0.0,
        rotary=None,
    ):
        super().__init__()
        kv_heads = kv_heads or heads
        if head_dim is None and d_model % heads:
            raise ValueError(
                f"Attention: d_model={d_model} must be a multiple of heads={heads} where no head_dim is given"
            )
        if heads % kv_heads:
            raise ValueError(f"Attention: heads={heads} must be a multiple of kv_heads={kv_heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim or d_model // heads
        self.causal, self.window, self.dropout = causal, window, dropout
        self.rotary = rotary
        self.query = self.projection(d_model, heads * self.head_dim, bias)
        self.key = self.projection(d_model, kv_heads * self.head_dim, bias)
        self.value = self.projection(d_model, kv_heads * self.head_dim, bias)
        self.out = self.projection(heads * self.head_dim, d_model, bias)

    def extra_repr(self):
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}, window={self.window}"

    def _split(self, x, heads):
        return x.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)  # [B, heads, T, D]

    def attend(self, q, k, v, mask, cu_seqlens=None):
        """[B, H, T, D] from q and the un-repeated k and v [B, Hkv, S, D]: what another implementation overrides."""
        dropout_p = self.dropout if self.training else 0.0
        options = dict(causal=self.causal, window=self.window, dropout_p=dropout_p)
        if cu_seqlens is not None:
            packed = [x[0].transpose(0, 1) for x in (q, k, v)]  # [T, H, D]
            o = attention_varlen(*packed, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options)
            return o.transpose(0, 1).unsqueeze(0)
        options["mask"] = mask
        if self.sequence is None:
            return attention(q, k, v, **options)
        return ring_attention(q, k, v, group=self.sequence.group, sharding=self.sequence.sharding, **options)

    def forward(self, x, context=None, *, mask=None, cache=None, cu_seqlens=None):
        if cu_seqlens is not None and not (context is mask is cache is self.sequence is None and len(x) == 1):
            raise ValueError("Attention: with cu_seqlens, x is [1, T, d_model], alone and whole")
        if context is not None and (self.causal or self.window):
            raise ValueError("Attention: a causal or windowed module attends to its own input, but a context was given")
        if cache is not None and self.sequence is not None:
            raise ValueError("Attention: a cache holds a whole sequence, but this rank has a part (sequence_parallel)")
        q = self._split(self.query(x), self.heads)
        if context is not None and cache is not None and len(cache):
            k, v = cache.k, cache.v
        else:
            source = x if context is None else context
            k = self._split(self.key(source), self.kv_heads)
            v = self._split(self.value(source), self.kv_heads)
            if self.sequence is not None:
                position = self.sequence.positions(x.shape[1], x.device)
            elif cu_seqlens is not None:
                position = packed_positions(cu_seqlens, x.shape[1])
            else:
                position = 0 if cache is None else len(cache)
            if self.rotary is not None and context is None:
                q, k = self.rotary(q, position), self.rotary(k, position)
            if cache is not None:
                k, v = cache.append(k, v)
        if mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        o = self.attend(q, k, v, mask) if cu_seqlens is None else self.attend(q, k, v, None, cu_seqlens)
        return self.out(o.transpose(1, 2).flatten(2))


def sequence_parallel(model, shards):
    """`model` and each `Attention` in it on this rank's part of every sequence, as `shards` cuts it; returns the model.

    What is not attention works on each position alone, so it needs nothing but its part of tokens, targets and masks
    (`Shards.shard`). Parameters stay whole on every rank and their gradients are this rank's summand: add them up, or
    average them as DistributedDataParallel does. shards=None undoes it.
    Raises ValueError for a model that mixes positions elsewhere: with a classification head, or without `Attention`.
    """
    modules = [module for module in model.modules() if isinstance(module, Attention)]
    if shards is not None:
        if not all(type(module).attend is Attention.attend for module in modules):
            raise ValueError("sequence_parallel: attention is plain PyTorch here; make the model with accelerated=True")
        if not modules or getattr(getattr(model, "config", None), "classes", 0):
            what = "a classification head" if modules else "no fastllm.nn.Attention"
            raise ValueError(f"sequence_parallel: {type(model).__name__} has {what}")
    for module in (model, *modules):
        module.sequence = shards
    return model


def packed_positions(cu_seqlens, T):
    """[T]: the position of every row in its own one of the packed sequences."""
    row = torch.arange(T, device=cu_seqlens.device)
    return row - cu_seqlens[torch.searchsorted(cu_seqlens, row, right=True) - 1]
