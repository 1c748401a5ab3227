"""The mean of the models behind the steps of a training run, which is often better than the last of them."""

import contextlib

import torch


class Average:
    """The mean of a model's parameters over its steps, the older the less (Polyak and Juditsky 1992; with weights that
    fall exponentially, and a warm-up)."""

    def __init__(self, model, factor: float):
        self.factor = factor
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.kept = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def add(self, step: int):
        """The parameters as they are behind step 0, 1, ..."""
        share = 1 - min(self.factor, (1 + step) / (10 + step))
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            kept.lerp_(parameter, share)

    @torch.no_grad()
    def exchange(self):
        """The model gets the mean, and what it had is kept here; again, and it is as before."""
        for kept, parameter in zip(self.kept, self.parameters, strict=True):
            mean = kept.clone()
            kept.copy_(parameter)
            parameter.copy_(mean)

    @contextlib.contextmanager
    def instead(self):
        self.exchange()
        try:
            yield
        finally:
            self.exchange()
