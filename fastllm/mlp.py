"""MLPs of other people's models: which of the known forms a module has is tried, and then runs on kernels.

A form is what is projected (to a gate and a value, in two layers or in one that is cut in half), which activation the
gate gets, and where dropout stands. Names of layers do not matter. What the trial runs is the module's own forward,
around projections of a few numbers. Where a module is no gated MLP, a GELU in it may still be one on a kernel.
"""

import functools
import inspect
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastllm import trial
from fastllm.ops.activation import bias_gelu, geglu, swiglu
from fastllm.swap import Unsupported, forward_of, swap


@dataclass(frozen=True)
class Activation:
    """silu or gelu by PyTorch's functions and by our op, and where our op is the faster one on CPU: from how many
    elements on, and whether in 16 bits too."""

    name: str
    gated: Callable
    written: Callable
    least: int
    low: bool = True


# Measured on Zen 4, one thread, forward and both ways, of PyTorch's activation and product. SiLU: fp32 1.2x and 1.0x at
# 49,000 elements, bf16 1.1x and 0.9x at 74,000, 1.1x and 1.1x at 590,000. GELU by tanh: 2.0x and 1.3x at 18,000. Exact
# GELU: fp32 1.0x and 1.2x at 74,000, bf16 0.7x and 1.0x at 590,000. Below, the time goes to calling.
SILU = Activation("swiglu", swiglu, F.silu, 2**17)
GELU_TANH = Activation("geglu, tanh", geglu, functools.partial(F.gelu, approximate="tanh"), 2**14)
GELU = Activation("geglu", functools.partial(geglu, approximate="none"), F.gelu, 2**16, low=False)
ACTIVATIONS = SILU, GELU_TANH, GELU


def worth(activation, x) -> bool:
    """Whether the kernel is the faster one for a gate like `x`."""
    if torch.compiler.is_compiling() or not x.is_cpu:
        return True
    return x.numel() >= activation.least and (activation.low or x.dtype.itemsize > 2)


@dataclass(frozen=True)
class Form:
    """One way to write a gated MLP, with the names of the layers that have the parts."""

    activation: Activation
    projections: tuple  # names: gate and value, or one for both
    swapped: bool  # the value is the first half of one projection
    down: str
    before: tuple = ()  # dropouts, before and after the projection back
    after: tuple = ()

    def __call__(self, module, x, casts=False):
        parts = [getattr(module, name)(x) for name in self.projections]
        if len(parts) == 1:
            parts = parts[0].chunk(2, -1)
        gate, value = reversed(parts) if self.swapped else parts
        op = self.activation
        fused = gate.dtype == value.dtype and worth(op, gate)
        y = op.gated(gate, value) if fused else op.written(gate) * value
        for name in self.before:
            y = getattr(module, name)(y)
        down = getattr(module, self.down)
        y = down(y.to(down.weight.dtype) if casts and down.weight.is_floating_point() else y)
        for name in self.after:
            y = getattr(module, name)(y)
        return y


def match_gated_mlp(module, row):
    """down(act(gate(x)) * value(x)) with SiLU or GELU."""
    if type(module).__module__.startswith(("torch.nn.", "fastllm.")) or [*module.parameters(recurse=False)]:
        return
    children = dict(module.named_children())
    linears = {name: found for name, m in children.items() if (found := _sizes(m))}
    drops = [name for name, m in children.items() if isinstance(m, nn.Dropout)]
    acts = {name: m for name, m in children.items() if name not in linears and name not in drops}
    forms = list(_forms(linears, drops))
    with_numbers = any([*m.children(), *m.parameters(), *m.buffers()] for m in acts.values())
    if not forms or with_numbers or not _takes_one(module):
        return
    form, casts = _try(module, forms)
    if form is not None:
        swap(module, row, _forward_of(form, casts, tuple(acts)))
    elif any(map(_activation, acts.values())):
        raise Unsupported("its forward is not that of a gated MLP")


def _sizes(module):
    """(inputs, outputs) of a linear layer, which may be quantised or carry an adapter; transformers' Conv1D has its
    own names for them."""
    for names in (("in_features", "out_features"), ("nx", "nf")):
        found = tuple(getattr(module, name, None) for name in names)
        if all(isinstance(n, int) for n in found):
            return found
    return None


def _forms(linears, drops):
    """Every form that the sizes of these layers and the number of dropouts allow."""
    shapes = []
    if len(linears) == 2:
        for up, down in itertools.permutations(linears):
            if linears[up][1] == 2 * linears[down][0]:
                shapes += [((up,), swapped, down) for swapped in (False, True)]
    elif len(linears) == 3:
        for gate, value, down in itertools.permutations(linears):
            if linears[gate] == linears[value] and linears[gate][1] == linears[down][0]:
                shapes.append(((gate, value), False, down))
    places = [(drops[:n], drops[n:]) for n in range(len(drops) + 1)]
    for shape, activation, (before, after) in itertools.product(shapes, ACTIVATIONS, places):
        yield Form(activation, *shape, tuple(before), tuple(after))


def _takes_one(module) -> bool:
    inputs = list(inspect.signature(forward_of(module)).parameters.values())[1:]
    return sum(p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) for p in inputs) == 1


def _try(module, forms):
    """The form that the module's own forward has, or None; and whether it casts to the dtype of the projection back,
    as T5's does, part of which may be in fp32."""
    x = trial.numbers(1, 2, 6)

    def run(form, dtype=torch.float64):
        parts = {name: trial.Mark() for name in (*form.before, *form.after)}
        for n, name in enumerate(form.projections):
            parts[name] = trial.Projection(6, 8 if len(form.projections) == 2 else 16, 100 * (n + 1))
        parts[form.down] = trial.Projection(8, 6, 300, dtype)
        parts |= {name: trial.bare(m) for name, m in module._modules.items() if name not in parts and m is not None}
        probe = trial.bare(module, parts)
        probe.__dict__["training"] = True  # so that a dropout that is no layer shows
        return probe, type(module).forward(probe, x)

    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.random.fork_rng(devices=[]):
        for form in forms:
            try:
                probe, y = run(form)
                if not isinstance(y, torch.Tensor) or not trial.same(y, form(probe, x)):
                    continue
            except Exception:  # whatever it is, the forward is not of this form
                continue
            try:
                return form, run(form, torch.float32)[1].dtype == torch.float32
            except RuntimeError:  # of the product of two dtypes
                return form, False
    return None, False


@functools.cache
def _forward_of(form, casts, acts):
    def forward(self, plain, *args, **kwargs):
        if len(args) != 1 or kwargs or any(trial.has_hooks(getattr(self, name)) for name in acts):
            return plain(self, *args, **kwargs)
        return form(self, args[0], casts)

    forward.runs = form.activation.name
    return forward


def _activation(module):
    """Which of ACTIVATIONS a module without numbers is, or None."""
    x = trial.numbers(64)
    try:
        with torch.no_grad():
            y = trial.bare(module)(x)
            return next((a for a in ACTIVATIONS if trial.same(y, a.written(x))), None)
    except Exception:
        return None


def match_experts(module, row):
    """A mixture's experts, whose weights are stacked [experts, ...] in parameters of one module: always left alone.

    They are called with the tokens and with the experts that a router chose for each.
    """
    stacks = [p for p in module.parameters(recurse=False) if p.ndim == 3]
    inputs = inspect.signature(forward_of(module)).parameters
    if len(stacks) < 2 or len({len(p) for p in stacks}) > 1 or len(stacks[0]) < 2 or len(inputs) < 3:
        return
    if len({p.shape for p in stacks}) == 1:  # one matrix a head: RecurrentGemma's gates
        return
    chosen = getattr(getattr(module, "config", None), "_experts_implementation", None)
    runs = f"transformers' {chosen!r} runs" if chosen not in (None, "eager") else "its own loop over the experts runs"
    raise Unsupported(f"no kernel takes experts in one stack of weights; {runs}")


def match_gelu(module, row):
    """A GELU by tanh that is a module. The exact one is left to PyTorch, which is faster at it: our op has 0.7x to 0.8x
    of its speed in fp32, 0.5x to 0.7x in bf16, forward."""
    if not re.search("gelu", type(module).__name__, re.IGNORECASE) or [*module.children(), *module.parameters()]:
        return
    if _activation(module) is GELU_TANH:
        swap(module, row, _gelu_tanh)


def _gelu_tanh(self, plain, *args, **kwargs):
    if len(args) != 1 or kwargs:
        return plain(self, *args, **kwargs)
    return bias_gelu(args[0], approximate="tanh") if worth(GELU_TANH, args[0]) else GELU_TANH.written(args[0])


_gelu_tanh.runs = "gelu, tanh"
