"""merge_attention: attention on all keys out of attention on parts of them."""

import functools

import torch

from fastllm import reference
from fastllm.dispatch import Op, choose
from fastllm.ops._common import check_tensor, gradients_through, wants_gradient

OP = "merge_attention"
MOST_PARTS = 32  # whose number is compiled into a kernel, and whose addresses are its arguments
merge_attention_fwd = Op(
    "merge_attention_fwd(Tensor[] outs, Tensor[] lses) -> (Tensor o, Tensor lse)",
    OP,
    lambda outs, lses: (torch.empty_like(outs[0]), lses[0].new_empty(lses[0].shape, dtype=torch.float32)),
)
merge_attention_bwd = Op(
    "merge_attention_bwd(Tensor do, Tensor dlse, Tensor[] outs, Tensor[] lses) -> (Tensor[] douts, Tensor[] dlses)",
    OP,
    lambda do, dlse, outs, lses: ([x.new_empty(x.shape) for x in outs], [x.new_empty(x.shape) for x in lses]),
)


class _MergeAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *parts):
        ctx.backend, half = backend, len(parts) // 2
        ctx.save_for_backward(*parts)
        return merge_attention_fwd(backend, list(parts[:half]), list(parts[half:]))

    @staticmethod
    def backward(ctx, do, dlse):
        parts, half = ctx.saved_tensors, len(ctx.saved_tensors) // 2
        if torch.is_grad_enabled():
            return None, *gradients_through(functools.partial(_merged, half), parts, (do, dlse))
        douts, dlses = merge_attention_bwd(ctx.backend, do, dlse, list(parts[:half]), list(parts[half:]))
        return None, *douts, *dlses


def _merged(half, *parts):
    return reference.merge_attention(parts[:half], parts[half:])


def merge_attention(outs, lses):
    """o and lse of attention on all keys, from attention on parts of them: o = sum_n exp(lse_n - lse) o_n.

    outs: tensors [..., T, Dv] (at least one), lses: as many [..., T], natural log-sum-exps in fp32 or fp64, as
    `return_lse=True` gives them; a sink or dropout must have been in one part at most. Returns (o, lse), o in the dtype
    of the first output, lse = log sum_n exp(lse_n). Differentiable in all of them. A query that no part has keys for
    (every lse -inf) gives o = 0, lse = -inf, gradients 0.

    Weights and sum are in fp32 (fp64 for fp64). On a GPU one kernel a pass, for up to 32 parts; plain PyTorch
    elsewhere: it moves a few percent of the bytes that the parts moved. Raises ValueError for shapes and counts that do
    not fit, TypeError for what is not a float tensor.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"{OP}: one lse per output, at least one, got {len(outs)} and {len(lses)}")
    for n, (o, lse) in enumerate(zip(outs, lses, strict=True)):
        check_tensor(OP, f"outs[{n}]", o, like=outs[0])
        check_tensor(OP, f"lses[{n}]", lse)
        if o.shape != outs[0].shape or lse.shape != o.shape[:-1]:
            raise ValueError(
                f"{OP}: outs[{n}] must be {list(outs[0].shape)} and lses[{n}] {list(outs[0].shape[:-1])}, "
                f"got {list(o.shape)} and {list(lse.shape)}"
            )
    backend = choose(OP, outs[0], functools.partial(_lacks, outs), optional=True)
    if backend == "reference":
        return reference.merge_attention(outs, lses)
    if wants_gradient(*outs, *lses):
        return _MergeAttention.apply(backend, *outs, *lses)
    return merge_attention_fwd(backend, outs, lses)


def _lacks(outs, backend):
    """`unsupported` for dispatch.choose."""
    if backend == "cpu":
        return "a few percent of what attention costs: plain PyTorch on a CPU"
    if outs[0].dtype == torch.float64:
        return "float64: the GPU kernels compute in fp32"
    return f"more than {MOST_PARTS} parts" if len(outs) > MOST_PARTS else None
