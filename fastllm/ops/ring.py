"""Ring attention: attention of a sequence that is spread over the ranks of a process group, forward and backward."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from fastllm import reference
from fastllm.dispatch import choose
from fastllm.ops._common import autocast, drop_all, wants_gradient
from fastllm.ops.attention import (
    _check,
    _kernels_lack,
    attention_bwd,
    attention_fwd,
    check_mask,
    check_options,
    head_tensors,
)

OP = "ring_attention"
SHARDINGS = ("contiguous", "zigzag")


@dataclass(frozen=True)
class Shards:
    """How a sequence is cut over the ranks of a process group (None: all ranks), each with the same length.

    contiguous: rank r of P has part r of P. zigzag: it has parts r and 2P - 1 - r of 2P, one behind the other, so that
    under a causal mask, where late positions cost more than early ones, all ranks have the same work.
    Raises ValueError for another name and where torch.distributed is not initialised.
    """

    group: object = None
    sharding: str = "contiguous"

    def __post_init__(self):
        if self.sharding not in SHARDINGS:
            raise ValueError(f"{OP}: sharding must be one of {', '.join(SHARDINGS)}, got {self.sharding!r}")
        if not (dist.is_available() and dist.is_initialized()):
            raise ValueError(f"{OP}: torch.distributed is not initialised; start with torchrun and init_process_group")
        if dist.get_rank(self.group) < 0:
            raise ValueError(f"{OP}: this process is not a member of the group")

    @property
    def rank(self) -> int:
        return dist.get_rank(self.group)

    @property
    def ranks(self) -> int:
        return dist.get_world_size(self.group)

    def parts(self, rank: int) -> tuple[int, ...]:
        """The numbers of a rank's parts, in the order in which it has them."""
        return (rank,) if self.sharding == "contiguous" else (rank, 2 * self.ranks - 1 - rank)

    def part_length(self, length: int) -> int:
        """Of a rank's `length` positions, those of one part."""
        parts = len(self.parts(0))
        if length % parts:
            raise ValueError(f"{OP}: a rank's length must be a multiple of {parts} for zigzag sharding, got {length}")
        return length // parts

    def positions(self, length: int, device=None) -> torch.Tensor:
        """[length] int64: the positions in the whole sequence of what this rank has."""
        n = self.part_length(length)
        return torch.cat([torch.arange(part * n, (part + 1) * n, device=device) for part in self.parts(self.rank)])

    def shard(self, x: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """This rank's part of x, the whole sequence, along `dim`."""
        self.check(x.shape[dim])
        return x.index_select(dim, self.positions(x.shape[dim] // self.ranks, x.device))

    def check(self, whole: int):
        """Raises ValueError for a length of the whole sequence that cannot be cut into equal parts."""
        count = self.ranks * len(self.parts(0))
        if whole % count:
            raise ValueError(f"{OP}: a {self.sharding} sequence must be a multiple of {count} long, got {whole}")


@dataclass(frozen=True)
class Block:
    """One part of the queries against one part of the keys: where they are in the shards, and how they stand."""

    rows: slice
    columns: slice
    q_offset: int
    number: int  # its place among all blocks of the whole sequence


def blocks(shards, q_rank, k_rank, T, S, options) -> list[Block]:
    """The blocks of q_rank's queries and k_rank's keys in which some query sees some key by causality and window."""
    t, s = shards.part_length(T), shards.part_length(S)
    left, right, found = options["window_left"], options["window_right"], []
    for a, q_part in enumerate(shards.parts(q_rank)):
        for b, k_part in enumerate(shards.parts(k_rank)):
            offset = q_part * t + options["q_offset"] - k_part * s  # of the first query, counted from the first key
            first_key_is_too_late = right >= 0 and -(t - 1 + offset) > right
            last_key_is_too_early = left >= 0 and s - 1 - offset < -left
            if t and s and not (first_key_is_too_late or last_key_is_too_early):
                number = q_part * shards.ranks * len(shards.parts(0)) + k_part
                found.append(Block(slice(a * t, (a + 1) * t), slice(b * s, (b + 1) * s), offset, number))
    return found


def stops(shards, T, S, options) -> list[int]:
    """How far from home keys are of use to any rank, nearest first: with a short window they stay in the vicinity."""
    ranks = range(shards.ranks)
    return [n for n in ranks if n == 0 or any(blocks(shards, r, (r - n) % shards.ranks, T, S, options) for r in ranks)]


def pass_on(tensors, hop, shards):
    """Start to send `tensors` to the rank `hop` further on. Returns the tensors that come from the rank as far behind,
    and the requests to wait for before they are read."""
    arriving = [torch.empty_like(x) for x in tensors]
    to, source = ((shards.rank + n) % shards.ranks for n in (hop, -hop))
    sends = [dist.P2POp(dist.isend, x, group=shards.group, group_peer=to) for x in tensors]
    receives = [dist.P2POp(dist.irecv, x, group=shards.group, group_peer=source) for x in arriving]
    return arriving, dist.batch_isend_irecv(sends + receives)


def wait(requests):
    for request in requests:
        request.wait()


class _Ring:
    """What does not change from block to block, and how one block is computed."""

    def __init__(self, shards, backend, alibi_slopes, seed, options):
        self.shards, self.backend = shards, backend
        self.alibi_slopes, self.seed, self.options = alibi_slopes, seed, options

    def arguments(self, block, mask):
        """(mask, alibi_slopes, seed, options) of `attention` for one block."""
        seed = None if self.seed is None else self.seed + block.number
        mask = None if mask is None else mask[..., block.columns].bool()
        return mask, self.alibi_slopes, seed, self.options | dict(q_offset=block.q_offset)

    def forward(self, block, q, k, v, mask):
        """o and lse of one block; mask is the one of all of this rank's keys."""
        mask, slopes, seed, options = self.arguments(block, mask)
        q, k, v = q[:, :, block.rows], k[:, :, block.columns], v[:, :, block.columns]
        if self.backend == "reference":
            return reference.attention(q, k, v, mask=mask, alibi_slopes=slopes, seed=seed, **options)
        return attention_fwd(self.backend, q, k, v, mask, None, slopes, None, seed, *options.values())

    def backward(self, block, do, dlse, q, k, v, o, lse, mask):
        """This block's share of dq, dk and dv, from o and lse of all blocks: probabilities are exp(s - lse)."""
        mask, slopes, seed, options = self.arguments(block, mask)
        do, q, o = (x[:, :, block.rows] for x in (do, q, o))
        lse, dlse = (None if x is None else x[:, :, block.rows].contiguous() for x in (lse, dlse))
        k, v = k[:, :, block.columns], v[:, :, block.columns]
        if self.backend != "reference":
            extra = mask, None, slopes, None, seed
            return attention_bwd(self.backend, do, dlse, q, k, v, o, lse, *extra, *options.values(), False, True)[:3]
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            part, part_lse = reference.attention(*leaves, mask=mask, alibi_slopes=slopes, seed=seed, **options)
        # o = sum w_n part_n with w_n = exp(part_lse_n - lse): the gradients of a part and of its lse.
        wide = part_lse.dtype
        w = torch.exp(part_lse.detach() - finite(lse).to(wide))
        dpart_lse = w * (do.to(wide) * (part.detach().to(wide) - o.to(wide))).sum(-1)
        dpart_lse = dpart_lse if dlse is None else dpart_lse + w * dlse
        return torch.autograd.grad((part, part_lse), leaves, ((w[..., None] * do).to(part.dtype), dpart_lse))


def finite(lse):
    """lse, but the lowest number for a query that sees nothing: exp(x - finite(lse)) is then 0 and not NaN."""
    return lse.clamp(min=torch.finfo(lse.dtype).min)


def ring_fwd(ring, q, k, v, mask, sink):
    """o [B, H, T, Dv] like q and lse [B, H, T] in fp64, over the keys of all ranks."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = torch.zeros(*q.shape[:3], v.shape[3], dtype=wide, device=q.device)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64, device=q.device)
    shards, sizes = ring.shards, (q.shape[2], k.shape[2], ring.options)
    keys = [x for x in (k, v, mask) if x is not None]
    route = stops(shards, *sizes)
    for n, stop in enumerate(route):
        if n + 1 < len(route):
            arriving, requests = pass_on(keys, route[n + 1] - stop, shards)
        for block in blocks(shards, shards.rank, (shards.rank - stop) % shards.ranks, *sizes):
            part, part_lse = ring.forward(block, q, *(*keys, None)[:3])
            rows = (slice(None), slice(None), block.rows)
            total = torch.logaddexp(lse[rows], part_lse.double())
            kept, added = (torch.exp(x - finite(total)).to(wide)[..., None] for x in (lse[rows], part_lse))
            o[rows] = kept * o[rows] + added * part
            lse[rows] = total
        if n + 1 < len(route):
            wait(requests)
            keys = arriving
    if sink is not None:  # one more part, whose value is 0
        total = torch.logaddexp(lse, sink.double().view(1, -1, 1))
        o *= torch.exp(lse - finite(total)).to(wide)[..., None]
        lse = total
    return o.to(q.dtype), lse


def ring_bwd(ring, do, dlse, q, k, v, o, lse, mask, sink):
    """dq, dk, dv, dsink. The keys go round once more; their gradients follow them, one step behind, and come home."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    shards, sizes = ring.shards, (q.shape[2], k.shape[2], ring.options)
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    keys, gradients, on_their_way = [x for x in (k, v, mask) if x is not None], [], []
    route = stops(shards, *sizes)
    for n, stop in enumerate(route):
        last = n + 1 == len(route)
        hop = (shards.ranks if last else route[n + 1]) - stop
        if not last:
            arriving, requests = pass_on(keys, hop, shards)
        dk, dv = (torch.zeros(x.shape, dtype=wide, device=x.device) for x in keys[:2])
        for block in blocks(shards, shards.rank, (shards.rank - stop) % shards.ranks, *sizes):
            part = ring.backward(block, do, dlse, q, *keys[:2], o, lse, (*keys, None)[2])
            for whole, at, x in zip((dq, dk, dv), (block.rows, block.columns, block.columns), part, strict=True):
                whole[:, :, at] += x
        wait(on_their_way)
        for whole, before in zip((dk, dv), gradients, strict=False):  # nothing has come before the first step
            whole += before
        if hop % shards.ranks:
            sent = dk, dv  # alive until they are sent
            gradients, on_their_way = pass_on(sent, hop, shards)
        else:
            gradients, on_their_way = [dk, dv], []
        if not last:
            wait(requests)
            keys = arriving
    wait(on_their_way)
    dsink = None
    if sink is not None:
        delta = (do.double() * o.double()).sum(-1)
        delta = delta if dlse is None else delta - dlse
        dsink = -(torch.exp(sink.double().view(1, -1, 1) - finite(lse)) * delta).sum((0, 2)).to(sink.dtype)
    return dq.to(q.dtype), *(x.to(q.dtype) for x in gradients), dsink


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, sink, ring):
        o, lse = ring_fwd(ring, q, k, v, mask, sink)
        ctx.save_for_backward(q, k, v, o, lse, mask, sink)
        ctx.ring = ring
        ctx.set_materialize_grads(False)
        return o, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlse):
        q, k, v, o, lse, mask, sink = ctx.saved_tensors
        do = torch.zeros_like(o) if do is None else do
        dq, dk, dv, dsink = ring_bwd(ctx.ring, do, dlse, q, k, v, o, lse, mask, sink)
        return dq, dk, dv, None, dsink, None


def ring_attention(
    q,
    k,
    v,
    *,
    group=None,
    sharding="contiguous",
    causal=False,
    window=None,
    q_offset=None,
    scale=None,
    softcap=0.0,
    mask=None,
    alibi_slopes=None,
    sink=None,
    dropout_p=0.0,
    return_lse=False,
):
    """`attention` of a sequence whose positions are spread over the ranks of `group` (default: all); every rank calls.

    q [B, H, T / P, D], k [B, Hkv, S / P, D], v [B, Hkv, S / P, Dv] are this rank's part of P equal ones, as `sharding`
    says: "contiguous", or "zigzag", which gives all ranks the same work under a causal mask (`Shards` cuts a sequence
    either way). Returns this rank's part of o, or (o, lse). causal, window, q_offset, scale, softcap, alibi_slopes,
    sink and dropout_p are those of `attention` and hold for the whole sequence; mask is boolean, True = a real key,
    of this rank's keys: it broadcasts to [B, 1, 1, S / P].

    Keys and values go round the ranks while each computes with what it has; partial results are merged by their
    log-sum-exp. Blocks in which no query sees a key are not computed, and keys travel only as far as somebody sees
    them: with a window that is shorter than a part, to the next rank. In the backward pass they travel once more, and
    their gradients, in fp32 (fp64 for fp64), behind them. The gradients of k and v are complete, that of sink is this
    rank's summand, as with every parameter that all ranks have. Which probabilities dropout drops depends on the
    number of ranks. There is no second derivative.

    Memory: saves q, k, v, o, 8 bytes a row, all of this rank's part, and uses three times its k and v (backward: and
    three times their gradients). Sent by each rank: (P - 1) times its k and v; backward the same, and P times their
    gradients. Deterministic. Merging is in fp32 (fp64 for fp64), log-sum-exps in fp64.
    Raises what `attention` raises, and ValueError for a sharding that does not exist or does not fit the length and
    where torch.distributed is not initialised.
    Error: at most 1.1 times that of torch's scaled_dot_product_attention in q's dtype (tests/test_ring.py).
    Source: Liu, Zaharia and Abbeel 2023, arXiv:2310.01889; zigzag: Llama team 2024, arXiv:2407.21783, section 3.3.2.
    """
    if isinstance(q, torch.Tensor) and (q.is_cpu or torch.amp.is_autocast_available(q.device.type)):
        q, k, v = autocast(q, k, v)
    _check(q, k, v)
    shards = Shards(group, sharding)
    (B, H, T, _), S = q.shape, k.shape[2]
    if q_offset is None:
        q_offset = (S - T) * shards.ranks
    if dropout_p == 1:
        v, dropout_p = drop_all(v)
    options = check_options(OP, q, k, v, causal, window, q_offset, scale, softcap, dropout_p)
    for length in (T, S):
        shards.part_length(length)
    if mask is not None:
        # Bytes, since not every communication library sends booleans.
        mask = check_mask(OP, mask, q, (B, 1, 1, S)).expand(B, 1, 1, S).to(torch.uint8).contiguous()
    head_tensors(OP, q, B, H, alibi_slopes, sink)
    seed = torch.randint(2**62, (), device=q.device) if dropout_p else None
    backend = choose("attention", q, lambda backend: _kernels_lack(backend, q, v, dropout_p))
    ring = _Ring(shards, backend, alibi_slopes, seed, options)
    k, v = k.contiguous(), v.contiguous()  # as they are sent
    if wants_gradient(q, k, v, sink):
        o, lse = _RingAttention.apply(q, k, v, mask, sink, ring)
    else:
        o, lse = ring_fwd(ring, q, k, v, mask, sink)
    if not return_lse:
        return o
    return o, lse if q.dtype == torch.float64 else lse.float()
