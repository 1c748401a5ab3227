"""Linear layers: plain, with adapters, of few bits, and the gated feed-forward blocks made of them."""

import torch
from torch import nn

from fastllm.ops.activation import geglu, swiglu
from fastllm.ops.linear import linear
from fastllm.ops.lora import lora_linear
from fastllm.ops.weight_only import QuantizedWeight, quantize_weight, weight_only_linear
from fastllm.reference import ACTIVATIONS


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

    tokens of any shape to [..., D] in `dtype`, times `scale`. Raises IndexError on CPU for a token that is no row.
    """

    def __init__(self, weight, dtype=torch.float32, scale=1.0):
        super().__init__()
        self.sizes, self.dtype, self.scale = (weight.shape, weight.bits, weight.group_size), dtype, scale
        for name in ("codes", "scales", "offsets"):
            self.register_buffer(name, getattr(weight, name))

    weight = QuantizedLinear.weight

    def forward(self, tokens):
        if tokens.is_cpu and tokens.numel() and not torch.compiler.is_compiling():  # or panels would be read askew
            low, high = torch.aminmax(tokens)
            if low < 0 or high >= self.sizes[0][0]:
                raise IndexError(f"QuantizedEmbedding: tokens must be in [0, {self.sizes[0][0]}), got {low} to {high}")
        rows = self.weight.rows(tokens.flatten(), self.dtype).unflatten(0, tokens.shape)
        return rows if self.scale == 1.0 else rows * self.scale


class Linear(nn.Linear):
    """y = x W^T + bias: torch.nn.Linear, its constructor, initial values and state dict, on `fastllm.linear`.

    The input x is [..., in_features]; dtypes, precision, what is saved and errors are those of `fastllm.linear`
    (tests/test_nn.py), as is forward's activation, which is applied to y.
    """

    def forward(self, input, *, activation=None):
        return linear(input, self.weight, self.bias, activation=activation)


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
    """y = down(gelu(gate(x)) * up(x)), gelu by tanh, as in Gemma, or exact with approximate="none".

    Constructor and shapes are those of `SwiGLU`; precision, what is saved, and errors those of `fastllm.geglu`.
    """

    def __init__(self, d_model, d_ff, bias=False, approximate="tanh"):
        super().__init__(d_model, d_ff, bias)
        self.approximate = approximate

    def extra_repr(self):
        return f"approximate={self.approximate!r}"

    def forward(self, x):
        return self.down(geglu(self.gate(x), self.up(x), approximate=self.approximate))
