"""One line to put fastllm's kernels under a model that exists, and one to take them out again."""

import contextlib
import threading
import weakref

import torch
from torch import nn

from fastllm.matchers import MATCHERS
from fastllm.swap import Report, Row, Unsupported, restore_module

BEFORE, AFTER = [], []  # of a whole model, for fastllm.hf: functions of (model, report, options), and of (model)

_lock = threading.RLock()
_reports = weakref.WeakKeyDictionary()


def accelerate(
    model, *, attention=True, norms=True, mlp=True, rope=True, linear=True, loss=True, strict=False
) -> Report:
    """Put fastllm's kernels under a model, in place, and tell what runs where. `restore(model)` takes them out.

    model: any Hugging Face or PyTorch model. The keywords choose what is accelerated. Only this model's modules change:
    its parameters, state dict, dtype, device, hooks and what copies and pickles hold stay as they are. Calling it again
    decides anew. In training, the loss of a causal language model leaves the logits out of the output, which makes
    them where `.logits` is read before the next optimizer step, unless the model is called with skip_logits=False, as
    Liger has it; evaluation has them. Encoders like BERT take real tokens alone through their layers; their hidden
    states are 0 where there was padding behind a sequence, unless the model's own loss reads them there (of spans, or
    of labels that are not -100). Attention gives 0 to positions that see nothing, like padding in front of a
    sequence; transformers' sdpa does too, its eager attention gives them the mean of all values.
    Two threads may run the model meanwhile: each module changes in one step, and both ways are right. strict=True
    raises RuntimeError, with the model as it was, where something of the chosen kinds is left alone. Raises TypeError
    where model is not a torch.nn.Module.

    >>> print(fastllm.accelerate(model))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate: model must be a torch.nn.Module, got {type(model).__name__}")
    options = dict(attention=attention, norms=norms, mlp=mlp, rope=rope, linear=linear, loss=loss)
    with _lock:
        _load_hf(model)
        restore(model)
        report = Report(options={**options, "strict": strict})
        try:
            for prepare in BEFORE:
                prepare(model, report, options)
            for kind in filter(options.get, MATCHERS):
                _match_all(model, kind, report)
            if strict and report.left_alone:
                raise RuntimeError(f"accelerate: strict, and these are left alone:\n{Report(report.left_alone)}")
        except BaseException:
            restore(model)
            raise
        _reports[model] = report
    return report


def _match_all(model, kind, report):
    whole = None  # the last MLP that runs as one: what is inside it is not called by itself
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) or (whole is not None and name.startswith(whole)):
            continue
        for matcher in MATCHERS[kind]:
            row = Row(name, type(module).__name__, kind)
            try:
                matcher(module, row)
            except Unsupported as why:
                row.runs, row.reason = "", str(why)
            if row.runs or row.reason:
                report.rows.append(row)
                if kind == "mlp" and row.runs:
                    whole = f"{name}." if name else ""
                break


def _load_hf(model):
    """Models of transformers need fastllm.hf; where there are none, transformers is not imported."""
    if any(cls.__module__.startswith("transformers.") for m in model.modules() for cls in type(m).__mro__):
        import fastllm.hf
        import fastllm.hf_encoder  # noqa: F401


def restore(model):
    """Give every module of `model` its own class and forward back; returns the model. Twice is once."""
    with _lock:
        for module in model.modules():
            restore_module(module)
        for undo in AFTER:
            undo(model)
        _reports.pop(model, None)
    return model


def is_accelerated(model) -> bool:
    """Whether `accelerate` was called for this very model, and `restore` was not."""
    return model in _reports


@contextlib.contextmanager
def accelerated(model, **options):
    """`accelerate(model, **options)` inside the `with` block, which gives the report; as it was before after it.

    A backward pass with gradient checkpointing runs modules again: keep it inside the block, or its second forward pass
    takes the other kernels (and PyTorch may refuse it, because they save other tensors).
    """
    before = _reports.get(model)
    report = accelerate(model, **options)
    try:
        yield report
    finally:
        restore(model)
        if before is not None:
            accelerate(model, **before.options)
