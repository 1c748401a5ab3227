"""The training loop of every command: schedule, accumulation, clipping, evaluation, early stopping, checkpoints.

What happens in step n depends on the parameters, the optimizer's state, the recipe and n alone: batches are looked up
by number and random numbers are seeded by it. So a run that was killed goes on bit for bit from its last checkpoint,
with no random state to keep. What several processes do differently is one object, `Ranks`.
"""

import contextlib
import copy
import functools
import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from fastllm.llm import meter, require
from fastllm.llm.average import Average
from fastllm.llm.ranks import Ranks, StandIn
from fastllm.optim import AdamW

OPTIMIZERS = ("adam", "adamw", "sgd")
STEPPED = "stepped."  # of names in training.safetensors: the parameters that the next step changes
PRECISIONS = {"fp32": None, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Recipe:
    """How to train. The learning rate rises linearly for `warmup` steps, then falls on a cosine to final_lr * lr.

    A step is `accumulate` batches, whose gradients are added up as one batch of that size would have them. weight_decay
    spares embeddings, norms and biases. precision="bf16" is autocast: parameters and optimizer stay in fp32.
    With average, the model that is evaluated, kept and returned is the mean of the parameters of all steps, the weight
    of a step falling by that factor with each later one (at first faster: min(average, (1 + step) / (10 + step))).
    checkpointing keeps a block's input for the backward pass, not what it computes, and computes that again.
    Training stops early when `patience` evaluations in a row have not improved on the best (0: never), which is that
    of the lowest validation loss, or of the largest of another score that is named in `best`; and after `seconds` of
    steps where that is given: then what a run reaches depends on the machine. save_every is evaluate_every where it is
    0; sample_every 0 is never.
    """

    steps: int = 1000
    optimizer: str = "adamw"
    lr: float = 1e-3
    final_lr: float = 0.1
    warmup: int = 50
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.0
    accumulate: int = 1
    precision: str = "fp32"
    checkpointing: bool = False
    evaluate_every: int = 100
    save_every: int = 0
    sample_every: int = 0
    patience: int = 3
    best: str = "loss"
    seconds: float | None = None
    seed: int = 0

    def __post_init__(self):
        for name, offered in (("optimizer", OPTIMIZERS), ("precision", tuple(PRECISIONS))):
            if getattr(self, name) not in offered:
                raise ValueError(f"Recipe: {name} must be one of {', '.join(offered)}, got {getattr(self, name)!r}")
        for name, least in (("steps", 1), ("evaluate_every", 1), ("accumulate", 1), ("warmup", 0), ("lr", 0)):
            if not getattr(self, name) >= least:
                raise ValueError(f"Recipe: {name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.average < 1:
            raise ValueError(f"Recipe: average must be in [0, 1), got {self.average}")

    def lr_at(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.final_lr + (1 - self.final_lr) * 0.5 * (1 + math.cos(math.pi * done)))


def parameter_groups(model, weight_decay: float) -> list[dict]:
    """Those that decay, and those that do not: embeddings, norms and biases. Frozen ones are in neither."""
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, spared = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and id(parameter) not in tables and name != "positions"
            (decayed if decays else spared).append(parameter)
    return [dict(params=decayed, weight_decay=weight_decay), dict(params=spared, weight_decay=0.0)]


class Stepper:
    """One model and its optimizer; a call takes one step on a list of batches and returns the loss before it.

    loss_of(model, batch) is the mean over weight_of(batch) things: a step's loss is the mean over all of them,
    whichever batch and rank they are in. groups is as PyTorch's optimizers take it; "lr_scale" in one multiplies its
    learning rate. `norm` is the last norm of the gradients before they were clipped, `activations` the bytes that the
    forward pass of the first batch left for the backward pass (None without `measure`, and with several ranks).
    """

    def __init__(self, model, recipe: Recipe, loss_of, *, weight_of=None, ranks=None, groups=None, measure=False):
        self.model, self.recipe, self.loss_of, self.taken = model, recipe, loss_of, 0
        self.norm, self.activations, self.measure = None, None, measure
        self.weight_of, self.ranks = weight_of or (lambda batch: 1), ranks or Ranks()
        groups = parameter_groups(model, recipe.weight_decay) if groups is None else groups
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.wrapped = self.ranks.spread(model)
        now = dict(model.named_parameters())  # to be spread over ranks may have replaced them
        groups = [group | dict(params=[now[names[id(p)]] for p in group["params"]]) for group in groups]
        self.optimizer = {
            "adam": lambda: torch.optim.Adam(groups, betas=(0.9, 0.98), fused=True),
            "adamw": lambda: adamw(groups, betas=(0.9, 0.98)),
            "sgd": lambda: torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9),
        }[recipe.optimizer]()

    def __call__(self, batches: list) -> float:
        recipe, ranks = self.recipe, self.ranks
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.taken) * group.get("lr_scale", 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        weights = [counted(self.weight_of, batch) for batch in batches]
        total, loss = ranks.sums(sum(weights))[0], 0.0
        for n, (batch, weight) in enumerate(zip(batches, weights, strict=True)):
            torch.manual_seed(ranks.seed(recipe.seed, self.taken * len(batches) + n))
            with ranks.accumulating(self.wrapped, more=n + 1 < len(batches)):
                with autocast(self.model, recipe.precision), self.measuring() as memory:
                    part = self.loss_of(self.wrapped, batch.batch if isinstance(batch, StandIn) else batch)
                    if memory is not None:
                        self.activations = memory.live
                (part * ranks.weight(weight, total)).backward()
            loss += float(part.detach()) * (weight / total)
        if recipe.clip:
            self.norm = ranks.clip(self.model.parameters(), recipe.clip)
        self.optimizer.step()
        self.taken += 1
        return ranks.sums(loss)[0]

    def measuring(self):
        if not self.measure or self.activations is not None or self.ranks.ranks > 1:
            return contextlib.nullcontext()
        return meter.LiveBytes([*self.model.parameters(), *self.model.buffers()])


def adamw(groups, **options):
    """Our AdamW, or PyTorch's fused one for parameters of which a rank has slices: they are no ordinary tensors."""
    whole = all(type(parameter) is nn.Parameter for group in groups for parameter in group["params"])
    return AdamW(groups, **options) if whole else torch.optim.AdamW(groups, **options, fused=True)


def counted(count_of, batch):
    return 0 if isinstance(batch, StandIn) else count_of(batch)


def autocast(model, precision: str):
    dtype, device = PRECISIONS[precision], next(model.parameters()).device.type
    return contextlib.nullcontext() if dtype is None else torch.autocast(device, dtype)


@dataclass
class Trainer:
    """One training run: `model` is trained in place and left with its best parameters (the last without `evaluate`).

    batches[n] is batch number n of the run, the same whenever it is asked for; loss_of(model, batch) is a scalar
    tensor, the mean over weight_of(batch) things (default: batches count alike); tokens_in(batch) a number, and length
    how long a sequence is, for the estimate of FLOPs.
    evaluate(model) returns a dict with "loss" and recipe.best, by which the best is chosen; it is called every
    evaluate_every steps and at the end. sample(model) returns a text to show, every sample_every steps. groups is
    `Stepper`'s.
    With run (a `runs.Run`) there is a checkpoint every save_every steps, at each evaluation that is the best and at the
    end, with the tokenizer and meta; SIGTERM and Ctrl-C end the run behind the next one. A run that is resumed goes on
    from its last checkpoint. ranks is a `Ranks`.
    """

    model: nn.Module
    batches: Any
    loss_of: Callable
    tokens_in: Callable
    recipe: Recipe
    _: KW_ONLY
    weight_of: Callable | None = None
    length: int = 0
    evaluate: Callable | None = None
    sample: Callable | None = None
    run: Any = None
    tokenizer: Any = None
    meta: dict | None = None
    ranks: Ranks = field(default_factory=Ranks)
    groups: list | None = None
    tensorboard: bool = False
    what: str = "train"

    def go(self) -> dict:
        """Train, and return what happened, fit for JSON: loss and tokens per step, evaluations, seconds, and
        tokens_per_s, measured over the steps alone (no evaluation), the first three left out where there are more.

        The random state of the caller is left as it was; the same seed, data and threads give the same history, in
        however many pieces the run was. Raises FloatingPointError for a loss that is not finite.
        """
        recipe, model = self.recipe, self.model
        self.history = dict(recipe=asdict(recipe), loss=[], seconds=[], tokens=[], evaluations=[], best=None)
        self.since_best, self.best_state, self.writer, self.average = 0, None, None, None
        model.train()
        if recipe.checkpointing:
            model.gradient_checkpointing_enable()
        options = dict(weight_of=self.weight_of, ranks=self.ranks, groups=self.groups, measure=True)
        self.stepper = Stepper(model, recipe, self.loss_of, **options)
        if recipe.average:
            self.average = Average(model, recipe.average)
        with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
            if self.run is not None:
                self.resume()
                self.interrupted = stack.enter_context(interruptions())
            if self.tensorboard and self.ranks.first:
                self.writer = stack.enter_context(self.open_tensorboard())
            advance = lambda text: None  # noqa: E731
            if self.ranks.first:
                advance = stack.enter_context(meter.progress(recipe.steps, self.what, self.stepper.taken))
            while not self.stopped():
                self.step(advance)
        self.history["stopped"] = self.stopped()
        self.finish()
        return self.history

    def stopped(self) -> str | None:
        """Why the run is at its end, or None."""
        recipe, taken = self.recipe, self.stepper.taken
        if taken >= recipe.steps:
            return "all steps done"
        if recipe.patience and self.since_best >= recipe.patience:
            return f"early: no better validation {recipe.best} in {self.since_best} evaluations"
        if recipe.seconds is not None and sum(self.history["seconds"]) > recipe.seconds:
            return f"{recipe.seconds:.0f} s were used up after {taken} of {recipe.steps} steps"
        return None

    def step(self, advance):
        recipe, history, taken = self.recipe, self.history, self.stepper.taken
        batches = self.ranks.batches(self.batches, taken, recipe.accumulate)
        before = time.perf_counter()
        loss = self.stepper(batches)
        if self.average is not None:
            self.average.add(taken)
        seconds = self.ranks.tell(time.perf_counter() - before)  # all stop at the same step
        if not math.isfinite(loss):
            raise FloatingPointError(f"{self.what}: the loss is {loss} at step {taken + 1}; try a lower learning rate")
        tokens = self.ranks.sums(sum(counted(self.tokens_in, batch) for batch in batches))[0]
        for name, value in (("loss", loss), ("seconds", seconds), ("tokens", tokens)):
            history[name].append(value)
        self.log(loss=loss, tokens=tokens, seconds=seconds, lr=recipe.lr_at(taken), norm=self.stepper.norm)
        advance(self.status)

        last, due, better = bool(self.stopped()), self.stepper.taken, False
        if self.evaluate is not None and (last or due % recipe.evaluate_every == 0):
            better = self.evaluated()
            last = bool(self.stopped())
        if self.sample is not None and recipe.sample_every and due % recipe.sample_every == 0:
            self.sampled()
        if self.run is not None:
            leave = self.ranks.sums(self.interrupted())[0] > 0
            if last or better or leave or due % (recipe.save_every or recipe.evaluate_every) == 0:
                self.save(better)
            if leave:
                raise KeyboardInterrupt

    def evaluated(self) -> bool:
        """Evaluate. True where this is the best so far."""
        self.model.eval()
        with torch.no_grad(), autocast(self.model, self.recipe.precision), self.ranks.evaluating(self.model):
            with self.averaged():
                found = dict(step=self.stepper.taken) | self.evaluate(self.model)
        self.model.train()
        self.history["evaluations"].append(found)
        self.log(evaluation=found)
        best = self.history["best"]
        if (by := self.recipe.best) not in found:
            raise ValueError(f"{self.what}: best={by!r} is no score of the evaluation, which has {', '.join(found)}")
        sign = -1 if by == "loss" else 1
        if best is not None and not sign * found[by] > sign * best[by]:
            self.since_best += 1
            return False
        self.history["best"], self.since_best = found, 0
        if self.run is None:
            with self.averaged():
                self.best_state = copy.deepcopy(self.ranks.model_state(self.model))
        return True

    def averaged(self):
        """A context in which the model has the parameters to evaluate and to keep."""
        return contextlib.nullcontext() if self.average is None else self.average.instead()

    def sampled(self):
        self.model.eval()
        with self.ranks.evaluating(self.model):
            text = self.sample(self.model)
        self.model.train()
        self.log(sample=text)
        if self.ranks.first:
            print(f"{self.what}, step {self.stepper.taken}: {text}", file=sys.stderr, flush=True)

    def save(self, better):
        training = dict(best=self.history["best"], since_best=self.since_best)
        tensors = self.ranks.optimizer_state(self.model, self.stepper.optimizer)
        if self.average is not None:  # to go on from, where the model that is kept is another
            own = self.ranks.model_state(self.model)
            tensors = dict(tensors) | {f"{STEPPED}{name}": x.clone() for name, x in own.items()}
        with self.averaged():
            state = self.ranks.model_state(self.model)
            if self.ranks.first:
                meta = dict(self.meta or {}, metrics=(self.history["evaluations"] or [None])[-1])
                saved = self.model, self.tokenizer, training, tensors
                self.run.save(self.stepper.taken, *saved, state=state, best=better, **meta)

    def resume(self):
        found = self.run.latest() if self.run.resumed else None
        if found is not None:
            training, tensors, state = found
            self.ranks.load_model_state(self.model, state)
            if self.average is not None:
                self.average = Average(self.model, self.recipe.average)
                own = {name: x for name, x in tensors.items() if name.startswith(STEPPED)}
                tensors = {name: x for name, x in tensors.items() if name not in own}
                self.ranks.load_model_state(self.model, {n.removeprefix(STEPPED): x for n, x in own.items()})
            self.ranks.load_optimizer_state(self.model, self.stepper.optimizer, tensors)
            self.stepper.taken, self.since_best = training["step"], training["since_best"]
            self.history["best"] = training["best"]
        for line in self.run.history(upto=self.stepper.taken):
            for name in ("loss", "seconds", "tokens"):
                if name in line:
                    self.history[name].append(line[name])
            if "evaluation" in line:
                self.history["evaluations"].append(line["evaluation"])

    def finish(self):
        history = self.history
        if self.run is not None and history["best"] is not None:
            self.best_state = self.run.best_state()
        if self.best_state is not None:
            self.ranks.load_model_state(self.model, self.best_state)
        elif self.average is not None:
            self.average.exchange()
        self.model.eval()
        first = 3 if len(history["tokens"]) > 3 else 0
        history["tokens_per_s"] = sum(history["tokens"][first:]) / (sum(history["seconds"][first:]) or math.inf)
        history["activation_bytes"] = self.stepper.activations

    # --- what it says ---

    @functools.cached_property
    def peak(self) -> float:
        """FLOP/s that all ranks could reach, were each as fast as this one in matrix products."""
        device = next(self.model.parameters()).device
        return self.ranks.ranks * meter.matrix_peak(PRECISIONS[self.recipe.precision] or torch.float32, device)

    def status(self) -> str:
        """The line that is shown live: the last 20 steps."""
        tokens, seconds = (sum(self.history[name][-20:]) for name in ("tokens", "seconds"))
        share = meter.training_flops(self.model, tokens, self.length) / seconds / self.peak
        best, kept = self.history["best"], self.stepper.activations
        return ", ".join(
            [f"loss {self.history['loss'][-1]:.3f}"]
            + ([f"valid {best['loss']:.3f}"] if best else [])
            + [f"{tokens / seconds:,.0f} tokens/s", f"{share:.0%} of peak"]
            + ([f"activations {kept / 2**20:,.0f} MiB"] if kept is not None else [])
        )

    def log(self, **line):
        """Into history.jsonl, and TensorBoard."""
        step = self.stepper.taken
        if self.run is not None and self.ranks.first:
            self.run.log(dict(step=step) | line)
        if self.writer is not None:
            for name, value in (line | line.get("evaluation", {})).items():
                if isinstance(value, str):
                    self.writer.add_text(name, value, step)
                elif isinstance(value, (int, float)) and name != "step":
                    self.writer.add_scalar(f"valid/{name}" if "evaluation" in line else f"train/{name}", value, step)

    def open_tensorboard(self):
        if self.run is None:
            raise ValueError(f"{self.what}: TensorBoard's files go into the folder of a run")
        require("tensorboard")
        writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter
        return writer(self.run.folder / "tensorboard", purge_step=self.stepper.taken + 1)


def train(model, batches, loss_of, tokens_in, recipe, **options) -> dict:
    """`Trainer(...).go()`."""
    return Trainer(model, batches, loss_of, tokens_in, recipe, **options).go()


@contextlib.contextmanager
def interruptions():
    """Gives a function that says whether SIGTERM or Ctrl-C came. A second Ctrl-C is one at once, as without this."""
    came, before = [], {}

    def note(number, frame):
        came.append(number)
        signal.signal(number, before[number])

    if threading.current_thread() is threading.main_thread():  # no other may set handlers
        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
