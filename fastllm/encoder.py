"""A BERT-like encoder whose layers are one C++ call: one layer is tried, all are packed once, and watched for changes.

    x = attention_norm(x + out(attend(query(x), key(x), value(x))))
    x = feed_norm(x + down(act(up(x))))

Encoding one sentence on PyTorch is mostly calls, and products of so few rows that a weight is read for little. Here the
weights lie in the order in which the product reads them, which takes as much memory again as they do.
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastllm import dispatch, trial
from fastllm.addresses import Addresses, threads_that_wait
from fastllm.decoder import Linear, _norm
from fastllm.ops._common import is_autocast
from fastllm.ops.linear import ACTIVATIONS
from fastllm.swap import Unsupported, forward_of

WRITTEN = {  # PyTorch's function by the name in ACTIVATIONS
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


@dataclass
class Layer:
    """The parts of one layer, whatever its class calls them: they are known by their order and sizes."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    out: nn.Linear
    up: nn.Linear
    down: nn.Linear
    attention_norm: nn.LayerNorm
    feed_norm: nn.LayerNorm

    @classmethod
    def of(cls, module):
        linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
        norms = [m for m in module.modules() if isinstance(m, nn.LayerNorm)]
        if len(linears) != 6 or len(norms) != 2:
            raise Unsupported("not six linear layers and two norms")
        made = cls(*linears, *norms)
        width, feed = made.out.out_features, made.up.out_features
        sizes = [(m.in_features, m.out_features) for m in linears]
        if sizes != [(width, width)] * 4 + [(width, feed), (feed, width)]:
            raise Unsupported("linear layers of other sizes")
        for part in (*linears, *norms):
            plain = nn.Linear if isinstance(part, nn.Linear) else nn.LayerNorm
            if forward_of(part) is not plain.forward or part.weight is None:
                raise Unsupported("linear layers or norms with more to do")
        if any(norm.normalized_shape != (width,) for norm in norms):
            raise Unsupported("norms of another size")
        return made

    def __call__(self, x, heads, activation):
        q, k, v = (m(x).unflatten(-1, (heads, -1)).transpose(-2, -3) for m in (self.query, self.key, self.value))
        x = self.attention_norm(x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(-2, -3).flatten(-2)))
        return self.feed_norm(x + self.down(WRITTEN[activation](self.up(x))))


def recognise(layers, heads) -> str:
    """The activation of layers that are `Layer`s with so many heads: the first one's own forward is run on numbers of
    ours beside it, and the others are of its kind. Raises Unsupported for any other."""
    if any("forward" in vars(m) or trial.has_hooks(m) for layer in layers for m in layer.modules()):
        raise Unsupported("somebody looks inside")
    parts = Layer.of(layers[0])
    width = parts.out.out_features
    if width % heads or any(_kind(layer) != _kind(layers[0]) for layer in layers):
        raise Unsupported("layers that differ, or heads that do not fit")
    probe = copy.deepcopy(layers[0]).double().eval()
    for n, p in enumerate(probe.parameters()):
        p.data = trial.numbers(*p.shape, first=10 * n) / math.sqrt(p.shape[-1]) + (p.ndim == 1)
    x = trial.numbers(1, 5, width)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            y = probe(x)
        except Exception as problem:  # whatever it is, the layer is not of this form
            raise Unsupported(f"its forward could not be tried: {problem}") from problem
        y = y[0] if isinstance(y, tuple) else y
        for activation in WRITTEN:
            if isinstance(y, torch.Tensor) and trial.same(y, Layer.of(probe)(x, heads, activation)):
                return activation
    raise Unsupported("its forward is another one")


def _kind(layer):
    """What layers of one encoder have in common: classes, sizes, and the numbers and switches in them."""
    simple = (bool, int, float, str)
    return [
        (name, type(m), [p.shape for p in m.parameters(recurse=False)])
        + tuple((k, v) for k, v in vars(m).items() if isinstance(v, simple) and k != "layer_idx")
        for name, m in layer.named_modules()
    ]


def state_of(modules):
    """Changes with a submodule, with a parameter that is replaced or written to, and with the instruction set; None
    where somebody trains or looks inside."""
    found = [dispatch.extension.selected()]
    for m in modules:
        own = vars(m)
        if own["training"] or own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"]:
            return None
        if own["_backward_pre_hooks"] or "forward" in own:
            return None
        found.append(type(m))
        found += map(id, own["_modules"].values())
        for p in own["_parameters"].values():
            if p is not None:
                if p.is_inference():  # which has no version
                    return None
                found += id(p), p._version, p.data_ptr()
    return found


class Encoder:
    """The layers of a module, in one call. `heads` and `activation` are as `recognise` has found them."""

    def __init__(self, layers, heads, activation):
        self.layers, self.heads, self.activation = list(layers), heads, activation
        self.modules = [m for layer in layers for m in layer.modules()]
        self._state = self._made = None

    def __call__(self, x, bounds):
        """The last hidden states of x [N, width], of which bounds are where sequences begin, and N; None where this
        call is the modules' own: with gradients, in training, in another dtype, or where somebody looks inside."""
        if torch.is_grad_enabled() or x.dtype != torch.float32 or is_autocast(x) or dispatch.extension is None:
            return None
        if (made := self._ready()) is None or dispatch.choose("encoder", x, optional=True) != "cpu":
            return None
        native, _, rows = made
        x = x.contiguous().clone()
        native.run(x.data_ptr(), bounds)
        for row in rows:
            row.calls += 1
        return x

    def _ready(self):
        """(C++ object, addresses that it has, rows of the report of all modules inside), as the modules are now."""
        state = state_of(self.modules)
        if state is None:
            return None
        if state != self._state:
            self._made, self._state = self._pack(), state
        return self._made

    def _pack(self):
        parameters = [p for layer in self.layers for p in layer.parameters()]
        if any(p.dtype != torch.float32 or not p.is_cpu or type(p) is not nn.Parameter for p in parameters):
            return None
        try:
            layers = [Layer.of(layer) for layer in self.layers]
        except Unsupported:
            return None
        kept, read = Addresses(), Addresses()  # of linear layers C++ has copies
        given = {"heads": self.heads, "activation": ACTIVATIONS[self.activation], "threads": threads_that_wait()}
        given |= {"scale": (layers[0].out.in_features // self.heads) ** -0.5}
        native = dispatch.extension.Encoder(given | {"layers": [_described(layer, kept, read) for layer in layers]})
        return native, kept, [row for m in self.modules for row in (vars(m).get("_fastllm") or {}).values()]


def _described(layer, kept, read):
    def linear(parts):
        bias = None
        if any(m.bias is not None for m in parts):
            bias = torch.cat([m.weight.new_zeros(m.out_features) if m.bias is None else m.bias.detach() for m in parts])
        return read.linear(Linear(torch.cat([m.weight.detach() for m in parts]), bias))

    made = {"qkv": linear([layer.query, layer.key, layer.value])}
    made |= {name: linear([getattr(layer, name)]) for name in ("out", "up", "down")}
    return made | {name: kept.norm(_norm(getattr(layer, name))) for name in ("attention_norm", "feed_norm")}
