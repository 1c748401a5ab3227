"""Two models, trained in turn on the same batches: is the one faster, and are the losses the same."""

import statistics
import time

import torch

from fastllm.llm.meter import progress
from fastllm.llm.train import Stepper


def compare(models: dict, batches: list, loss_of, tokens_in, recipe, *, block=10, what="compare") -> dict:
    """Train two models step for step on the same batches, `block` steps of the one and of the other in turn.

    Whatever else the machine does hits both, and the order changes from block to block. Speed is that of whole blocks,
    the first one left out; the ratio of a block is the second model's tokens/s over the first's on the same batches.
    The spread is from the 20th to the 80th percentile of the blocks. Losses are those of every step. With `seconds` in
    the recipe it ends with the first block behind them, the third at the earliest.
    """
    names = list(models)
    steppers = {name: Stepper(model.train(), recipe, loss_of) for name, model in models.items()}
    losses, speeds = {name: [] for name in names}, {name: [] for name in names}
    began = time.perf_counter()
    with torch.random.fork_rng(devices=[]), progress(len(batches) * len(names), what) as advance:
        for number, at in enumerate(range(0, len(batches), block)):
            if recipe.seconds is not None and number > 2 and time.perf_counter() - began > recipe.seconds:
                break
            part = batches[at : at + block]
            for name in names if number % 2 == 0 else reversed(names):
                before = time.perf_counter()
                for batch in part:
                    losses[name].append(steppers[name]([batch]))
                    advance(lambda name=name: f"{name} loss {losses[name][-1]:.3f}")
                speeds[name].append(sum(map(tokens_in, part)) / (time.perf_counter() - before))
    first, second = (speeds[name][1:] or speeds[name] for name in names)
    differences = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    ratio = spread([b / a for a, b in zip(first, second, strict=True)])
    ratio["of_medians"] = statistics.median(second) / statistics.median(first)
    return dict(
        steps=len(differences),
        block=block,
        loss=losses,
        largest_difference=max(differences),
        largest_relative_difference=max(d / abs(a) for d, a in zip(differences, losses[names[0]], strict=True)),
        tokens_per_s={name: spread(values) for name, values in zip(names, (first, second), strict=True)},
        ratio=ratio,
    )


def spread(values: list[float]) -> dict:
    """Median, 20th and 80th percentile, and the values themselves."""
    low, high = (
        torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    )
    return dict(median=statistics.median(values), p20=low, p80=high, values=values)
