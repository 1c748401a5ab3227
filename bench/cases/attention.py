"""Cases of attention, packed attention, and a step of decoding on a cache."""

import functools
import itertools

import torch
import torch.nn.functional as F

import fastllm
from fastllm import reference
from fastllm.bench.cases.case import Case, both


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
        flops=both({"forward": 2.0 * pairs * (D + Dv), "backward": 2.0 * pairs * (3 * D + 2 * Dv)}),
        values=both({"forward": qo + kv + scores, "backward": 2 * (qo + kv + scores)}),
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
        flops=both({"forward": 4.0 * pairs * D, "backward": 10.0 * pairs * D}),
        values=both({"forward": qo + kv, "backward": 2 * (qo + kv)}),
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


def merge(parts, B, H, T, D):
    """Attention on all keys from attention on `parts` of them."""

    def lists(function):
        """Of outputs, and of log-sum-exps in at least fp32, as attention gives them."""
        wide = {torch.bfloat16: torch.float32, torch.float16: torch.float32}
        return lambda *x: function(x[:parts], [lse.to(wide.get(lse.dtype, lse.dtype)) for lse in x[parts:]])

    row, N = D + 1, B * H * T
    plain = lists(reference.merge_attention)
    return Case(
        op="merge_attention",
        name=f"{parts} of {B}x{H}x{T}x{D}",
        shapes={f"o{n}": (B, H, T, D) for n in range(parts)} | {f"lse{n}": (B, H, T) for n in range(parts)},
        ours=lists(fastllm.merge_attention),
        torch=plain,
        naive=plain,
        flops=both({"forward": 3.0 * parts * N * D, "backward": 7.0 * parts * N * D}),
        values=both({"forward": (parts + 1) * N * row, "backward": (2 * parts + 1) * N * row}),
        outputs=("o", "lse"),
    )
