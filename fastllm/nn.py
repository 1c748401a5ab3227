"""Modules around the ops. Where torch has the module, its constructor, defaults and state dict are kept."""

import torch
from torch import nn

from fastllm import dispatch
from fastllm.ops import _tuned
from fastllm.ops.activation import geglu, swiglu
from fastllm.ops.attention import attention
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.linear import linear
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.ops.lora import lora_linear
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.ops.ring import Shards, ring_attention
from fastllm.ops.rope import rope
from fastllm.ops.varlen import attention_varlen
from fastllm.ops.weight_only import QuantizedWeight, quantize_weight, weight_only_linear
from fastllm.reference import ACTIVATIONS

__all__ = [
    "Attention",
    "CrossEntropyLoss",
    "GeGLU",
    "KeyValues",
    "LayerNorm",
    "Linear",
    "LinearCrossEntropyLoss",
    "LoRALinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RMSNorm",
    "Rotary",
    "Shards",
    "SwiGLU",
    "sequence_parallel",
]


def flat_norm(module, op, x, weights, eps, residual=None, dropout_p=0.0):
    """`op` over all of module.normalized_shape, which the op itself sees as one last dimension."""
    shape = tuple(module.normalized_shape)
    if tuple(x.shape[x.ndim - len(shape) :]) != shape or x.ndim < len(shape):
        raise ValueError(f"{type(module).__name__}: x must be [..., {', '.join(map(str, shape))}], got {list(x.shape)}")
    if len(shape) == 1:
        return op(x, *weights, eps=eps, residual=residual, dropout_p=dropout_p)
    weights = [None if w is None else w.flatten() for w in weights]
    residual = None if residual is None else residual.flatten(-len(shape))
    found = op(x.flatten(-len(shape)), *weights, eps=eps, residual=residual, dropout_p=dropout_p)
    return found.view(x.shape) if residual is None else tuple(y.view(x.shape) for y in found)


class LayerNorm(nn.LayerNorm):
    """y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias over the last len(normalized_shape) dimensions.

    Constructor, defaults, initial values and state dict are those of torch.nn.LayerNorm. x [..., *normalized_shape] in
    fp32, bf16, fp16 or fp64. `forward(x)` returns y; `forward(x, residual)` returns (y, h) with h = x + residual, or
    dropout(x) + residual with dropout_p, whatever the module's mode.
    Precision, what is saved, and errors are those of `fastllm.layer_norm`, and ValueError where x does not end in
    normalized_shape (tests/test_nn.py).
    """

    def forward(self, x, residual=None, *, dropout_p=0.0):
        return flat_norm(self, layer_norm, x, (self.weight, self.bias), self.eps, residual, dropout_p)


class RMSNorm(nn.RMSNorm):
    """y = h / sqrt(mean(h^2) + eps) * weight over the last len(normalized_shape) dimensions.

    Constructor, defaults, initial values and state dict are those of torch.nn.RMSNorm. eps=None is, as there, the eps
    of the dtype that the norm is computed in: fp32's for bf16 and fp16 too. `forward(x, residual)` returns (y, h) with
    h = x + residual, or dropout(x) + residual. Shapes, precision and errors are those of `LayerNorm` here and of
    `fastllm.rms_norm`.
    """

    def forward(self, x, residual=None, *, dropout_p=0.0):
        eps = self.eps
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        return flat_norm(self, rms_norm, x, (self.weight,), eps, residual, dropout_p)


class QuantizedLinear(nn.Module):
    """y = x w^T + bias with w in 8 or 4 bits: `fastllm.weight_only_linear` as a module, for inference.

    Made by `from_linear`. The codes, scales and offsets are buffers of the state dict, the bias a parameter; `weight`
    is the `QuantizedWeight` of them. Dtypes, precision and errors are those of `fastllm.weight_only_linear`.
    """

    def __init__(self, weight, bias=None):
        super().__init__()
        self.sizes = weight.shape, weight.bits, weight.group_size
        for name in ("codes", "scales", "offsets"):
            self.register_buffer(name, getattr(weight, name))
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    @classmethod
    def from_linear(cls, linear, bits=8, group_size=None, *, symmetric=True):
        """The torch.nn.Linear `linear` with its weight quantised by `fastllm.quantize_weight`."""
        return cls(quantize_weight(linear.weight, bits, group_size, symmetric=symmetric), linear.bias)

    @property
    def weight(self):
        return QuantizedWeight(self.codes, self.scales, self.offsets, *self.sizes)

    def extra_repr(self):
        (rows, columns), bits, group_size = self.sizes
        return f"in_features={columns}, out_features={rows}, bits={bits}, group_size={group_size}"

    def forward(self, x):
        return weight_only_linear(x, self.weight, self.bias)


class QuantizedEmbedding(nn.Module):
    """Rows of a weight in 8 or 4 bits: torch.nn.Embedding for inference, of a `QuantizedWeight` that a head may share.

    tokens of any shape to [..., D] in `dtype`, times `scale`.
    """

    def __init__(self, weight, dtype=torch.float32, scale=1.0):
        super().__init__()
        self.sizes, self.dtype, self.scale = (weight.shape, weight.bits, weight.group_size), dtype, scale
        for name in ("codes", "scales", "offsets"):
            self.register_buffer(name, getattr(weight, name))

    weight = QuantizedLinear.weight

    def forward(self, tokens):
        rows = self.weight.rows(tokens.flatten(), self.dtype).unflatten(0, tokens.shape)
        return rows if self.scale == 1.0 else rows * self.scale


class Linear(nn.Linear):
    """y = x W^T + bias: torch.nn.Linear, its constructor, initial values and state dict, on `fastllm.linear`.

    x [..., in_features]; dtypes, precision, what is saved and errors are those of `fastllm.linear` (tests/test_nn.py),
    as is forward's activation, which is applied to y.
    """

    def forward(self, x, *, activation=None):
        if activation is None and is_pytorchs(x, self.weight):
            return super().forward(x)
        return linear(x, self.weight, self.bias, activation=activation)


def is_pytorchs(x, weight):
    """Whether `linear` would leave x W^T to PyTorch for x having so few rows, or in any case. To ask it took 11% of the
    time of a sentence of 30 tokens in MiniLM."""
    if torch.compiler.is_compiling() or not dispatch.is_free() or x.dtype is not weight.dtype:
        return False
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    K = weight.shape[1]
    return x.shape[-1:] == (K,) and x.numel() < K * _tuned.fewest_rows(dtype)


def activated(layer, x, activation):
    """activation(layer(x)), in one pass over memory where `layer` is a `Linear`; another one may have replaced it."""
    if isinstance(layer, Linear):
        return layer(x, activation=activation)
    return ACTIVATIONS[activation](layer(x))


class LoRALinear(nn.Module):
    """A linear layer whose weight stays, and a low-rank update that trains: `fastllm.lora_linear` as a module.

    y = base(x) + alpha / rank * (dropout(x) lora_A^T) lora_B^T (alpha / sqrt(rank) with `rslora`). `base` is a
    torch.nn.Linear or Hugging Face's Conv1D, whose weight is stored the other way round; it is frozen. lora_A
    [rank, in] starts uniform and lora_B [out, rank] at zero, in fp32 where the weight has 16 bits; so y is base(x) at
    first. `merge` adds the update to the weight, for inference; `unmerge` puts the weight back that was there.
    Dtypes, precision, what is saved and errors are those of `fastllm.lora_linear` (tests/test_lora.py).
    """

    def __init__(self, base, rank, alpha=None, dropout=0.0, *, rslora=False):
        super().__init__()
        if rank < 1:
            raise ValueError(f"LoRALinear: rank must be at least 1, got {rank}")
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, rank if alpha is None else alpha, dropout, rslora
        self.scale = self.alpha / (rank**0.5 if rslora else rank)
        self.out_features, self.in_features = N, K = self._weight().shape
        wide = torch.promote_types(base.weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.empty(rank, K, dtype=wide, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(N, rank, dtype=wide, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        self._before = None  # the weight without the update, while they are merged

    def _weight(self):
        return self.base.weight if isinstance(self.base, nn.Linear) else self.base.weight.T

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    @property
    def merged(self):
        return self._before is not None

    @torch.no_grad()
    def merge(self):
        if not self.merged:
            self._before = self.base.weight.detach().clone()
            self._weight().add_((self.lora_B @ self.lora_A).to(self._before.dtype), alpha=self.scale)

    @torch.no_grad()
    def unmerge(self):
        if self.merged:
            self.base.weight.copy_(self._before)
            self._before = None

    def extra_repr(self):
        return f"rank={self.rank}, alpha={self.alpha}, dropout={self.dropout}"

    def forward(self, x):
        if self.merged:
            return self.base(x)
        a, b = (self.lora_A, self.lora_B) if x.dtype == self.lora_A.dtype else (self.lora_A.to(x), self.lora_B.to(x))
        dropout_p = self.dropout if self.training else 0.0
        return lora_linear(x, self._weight(), a, b, self.bias, scale=self.scale, dropout_p=dropout_p)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """loss = -log softmax(input)[target], reduced; forward(input, target).

    Constructor, defaults and state dict are those of torch.nn.CrossEntropyLoss, and softcap, z_loss and
    return_token_accuracy are those of `fastllm.cross_entropy`, as are shapes, precision and errors.
    """

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        softcap=0.0,
        z_loss=0.0,
        return_token_accuracy=False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.softcap, self.z_loss, self.return_token_accuracy = softcap, z_loss, return_token_accuracy

    def forward(self, input, target):
        return cross_entropy(
            input,
            target,
            self.weight,
            self.ignore_index,
            self.reduction,
            self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            return_token_accuracy=self.return_token_accuracy,
        )


class LinearCrossEntropyLoss(nn.Module):
    """The loss of a head: `fastllm.linear_cross_entropy` with the weight (and bias) of `self.linear`.

    forward(input [..., in_features], target [...]). Constructor and state dict are those of torch's class of this name
    (2.13), without its out_features and options; softcap, z_loss and return_token_accuracy are those of
    `fastllm.cross_entropy`, as are the errors.
    """

    def __init__(
        self,
        in_features,
        num_classes,
        *,
        bias=False,
        device=None,
        dtype=None,
        reduction="mean",
        weight=None,
        ignore_index=None,
        label_smoothing=0.0,
        softcap=0.0,
        z_loss=0.0,
        return_token_accuracy=False,
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.options = dict(
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            return_token_accuracy=return_token_accuracy,
        )

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    def forward(self, input, target):
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight, **self.options
        )


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


class SwiGLU(nn.Module):
    """y = down(silu(gate(x)) * up(x)): the gated feed-forward block of Llama and its like.

    x [..., d_model]; gate and up are d_model -> d_ff, down is d_ff -> d_model, without bias unless asked for. Returns y
    like x. Precision, what is saved, and errors are those of `fastllm.swiglu` (tests/test_nn.py).
    Source: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, d_model, d_ff, bias=False):
        super().__init__()
        self.gate = Linear(d_model, d_ff, bias)
        self.up = Linear(d_model, d_ff, bias)
        self.down = Linear(d_ff, d_model, bias)

    def forward(self, x):
        return self.down(swiglu(self.gate(x), self.up(x)))


class GeGLU(SwiGLU):
    """y = down(gelu(gate(x)) * up(x)), gelu by tanh, as in Gemma, or exact with approximate="none"."""

    def __init__(self, d_model, d_ff, bias=False, approximate="tanh"):
        super().__init__(d_model, d_ff, bias)
        self.approximate = approximate

    def extra_repr(self):
        return f"approximate={self.approximate!r}"

    def forward(self, x):
        return self.down(geglu(self.gate(x), self.up(x), approximate=self.approximate))
