"""All layers of a BERT-like encoder in one C++ call: what is recognised, how exact it is, and when it stands back."""

import copy

import pytest
import torch
from check import assert_as_accurate
from torch import nn

from fastllm import dispatch, encoder
from fastllm.swap import Unsupported

pytestmark = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


class Block(nn.Module):
    """A layer as anybody might write it."""

    def __init__(self, width=36, heads=3, feed=50, activation="gelu", bias=True):
        super().__init__()
        self.heads, self.activation = heads, activation
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias) for _ in "qkvo")
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-12), nn.LayerNorm(width, eps=1e-5)
        self.up, self.down = nn.Linear(width, feed, bias), nn.Linear(feed, width, bias)
        self.dropout = nn.Dropout(0.1)

    def attend(self, x):
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for m in (self.q, self.k, self.v))
        o = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v
        return self.o(o.transpose(-2, -3).flatten(-2))

    def forward(self, x):
        x = self.norm1(x + self.dropout(self.attend(x)))
        return self.norm2(x + self.dropout(self.down(encoder.WRITTEN[self.activation](self.up(x)))))


def stack(number=2, seed=0, **options):
    torch.manual_seed(seed)
    layers = nn.ModuleList([Block(**options) for _ in range(number)]).eval()
    for p in layers.parameters():
        if p.ndim == 1:
            nn.init.normal_(p, 0.5, 0.5)
    return layers


def one_by_one(layers, x, bounds):
    """Each sequence by itself through the modules."""
    found = []
    for begin, end in zip(bounds, bounds[1:]):
        y = x[begin:end]
        for layer in layers if end > begin else ():
            y = layer(y)
        found.append(y)
    return torch.cat(found)


def tokens(lengths, width, seed=1):
    bounds = [0]
    for length in lengths:
        bounds.append(bounds[-1] + length)
    return torch.randn(bounds[-1], width, generator=torch.Generator().manual_seed(seed)), bounds


LENGTHS = {"one": [30], "short": [1], "few": [7, 0, 1, 12], "many": [40, 3, 65, 17, 64, 128], "wide": [300]}


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("sizes", [dict(), dict(width=64, heads=2, feed=200, bias=False, activation="relu")], ids=str)
@torch.no_grad()
def test_as_accurate_as_the_modules(sizes, lengths):
    layers = stack(**sizes)
    x, bounds = tokens(LENGTHS[lengths], layers[0].o.out_features)
    made = encoder.Encoder(layers, layers[0].heads, encoder.recognise(layers, layers[0].heads))
    before = x.clone()
    got = made(x, bounds)
    assert torch.equal(x, before)
    exact = one_by_one(copy.deepcopy(layers).double(), x.double(), bounds)
    assert_as_accurate(got, one_by_one(layers, x, bounds), exact)


@torch.no_grad()
def test_a_sequence_has_the_same_bits_in_any_batch_and_on_any_threads():
    layers = stack()
    made = encoder.Encoder(layers, 3, "gelu")
    x, bounds = tokens(LENGTHS["many"], 36)
    together, threads = made(x, bounds), torch.get_num_threads()
    for begin, end in zip(bounds, bounds[1:]):
        assert torch.equal(made(x[begin:end], [0, end - begin]), together[begin:end])
    try:
        torch.set_num_threads(1)
        assert torch.equal(made(x, bounds), together)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activation", encoder.WRITTEN)
def test_activations_are_recognised(activation):
    assert encoder.recognise(stack(activation=activation), 3) == activation


class NormFirst(Block):
    def forward(self, x):
        x = x + self.attend(self.norm1(x))
        return x + self.down(encoder.WRITTEN[self.activation](self.up(self.norm2(x))))


class Swapped(Block):
    def attend(self, x):
        self.q, self.k = self.k, self.q
        o = super().attend(x)
        self.q, self.k = self.k, self.q
        return o.flip(-1)


class Causal(Block):
    def attend(self, x):
        q, k, v = (m(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for m in (self.q, self.k, self.v))
        o = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(o.transpose(-2, -3).flatten(-2))


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_another_layer_is_not_taken():
    def own_linear(layers):
        layers[0].up = Scaled(36, 50)

    def own_eps(layers):
        layers[1].norm1.eps = 0.1  # read from each norm, so that this is no reason

    def other_activation(layers):
        layers[1].activation = "relu"

    def one_more(layers):
        layers[0].gate = nn.Linear(36, 50)

    for kind in (NormFirst, Swapped, Causal):
        layers = stack()
        for layer in layers:
            layer.__class__ = kind
        with pytest.raises(Unsupported):
            encoder.recognise(layers, 3)
    for change in (own_linear, other_activation, one_more):
        layers = stack()
        change(layers)
        with pytest.raises(Unsupported):
            encoder.recognise(layers, 3)
    with pytest.raises(Unsupported):
        encoder.recognise(stack(), 4), "the number of heads is tried too"
    with pytest.raises(Unsupported):
        encoder.recognise(stack(), 5)


@torch.no_grad()
def test_it_sees_changes_and_stands_back():
    layers = stack()
    made = encoder.Encoder(layers, 3, "gelu")
    x, bounds = tokens([9, 4], 36)

    def holds():
        exact = one_by_one(copy.deepcopy(layers).double(), x.double(), bounds)
        assert_as_accurate(made(x, bounds), one_by_one(layers, x, bounds), exact)

    holds()
    layers[1].up.weight.mul_(1.5)
    holds()
    layers[0].q.weight = nn.Parameter(torch.randn(36, 36))
    holds()
    layers[0].norm1.bias.data = torch.randn(36)
    holds()
    with torch.enable_grad():
        assert made(x, bounds) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert made(x, bounds) is None
    with dispatch.backend("reference"):
        assert made(x, bounds) is None
    layers[0].dropout.train()
    assert made(x, bounds) is None
    layers[0].dropout.eval()
    hook = layers[1].down.register_forward_hook(lambda *_: None)
    assert made(x, bounds) is None
    hook.remove()
    object.__setattr__(layers[0].o, "forward", lambda x: x)
    assert made(x, bounds) is None
    del layers[0].o.forward
    holds()
    layers[1].v = Scaled(36, 36)
    made.modules = [m for layer in layers for m in layer.modules()]
    assert made(x, bounds) is None
    layers.bfloat16()
    assert made(x, bounds) is None and made(x.bfloat16(), bounds) is None
