"""What every op means, in plain PyTorch: the oracle of the tests, the fallback, and the documentation.

Nothing here is tuned. Each function is differentiable by PyTorch, any number of times, and takes any float dtype.
"""

import functools
import math

import torch
import torch.nn.functional as F


def attention_scores(
    q,
    k,
    *,
    scale,
    softcap=0.0,
    bias=None,
    alibi_slopes=None,
    mask=None,
    q_offset=0,
    window_left=-1,
    window_right=-1,
):
    """s[b, h, i, j] before the softmax, -inf where key j is not visible to query i.

    In this order: scale, soft-cap, bias, ALiBi, mask. Query i stands at key position i + q_offset and sees keys from
    window_left before to window_right after it; -1 is unbounded.
    """
    (B, H, T, D), (Hkv, S) = q.shape, k.shape[1:3]
    s = (q.reshape(B, Hkv, H // Hkv * T, D) @ k.mT).reshape(
        B, H, T, S
    )  # the H / Hkv query heads of a key head, stacked
    s = (s.float() if s.dtype != torch.float64 else s) * scale
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    if bias is not None:
        s = s + bias
    i = torch.arange(T, device=q.device)[:, None] + q_offset
    j = torch.arange(S, device=q.device)[None, :]
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype).view(-1, H, 1, 1) * (i - j).abs()
    visible = torch.ones(T, S, dtype=torch.bool, device=q.device)
    if window_left >= 0:
        visible = visible & (j >= i - window_left)
    if window_right >= 0:
        visible = visible & (j <= i + window_right)
    if mask is not None:
        visible = visible & mask
    return s.masked_fill(~visible, -math.inf)


def philox(c0, c1, c2, seed):
    """Philox4x32-7: four tensors of random 32-bit words from the counter (c0, c1, c2, 0) and a 64-bit key (int64)."""
    low = 0xFFFFFFFF
    c3, k0, k1 = torch.zeros_like(c0), seed & low, (seed >> 32) & low
    for _ in range(7):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps around: the low 64 bits are right
        c0, c1, c2, c3 = ((p1 >> 32) & low) ^ c1 ^ k0, p1 & low, ((p0 >> 32) & low) ^ c3 ^ k1, p0 & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return c0, c1, c2, c3


def dropout_keep(seed, dropout_p, B, H, T, S, first_head=0):
    """[B, H, T, S]: 0 with probability dropout_p, else 1 / (1 - dropout_p), decided by seed and place alone.

    The word for (b, h, i, j) is number j % 4 of Philox counter (i, j // 4, first_head + b * H + h), on every backend.
    """
    device = seed.device
    head = first_head + torch.arange(B * H, device=device).view(-1, 1, 1).expand(-1, T, (S + 3) // 4)
    row, group = (torch.arange(n, device=device) for n in (T, (S + 3) // 4))
    words = philox(row[None, :, None].expand_as(head), group[None, None, :].expand_as(head), head, seed)
    words = torch.stack(words, -1).reshape(B, H, T, (S + 3) // 4 * 4)[..., :S]
    return (words >= int(dropout_p * 2**32)).double() / (1 - dropout_p)


def attention(
    q,
    k,
    v,
    *,
    scale,
    softcap=0.0,
    mask=None,
    bias=None,
    alibi_slopes=None,
    sink=None,
    q_offset=0,
    window_left=-1,
    window_right=-1,
    dropout_p=0.0,
    seed=None,
    first_head=0,
):
    """o = dropout(softmax(scores)) v and lse = log sum exp(scores), the sink being one more score with no value.

    A query that sees nothing gives o = 0 and lse = -inf.
    """
    (B, H, T, _), (_, Hkv, S, Dv) = q.shape, v.shape
    s = attention_scores(
        q,
        k,
        scale=scale,
        softcap=softcap,
        bias=bias,
        alibi_slopes=alibi_slopes,
        mask=mask,
        q_offset=q_offset,
        window_left=window_left,
        window_right=window_right,
    )
    m = s.detach().amax(-1, keepdim=True) if S else s.new_full((B, H, T, 1), -math.inf)
    if sink is not None:
        sink = sink.to(s.dtype).view(1, H, 1, 1)
        m = torch.maximum(m, sink.detach())
    m = m.clamp(min=torch.finfo(s.dtype).min)
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True)
    if sink is not None:
        l = l + torch.exp(sink - m)
    empty = l == 0
    l = l.masked_fill(empty, 1.0)
    lse = (m + torch.log(l)).masked_fill(empty, -math.inf).squeeze(-1)
    p = p / l
    if dropout_p:
        p = p * dropout_keep(seed, dropout_p, B, H, T, S, first_head).to(p.dtype)
    o = (p.to(v.dtype).reshape(B, Hkv, H // Hkv * T, S) @ v).reshape(B, H, T, Dv)
    return o, lse


def rotate(x, cos, sin, interleaved=False):
    """(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin) for the first R values of x [..., T, D]; cos, sin [..., T, R / 2].

    The pairs are (i, i + R / 2), or (2i, 2i + 1) where interleaved.
    """
    R, wide = 2 * cos.shape[-1], torch.float64 if x.dtype == torch.float64 else torch.float32
    first, rest = x[..., :R].to(wide), x[..., R:]
    x1, x2 = (first[..., ::2], first[..., 1::2]) if interleaved else first.chunk(2, -1)
    cos, sin = cos.to(wide), sin.to(wide)
    rotated = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    rotated = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return torch.cat((rotated.to(x.dtype), rest), -1)


def attention_with_kvcache(
    q, k_cache, v_cache, k_new, v_new, cache_seqlens, block_table, cos, sin, interleaved, *, q_offset, **options
):
    """`attention` of q on the keys of each sequence's cache, to which k_new and v_new are appended in place."""
    T, page_size = q.shape[2], k_cache.shape[2]
    S = page_size if block_table is None else page_size * block_table.shape[1]
    added = 0 if k_new is None else k_new.shape[2]
    mask, bias, slopes = (options.pop(name) for name in ("mask", "bias", "alibi_slopes"))
    outputs, lengths = [], cache_seqlens.tolist()
    for b, had in enumerate(lengths):  # all of them, before anything is written
        if had < 0 or had + added > S:
            raise ValueError(
                f"attention_with_kvcache: sequence {b} has {had} keys in its cache and gets {added} more, but there is"
                f" room for {S}"
            )
    for b, had in enumerate(lengths):
        length = had + added
        row = torch.arange(length, device=q.device)
        entry = row.new_full((length,), b) if block_table is None else block_table[b].long()[row // page_size]
        if length and not 0 <= int(entry.min()) <= int(entry.max()) < len(k_cache):
            raise ValueError(f"attention_with_kvcache: block_table[{b}] must name pages in [0, {len(k_cache)})")
        offset = length - T if q_offset is None else q_offset
        if cos is not None:
            highest = max(offset + T, length if added else 0)
            if offset < 0 or highest > len(cos):
                raise ValueError(
                    f"positions {offset} up to {highest - 1} are rotated; cos and sin have {len(cos)} rows"
                )
        rows = (entry, slice(None), row % page_size)
        if added:
            new = k_new[b] if cos is None else rotate(k_new[b], cos[had:length], sin[had:length], interleaved)
            tail = (entry[had:], slice(None), rows[2][had:])
            k_cache[tail], v_cache[tail] = new.transpose(0, 1), v_new[b].transpose(0, 1)
        query = q[b] if cos is None else rotate(q[b], cos[offset : offset + T], sin[offset : offset + T], interleaved)
        part = [None if x is None else x[b if x.shape[0] > 1 else 0][None] for x in (mask, bias)]
        part = [x if x is None or x.shape[-1] == 1 else x[..., :length] for x in part]
        outputs.append(
            attention(
                query[None],
                *(x[rows].transpose(0, 1)[None] for x in (k_cache, v_cache)),
                mask=part[0],
                bias=part[1],
                alibi_slopes=slopes[b] if slopes is not None and slopes.ndim == 2 else slopes,
                q_offset=offset,
                **options,
            )
        )
    if not outputs:
        return q.new_empty(*q.shape[:3], v_cache.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    return torch.cat([o for o, _ in outputs]), torch.cat([lse for _, lse in outputs])


def merge_attention(outs, lses):
    """o = sum_n exp(lse_n - lse) o_n and lse = log sum_n exp(lse_n); 0 and -inf where every lse_n is -inf."""
    wide = torch.float64 if outs[0].dtype == torch.float64 else torch.float32
    stacked = torch.stack([lse.to(wide) for lse in lses])
    m = stacked.detach().amax(0).clamp(min=torch.finfo(wide).min)
    weights = torch.exp(stacked - m)
    total = weights.sum(0)
    empty = total == 0
    total = total.masked_fill(empty, 1.0)
    lse = (m + torch.log(total)).masked_fill(empty, -math.inf)
    o = sum(o.to(wide) * (w / total)[..., None] for o, w in zip(outs, weights, strict=True))
    return o.to(outs[0].dtype), lse


def softmax(x, *, scale=1.0, mask=None, causal=False, log=False):
    """softmax(scale * x) over the last dimension of x [..., T, S], over what `mask` (True = keep) and `causal` leave.

    Causal is aligned bottom-right: row i sees columns up to i + S - T. A row that sees nothing is 0 (logarithm: -inf).
    """
    s = (x if x.dtype == torch.float64 else x.float()) * scale
    visible = torch.ones((), dtype=torch.bool, device=x.device)
    if causal:
        T, S = x.shape[-2:]
        visible = torch.ones(T, S, dtype=torch.bool, device=x.device).tril(S - T)
    if mask is not None:
        visible = visible & mask
    s = s.masked_fill(~visible, -math.inf)
    if not s.shape[-1]:
        return s.to(x.dtype)
    m = s.detach().amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).min)
    p = torch.exp(s - m)
    l = p.sum(-1, keepdim=True)
    l = l.masked_fill(l == 0, 1.0)
    return (s - m - torch.log(l) if log else p / l).to(x.dtype)


def _dropout_add(x, residual, dropout_p, seed):
    """dropout(x) + residual in x's dtype; what is dropped is decided by `dropout_keep` of a single head of rows."""
    if dropout_p:
        N = math.prod(x.shape[:-1])
        keep = dropout_keep(seed, dropout_p, 1, 1, N, x.shape[-1]).view(x.shape)
        kept = x * keep.to(x.dtype if x.dtype == torch.float64 else torch.float32)
        return (kept if residual is None else kept + residual).to(x.dtype)
    return x if residual is None else x + residual


def layer_norm(x, weight=None, bias=None, *, eps=1e-5, residual=None, dropout_p=0.0, seed=None):
    """y = (h - mean) / sqrt(var + eps) * weight + bias over the last dimension, h = dropout(x) + residual.

    Returns y, or (y, h) where there is a residual.
    """
    h = _dropout_add(x, residual, dropout_p, seed)
    c = h if h.dtype == torch.float64 else h.float()
    c = c - c.mean(-1, keepdim=True)
    y = c * torch.rsqrt((c * c).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight
    if bias is not None:
        y = y + bias
    y = y.to(h.dtype)
    return y if residual is None else (y, h)


def rms_norm(x, weight=None, *, eps=1e-6, residual=None, weight_offset=0.0, dropout_p=0.0, seed=None):
    """y = h / sqrt(mean(h^2) + eps) * (weight + weight_offset), h = dropout(x) + residual; returns y, or (y, h)."""
    h = _dropout_add(x, residual, dropout_p, seed)
    c = h if h.dtype == torch.float64 else h.float()
    y = c * torch.rsqrt((c * c).mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * (weight.to(y.dtype) + weight_offset)
    y = y.to(h.dtype)
    return y if residual is None else (y, h)


def dequantize(codes, scales, offsets=None, *, bits, group_size):
    """The weight [16 panels, K'] in fp32 that packed codes int32 [panels, K' * bits / 32, 16] stand for.

    A word holds numbers of one row: byte i the number 4j + i of 8 bits, or 8j + i (low half) and 8j + 4 + i (high half)
    of 4 bits. What is stored is code + 128, or code + 8. scales and offsets are [panels, K' / group_size, 16].
    """
    stored = codes.transpose(1, 2).contiguous().view(torch.uint8).unflatten(-1, (-1, 4))  # [panels, 16, words, 4]
    if bits == 4:
        stored = torch.stack([stored & 15, stored >> 4], -2)
    w = stored.flatten(2).float() - (128 if bits == 8 else 8)

    def spread(x):
        return x.float().transpose(1, 2).repeat_interleave(group_size, -1)

    w = w * spread(scales)
    return (w if offsets is None else w + spread(offsets)).flatten(0, 1)


ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def linear(x, weight, bias=None, activation=None):
    """y = activation(x W^T + bias): x [..., K], weight [N, K], bias [N]."""
    y = F.linear(x, weight, bias)
    return y if activation is None else ACTIVATIONS[activation](y)


def lora_linear(x, weight, lora_a, lora_b, bias=None, keep=None, *, scale=1.0, dropout_p=0.0):
    """x W^T + bias + scale * (d A^T) B^T; d is x, or where `keep` [..., K] is given x * keep / (1 - dropout_p)."""
    d = x if keep is None else x * keep.to(x.dtype) / (1 - dropout_p)
    return F.linear(x, weight, bias) + scale * F.linear(F.linear(d, lora_a), lora_b)


def cross_entropy(
    input,
    target,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    *,
    softcap=0.0,
    z_loss=0.0,
    return_token_accuracy=False,
):
    """-log p[target] of logits [N, V]: class weights, ignored rows, smoothed targets, soft-cap and z_loss * lse^2.

    The mean divides by the sum of the weights of the targets, and the z-loss, which has no class, by their number.
    Targets may be probabilities [N, V] too: the sum of -target log p, its mean over all N rows.
    """
    x = input if input.dtype == torch.float64 else input.float()
    if softcap:
        x = softcap * torch.tanh(x / softcap)
    V = x.shape[-1]
    lse = torch.logsumexp(x, -1)
    log_p = x - lse[:, None]
    w = torch.ones_like(x[:1]) if weight is None else weight.to(x.dtype)[None]
    if target.is_floating_point():
        ignored, weights = torch.zeros_like(lse, dtype=torch.bool), torch.ones_like(lse)
        share = target.to(x.dtype) * (1 - label_smoothing) + label_smoothing / V
        loss = -(share * w * log_p).sum(-1)
        right = log_p.argmax(-1) == target.argmax(-1)
    else:
        ignored = target == ignore_index
        index = target.masked_fill(ignored, 0)[:, None]
        weights = w.expand_as(x).gather(-1, index)[:, 0].masked_fill(ignored, 0.0)
        loss = -weights * log_p.gather(-1, index)[:, 0].masked_fill(ignored, 0.0)
        if label_smoothing:
            smooth = -(w * log_p).sum(-1).masked_fill(ignored, 0.0)
            loss = (1 - label_smoothing) * loss + label_smoothing / V * smooth
        right = (input.argmax(-1) == target) & ~ignored
    squares = z_loss * (lse * lse).masked_fill(ignored, 0.0) if z_loss else torch.zeros_like(lse)
    if reduction == "none":
        loss, accuracy = loss + squares, right.to(x.dtype)
    else:
        loss, kept = loss.sum(), (~ignored).sum()
        loss = loss / weights.sum() + squares.sum() / kept if reduction == "mean" else loss + squares.sum()
        accuracy = right.sum() / kept
    loss = loss.to(input.dtype)
    return (loss, accuracy) if return_token_accuracy else loss


def linear_cross_entropy(input, linear_weight, target, *, linear_bias=None, **options):
    """`cross_entropy` of the logits input [N, D] @ linear_weight [V, D].T + linear_bias [V]."""
    return cross_entropy(F.linear(input, linear_weight, linear_bias), target, **options)


def _gated(activation, gate, up):
    """activation(gate) * up, gate and up being the halves of gate where there is no up."""
    gate, up = gate.chunk(2, -1) if up is None else (gate, up)
    dtype = gate.dtype
    gate, up = (x if dtype == torch.float64 else x.float() for x in (gate, up))
    return (activation(gate) * up).to(dtype)


def swiglu(gate, up=None):
    """silu(gate) * up; without up, gate is [gate | up]."""
    return _gated(F.silu, gate, up)


def geglu(gate, up=None, *, approximate="tanh"):
    """gelu(gate) * up; without up, gate is [gate | up]."""
    return _gated(lambda x: F.gelu(x, approximate=approximate), gate, up)


def bias_gelu(x, bias=None, *, approximate="tanh"):
    """gelu(x + bias)."""
    c = x if x.dtype == torch.float64 else x.float()
    return F.gelu(c if bias is None else c + bias, approximate=approximate).to(x.dtype)


def rope(q, k, cos, sin, *, interleaved=False, offset=0, offsets=None, cu_seqlens=None, whole=False):
    """q [B, H, T, D] and k (or None), each pair (a, b) of their first R elements made (a cos - b sin, b cos + a sin).

    cos and sin [S, R / 2] or [B, S, R / 2] have a number for each pair; where `whole`, [.., R], for each element. Pairs
    are (2i, 2i + 1) where interleaved, else (i, i + R / 2). The row of position t is t + offset + offsets[b]; with
    cu_seqlens, B is 1, t counts from the beginning of its sequence, and offsets has one for each sequence.
    """
    B, _, T, _ = q.shape
    row = torch.arange(T, device=q.device)
    b = torch.arange(B, device=q.device)[:, None]
    sequence = b.expand(B, T)
    if cu_seqlens is not None:
        sequence = torch.searchsorted(cu_seqlens[1:].contiguous(), row, right=True).expand(B, T)
        row = row - cu_seqlens[sequence[0]]
    row = (row + offset).expand(B, T)
    if offsets is not None:
        row = row + offsets[sequence]
    pick = [table[row] if table.ndim == 2 else table.expand(B, -1, -1)[b, row] for table in (cos, sin)]  # [B, T, ..]
    wide = q.dtype if q.dtype == torch.float64 else torch.float32
    cos, sin = (table.to(wide)[:, None] for table in pick)
    if not whole:
        cos, sin = (table.repeat_interleave(2, -1) if interleaved else table.repeat(1, 1, 1, 2) for table in (cos, sin))
    R = cos.shape[-1]

    def turned(x):
        head = x[..., :R].to(wide)
        if interleaved:
            partner = torch.stack([-head[..., 1::2], head[..., ::2]], -1).flatten(-2)
        else:
            partner = torch.cat([-head[..., R // 2 :], head[..., : R // 2]], -1)
        return torch.cat([(head * cos + partner * sin).to(x.dtype), x[..., R:]], -1)

    return turned(q) if k is None else (turned(q), turned(k))
