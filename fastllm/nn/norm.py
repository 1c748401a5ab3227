"""Norms: torch's modules on our kernels."""

import torch
from torch import nn

from fastllm.ops.norm import layer_norm, rms_norm


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

    Constructor, defaults, initial values and state dict are those of torch.nn.LayerNorm. The input x
    [..., *normalized_shape] is in fp32, bf16, fp16 or fp64. `forward(x)` returns y; `forward(x, residual)` returns
    (y, h) with h = x + residual, or dropout(x) + residual with dropout_p, whatever the module's mode.
    Precision, what is saved, and errors are those of `fastllm.layer_norm`, and ValueError where x does not end in
    normalized_shape (tests/test_nn.py).
    """

    def forward(self, input, residual=None, *, dropout_p=0.0):
        return flat_norm(self, layer_norm, input, (self.weight, self.bias), self.eps, residual, dropout_p)


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
