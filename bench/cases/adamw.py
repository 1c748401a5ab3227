"""Cases of a step of AdamW on many parameters."""

import torch

from fastllm.bench.cases.case import Case
from fastllm.optim import AdamW

OPTIONS = dict(lr=1e-2, weight_decay=0.1)
STEPS = 3  # that are checked: behind the first one, what the moments are hardly shows


class Stepping:
    """An optimiser as a function of parameters and gradients [count, size], a tensor to a row: the parameters behind
    `STEPS` steps, each with the gradients in another order. `steady` gives what is timed."""

    def __init__(self, optimizer, **options):
        self.optimizer, self.options = optimizer, OPTIONS | options

    def start(self, p, grad):
        """The parameters, a copy of p, and the optimiser of its rows."""
        whole = p.detach().clone()
        rows = list(whole.unbind())
        for row, g in zip(rows, grad.detach(), strict=True):
            row.grad = g
        return whole, self.optimizer(rows, **self.options)

    def __call__(self, p, grad):
        whole, optimizer = self.start(p, grad)
        rows = optimizer.param_groups[0]["params"]
        for n in range(STEPS):
            for row, g in zip(rows, grad.detach().roll(n, -1), strict=True):
                row.grad = g
            optimizer.step()
        return whole

    def steady(self, p, grad):
        """A step that goes on, in place, from where the one before it ended."""
        return self.start(p, grad)[1].step


def adamw(count, size):
    """A step on `count` tensors of `size` numbers, in place."""
    n = count * size
    return Case(
        op="adamw",
        name=f"{count}x{size}",
        shapes={"p": (count, size), "grad": (count, size)},
        outputs=("p",),
        ours=Stepping(AdamW),
        torch=Stepping(torch.optim.AdamW, fused=True),
        naive=Stepping(torch.optim.AdamW, foreach=False),
        flops={"forward": 14.0 * n},
        values={"forward": 7 * n},  # the gradient is read, the parameter and two moments are read and written
    )
