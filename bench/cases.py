"""The cases: what each op is given, what it must cost, who else can do it. `verify`, bench and pytest share them.

A case is one call at one size; dtype and pass (forward, backward, both) are chosen by whoever runs it. Every callable
takes the same inputs. Sizes of the bench are those of real models, sizes of `verify` are small and awkward.
"""

import functools
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

import fastllm
from fastllm import reference

PASSES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Case:
    """One call of an op. `flops` and `values` are the arithmetic and the memory traffic that nobody can avoid."""

    op: str
    name: str
    shapes: dict[str, tuple]  # of the floating inputs, in order
    ours: Callable
    torch: Callable  # PyTorch's own kernel: the peer of the accuracy rule and the rival that counts
    naive: Callable  # the same in plain PyTorch operations, from fastllm.reference
    flops: dict[str, float]  # pass -> floating point operations; an op without a backward pass has "forward" alone
    values: dict[str, int]  # pass -> values of the dtype read and written
    outputs: tuple[str, ...] = ("y",)
    peer: Callable | None = None  # of the accuracy rule, where `torch` computes something else
    compiled: Callable | None = None  # what torch.compile is given, where that is not `torch`
    fixed_bytes: int = 0  # read besides, whatever the dtype: packed weights
    part: Callable = field(default=lambda x: x)  # the share of an input or output that is checked against fp64

    def inputs(self, dtype, device="cpu", seed=0) -> list[torch.Tensor]:
        random = torch.Generator(device).manual_seed(seed)
        made = [torch.randn(shape, generator=random, device=device) for shape in self.shapes.values()]
        return [x.to(dtype) for x in made]

    def bytes(self, passes: str, dtype) -> int:
        return self.values[passes] * dtype.itemsize + self.fixed_bytes * (2 if passes == "both" else 1)

    def __str__(self):
        return f"{self.op} {self.name}"


def _both(costs: dict) -> dict:
    return costs | {"both": costs["forward"] + costs["backward"]}


def visible_pairs(T, S, left, right, q_offset) -> int:
    """How many (query, key) pairs a window leaves; -1 is unbounded."""
    i = torch.arange(T) + q_offset
    first = (i - left).clamp(min=0) if left >= 0 else torch.zeros(T, dtype=torch.int64)
    last = (i + right).clamp(max=S - 1) if right >= 0 else torch.full((T,), S - 1)
    return int((last - first + 1).clamp(min=0).sum())


def attention(
    B,
    H,
    T,
    D,
    *,
    Hkv=None,
    S=None,
    Dv=None,
    causal=False,
    window=None,
    q_offset=None,
    lse=False,
    masked=False,
    biased=False,
    dropout_p=0.0,
):
    """q [B, H, T, D] on k [B, Hkv, S, D] and v [B, Hkv, S, Dv]; T = 1 is a step of decoding.

    With `masked` under a random boolean mask, with `biased` (which is not causal) with a bias that has a gradient.
    """
    Hkv, S, Dv = Hkv or H, S or T, Dv or D
    offset = S - T if q_offset is None else q_offset
    left, right = window or (-1, -1)
    right = 0 if causal else right
    plain = not (causal or window or masked)
    top_left = causal and not window and not masked and offset == 0

    @functools.cache
    def mask(device):
        kept = torch.ones(1, 1, T, S, dtype=torch.bool)
        if masked:
            kept = torch.rand(1, 1, T, S, generator=torch.Generator().manual_seed(1)) < 0.7
            kept[..., 0] = True  # PyTorch's kernels give NaN for a query that sees nothing
        return kept.to(device)

    @functools.cache
    def dense(device):
        i, j = torch.arange(T, device=device)[:, None] + offset, torch.arange(S, device=device)
        kept = mask(device)
        kept = kept & (j >= i - left) if left >= 0 else kept
        return kept & (j <= i + right) if right >= 0 else kept

    def drawn():  # the same probabilities are dropped in every call
        if dropout_p:
            torch.manual_seed(0)

    def ours(q, k, v, bias=None):
        drawn()
        given = dict(mask=mask(q.device) if masked else None, bias=bias, dropout_p=dropout_p)
        return fastllm.attention(q, k, v, causal=causal, window=window, q_offset=q_offset, return_lse=lse, **given)

    def sdpa(q, k, v, bias=None):
        drawn()
        given = bias if bias is not None else None if plain or top_left else dense(q.device)
        given = dict(attn_mask=given, is_causal=top_left, dropout_p=dropout_p, enable_gqa=H != Hkv)
        return F.scaled_dot_product_attention(q, k, v, **given)

    def naive(q, k, v, bias=None):
        drawn()
        given = dict(mask=mask(q.device) if masked else None, bias=bias, dropout_p=dropout_p)
        given["seed"] = torch.randint(2**62, (), device=q.device) if dropout_p else None
        o, logsumexp = reference.attention(
            q, k, v, scale=D**-0.5, q_offset=offset, window_left=left, window_right=right, **given
        )
        return (o, logsumexp) if lse else o

    def flex(q, k, v):
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def seen(b, h, i, j):
            kept = j >= i + offset - left if left >= 0 else j >= 0
            return kept & (j <= i + offset + right) if right >= 0 else kept

        blocks = None if plain else create_block_mask(seen, None, None, T, S, device=q.device.type)
        return flex_attention(q, k, v, block_mask=blocks, enable_gqa=H != Hkv)

    words = ["causal"] * causal + [f"window {left},{right}"] * bool(window) + ["mask"] * masked + ["lse"] * lse
    words += ["bias"] * biased + [f"dropout {dropout_p}"] * bool(dropout_p)
    words += [f"q_offset {q_offset}"] if q_offset is not None else []
    size = f"{B}x{H if H == Hkv else f'{H}/{Hkv}'}x{T if T == S else f'{T}/{S}'}x{D if D == Dv else f'{D}/{Dv}'}"
    pairs = B * H * visible_pairs(T, S, left, right, offset)
    qo, kv = B * H * T * (D + Dv), B * Hkv * S * (D + Dv)
    scores = B * H * T * S if biased else 0
    return Case(
        op="attention",
        name=" ".join([size, *words]),
        shapes={"q": (B, H, T, D), "k": (B, Hkv, S, D), "v": (B, Hkv, S, Dv)}
        | ({"bias": (B, H, T, S)} if biased else {}),
        outputs=("o", "lse") if lse else ("o",),
        ours=ours,
        torch=naive if lse else sdpa,  # PyTorch's kernels do not return the log-sum-exp
        naive=naive,
        peer=naive if dropout_p else None,  # PyTorch drops others
        compiled=None if biased or dropout_p else flex,
        flops=_both({"forward": 2.0 * pairs * (D + Dv), "backward": 2.0 * pairs * (3 * D + 2 * Dv)}),
        values=_both({"forward": qo + kv + scores, "backward": 2 * (qo + kv + scores)}),
        # The last key head and its query heads, as fp64 scores are large; what is dropped differs from head to head.
        part=(lambda x: x) if dropout_p else lambda x: x[-1:, -(x.shape[1] // Hkv) :],
    )


def varlen(lengths, H, D, *, Hkv=None, causal=False):
    """attention_varlen of packed sequences; PyTorch's kernel gets them padded, with a mask, and packs its result."""
    Hkv, N, longest = Hkv or H, len(lengths), max(lengths)
    total = sum(lengths)

    @functools.cache
    def bounds(device):
        return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)

    @functools.cache
    def padded(device):
        """Where each packed row stands in [N, longest], and which pairs of query and key may see each other."""
        n = torch.repeat_interleave(torch.arange(N), torch.tensor(lengths))
        place = torch.cat([torch.arange(length) for length in lengths])
        kept = (torch.arange(longest) < torch.tensor(lengths)[:, None])[:, None, None, :]
        kept = kept & torch.ones(longest, longest, dtype=torch.bool).tril() if causal else kept
        return n.to(device), place.to(device), kept.to(device)

    def ours(q, k, v):
        cu = bounds(q.device)
        return fastllm.attention_varlen(q, k, v, cu_seqlens_q=cu, cu_seqlens_k=cu, causal=causal)

    def sdpa(q, k, v):
        n, place, kept = padded(q.device)
        wide = (x.new_zeros(N, longest, *x.shape[1:]).index_put((n, place), x).transpose(1, 2) for x in (q, k, v))
        o = F.scaled_dot_product_attention(*wide, attn_mask=kept, enable_gqa=H != Hkv)
        return o.transpose(1, 2)[n, place]

    def naive(q, k, v):
        parts = zip(*(x.transpose(0, 1).unsqueeze(0).split(list(lengths), 2) for x in (q, k, v)), strict=True)
        right = 0 if causal else -1
        o = [reference.attention(*part, scale=D**-0.5, window_right=right)[0] for part in parts]
        return torch.cat(o, 2)[0].transpose(0, 1)

    pairs = H * sum(n * (n + 1) // 2 if causal else n * n for n in lengths)
    qo, kv = 2 * total * H * D, 2 * total * Hkv * D
    heads = H if H == Hkv else f"{H}/{Hkv}"
    return Case(
        op="attention_varlen",
        name=f"{N} of {min(lengths)}..{longest}, {total} in all, x{heads}x{D}" + " causal" * causal,
        shapes={"q": (total, H, D), "k": (total, Hkv, D), "v": (total, Hkv, D)},
        outputs=("o",),
        ours=ours,
        torch=sdpa,
        naive=naive,
        flops=_both({"forward": 4.0 * pairs * D, "backward": 10.0 * pairs * D}),
        values=_both({"forward": qo + kv, "backward": 2 * (qo + kv)}),
        part=lambda x: x[:, -(x.shape[1] // Hkv) :],  # the last key head and its query heads
    )


def kvcache(B, H, Hkv, S, D, *, page_size=None):
    """A step of generation: one query per sequence on S keys of a cache, whole or in pages that lie scattered."""
    pages = B * (S // page_size) if page_size else B

    @functools.cache
    def table(device):
        shuffled = torch.randperm(pages, generator=torch.Generator().manual_seed(1))
        return shuffled.view(B, -1).to(device, torch.int32) if page_size else None

    def lengths(q):
        return torch.full((B,), S, device=q.device)

    def ours(q, k, v):
        return fastllm.attention_with_kvcache(q, k, v, cache_seqlens=lengths(q), block_table=table(q.device))

    def sdpa(q, k, v):
        if page_size:
            k, v = (x[table(q.device).flatten().long()].unflatten(0, (B, -1)) for x in (k, v))
            k, v = (x.transpose(1, 2).flatten(2, 3) for x in (k, v))
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=H != Hkv)

    def naive(q, k, v):
        given = q, k, v, None, None, lengths(q), table(q.device), None, None, False
        none = dict.fromkeys(("q_offset", "mask", "bias", "alibi_slopes"))
        return reference.attention_with_kvcache(*given, **none, scale=D**-0.5)[0]

    rows = (pages, Hkv, page_size or S, D)
    return Case(
        op="attention_with_kvcache",
        name=f"{B}x{H if H == Hkv else f'{H}/{Hkv}'}x1/{S}x{D}" + (f" pages of {page_size}" if page_size else ""),
        shapes={"q": (B, H, 1, D), "k_cache": rows, "v_cache": rows},
        outputs=("o",),
        ours=ours,
        torch=sdpa,
        naive=naive,
        flops={"forward": 4.0 * B * H * S * D},
        values={"forward": 2 * B * H * D + 2 * B * Hkv * S * D},
        part=lambda x: x[:, -(x.shape[1] // Hkv) :],  # the last key head and its query heads
    )


def norm(op, N, D, *, residual=False):
    """layer_norm or rms_norm of N rows of D values, with weight (and bias), perhaps after adding a residual."""
    eps = {"layer_norm": 1e-5, "rms_norm": 1e-6}[op]
    plain, ours, naive = getattr(F, op), getattr(fastllm, op), getattr(reference, op)
    weights = {"weight": (D,), "bias": (D,)} if op == "layer_norm" else {"weight": (D,)}

    def split(inputs):
        return (inputs[0], inputs[1], inputs[2:]) if residual else (inputs[0], None, inputs[1:])

    def rival(*inputs):
        x, r, w = split(inputs)
        h = x if r is None else x + r
        y = plain(h, (D,), *w, eps=eps)
        return y if r is None else (y, h)

    def with_function(function):
        def call(*inputs):
            x, r, w = split(inputs)
            return function(x, *w, eps=eps, residual=r)

        return call

    rows, each = N * D, 2 if residual else 1  # a residual is one more tensor in and one more out, both ways
    return Case(
        op=op,
        name=f"{N}x{D}" + " residual" * residual,
        shapes={"x": (N, D)} | ({"residual": (N, D)} if residual else {}) | weights,
        outputs=("y", "h") if residual else ("y",),
        ours=with_function(ours),
        torch=rival,
        naive=with_function(naive),
        flops=_both({"forward": 7.0 * rows, "backward": 11.0 * rows}),
        values=_both({"forward": 2 * each * rows, "backward": (3 + residual) * rows}),
    )


def softmax(*shape, log=False, causal=False, scale=1.0):
    """softmax or log_softmax over the last of `shape`."""
    op = "log_softmax" if log else "softmax"
    T, S = (1, *shape)[-2:]

    @functools.cache
    def hidden(device):
        return torch.ones(T, S, dtype=torch.bool, device=device).triu(S - T + 1)

    def rival(x):
        x = x if scale == 1.0 else x * scale
        x = x.masked_fill(hidden(x.device), -math.inf) if causal else x
        return getattr(torch, op)(x, -1)

    size = math.prod(shape)
    return Case(
        op=op,
        name="x".join(map(str, shape)) + " causal" * causal + (f" scale {scale}" if scale != 1.0 else ""),
        shapes={"x": shape},
        ours=lambda x: getattr(fastllm, op)(x, causal=causal, scale=scale),
        torch=rival,
        naive=lambda x: reference.softmax(x, causal=causal, scale=scale, log=log),
        flops=_both({"forward": 5.0 * size, "backward": 4.0 * size}),
        values=_both({"forward": 2 * size, "backward": 3 * size}),
        part=lambda x: x[-4096:],  # fp64 copies of more rows would fill a GPU
    )


def weight_only(M, N, K, bits):
    """A linear layer of M rows on a weight [N, K] of 16 (bf16), 8 or 4 bits; PyTorch's has it in the dtype of x."""

    @functools.cache
    def weight(device):
        w = torch.randn(N, K, generator=torch.Generator().manual_seed(1)).to(device) * K**-0.5
        return w.bfloat16() if bits == 16 else fastllm.quantize_weight(w, bits)

    @functools.cache
    def plain(device, dtype):
        w = weight(device)
        return w.to(dtype) if bits == 16 else w.dequantize().to(dtype)

    def rival(x):
        return F.linear(x, plain(x.device, x.dtype))

    size = {16: 2 * N * K, 8: N * (K + 4), 4: N * (K // 2 + K // 64 * 2)}[bits]
    return Case(
        op="weight_only_linear",
        name=f"{M}x{N}x{K} {'bf16' if bits == 16 else f'int{bits}'}",
        shapes={"x": (M, K)},
        ours=lambda x: fastllm.weight_only_linear(x, weight(x.device)),
        torch=rival,
        naive=rival,
        flops=_both({"forward": 2.0 * M * N * K, "backward": 2.0 * M * N * K}),
        values=_both({"forward": M * (N + K), "backward": M * (N + K)}),
        fixed_bytes=size,
    )


def linear(M, N, K):
    """x [M, K] times the transpose of weight [N, K], with a bias; backward is both products of the gradient."""
    flops = 2.0 * M * N * K
    return Case(
        op="linear",
        name=f"{M}x{N}x{K}",
        shapes={"x": (M, K), "weight": (N, K), "bias": (N,)},
        ours=fastllm.linear,
        torch=F.linear,
        naive=reference.linear,
        flops=_both({"forward": flops, "backward": 2 * flops}),
        values=_both({"forward": M * K + N * K + M * N, "backward": M * N + 2 * (M * K + N * K)}),
    )


def targets(N, V, ignored=0.0):
    """int64 [N], a share of them -100."""
    random = torch.Generator().manual_seed(2)
    target = torch.randint(V, (N,), generator=random)
    return target.masked_fill(torch.rand(N, generator=random) < ignored, -100)


def cross_entropy(N, V, *, ignored=0.0, **options):
    """The loss of N rows of V logits, with options that torch has; costs are those of no row ignored."""
    target = targets(N, V, ignored)
    size = N * V
    return Case(
        op="cross_entropy",
        name=f"{N}x{V}" + f" ignoring {ignored:.0%}" * bool(ignored) + "".join(f" {k} {v}" for k, v in options.items()),
        shapes={"x": (N, V)},
        outputs=("loss",),
        ours=lambda x: fastllm.cross_entropy(x, target.to(x.device), **options),
        torch=lambda x: F.cross_entropy(x, target.to(x.device), **options),
        naive=lambda x: reference.cross_entropy(x, target.to(x.device), **options),
        flops=_both({"forward": 5.0 * size, "backward": 4.0 * size}),
        values=_both({"forward": size, "backward": 2 * size}),
    )


def linear_cross_entropy(N, D, V, *, bias=False, ignored=0.0, **options):
    """The loss of N hidden states of D values under a head of V classes, forward and backward 3 products."""
    target = targets(N, V, ignored)
    size, inputs = N * V, N * D + V * D

    def head(x, w, b=None):
        return F.cross_entropy(F.linear(x, w, b), target.to(x.device), **options)

    def with_function(function):
        return lambda x, w, b=None: function(x, w, target.to(x.device), linear_bias=b, **options)

    return Case(
        op="linear_cross_entropy",
        name=f"{N}x{D}x{V}"
        + f" ignoring {ignored:.0%}" * bool(ignored)
        + "".join(f" {k} {v}" for k, v in options.items()),
        shapes={"x": (N, D), "linear_weight": (V, D)} | ({"linear_bias": (V,)} if bias else {}),
        outputs=("loss",),
        ours=with_function(fastllm.linear_cross_entropy),
        torch=head,
        naive=with_function(reference.linear_cross_entropy),
        flops=_both({"forward": 2.0 * D * size, "backward": 4.0 * D * size}),
        values=_both({"forward": inputs, "backward": 2 * inputs}),
    )


def gated(op, N, D, *, approximate=None):
    """swiglu or geglu of N rows of D gates and D values."""
    options = {} if approximate is None else {"approximate": approximate}
    activation = {"swiglu": F.silu, "geglu": F.gelu}[op]
    size = N * D
    return Case(
        op=op,
        name=f"{N}x{D}" + (f" {approximate}" if approximate else ""),
        shapes={"gate": (N, D), "up": (N, D)},
        ours=lambda gate, up: getattr(fastllm, op)(gate, up, **options),
        torch=lambda gate, up: activation(gate, **options) * up,
        naive=lambda gate, up: getattr(reference, op)(gate, up, **options),
        flops=_both({"forward": 20.0 * size, "backward": 28.0 * size}),
        values=_both({"forward": 3 * size, "backward": 5 * size}),
    )


def bias_gelu(N, D, *, approximate):
    """gelu of N rows of D, after adding a bias."""
    size = N * D
    return Case(
        op="bias_gelu",
        name=f"{N}x{D} {approximate}",
        shapes={"x": (N, D), "bias": (D,)},
        ours=lambda x, bias: fastllm.bias_gelu(x, bias, approximate=approximate),
        torch=lambda x, bias: F.gelu(x + bias, approximate=approximate),
        naive=lambda x, bias: reference.bias_gelu(x, bias, approximate=approximate),
        flops=_both({"forward": 20.0 * size, "backward": 28.0 * size}),
        values=_both({"forward": 2 * size, "backward": 3 * size}),
    )


def rope(B, T, H, D, *, Hkv=None, R=None, interleaved=False):
    """q and k [B, T, heads, D], as a projection leaves them; R of D elements are turned. The rival is Llama's code."""
    Hkv, R = Hkv or H, R or D

    @functools.cache
    def tables(device):
        frequencies = 10000.0 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
        angles = torch.arange(T, dtype=torch.float64)[:, None] * frequencies
        return angles.cos().float().to(device), angles.sin().float().to(device)

    @functools.cache
    def wide_tables(device, dtype):  # a number for each element, in the model's dtype
        return tuple((x.repeat_interleave(2, -1) if interleaved else x.repeat(1, 2)).to(dtype) for x in tables(device))

    def ours(q, k):
        turned = fastllm.rope(q.transpose(1, 2), k.transpose(1, 2), *tables(q.device), interleaved=interleaved)
        return tuple(x.transpose(1, 2) for x in turned)

    def rival(*both):
        cos, sin = (table[:, None] for table in wide_tables(both[0].device, both[0].dtype))
        found = []
        for x in both:
            head = x[..., :R]
            if interleaved:
                partner = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
            else:
                partner = torch.cat([-head[..., R // 2 :], head[..., : R // 2]], -1)
            turned = head * cos + partner * sin
            found.append(turned if R == D else torch.cat([turned, x[..., R:]], -1))
        return tuple(found)

    def naive(q, k):
        turned = reference.rope(q.transpose(1, 2), k.transpose(1, 2), *tables(q.device), interleaved=interleaved)
        return tuple(x.transpose(1, 2) for x in turned)

    size = B * T * (H + Hkv) * D
    words = [f"{B}x{T}x{H if H == Hkv else f'{H}/{Hkv}'}x{D}"] + [f"R {R}"] * (R != D) + ["interleaved"] * interleaved
    return Case(
        op="rope",
        name=" ".join(words),
        shapes={"q": (B, T, H, D), "k": (B, T, Hkv, D)},
        outputs=("q", "k"),
        ours=ours,
        torch=rival,
        naive=naive,
        flops=_both({"forward": 3.0 * size, "backward": 3.0 * size}),
        values=_both({"forward": 2 * size, "backward": 2 * size}),
    )


BENCH = [
    attention(1, 8, 2048, 64, causal=True),
    attention(4, 12, 1024, 64, causal=True),  # GPT-2 small
    attention(1, 32, 2048, 128, causal=True),  # Llama 7B
    attention(1, 32, 2048, 64, Hkv=8, causal=True),  # Llama 3.2 1B
    attention(1, 8, 512, 64),
    attention(16, 12, 128, 64),  # BERT base
    attention(64, 4, 64, 32),  # a small classifier on short sentences
    attention(1, 8, 4096, 64, window=(511, 0)),
    attention(1, 8, 1024, 128, Dv=64, causal=True),
    attention(1, 8, 1024, 64, biased=True),
    attention(1, 8, 1024, 64, dropout_p=0.1),
    attention(1, 32, 1, 128, Hkv=8, S=1024),  # a step of decoding
    attention(1, 32, 1, 128, Hkv=8, S=4096),
    attention(1, 32, 1, 128, Hkv=8, S=32768),
    attention(16, 12, 1, 64, S=1024),
    attention(1, 4, 16, 32),  # calls, hardly any work
    norm("layer_norm", 2048, 768),
    norm("layer_norm", 2048, 768, residual=True),
    norm("layer_norm", 8192, 2048),
    norm("rms_norm", 2048, 768),
    norm("rms_norm", 2048, 768, residual=True),
    norm("rms_norm", 4096, 768),
    norm("rms_norm", 4096, 4096, residual=True),
    softmax(512, 512),
    softmax(4096, 1024),
    softmax(8, 12, 256, 256, causal=True),
    softmax(4096, 1024, log=True),
    *(weight_only(1, N, K, bits) for N, K in ((768, 768), (4096, 4096), (14336, 4096)) for bits in (16, 8, 4)),
    weight_only(8, 4096, 4096, 4),
    weight_only(64, 4096, 4096, 8),
    varlen([round(16 * 32 ** (n / 31)) for n in range(32)], 8, 64, causal=True),  # 32 of 16 to 512, log-uniform
    linear(512, 768, 768),
    linear(512, 3072, 768),
    linear(2048, 768, 3072),
    linear(2048, 3072, 768),
    kvcache(1, 32, 8, 4096, 128),
    kvcache(8, 32, 8, 2048, 128, page_size=16),
    cross_entropy(128, 32000),
    cross_entropy(512, 50304),
    linear_cross_entropy(1024, 768, 50304),  # GPT-2 small
    gated("swiglu", 2048, 3072),
    gated("swiglu", 256, 3072),
    gated("swiglu", 4096, 6144),
    gated("geglu", 2048, 3072, approximate="tanh"),
    gated("geglu", 2048, 3072, approximate="none"),
    bias_gelu(2048, 3072, approximate="tanh"),
    bias_gelu(2048, 3072, approximate="none"),
    rope(1, 2048, 32, 64),
    rope(1, 2048, 32, 128, Hkv=8),  # Llama 3 8B
    rope(8, 256, 6, 64),
]
_QUICK = (
    "attention 1x8x2048x64 causal",
    "attention 16x12x128x64",
    "attention 1x32/8x1/4096x128",
    "layer_norm 2048x768",
    "rms_norm 2048x768 residual",
    "softmax 512x512",
    "softmax 4096x1024",
    "weight_only_linear 1x4096x4096 int8",
    "cross_entropy 512x50304",
    "swiglu 2048x3072",
    "geglu 2048x3072 tanh",
    "rope 1x2048x32x64",
)
QUICK = [case for case in BENCH if str(case) in _QUICK]

VERIFY = [
    attention(2, 3, 129, 64),
    attention(2, 4, 127, 64, causal=True),
    attention(1, 4, 200, 32, Hkv=2, causal=True),
    attention(1, 6, 65, 128, Hkv=1, Dv=80),
    attention(1, 2, 33, 64, S=190, causal=True),
    attention(1, 2, 100, 64, S=150, causal=True, q_offset=0),
    attention(1, 4, 160, 64, Hkv=2, window=(31, 16)),
    attention(1, 2, 90, 40, masked=True),
    attention(1, 2, 96, 64, causal=True, lse=True),
    attention(1, 2, 80, 40, biased=True),
    attention(1, 2, 80, 64, dropout_p=0.2),
    attention(2, 4, 1, 64, Hkv=2, S=600),
    varlen([5, 1, 70, 33], 4, 64, Hkv=2, causal=True),
    kvcache(2, 4, 4, 75, 40),
    kvcache(3, 6, 2, 80, 64, page_size=16),
    norm("layer_norm", 127, 768),
    norm("layer_norm", 64, 1000, residual=True),
    norm("rms_norm", 127, 768),
    norm("rms_norm", 64, 1000, residual=True),
    softmax(63, 1001),
    softmax(2, 3, 70, 90, causal=True, scale=0.125),
    softmax(63, 1001, log=True),
    *(weight_only(M, 100, 192, bits) for M, bits in ((1, 16), (1, 8), (2, 8), (3, 4))),
    linear(129, 520, 777),
    cross_entropy(33, 5001),
    cross_entropy(64, 1000, ignored=0.3, label_smoothing=0.1),
    cross_entropy(40, 777, ignored=0.3, reduction="none"),
    linear_cross_entropy(200, 48, 1001),
    linear_cross_entropy(130, 33, 777, bias=True, ignored=0.3, label_smoothing=0.1, reduction="none"),
    gated("swiglu", 63, 1001),
    gated("geglu", 63, 1001, approximate="tanh"),
    gated("geglu", 63, 1001, approximate="none"),
    bias_gelu(127, 1000, approximate="tanh"),
    bias_gelu(127, 1000, approximate="none"),
    rope(2, 33, 4, 64, Hkv=1),
    rope(2, 33, 3, 80, R=32),
    rope(2, 33, 3, 66, interleaved=True),
]
