"""One step of AdamW in Triton, on any number of parameters in one launch for each dtype.

The parameters' addresses go to the GPU as one table, so that neither their number nor their sizes are compiled into the
kernel; a program looks up whose block it has. Each number is read and written once, and computed in fp32.
"""

import math

import torch
import triton
import triton.language as tl


@triton.jit
def _at(table_ptr, row, n, tensors, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The n-th address in a row of the table, as a pointer."""
    ptr = tl.cast(tl.load(table_ptr + row * tensors + n), tl.pointer_type(dtype))
    if ALIGNED:  # else no access would be wider than one element
        ptr = tl.multiple_of(ptr, 16)
    return ptr


@triton.jit
def _update(
    p_ptr, g_ptr, m_ptr, v_ptr, top_ptr, offsets, mask, step, root_bias2,
    decay, rest1, beta2, rest2, eps, sign, AMSGRAD: tl.constexpr,
):  # fmt: skip
    p = tl.load(p_ptr + offsets, mask=mask).to(tl.float32)
    g = tl.load(g_ptr + offsets, mask=mask).to(tl.float32) * sign
    m = tl.load(m_ptr + offsets, mask=mask)
    v = tl.load(v_ptr + offsets, mask=mask)

    m += (g - m) * rest1
    v = v * beta2 + g * g * rest2
    top = v
    if AMSGRAD:
        top = tl.maximum(tl.load(top_ptr + offsets, mask=mask), v)
        tl.store(top_ptr + offsets, top, mask=mask)
    p = p * decay - step * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(top), root_bias2) + eps)

    tl.store(m_ptr + offsets, m, mask=mask)
    tl.store(v_ptr + offsets, v, mask=mask)
    tl.store(p_ptr + offsets, p.to(p_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["tensors"])
def _adamw_step(
    like_ptr,
    table_ptr,
    biases_ptr,
    tensors,
    decay,
    rest1,
    beta2,
    rest2,
    eps,
    sign,
    AMSGRAD: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block of one parameter. Rows of the table: first block, length, addresses of p, grad, m, v, largest v."""
    block = tl.program_id(0)
    n, above = block * 0, block * 0 + tensors  # the parameter lies in [n, above)
    while above - n > 1:
        middle = (n + above) // 2
        right = tl.load(table_ptr + middle) <= block
        n, above = tl.where(right, middle, n), tl.where(right, above, middle)
    start = (block - tl.load(table_ptr + n)) * BLOCK
    length = tl.load(table_ptr + tensors + n)
    p_ptr = _at(table_ptr, 2, n, tensors, like_ptr.dtype.element_ty, ALIGNED)
    g_ptr = _at(table_ptr, 3, n, tensors, like_ptr.dtype.element_ty, ALIGNED)
    m_ptr = _at(table_ptr, 4, n, tensors, tl.float32, ALIGNED)
    v_ptr = _at(table_ptr, 5, n, tensors, tl.float32, ALIGNED)
    top_ptr = None
    if AMSGRAD:
        top_ptr = _at(table_ptr, 6, n, tensors, tl.float32, ALIGNED)
    step, root_bias2 = tl.load(biases_ptr + n), tl.load(biases_ptr + tensors + n)

    offsets = start + tl.arange(0, BLOCK)
    numbers = step, root_bias2, decay, rest1, beta2, rest2, eps, sign
    if start + BLOCK <= length:  # no mask, so that accesses are as wide as they can be
        _update(p_ptr, g_ptr, m_ptr, v_ptr, top_ptr, offsets, None, *numbers, AMSGRAD)
    else:
        _update(p_ptr, g_ptr, m_ptr, v_ptr, top_ptr, offsets, offsets < length, *numbers, AMSGRAD)


BLOCK = 2048  # with 8 warps, 8 elements a thread. Not measured yet.


def _on(device, x):
    """A table made on the CPU, on its way to a GPU without waiting for it."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _launch(rows, lr, beta1, beta2, eps, weight_decay, maximize, aligned):
    """One launch: `rows` are (p, grad, m, v[, largest v], step), all p of one dtype."""
    first = rows[0]
    device, amsgrad, biases = first[0].device, len(first) == 6, []
    starts, blocks = [], 0
    for *tensors, step in rows:
        starts.append(blocks)
        blocks += triton.cdiv(tensors[0].numel(), BLOCK)
        count = float(step)
        biases.append((lr / (1 - beta1**count), math.sqrt(1 - beta2**count)))
    table = [starts, [row[0].numel() for row in rows]]
    table += [[row[i].data_ptr() for row in rows] for i in range(4 + amsgrad)]
    _adamw_step[(blocks,)](
        first[0].new_empty(0),  # for its dtype
        _on(device, torch.tensor(table, dtype=torch.int64)),
        _on(device, torch.tensor(biases, dtype=torch.float32).T.contiguous()),
        len(rows),
        1 - lr * weight_decay,
        1 - beta1,
        beta2,
        1 - beta2,
        eps,
        -1.0 if maximize else 1.0,
        AMSGRAD=amsgrad,
        ALIGNED=aligned,
        BLOCK=BLOCK,
        num_warps=8,
    )


def adamw_step(
    params, grads, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps, lr, beta1, beta2, eps, weight_decay, maximize
):
    """Updates params, their moments in fp32 (max_exp_avg_sqs empty without amsgrad) and steps, in place."""
    lists = [params, grads, exp_avgs, exp_avg_sqs] + [max_exp_avg_sqs] * bool(max_exp_avg_sqs)
    groups = {}
    for *tensors, step in zip(*lists, steps, strict=True):
        p, grad, *moments = tensors
        if p.dtype not in (torch.float32, torch.bfloat16, torch.float16) or grad.dtype != p.dtype:
            raise TypeError(f"adamw_step: the Triton kernel takes fp32, bf16 and fp16, got {p.dtype} and {grad.dtype}")
        if any(m.dtype != torch.float32 for m in moments):
            raise TypeError(f"adamw_step: moments must be fp32, got {[m.dtype for m in moments]}")
        if any(x.shape != p.shape or not x.is_contiguous() for x in tensors):
            raise ValueError("adamw_step: tensors must be contiguous and of their parameter's shape")
        step += 1
        if p.numel():
            aligned = all(x.data_ptr() % 16 == 0 for x in tensors)
            groups.setdefault((p.device, p.dtype, aligned), []).append((*tensors, step))
    for (_, _, aligned), rows in groups.items():
        _launch(rows, lr, beta1, beta2, eps, weight_decay, maximize, aligned)
