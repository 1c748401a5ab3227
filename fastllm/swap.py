"""Another forward for one module, by another class, and the table of what was done.

A module gets a subclass of its own class, of the same name, whose `forward` calls a kernel. So its parameters, buffers,
hooks, dtype and device stay its own, other instances of its class do not change, a copy of it (pickle, deepcopy) is an
instance of the original class, and giving the class back is one assignment.
"""

import copyreg
import functools
import inspect
import re
from dataclasses import dataclass, field

import torch


class Unsupported(Exception):
    """Raised by a matcher: this module is of its kind, and is left alone for the reason given."""


@dataclass
class Row:
    """One module of a report: what its `kind` runs now, or why it was left alone; `calls` counts eager calls."""

    name: str
    module: str
    kind: str
    runs: str = ""
    reason: str = ""
    calls: int = 0


class _Rows(dict):
    """A module's rows by kind, kept on the module. A copy of the module is not accelerated, so it gets none."""

    def __reduce_ex__(self, protocol):
        return type(None), ()


@dataclass
class Report:
    """What `accelerate` did, module by module; the counts go on as the model runs. Prints as a table."""

    rows: list = field(default_factory=list)
    options: dict = field(default_factory=dict)

    @property
    def accelerated(self) -> list:
        return [row for row in self.rows if row.runs]

    @property
    def left_alone(self) -> list:
        return [row for row in self.rows if row.reason]

    @property
    def never_called(self) -> list:
        """Accelerated modules that no call has reached: after a forward pass, those that the model goes round."""
        return [row for row in self.accelerated if not row.calls]

    def __str__(self):
        if not self.rows:
            return "nothing to accelerate was found"
        groups = {}
        for row in self.rows:
            key = re.sub(r"\b\d+\b", "*", row.name) or "(the model)", row.module, row.kind, row.runs, row.reason
            groups.setdefault(key, []).append(row.calls)
        table = [("modules", "class", "number", "kind", "runs", "calls", "left alone because")]
        for (name, module, kind, runs, reason), calls in groups.items():
            count = str(sum(calls)) if runs else "-"
            table.append((name, module, str(len(calls)), kind, runs or "as before", count, reason or "-"))
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in table)


@functools.cache
def _accelerated_class(original: type, kind: str, forward, attributes=()) -> type:
    """The subclass of `original` whose instances run `forward`, while they have a row of `kind`."""
    plain = original.forward

    @functools.wraps(plain)
    def counted(self, *args, **kwargs):
        rows = getattr(self, "_fastllm", None)
        if rows is None or kind not in rows:  # restored while another library held this method or subclassed this class
            return plain(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            rows[kind].calls += 1
        return forward(self, plain, *args, **kwargs)

    bare = original
    while "_fastllm_original" in vars(bare):
        bare = bare._fastllm_original

    def reduce(self, protocol):
        return as_instance_of(bare, cls, super(cls, self).__reduce_ex__(protocol))

    names = {"__module__": original.__module__, "__qualname__": original.__qualname__, "__doc__": original.__doc__}
    own = {"forward": counted, "__reduce_ex__": reduce, "_fastllm_original": original, "_fastllm_kind": kind}
    cls = type(original.__name__, (original,), {**names, **own, **dict(attributes)})
    return cls


def as_instance_of(original: type, cls: type, reduced):
    """What __reduce_ex__ says of an instance of `cls`, said of one of `original`, in words that need no fastllm."""
    _, (first, *_), state, *rest = reduced
    if first is not cls:  # of a subclass that another library made
        return reduced
    if isinstance(state, dict):
        state = {name: value for name, value in state.items() if name != "_fastllm"}
    return copyreg._reconstructor, (original, object, None), state, *rest


def swap(module, row, forward, attributes=()):
    """Let `module` run forward(self, plain, ...) and count in `row`; `plain` is its class's own forward."""
    if "forward" in vars(module):
        raise Unsupported("another library has replaced its forward method")
    row.runs = row.runs or getattr(forward, "runs", forward.__name__.strip("_"))
    attach(module, row)
    module.__class__ = _accelerated_class(type(module), row.kind, forward, attributes)


def attach(module, row):
    """Keep `row` on the module, where its calls are counted."""
    if getattr(module, "_fastllm", None) is None:
        object.__setattr__(module, "_fastllm", _Rows())
    module._fastllm[row.kind] = row


def restore_module(module):
    vars(module).pop("_fastllm", None)
    while (original := vars(type(module)).get("_fastllm_original")) is not None:
        module.__class__ = original


def forward_of(module):
    return inspect.unwrap(type(module).forward)


def names_used(function) -> set:
    """The names in a function's code, its inner functions' included."""
    code, found = [inspect.unwrap(function).__code__], set()
    while code:
        part = code.pop()
        found |= set(part.co_names)
        code += [c for c in part.co_consts if inspect.iscode(c)]
    return found
