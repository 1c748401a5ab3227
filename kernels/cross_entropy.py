"""Cross-entropy of rows of logits in Triton, forward with an online log-sum-exp, backward from it.

Forward walks a row once, in blocks: one exponential a logit. Backward may write the gradient over the logits, which is
how linear_cross_entropy needs one buffer only. Rows of any length; an id that is no class gives a loss of NaN.
Source of the walk: Milakov and Gimelshein 2018, arXiv:1805.02867.
"""

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
NONE, MEAN = 0, 1  # of the reductions; 2 is the sum

# Where a running maximum starts. Finite: exp(-inf - LOWEST) is 0, but exp(-inf - -inf) would be NaN.
LOWEST = tl.constexpr(-3.0e38)


@triton.jit
def _tanh(x):
    """tanh to two ulp (Cephes): near 0 a polynomial, where 1 - 2 / (exp(2x) + 1) would lose its digits."""
    z = x * x
    near = -5.70498872745e-3 * z + 2.06390887954e-2
    near = (near * z - 5.37397155531e-2) * z + 1.33314422036e-1
    near = (near * z - 3.33332819422e-1) * z * x + x
    far = 1.0 - 2.0 / (tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def _softcapped(x, softcap, CAPPED: tl.constexpr):
    return softcap * _tanh(x / softcap) if CAPPED else x


@triton.jit
def _class_weight(weight_ptr, t):
    return 1.0 if weight_ptr is None else tl.load(weight_ptr + t).to(tl.float32)


@triton.jit
def _weight_sum(weight_sum_ptr, V):
    return V if weight_sum_ptr is None else tl.load(weight_sum_ptr)


@triton.jit
def _row_z_loss(z_loss, total_ptr):
    """The mean divides cross-entropies by the sum of weights, but the z-loss, which has no class, by the rows."""
    return z_loss if total_ptr is None else z_loss * (tl.load(total_ptr) / tl.load(total_ptr + 1)).to(tl.float32)


@triton.jit
def _cross_entropy_total(target_ptr, weight_ptr, total_ptr, N, V, ignore_index, BLOCK: tl.constexpr):
    """Over the rows that are not ignored: the sum of their weights and their number, in one program, in order."""
    weights = tl.zeros((BLOCK,), tl.float64)
    rows = tl.zeros((BLOCK,), tl.float64)
    for start in tl.range(0, N, BLOCK):
        i = start + tl.arange(0, BLOCK)
        t = tl.load(target_ptr + i, mask=i < N, other=ignore_index)
        kept = (t != ignore_index) & (i < N)
        if weight_ptr is None:
            weights += tl.where(kept, 1.0, 0.0)
        else:
            weights += tl.load(weight_ptr + t, mask=kept & (t >= 0) & (t < V), other=0.0).to(tl.float64)
        rows += tl.where(kept, 1.0, 0.0)
    tl.store(total_ptr, tl.sum(weights, 0))
    tl.store(total_ptr + 1, tl.sum(rows, 0))


@triton.jit
def _cross_entropy_fwd(
    x_ptr,
    target_ptr,
    weight_ptr,
    total_ptr,
    loss_ptr,
    lse_ptr,
    right_ptr,
    weight_sum_ptr,
    V,
    ignore_index,
    label_smoothing,
    softcap,
    z_loss,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: loss = -(1 - s) w[t] log p[t] - s / V sum_c w[c] log p[c] + z_loss lse^2, and lse, in fp64."""
    row = tl.program_id(0).to(tl.int64)
    t = tl.load(target_ptr + row)
    if t == ignore_index:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        if right_ptr is not None:
            tl.store(right_ptr + row, 0)
        return
    known = (t >= 0) & (t < V)
    t = tl.where(known, t, 0)
    x_ptr += row * V
    target = tl.load(x_ptr + t).to(tl.float32)

    m = tl.full((), LOWEST, tl.float32)
    l = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)
    larger = tl.zeros((BLOCK,), tl.int32)
    centre = tl.zeros((), tl.float32)
    for start in tl.range(0, V, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + columns, mask=columns < V, other=float("-inf")).to(tl.float32)
        z = tl.where(columns < V, _softcapped(x, softcap, CAPPED), float("-inf"))
        largest = tl.max(z, 0)
        m_next = tl.maximum(m, largest)
        l = l * tl.exp(m - m_next) + tl.exp(z - m_next)
        m = m_next
        if SMOOTHED:  # sum_c w[c] (z[c] - centre): logits far from 0 would lose their digits in the sum
            centre = tl.where((start == 0) & (largest - largest == 0.0), largest, centre)
            d = tl.where(columns < V, z - centre, 0.0)
            if weight_ptr is not None:
                d *= tl.load(weight_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
            weighted += d
        if right_ptr is not None:  # of equal logits the first is the largest
            larger += ((x > target) | ((x == target) & (columns < t)) | (x != x)).to(tl.int32)

    lse = m.to(tl.float64) + tl.log(tl.sum(l, 0).to(tl.float64))
    zt = _softcapped(target, softcap, CAPPED)
    loss = (1.0 - label_smoothing) * _class_weight(weight_ptr, t) * (lse - zt)
    if SMOOTHED:
        loss -= label_smoothing / V * (tl.sum(weighted, 0) - _weight_sum(weight_sum_ptr, V) * (lse - centre))
    loss += _row_z_loss(z_loss, total_ptr) * lse * lse
    tl.store(loss_ptr + row, tl.where(known, loss, float("nan")))
    tl.store(lse_ptr + row, lse)
    if right_ptr is not None:
        tl.store(right_ptr + row, known & (target == target) & (tl.sum(larger, 0) == 0))


@triton.jit
def _cross_entropy_bwd(
    x_ptr,
    target_ptr,
    weight_ptr,
    total_ptr,
    lse_ptr,
    dloss_ptr,
    dloss_stride,
    dx_ptr,
    weight_sum_ptr,
    V,
    ignore_index,
    label_smoothing,
    softcap,
    z_loss,
    CAPPED: tl.constexpr,
    SMOOTHED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A block of a row: dz = dloss (p total - s / V w - (1 - s) w[t] [c = t]); dx may be x."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    offsets = row * V + columns
    t = tl.load(target_ptr + row)
    if t == ignore_index:
        tl.store(dx_ptr + offsets, tl.zeros((BLOCK,), dx_ptr.dtype.element_ty), mask=columns < V)
        return
    known = (t >= 0) & (t < V)
    lse = tl.load(lse_ptr + row)
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    dloss = tl.load(dloss_ptr + row * dloss_stride).to(tl.float32)
    if total_ptr is not None:
        dloss /= tl.load(total_ptr).to(tl.float32)
    hot = (1.0 - label_smoothing) * _class_weight(weight_ptr, tl.where(known, t, 0))
    total = hot + label_smoothing / V * _weight_sum(weight_sum_ptr, V) + 2.0 * _row_z_loss(z_loss, total_ptr) * high
    x = tl.load(x_ptr + offsets, mask=columns < V, other=0.0).to(tl.float32)

    z = _softcapped(x, softcap, CAPPED)
    d = tl.exp((z - high) - low) * total
    d -= tl.where(columns == t, hot, 0.0)
    if SMOOTHED:
        w = 1.0 if weight_ptr is None else tl.load(weight_ptr + columns, mask=columns < V, other=0.0).to(tl.float32)
        d -= label_smoothing / V * w
    if CAPPED:
        d *= 1.0 - (z / softcap) * (z / softcap)
    d = tl.where(known, d * dloss, float("nan"))

    tl.store(dx_ptr + offsets, d.to(dx_ptr.dtype.element_ty), mask=columns < V)


def _launch_for(V):
    """Block and warps. Not measured yet, chosen from the compile table (registers)."""
    BLOCK = min(max(triton.next_power_of_2(V), 128), 8192)
    return dict(BLOCK=BLOCK, num_warps=min(max(BLOCK // 256, 4), 16))


def _sum_of(weight, label_smoothing):
    """The sum of the class weights where there are any and smoothed targets need it; a tensor, so that nobody waits."""
    return weight.sum(dtype=torch.float32) if weight is not None and label_smoothing else None


def _forward(x, target, weight, total, weight_sum, ignore_index, label_smoothing, softcap, z_loss, accuracy):
    N, V = x.shape
    loss, lse = (torch.empty(N, dtype=torch.float64, device=x.device) for _ in range(2))
    right = torch.empty(N if accuracy else 0, dtype=torch.bool, device=x.device)
    if N:
        _cross_entropy_fwd[(N,)](
            x, target, weight, total, loss, lse, right if accuracy else None,
            weight_sum, V, ignore_index, label_smoothing, softcap, z_loss,
            CAPPED=softcap > 0, SMOOTHED=label_smoothing > 0, **_launch_for(V),
        )  # fmt: skip
    return loss, lse, right


def _backward(dloss, x, target, weight, total, weight_sum, lse, dx, ignore_index, label_smoothing, softcap, z_loss):
    N, V = x.shape
    if N:
        launch = _launch_for(V)
        _cross_entropy_bwd[(N, triton.cdiv(V, launch["BLOCK"]))](
            x, target, weight, total, lse, dloss, dloss.ndim, dx,
            weight_sum, V, ignore_index, label_smoothing, softcap, z_loss,
            CAPPED=softcap > 0, SMOOTHED=label_smoothing > 0, **launch,
        )  # fmt: skip
    return dx


def _check(x):
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"cross_entropy: the Triton kernels take fp32, bf16 and fp16, got {x.dtype}")


def cross_entropy_total(target, weight, classes, ignore_index):
    """[2] in fp64: the sum of the weights of the targets that are not ignored, and their number."""
    total = torch.empty(2, dtype=torch.float64, device=target.device)
    _cross_entropy_total[(1,)](target, weight, total, target.numel(), classes, ignore_index, BLOCK=1024, num_warps=4)
    return total


def cross_entropy_fwd(x, target, weight, ignore_index, reduction, label_smoothing, softcap, z_loss, accuracy):
    """The loss of x [N, V], reduced; the rows' log-sum-exp in fp64; whether each target has the largest logit."""
    _check(x)
    total = cross_entropy_total(target, weight, x.shape[1], ignore_index) if reduction == MEAN else None
    weight_sum = _sum_of(weight, label_smoothing)
    options = ignore_index, label_smoothing, softcap, z_loss
    loss, lse, right = _forward(x, target, weight, total, weight_sum, *options, accuracy)
    if reduction != NONE:
        loss = loss.sum() / total[0] if reduction == MEAN else loss.sum()
    return loss.float(), lse, right


def cross_entropy_bwd(dloss, x, target, weight, lse, ignore_index, reduction, label_smoothing, softcap, z_loss):
    """dx, given the gradient of what the forward pass returned."""
    total = cross_entropy_total(target, weight, x.shape[1], ignore_index) if reduction == MEAN else None
    weight_sum = _sum_of(weight, label_smoothing)
    options = ignore_index, label_smoothing, softcap, z_loss
    return _backward(dloss, x, target, weight, total, weight_sum, lse, torch.empty_like(x), *options)


def cross_entropy_rows(x, target, weight, total, dloss, ignore_index, label_smoothing, softcap, z_loss, accuracy):
    """The rows' losses, and whether each is right. Where dloss ([] or [N]) is given, x becomes its gradient.

    With total (cross_entropy_total) the gradient is that of the mean over all the rows that it counts.
    """
    _check(x)
    weight_sum = _sum_of(weight, label_smoothing)
    options = ignore_index, label_smoothing, softcap, z_loss
    loss, lse, right = _forward(x, target, weight, total, weight_sum, *options, accuracy)
    if dloss is not None:
        _backward(dloss, x, target, weight, total, weight_sum, lse, x, *options)
    return loss, right
