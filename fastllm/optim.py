"""Optimisers: torch's AdamW with a kernel for CPU and one for GPU."""

import torch
from torch.optim.adam import adam

from fastllm.dispatch import choose
from fastllm.ops._common import FLOATS
from fastllm.ops.adamw import adamw_step

__all__ = ["AdamW"]

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _wide(p):
    """The dtype of a parameter's moments."""
    return torch.float64 if p.dtype == torch.float64 else torch.float32


def _plain(x):
    return type(x) in (torch.Tensor, torch.nn.Parameter) and x.layout == torch.strided and x.dtype in FLOATS


def _lacks(group, backend):
    """Why the kernel cannot take a group of parameters, or None."""
    for name in ("foreach", "capturable", "differentiable", "fused"):
        if group[name]:
            return f"{name}: PyTorch's step was asked for"
    device = group["params"][0].device
    for p in group["params"]:
        if not (_plain(p) and p.device == device and p.is_contiguous()):
            return "a parameter is on another device, not contiguous, or no ordinary tensor of floats"
        if backend != "cpu" and p.dtype == torch.float64:
            return "float64: the Triton kernels take fp32, bf16 and fp16"
        if p.grad is not None and not (_plain(p.grad) and p.grad.dtype == p.dtype):
            return "a gradient is no ordinary tensor, or not of its parameter's dtype"
    return None


class AdamW(torch.optim.AdamW):
    """p -= lr * (weight_decay * p + m' / (sqrt(v') + eps)): m' = m / (1 - beta1^t) and v' = v / (1 - beta2^t) of the
    averages m = beta1 m + (1 - beta1) g and v = beta2 v + (1 - beta2) g^2 of gradients; with amsgrad the largest v.

    Constructor, defaults, closures, hooks and state dict are those of torch.optim.AdamW, and each takes the other's
    state dict. A group of parameters is one call of a kernel that reads and writes each number once (on a GPU a launch
    for each dtype), on CPU in C++ and on an NVIDIA GPU in Triton. It computes
    in fp32 (fp64 for fp64) and keeps the moments of bf16 and fp16 parameters in fp32, where PyTorch has them in the
    parameters' dtype: 2 bytes more for each moment of each number, for averages that do not drown in rounding.
    PyTorch's, which reads the state dict, rounds them.
    What the kernel does not know is PyTorch's own step: parameters on several devices, strided or sparse ones,
    subclasses of Tensor, fp64 on a GPU, foreach, capturable, differentiable and fused=True.
    `fastllm.explain` tells.
    Raises what torch.optim.AdamW raises. Error: at most 1.1 times that of torch's (tests/test_optim.py).
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    def step(self, closure=None):
        """One step; `closure`, where given, evaluates the model again and returns the loss, which is returned."""
        if self.defaults["differentiable"]:
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            for group in self.param_groups:
                self._step(group)
        return loss

    def _step(self, group):
        with_gradient = [p for p in group["params"] if p.grad is not None]
        if not with_gradient:
            return
        backend = choose("adamw", with_gradient[0], lambda backend: _lacks(group, backend), optional=True)
        ours = backend != "reference"
        if ours:
            self._wide_moments(group, with_gradient)
        params, grads, *state = ([] for _ in range(6))
        has_complex = self._init_group(group, params, grads, *state)
        (beta1, beta2), numbers = group["betas"], {name: group[name] for name in ("eps", "weight_decay", "maximize")}
        if ours:
            grads = [g.contiguous() for g in grads]
            adamw_step(backend, params, grads, *state, float(group["lr"]), beta1, beta2, *numbers.values())
            torch.autograd.graph.increment_version(params)  # a backward pass that needs them as they were must fail
            return
        options = {name: group[name] for name in ("amsgrad", "foreach", "capturable", "differentiable", "fused")}
        options |= {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        options |= dict(lr=group["lr"], beta1=beta1, beta2=beta2, has_complex=has_complex, decoupled_weight_decay=True)
        adam(params, grads, *state, **numbers, **options)

    def _wide_moments(self, group, params):
        """What torch makes in a parameter's dtype, for parameters that have no state yet."""
        for p in params:
            if not self.state[p]:
                names = MOMENTS if group["amsgrad"] else MOMENTS[:2]
                self.state[p] = {"step": torch.tensor(0.0)} | {n: torch.zeros_like(p, dtype=_wide(p)) for n in names}

    def load_state_dict(self, state_dict):
        """As torch's, but the moments of parameters with a kernel are not rounded to the parameters' dtype."""
        super().load_state_dict(state_dict)
        places = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for i, p in zip(places, params, strict=True):
            for name in MOMENTS:
                saved = state_dict["state"].get(i, {}).get(name)
                if saved is not None and (p.is_cpu or p.is_cuda) and self.state[p][name].dtype != _wide(p):
                    self.state[p][name] = saved.to(p.device, _wide(p), copy=True)
