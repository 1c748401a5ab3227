"""Rotary embeddings, which transformers' attention modules call as a function of their file."""

import functools
import inspect
import types

import torch

from fastllm import trial
from fastllm.matchers import MATCHERS
from fastllm.ops._common import is_autocast
from fastllm.ops.rope import rope
from fastllm.swap import Unsupported, names_used, swap


def match_rope(module, row):
    """An attention module whose forward calls its file's rotary function: the forward, with a kernel by that name.

    The function itself is every model's, and stays.
    """
    forward = type(module).forward
    inner = inspect.unwrap(forward)
    used = [name for name in names_used(inner) if name.startswith("apply_") and "rotary" in name]
    functions = {name: inner.__globals__.get(name) for name in sorted(used)}
    if not functions or "ALL_ATTENTION_FUNCTIONS" not in names_used(inner):
        return
    if inner is not forward:
        raise Unsupported("its forward is decorated")
    if unknown := [name for name, function in functions.items() if not any(_forms_of(function)[:2])]:
        raise Unsupported(f"{' and '.join(unknown)} is none of the known rotations")
    swap(module, row, _with_rope(forward, tuple(functions)))


# The rotations that there are, for q and k [B, H, T, D] and tables [S, R] or [B, S, R].


def _halves(q, k, cos, sin):
    return rope(q, k, cos, sin, rotary_dim=cos.shape[-1])


def _halves_by_pairs(q, k, cos, sin):  # tables of R / 2, as in gpt-oss
    return rope(q, k, cos, sin, rotary_dim=2 * cos.shape[-1])


def _neighbours(q, k, cos, sin):  # Cohere
    return rope(q, k, cos, sin, interleaved=True, rotary_dim=cos.shape[-1])


def _neighbours_by_pairs(q, k, cos, sin):  # GLM: the first half of a table is that of the pairs
    pairs = cos.shape[-1] // 2
    return rope(q, k, cos[..., :pairs], sin[..., :pairs], interleaved=True, rotary_dim=2 * pairs)


def _neighbours_to_halves(q, k, cos, sin):  # DeepSeek: what stood side by side is half a head apart afterwards
    q, k = (torch.cat([x[..., ::2], x[..., 1::2]], -1) for x in (q, k))
    return rope(q, k, *(x[..., : x.shape[-1] // 2] for x in (cos, sin)), rotary_dim=cos.shape[-1])


ROTATIONS = _halves, _halves_by_pairs, _neighbours, _neighbours_by_pairs, _neighbours_to_halves


@functools.cache
def _forms_of(function):
    """What `function` does with tables as wide as a head, and with narrower ones: one of ROTATIONS each, or None; and
    whether its result has the wider dtype of head and table, or that of the head."""
    q, k = trial.numbers(2, 2, 3, 8), trial.numbers(2, 1, 3, 8, first=200)

    def tried(width):
        cos, sin = (trial.numbers(2, 3, width, first=n) for n in (300, 400))
        try:
            expected = function(q, k, cos, sin)
        except Exception:
            return None
        for rotation in ROTATIONS:
            try:
                if all(map(trial.same, expected, rotation(q, k, cos, sin))):
                    return rotation
            except ValueError:  # of the tables' width
                continue
        return None

    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        found = tried(8), tried(4)
        width = 8 if found[0] else 4
        table = trial.numbers(2, 3, width, dtype=torch.float32)
        promotes = any(found) and function(q.bfloat16(), k.bfloat16(), table, table)[0].dtype == torch.float32
    return *found, promotes


def _rotary(function):
    """`function` on the kernel, where its arguments are those that were tried."""
    wide, narrow, promotes = _forms_of(function)

    def rotate(q, k, cos, sin, *rest, unsqueeze_dim=1, **options):
        rotation = wide if cos.shape[-1] == q.shape[-1] else narrow
        if rotation is None or rest or options or unsqueeze_dim not in (1, 2) or cos.ndim not in (2, 3):
            return function(q, k, cos, sin, *rest, unsqueeze_dim=unsqueeze_dim, **options)
        if unsqueeze_dim == 2:
            q, k = q.transpose(1, 2), k.transpose(1, 2)
        if promotes and not is_autocast(q):  # which casts to the narrower one afterwards
            q, k = (x.to(torch.promote_types(x.dtype, cos.dtype)) for x in (q, k))
        if cos.ndim == 3 and cos.shape[0] == 1:  # one table for every sequence
            cos, sin = cos[0], sin[0]
        q, k = rotation(q, k, cos, sin)
        return (q, k) if unsqueeze_dim == 1 else (q.transpose(1, 2), k.transpose(1, 2))

    return rotate


@functools.cache
def _with_rope(forward, names):
    """`forward` with other globals: its code finds the kernel where it looks for its file's function."""
    scope = forward.__globals__ | {name: _rotary(forward.__globals__[name]) for name in names}
    scope.pop("__name__", None)  # by which torch.compile would take the file's globals instead
    rotated = types.FunctionType(forward.__code__, scope, forward.__name__, forward.__defaults__, forward.__closure__)
    rotated.__kwdefaults__ = forward.__kwdefaults__

    def run(self, plain, *args, **kwargs):
        return rotated(self, *args, **kwargs)

    run.runs = "rope"
    return run


MATCHERS["rope"].append(match_rope)
