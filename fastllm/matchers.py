"""What `fastllm.accelerate` recognises in a module, and what runs there then.

A matcher takes a module and its row of the report. It does nothing for a module that is none of its business, swaps the
module's forward where a kernel gives the same, and raises Unsupported, with the reason, for what is of its kind but is
left alone. Structure decides, not names: what somebody wrote out in PyTorch is tried on a probe beside the kernel.
"""

import functools
import inspect

import torch
from torch import nn

from fastllm import trial
from fastllm.compat.pytorch import scaled_dot_product_attention
from fastllm.mlp import match_experts, match_gated_mlp, match_gelu
from fastllm.nn.norm import flat_norm
from fastllm.ops.attention import attention
from fastllm.ops.linear import linear
from fastllm.ops.norm import layer_norm, rms_norm
from fastllm.swap import Unsupported, forward_of, names_used, swap


def _autocast_to_fp32(x):
    """Autocast lets CUDA's norms run in fp32; on CPU it leaves them their dtype."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64 else x


# Arguments have torch's names: a caller may use them.


def _layer_norm_forward(self, plain, input):
    return flat_norm(self, layer_norm, _autocast_to_fp32(input), (self.weight, self.bias), self.eps)


def _rms_norm_forward(self, plain, x):
    eps = self.eps
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return flat_norm(self, rms_norm, _autocast_to_fp32(x), (self.weight,), eps)


_layer_norm_forward.runs, _rms_norm_forward.runs = "layer_norm", "rms_norm"


def match_torch_norm(module, row):
    for theirs, forward in ((nn.LayerNorm, _layer_norm_forward), (nn.RMSNorm, _rms_norm_forward)):
        if isinstance(module, theirs):
            if type(module).__module__.startswith("fastllm."):
                return
            if type(module).forward is not theirs.forward:
                raise Unsupported("its class has a forward of its own")
            swap(module, row, forward)


EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "rms_norm_eps")


def match_written_norm(module, row):
    """A norm that somebody wrote out in PyTorch: one vector of weights (and one of biases), an epsilon, one input."""
    if type(module).__module__.startswith(("torch.nn.", "fastllm.")) or [*module.children(), *module.buffers()]:
        return
    weights = dict(module.named_parameters(recurse=False))
    eps = next((name for name in EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    if eps is None or "weight" not in weights or weights.keys() - {"weight", "bias"}:
        return
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or any(w.ndim != 1 for w in weights.values()):
        return
    inputs = list(inspect.signature(forward_of(module)).parameters.values())[1:]
    if len([p for p in inputs if p.kind != p.VAR_KEYWORD]) != 1:  # an optional one too: Mamba 2's norm has a gate
        raise Unsupported("its forward takes more than one tensor")
    swap(module, row, _written_norm(eps, *_try_norm(module, eps)))


def _try_norm(module, eps):
    """(op, weight offset, rule of the result's dtype), found by running the module's own forward on a probe."""
    probe, device, e = trial.bare(module), module.weight.device, getattr(module, eps)
    x = trial.numbers(3, len(module.weight), device=device) + 0.5  # nothing that could pass for normalised
    x = (x * torch.tensor([[1.0], [30.0], [e**0.5]], device=device)).float()  # the last row as small as eps

    def run(x, weights_dtype):
        probe._parameters = {
            name: w if w is None else nn.Parameter(w.detach().to(weights_dtype), False)
            for name, w in module._parameters.items()
        }
        return type(module).forward(probe, x)  # past its hooks

    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            low, dtypes = torch.bfloat16, (run(x.bfloat16(), torch.float32).dtype, run(x, torch.bfloat16).dtype)
            y = run(x, torch.float32)
            weight, bias = probe.weight, getattr(probe, "bias", None)
            candidates = {("layer_norm", 0.0): layer_norm(x, weight, bias, eps=e)}
            if bias is None:
                candidates |= {("rms_norm", c): rms_norm(x, weight, eps=e, weight_offset=c) for c in (0.0, 1.0)}
            same = [found for found, c in candidates.items() if trial.same(y, c)]
    except Exception as error:
        raise Unsupported(f"its forward could not be tried: {error}") from error
    wide = torch.float32
    rule = {(low, wide): "x's", (wide, wide): "the wider", (wide, low): "the weight's"}.get(dtypes)
    if not same or rule is None:
        raise Unsupported("its forward is neither layer norm nor RMS norm")
    return *same[0], rule


@functools.cache
def _written_norm(eps, op, offset, rule):
    plus_one = bool(offset)  # Dynamo, which sees many models through one function, would take a float for a variable

    def forward(self, plain, *args, **kwargs):
        if len(args) != 1 or kwargs:  # by its own name for it
            return plain(self, *args, **kwargs)
        (x,) = args
        weight, dtype = self.weight, x.dtype
        if rule == "the wider" or (rule == "the weight's" and weight.dtype.itemsize > dtype.itemsize):
            x = x.to(torch.promote_types(dtype, weight.dtype))
        if op == "layer_norm":
            y = layer_norm(x, weight, getattr(self, "bias", None), eps=getattr(self, eps))
        else:
            y = rms_norm(x, weight, eps=getattr(self, eps), weight_offset=1.0 if plus_one else 0.0)
        return y.to(weight.dtype) if rule == "the weight's" else y

    forward.runs = op if not offset else f"{op}, 1 + weight"
    return forward


def match_multihead_attention(module, row):
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward:
            raise Unsupported("its class has a forward of its own")
        if module.bias_k is not None or module.add_zero_attn:
            raise Unsupported("bias_kv and add_zero_attn have no kernel")
        swap(module, row, _multihead_attention)


def _multihead_attention(
    self,
    plain,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    if need_weights or query.is_nested:  # probabilities are what the kernel never has in memory
        return plain(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    batched, same = query.ndim == 3, query is key and key is value
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    D, H = self.head_dim, self.num_heads
    if self._qkv_same_embed_dim and same:
        parts = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    else:
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
    q, k, v = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in parts)
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None and not is_causal:  # with is_causal, the mask is a causal one: PyTorch goes by that too
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.view(-1, H, *attn_mask.shape[1:]))
    kept = [~m for m in masks if m.dtype == torch.bool]
    added = [m for m in masks if m.dtype != torch.bool]
    o = attention(
        q,
        k,
        v,
        causal=is_causal,
        q_offset=0,
        mask=functools.reduce(torch.logical_and, kept) if kept else None,
        bias=functools.reduce(torch.add, added) if added else None,
        dropout_p=self.dropout if self.training else 0.0,
    )
    o = self.out_proj(o.transpose(1, 2).flatten(2))
    if not batched:
        return o.squeeze(0), None
    return (o if self.batch_first else o.transpose(0, 1)), None


_multihead_attention.runs = "attention"


# PyTorch's encoder in eval() goes round its modules where, among much else, these hold: here they never do.
_ROUND = {
    nn.TransformerEncoderLayer: (("activation_relu_or_gelu", property(lambda self: 0)),),
    nn.TransformerEncoder: (("use_nested_tensor", property(lambda self: False)),),
}


def match_encoder(module, row):
    for theirs, attributes in _ROUND.items():
        if isinstance(module, theirs):
            if type(module).forward is not theirs.forward:
                raise Unsupported("its class has a forward of its own")
            swap(module, row, _as_written, attributes)


def _as_written(self, plain, *args, **kwargs):
    return plain(self, *args, **kwargs)


_as_written.runs = "its modules, in eval() too"


class _SDPA(torch.overrides.TorchFunctionMode):
    """Sends torch.nn.functional.scaled_dot_product_attention to the kernel, on this thread."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return scaled_dot_product_attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _in_sdpa_mode(self, plain, *args, **kwargs):
    with _SDPA():
        return plain(self, *args, **kwargs)


_in_sdpa_mode.runs = "attention for F.scaled_dot_product_attention"


def match_sdpa(module, row):
    """A module whose own code, or a function of its file that this calls, calls PyTorch's attention function."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            return
        for function in filter(inspect.isfunction, vars(cls).values()):
            names = names_used(function)
            near = [inspect.unwrap(function).__globals__.get(name) for name in names]
            near = [f for f in near if inspect.isfunction(f) and f.__module__ == cls.__module__]
            if any("scaled_dot_product_attention" in n for n in (names, *map(names_used, near))):
                return swap(module, row, _in_sdpa_mode)


def match_linear(module, row):
    """torch's Linear. One of another class has more to do than the product (LoRA, quantised weights)."""
    if isinstance(module, nn.Linear) and forward_of(module) is nn.Linear.forward:
        swap(module, row, _linear_forward)


def _linear_forward(self, plain, input):
    return linear(input, self.weight, self.bias)


_linear_forward.runs = "linear"


def match_conv1d(module, row):
    """transformers' Conv1D, GPT-2's linear layer: its weight is [K, N], which our product reads as it lies."""
    for cls in type(module).__mro__:
        if (cls.__module__, cls.__name__) == ("transformers.pytorch_utils", "Conv1D"):
            if forward_of(module) is cls.forward:
                swap(module, row, _conv1d_forward)
            return


def _conv1d_forward(self, plain, x):
    return linear(x, self.weight.t(), self.bias)


_conv1d_forward.runs = "linear"

# Kind, a keyword of accelerate -> its matchers; the first that knows a module has it. Kinds come in this order: the
# loss, last, goes around a head that is a linear layer.
MATCHERS = {
    "attention": [match_multihead_attention, match_encoder, match_sdpa],
    "norms": [match_torch_norm, match_written_norm],
    "mlp": [match_gated_mlp, match_experts, match_gelu],
    "rope": [],
    "linear": [match_linear, match_conv1d],
    "loss": [],
}
