"""One line to put fastllm's kernels under a model that exists, and one to take them out again.

A module is accelerated by giving that one instance a subclass of its own class, of the same name, whose `forward` calls
a kernel. So the parameters, buffers, hooks, dtype and device stay the module's own, other instances of its class do not
change, a copy (pickle, deepcopy) is an instance of the original class, and taking the kernels out is one assignment.

What a module computes is recognised by its structure and then tried: a norm is accelerated where its own forward gives
what the kernel gives on a probe, whatever its class is called. What is left alone is in the report, with the reason.
"""

import contextlib
import copy
import copyreg
import functools
import inspect
import re
import threading
import weakref
from dataclasses import dataclass, field

import torch
from torch import nn

from fastllm import compat
from fastllm.nn import flat_norm
from fastllm.ops.attention import attention
from fastllm.ops.norm import layer_norm, rms_norm

KINDS = ("attention", "norms", "mlp", "rope", "linear", "loss")


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


# --- giving a module another class, and its own back ---


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


def _restore_module(module):
    vars(module).pop("_fastllm", None)
    while (original := vars(type(module)).get("_fastllm_original")) is not None:
        module.__class__ = original


# --- what can be accelerated: kind -> functions that take a module and its row ---
# A matcher returns without doing anything for a module that is none of its business, and raises Unsupported otherwise.


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


def _autocast_to_fp32(x):
    """Autocast lets CUDA's norms run in fp32; on CPU it leaves them their dtype."""
    return x.float() if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64 else x


def _layer_norm_forward(self, plain, x):
    return flat_norm(self, layer_norm, _autocast_to_fp32(x), (self.weight, self.bias), self.eps)


def _rms_norm_forward(self, plain, x):
    eps = self.eps
    if eps is None:
        eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
    return flat_norm(self, rms_norm, _autocast_to_fp32(x), (self.weight,), eps)


_layer_norm_forward.runs, _rms_norm_forward.runs = "layer_norm", "rms_norm"


def match_torch_norm(module, row):
    for theirs, forward in ((nn.LayerNorm, _layer_norm_forward), (nn.RMSNorm, _rms_norm_forward)):
        if isinstance(module, theirs):
            if type(module).__module__ == "fastllm.nn":
                return
            if type(module).forward is not theirs.forward:
                raise Unsupported("its class has a forward of its own")
            swap(module, row, forward)


EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps", "rms_norm_eps")


def match_written_norm(module, row):
    """A norm that somebody wrote out in PyTorch: one vector of weights (and one of biases), an epsilon, one input."""
    if type(module).__module__.startswith(("torch.nn.", "fastllm.")) or [*module.children(), *module.buffers()]:
        return
    weights = dict(module.named_parameters(recurse=False))
    eps = next((name for name in EPS_NAMES if isinstance(getattr(module, name, None), float)), None)
    if eps is None or "weight" not in weights or weights.keys() - {"weight", "bias"}:
        return
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or any(w.ndim != 1 for w in weights.values()):
        return
    inputs = list(inspect.signature(forward_of(module)).parameters.values())[1:]
    if sum(p.default is p.empty and p.kind != p.VAR_KEYWORD for p in inputs) != 1:
        raise Unsupported("its forward takes more than one tensor")
    swap(module, row, _written_norm(eps, *_try_norm(module, eps)))


def _try_norm(module, eps):
    """(op, weight offset, rule of the result's dtype), found by running the module's own forward on a probe."""
    probe, size, device = copy.copy(module), len(module.weight), module.weight.device
    x = torch.arange(3 * size, device=device, dtype=torch.float32).view(3, size)
    x = torch.sin(x * x) + 0.5  # nothing that could pass for normalised; and no random number is drawn

    def run(x, weights_dtype):
        probe._parameters = {
            name: w if w is None else nn.Parameter(w.detach().to(weights_dtype), False)
            for name, w in module._parameters.items()
        }
        return type(module).forward(probe, x)  # past its hooks

    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            low, dtypes = torch.bfloat16, (run(x.bfloat16(), torch.float32).dtype, run(x, torch.bfloat16).dtype)
            y, e = run(x, torch.float32), getattr(module, eps)
            weight, bias = probe.weight, getattr(probe, "bias", None)
            candidates = {("layer_norm", 0.0): layer_norm(x, weight, bias, eps=e)}
            if bias is None:
                candidates |= {("rms_norm", c): rms_norm(x, weight, eps=e, weight_offset=c) for c in (0.0, 1.0)}
            same = [found for found, c in candidates.items() if torch.allclose(y, c, rtol=1e-4, atol=1e-5)]
    except Exception as error:
        raise Unsupported(f"its forward could not be tried: {error}") from error
    wide = torch.float32
    rule = {(low, wide): "x's", (wide, wide): "the wider", (wide, low): "the weight's"}.get(dtypes)
    if not same or rule is None:
        raise Unsupported("its forward is neither layer norm nor RMS norm")
    return *same[0], rule


@functools.cache
def _written_norm(eps, op, offset, rule):
    def forward(self, plain, x):
        weight, dtype = self.weight, x.dtype
        if rule == "the wider" or (rule == "the weight's" and weight.dtype.itemsize > dtype.itemsize):
            x = x.to(torch.promote_types(dtype, weight.dtype))
        if op == "layer_norm":
            y = layer_norm(x, weight, getattr(self, "bias", None), eps=getattr(self, eps))
        else:
            y = rms_norm(x, weight, eps=getattr(self, eps), weight_offset=offset)
        return y.to(weight.dtype) if rule == "the weight's" else y

    forward.runs = op if not offset else f"{op}, 1 + weight"
    return forward


def match_multihead_attention(module, row):
    if isinstance(module, nn.MultiheadAttention):
        if type(module).forward is not nn.MultiheadAttention.forward:
            raise Unsupported("its class has a forward of its own")
        if module.bias_k is not None or module.add_zero_attn:
            raise Unsupported("bias_kv and add_zero_attn have no kernel")
        swap(module, row, _multihead_attention)


def _multihead_attention(
    self,
    plain,
    query,
    key,
    value,
    key_padding_mask=None,
    need_weights=True,
    attn_mask=None,
    average_attn_weights=True,
    is_causal=False,
):
    if need_weights or query.is_nested:  # probabilities are what the kernel never has in memory
        return plain(
            self, query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )
    batched, same = query.ndim == 3, query is key and key is value
    if not batched:
        query, key, value = (x.unsqueeze(0) for x in (query, key, value))
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    elif not self.batch_first:
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    D, H = self.head_dim, self.num_heads
    linear = nn.functional.linear
    if self._qkv_same_embed_dim and same:
        parts = linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
    else:
        weights = (
            self.in_proj_weight.chunk(3)
            if self._qkv_same_embed_dim
            else (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        )
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = [linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases)]
    q, k, v = (x.unflatten(-1, (H, D)).transpose(1, 2) for x in parts)
    masks = []
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if attn_mask is not None and not is_causal:  # with is_causal, the mask is a causal one: PyTorch goes by that too
        masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.view(-1, H, *attn_mask.shape[1:]))
    kept = [~m for m in masks if m.dtype == torch.bool]
    added = [m for m in masks if m.dtype != torch.bool]
    o = attention(
        q,
        k,
        v,
        causal=is_causal,
        q_offset=0,
        mask=functools.reduce(torch.logical_and, kept) if kept else None,
        bias=functools.reduce(torch.add, added) if added else None,
        dropout_p=self.dropout if self.training else 0.0,
    )
    o = self.out_proj(o.transpose(1, 2).flatten(2))
    if not batched:
        return o.squeeze(0), None
    return (o if self.batch_first else o.transpose(0, 1)), None


_multihead_attention.runs = "attention"


# PyTorch's encoder in eval() goes round its modules where, among much else, these hold: here they never do.
_ROUND = {
    nn.TransformerEncoderLayer: (("activation_relu_or_gelu", property(lambda self: 0)),),
    nn.TransformerEncoder: (("use_nested_tensor", property(lambda self: False)),),
}


def match_encoder(module, row):
    for theirs, attributes in _ROUND.items():
        if isinstance(module, theirs):
            if type(module).forward is not theirs.forward:
                raise Unsupported("its class has a forward of its own")
            swap(module, row, _as_written, attributes)


def _as_written(self, plain, *args, **kwargs):
    return plain(self, *args, **kwargs)


_as_written.runs = "its modules, in eval() too"


class _SDPA(torch.overrides.TorchFunctionMode):
    """Sends torch.nn.functional.scaled_dot_product_attention to the kernel, on this thread."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.scaled_dot_product_attention:
            return compat.scaled_dot_product_attention(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def _in_sdpa_mode(self, plain, *args, **kwargs):
    with _SDPA():
        return plain(self, *args, **kwargs)


_in_sdpa_mode.runs = "attention for F.scaled_dot_product_attention"


def match_sdpa(module, row):
    """A module whose own code, or a function of its file that this calls, calls PyTorch's attention function."""
    for cls in type(module).__mro__:
        if cls.__module__.startswith("torch."):
            return
        for function in filter(inspect.isfunction, vars(cls).values()):
            names = names_used(function)
            near = [inspect.unwrap(function).__globals__.get(name) for name in names]
            near = [f for f in near if inspect.isfunction(f) and f.__module__ == cls.__module__]
            if any("scaled_dot_product_attention" in n for n in (names, *map(names_used, near))):
                return swap(module, row, _in_sdpa_mode)


MATCHERS = {kind: [] for kind in KINDS}
MATCHERS["norms"] = [match_torch_norm, match_written_norm]
MATCHERS["attention"] = [match_multihead_attention, match_encoder, match_sdpa]
BEFORE, AFTER = [], []  # functions of the whole model: (model, report, options) and (model), for fastllm.hf


# --- the three public functions ---

_lock = threading.RLock()
_reports = weakref.WeakKeyDictionary()


def accelerate(
    model, *, attention=True, norms=True, mlp=True, rope=True, linear=True, loss=True, strict=False
) -> Report:
    """Put fastllm's kernels under a model, in place, and tell what runs where. `restore(model)` takes them out.

    model: any Hugging Face or PyTorch model. The keywords choose what is accelerated. Only this model's modules change:
    its parameters, state dict, dtype, device, hooks and what copies and pickles hold stay as they are. Calling it again
    decides anew. Two threads may run the model meanwhile: each module changes in one step, and both ways are right.
    strict=True raises RuntimeError, with the model as it was, where something of the chosen kinds is left alone.
    Raises TypeError where model is not a torch.nn.Module.

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
            for name, module in model.named_modules():
                if not isinstance(module, torch.jit.ScriptModule):
                    for kind in filter(options.get, KINDS):
                        _match(name, module, kind, report)
            if strict and report.left_alone:
                raise RuntimeError(f"accelerate: strict, and these are left alone:\n{Report(report.left_alone)}")
        except BaseException:
            restore(model)
            raise
        _reports[model] = report
    return report


def _match(name, module, kind, report):
    for matcher in MATCHERS[kind]:
        row = Row(name, type(module).__name__, kind)
        try:
            matcher(module, row)
        except Unsupported as why:
            row.runs, row.reason = "", str(why)
        if row.runs or row.reason:
            report.rows.append(row)
            return


def _load_hf(model):
    """Models of transformers need fastllm.hf; where there are none, transformers is not imported."""
    if any(cls.__module__.startswith("transformers.") for m in model.modules() for cls in type(m).__mro__):
        import fastllm.hf  # noqa: F401


def restore(model):
    """Give every module of `model` its own class and forward back; returns the model. Twice is once."""
    with _lock:
        for module in model.modules():
            _restore_module(module)
        for undo in AFTER:
            undo(model)
        _reports.pop(model, None)
    return model


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
