"""The training loop: optimizer, schedule, clipping, early stopping, the best checkpoint, progress, history."""

import contextlib
import copy
import math
import statistics
import sys
import time
from dataclasses import asdict, dataclass

import torch

from fastllm.llm.files import atomic

OPTIMIZERS = ("adam", "adamw", "sgd")


@dataclass(frozen=True)
class Recipe:
    """How to train. The learning rate rises linearly for `warmup` steps, then falls on a cosine to final_lr * lr.

    weight_decay spares embeddings, norms and biases. Training stops early when `patience` evaluations in a row have not
    improved the validation loss (0: never), and after `seconds` of steps where that is given: then what a run reaches
    depends on the machine.
    """

    steps: int = 1000
    optimizer: str = "adamw"
    lr: float = 1e-3
    final_lr: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    evaluate_every: int = 100
    patience: int = 3
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self):
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"Recipe: optimizer must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}")
        if self.steps < 1 or self.evaluate_every < 1:
            raise ValueError(f"Recipe: steps and evaluate_every must be at least 1, got {self}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


class Stepper:
    """One model and its optimizer; a call takes one step on one batch and returns the loss before it."""

    def __init__(self, model, recipe: Recipe, loss_of):
        self.model, self.recipe, self.loss_of, self.taken = model, recipe, loss_of, 0
        decayed, spared = [], []
        for name, parameter in model.named_parameters():
            (decayed if parameter.ndim > 1 and "embedding" not in name else spared).append(parameter)
        groups = [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=spared, weight_decay=0.0)]
        self.optimizer = {
            "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True),
            "adamw": lambda: torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True),
            "sgd": lambda: torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9),
        }[recipe.optimizer]()

    def __call__(self, batch) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.lr_at(self.taken)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss_of(self.model, batch)
        loss.backward()
        if self.recipe.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.taken += 1
        return float(loss.detach())


def train(model, batches, loss_of, tokens_in, recipe, *, evaluate=None, checkpoint=None, extra=None, what="train"):
    """Train `model` in place and leave it with its best parameters (the last ones without `evaluate`).

    batches yields at least recipe.steps batches; loss_of(model, batch) is a scalar tensor; tokens_in(batch) a number.
    evaluate(model) returns a dict with "loss", by which the best is chosen; it is called every evaluate_every steps and
    at the end. checkpoint is a path where the best parameters so far, with `extra`, are at any time.
    The random state of the caller is left as it was; the same seed, data and threads give the same history.

    Returns what happened, fit for JSON: loss and tokens per step, evaluations, seconds, and tokens_per_s, measured over
    the steps alone (no evaluation), the first three left out. Raises FloatingPointError for a loss that is not finite.
    """
    history = dict(recipe=asdict(recipe), loss=[], seconds=[], tokens=[], evaluations=[], stopped="all steps done")
    best, best_state, since_best = math.inf, None, 0
    batches = iter(batches)
    with torch.random.fork_rng(devices=[]), progress(recipe.steps, what) as advance:
        torch.manual_seed(recipe.seed)
        model.train()
        stepper = Stepper(model, recipe, loss_of)
        for step in range(recipe.steps):
            batch = next(batches)
            before = time.perf_counter()
            loss = stepper(batch)
            history["seconds"].append(time.perf_counter() - before)
            history["loss"].append(loss)
            history["tokens"].append(tokens_in(batch))
            if not math.isfinite(loss):
                raise FloatingPointError(f"{what}: the loss is {loss} at step {step + 1}; try a lower learning rate")
            advance(f"loss {loss:.3f}")
            spent = recipe.seconds is not None and sum(history["seconds"]) > recipe.seconds and step + 1 < recipe.steps
            if spent:
                history["stopped"] = f"{recipe.seconds:.0f} s were used up after {step + 1} of {recipe.steps} steps"
            last = spent or step + 1 == recipe.steps
            if evaluate is not None and (last or not (step + 1) % recipe.evaluate_every):
                model.eval()
                found = dict(step=step + 1) | evaluate(model)
                model.train()
                history["evaluations"].append(found)
                if found["loss"] < best:
                    best, since_best = found["loss"], 0
                    best_state = copy.deepcopy(model.state_dict())
                    history["best"] = found
                    if checkpoint:
                        save(checkpoint, model=best_state, metrics=found, **(extra or {}))
                else:
                    since_best += 1
                    if recipe.patience and since_best >= recipe.patience and not last:
                        history["stopped"] = f"early: no better validation loss in {since_best} evaluations"
                        last = True
            if last:
                break
    if best_state is not None:
        model.load_state_dict(best_state)
    elif checkpoint:
        save(checkpoint, model=model.state_dict(), **(extra or {}))
    model.eval()
    history["tokens_per_s"] = sum(history["tokens"][3:]) / (sum(history["seconds"][3:]) or math.inf)
    return history


def save(path, **content):
    """A checkpoint of tensors and plain values, complete or not there at all."""
    with atomic(path, "wb") as file:
        torch.save(content, file)


def load(path) -> dict:
    return torch.load(path, map_location="cpu", weights_only=True)


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
                torch.manual_seed(recipe.seed + number)
                before = time.perf_counter()
                for batch in part:
                    losses[name].append(steppers[name](batch))
                    advance(f"{name} loss {losses[name][-1]:.3f}")
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


@contextlib.contextmanager
def progress(total: int, what: str):
    """Gives advance(text): a rich progress bar where somebody looks and rich is installed, else a line now and then."""
    try:
        from rich import progress as bars
    except ImportError:
        bars = None
    if bars is not None and sys.stderr.isatty():
        from rich.console import Console

        columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
        with bars.Progress(*columns, "{task.fields[text]}", console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
        return
    state = dict(done=0, said=time.monotonic())

    def advance(text):
        state["done"] += 1
        if time.monotonic() - state["said"] > 20:
            state["said"] = time.monotonic()
            print(f"{what} {state['done']}/{total}: {text}", file=sys.stderr, flush=True)

    yield advance
