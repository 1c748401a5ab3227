"""ring_attention on 2 and 4 ranks: outputs and gradients against fp64 and beside PyTorch's kernel on the whole."""

import functools
import types

import pytest
import ranks
import torch
from check import assert_as_accurate, run
from test_attention import arguments, torch_attention
from torch.utils._python_dispatch import TorchDispatchMode

import fastllm
from fastllm import reference
from fastllm.model import Config, Transformer
from fastllm.nn import sequence_parallel
from fastllm.ops import ring

SIZES = dict(B=2, H=4, Hkv=2, T=48, S=48, D=24, Dv=24)
ALIBI, SINK = torch.linspace(0.02, 0.5, 4), torch.linspace(-1.0, 1.5, 4)
KEPT = torch.arange(48)[None, None, None, :] < torch.tensor([48, 19]).view(2, 1, 1, 1)  # padding behind a sequence
CASES = {  # name -> (sharding, dtype, sizes, options)
    f"{name}, {sharding}": (sharding, dtype, sizes, options)
    for sharding in ring.SHARDINGS
    for name, dtype, sizes, options in (
        ("full", torch.float32, {}, {}),
        ("causal", torch.float32, {}, dict(causal=True)),
        ("causal bf16", torch.bfloat16, {}, dict(causal=True)),
        ("causal fp16", torch.float16, dict(Hkv=1), dict(causal=True)),
        ("causal window", torch.float32, {}, dict(causal=True, window=(9, 0))),
        ("window, bf16", torch.bfloat16, {}, dict(window=(5, 3))),
        ("another D_v", torch.float32, dict(Dv=40, Hkv=4), dict(causal=True)),
        ("more keys", torch.float32, dict(S=80), dict(causal=True)),
        ("fewer keys, top-left", torch.float32, dict(S=32), dict(causal=True, q_offset=0)),
        ("rows that see nothing", torch.float32, {}, dict(causal=True, q_offset=-20)),
        ("scale, soft-cap", torch.float32, {}, dict(scale=0.4, softcap=2.0)),
        ("ALiBi", torch.float32, {}, dict(causal=True, alibi_slopes=ALIBI)),
        ("sink", torch.float32, {}, dict(causal=True, sink=SINK)),
        ("sink, bf16", torch.bfloat16, {}, dict(causal=True, window=(9, 0), sink=SINK)),
        ("padding", torch.float32, {}, dict(mask=KEPT)),
        ("padding, causal", torch.float32, {}, dict(mask=KEPT, causal=True)),
        ("short", torch.float32, dict(T=8, S=8), dict(causal=True)),
    )
}
PLAIN = {"full", "causal", "causal bf16", "causal fp16", "causal window", "window, bf16", "another D_v", "more keys"}


def tensors(dtype, sizes):
    """q, k, v, the sink's stand-in, and upstream gradients of o and lse; the same on every rank."""
    B, H, Hkv, T, S, D, Dv = (SIZES | sizes).values()
    random = torch.Generator().manual_seed(1)
    shapes = (B, H, T, D), (B, Hkv, S, D), (B, Hkv, S, Dv), (B, H, T, Dv), (B, H, T)
    return [torch.randn(shape, generator=random).to(dtype) for shape in shapes]


def with_sink(options, function):
    """`function` of q, k, v and options as one of all differentiable tensors."""
    if "sink" not in options:
        return functools.partial(function, **options)
    rest = {name: value for name, value in options.items() if name != "sink"}
    return lambda q, k, v, sink: function(q, k, v, sink=sink, **rest)


def inputs_of(options, dtype, q, k, v):
    return [q, k, v, options["sink"].to(dtype)] if "sink" in options else [q, k, v]


def one_rank(rank, count, folder):
    found = {}
    for name, (sharding, dtype, sizes, options) in CASES.items():
        shards = ring.Shards(None, sharding)
        q, k, v, do, dlse = (shards.shard(x, 2) for x in tensors(dtype, sizes))
        if "mask" in options:
            options = options | dict(mask=shards.shard(options["mask"], 3))
        ours = functools.partial(fastllm.ring_attention, sharding=sharding, return_lse=True)
        for backend in ("cpu", "reference") if "causal" in name else ("cpu",):
            with fastllm.backend(backend):
                outputs, grads = run(with_sink(options, ours), inputs_of(options, dtype, q, k, v), [do, dlse])
                again = run(with_sink(options, ours), inputs_of(options, dtype, q, k, v), [do, dlse])
            found[name, backend] = *outputs, *grads
            same = all(torch.equal(a, b) for a, b in zip(found[name, backend], again[0] + again[1], strict=True))
            assert same, f"{name}: two runs differ"
    for backend in ("cpu", "reference"):
        q, k, v, do, dlse = (ring.Shards().shard(x, 2) for x in tensors(torch.float32, {}))
        torch.manual_seed(3)
        dropped = functools.partial(fastllm.ring_attention, causal=True, dropout_p=0.3, return_lse=True)
        with fastllm.backend(backend):
            found["dropout", backend] = sum(run(dropped, [q, k, v], [do, dlse]), [])
    found["facts"] = facts(rank, count)
    torch.save(found, f"{folder}/{count}-{rank}.pt")


class Watch(TorchDispatchMode):
    """Counts the calls of ops by name and keeps the most elements of a tensor that any op made."""

    def __init__(self):
        super().__init__()
        self.calls, self.largest = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def facts(rank, count):
    """What one rank computes, sends and holds."""
    q = torch.randn(1, 2, 64 // count, 16, requires_grad=True)
    found = {}
    for name, sharding, options in (
        ("full", "contiguous", {}),
        ("causal", "contiguous", dict(causal=True)),
        ("zigzag", "zigzag", dict(causal=True)),
        ("window", "contiguous", dict(causal=True, window=(4, 0))),
        ("own", "contiguous", dict(window=(0, 0))),
    ):
        with Watch() as watch:
            fastllm.ring_attention(q, q, q, sharding=sharding, **options).sum().backward()
        calls = watch.calls
        found[name] = dict(
            forward=calls.get("fastllm::attention_fwd", 0),
            backward=calls.get("fastllm::attention_bwd", 0),
            sent=calls.get("c10d::send", 0),
            largest=watch.largest / q.numel(),
        )
    return found


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ring")
    ranks.run(one_rank, request.param, folder)
    return request.param, [torch.load(folder / f"{request.param}-{rank}.pt") for rank in range(request.param)]


def joined(parts, sharding, dim=2):
    """The whole sequence from every rank's part."""
    if sharding == "contiguous":
        return torch.cat(parts, dim)
    early, late = zip(*(part.chunk(2, dim) for part in parts), strict=True)
    return torch.cat([*early, *reversed(late)], dim)


@pytest.mark.parametrize("name", CASES)
def test_is_as_accurate_as_attention_on_the_whole(results, name):
    sharding, dtype, sizes, options = CASES[name]
    q, k, v, *grads = tensors(dtype, sizes)
    of = arguments(**{key: value for key, value in options.items() if key != "sink"})

    def exact(q, k, v, sink=None):
        return reference.attention(q, k, v, sink=sink, **of(q, k))

    inputs = inputs_of(options, dtype, q, k, v)
    truth = run(exact, inputs, grads, torch.float64)
    peer = run(exact, inputs, grads)
    if name.rpartition(",")[0] in PLAIN:  # PyTorch's kernel has no log-sum-exp, so no upstream gradient for it
        peer[0][0] = torch_attention(of)(q, k, v)
    for backend in ("cpu", "reference") if "causal" in name else ("cpu",):
        parts = list(zip(*(found[name, backend] for found in results[1]), strict=True))
        got = [joined(part, sharding) for part in parts[:5]]
        got += [sum(x.double() for x in part).to(dtype) for part in parts[5:]]  # the sink's
        for what, a, b, c in zip(("o", "lse", "dq", "dk", "dv", "dsink"), got, sum(peer, []), sum(truth, [])):
            assert_as_accurate(a, b.to(a.dtype), c, f"{name}, {backend}: {what}")


def test_dropout(results):
    """Each block drops by a seed of its own: the one that torch's generator draws, plus the block's number."""
    P, found = results
    q, k, v, *grads = tensors(torch.float32, {})
    B, H, part = *q.shape[:2], q.shape[2] // P
    torch.manual_seed(3)
    seed = torch.randint(2**62, ())
    kept = [
        [reference.dropout_keep(seed + row * P + column, 0.3, B, H, part, part) for column in range(P)]
        for row in range(P)
    ]
    kept = torch.cat([torch.cat(row, 3) for row in kept], 2)

    def exact(q, k, v):
        s = reference.attention_scores(q, k, scale=q.shape[-1] ** -0.5, window_right=0)
        p = s.softmax(-1) * kept.to(s.dtype)
        return p @ v.repeat_interleave(H // v.shape[1], 1), s.logsumexp(-1)

    peer, truth = run(exact, [q, k, v], grads), run(exact, [q, k, v], grads, torch.float64)
    for backend in ("cpu", "reference"):
        parts = zip(*(rank["dropout", backend] for rank in found), strict=True)
        for what, part, b, c in zip(("o", "lse", "dq", "dk", "dv"), parts, sum(peer, []), sum(truth, []), strict=True):
            assert_as_accurate(torch.cat(part, 2), b, c, f"{backend}: {what}")


def test_computes_only_what_is_seen(results):
    """In blocks of one part: all P^2, then those on and below the diagonal; zigzag has the same number on all ranks."""
    P, found = results
    counts = lambda name, what="forward": [rank["facts"][name][what] for rank in found]  # noqa: E731
    assert counts("full") == [P] * P
    assert counts("causal") == [rank + 1 for rank in range(P)]
    assert counts("zigzag") == [2 * P + 1] * P  # of 2P parts
    assert counts("window") == [1] + [2] * (P - 1)
    assert counts("own") == [1] * P
    for name in ("full", "causal", "zigzag", "window", "own"):
        assert counts(name, "backward") == counts(name)


def test_sends_only_as_far_as_is_seen(results):
    """Keys and values forward and backward P - 1 times, their gradients P times; a short window reaches one rank."""
    P, found = results
    for rank in found:
        assert {rank["facts"][name]["sent"] for name in ("full", "causal", "zigzag")} == {2 * (P - 1) * 2 + 2 * P}
        assert rank["facts"]["window"]["sent"] == 2 * 1 * 2 + 2 * 2
        assert rank["facts"]["own"]["sent"] == 0


def test_holds_nothing_larger_than_its_part(results):
    for rank in results[1]:
        assert {facts["largest"] for facts in rank["facts"].values()} == {1.0}


def test_needs_a_process_group():
    q = torch.randn(1, 1, 4, 8)
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        fastllm.ring_attention(q, q, q)
    with pytest.raises(ValueError, match="contiguous, zigzag, got 'stripes'"):
        fastllm.ring_attention(q, q, q, sharding="stripes")


MODELS = {  # name -> (config, sharding)
    "rotary": (dict(positions="rotary", norm="rmsnorm", activation="swiglu", kv_heads=1), "zigzag"),
    "rotary, window": (dict(positions="rotary", window=(5, 0)), "contiguous"),
    "learned": (dict(positions="learned", activation="gelu"), "zigzag"),
    "sinusoidal": (dict(), "contiguous"),
    "encoder-decoder": (dict(kind="encoder-decoder", positions="rotary"), "zigzag"),
}


def model_and_batch(config):
    torch.manual_seed(0)
    sizes = dict(vocab=50, d_model=16, heads=2, layers=2, d_ff=24, dropout=0.0, max_len=32)
    model = Transformer(Config(**sizes | config))
    tokens, source = torch.randint(50, (2, 33)), torch.randint(50, (2, 16))
    batch = dict(tokens=tokens[:, :-1], targets=tokens[:, 1:])
    return model, batch | (dict(source=source) if "kind" in config else {})


def losses_and_gradients(rank, count, folder):
    found = {}
    for name, (config, sharding) in MODELS.items():
        model, batch = model_and_batch(config)
        shards = ring.Shards(None, sharding)
        sequence_parallel(model, shards)
        loss = model(**{key: shards.shard(x) for key, x in batch.items()})
        loss.backward()
        found[name] = loss.detach(), {n: p.grad for n, p in model.named_parameters()}
    torch.save(found, f"{folder}/models-{rank}.pt")


@pytest.fixture(scope="module")
def of_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ranks.run(losses_and_gradients, 2, folder)
    return [torch.load(folder / f"models-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("name", MODELS)
def test_models(of_models, name):
    """The mean of the ranks' losses and gradients is that of the whole sequence, with the error of one process."""
    model, batch = model_and_batch(MODELS[name][0])
    exact, _ = model_and_batch(MODELS[name][0])
    for m in (model, exact.double()):
        m(**batch).backward()
    loss = torch.stack([found[name][0] for found in of_models]).mean()
    assert_as_accurate(loss, model(**batch), exact(**batch), "loss")
    pairs = zip(model.named_parameters(), exact.parameters(), strict=True)
    flat = [
        (sum(found[name][1][n] for found in of_models) / 2, parameter.grad, true.grad) for (n, parameter), true in pairs
    ]
    assert_as_accurate(*(torch.cat([x.flatten() for x in column]) for column in zip(*flat, strict=True)), "gradients")


def test_what_a_part_of_a_sequence_cannot_do():
    model, batch = model_and_batch({})
    part = types.SimpleNamespace(ranks=2, positions=lambda length, device: torch.arange(length), group=None)
    sequence_parallel(model, part)
    with pytest.raises(ValueError, match="40 positions, but max_len=32"):
        model(torch.zeros(1, 20, dtype=torch.int64))
    with pytest.raises(ValueError, match="cache holds a whole sequence"):
        model.generate(batch["tokens"][:, :4], 2)
    assert sequence_parallel(model, None).generate(batch["tokens"][:, :4], 2).shape == (2, 6)
    with pytest.raises(ValueError, match="classification head"):
        sequence_parallel(Transformer(Config(vocab=9, kind="encoder", classes=2, layers=1)), part)
    with pytest.raises(ValueError, match=r"Linear has no fastllm\.nn\.Attention"):
        sequence_parallel(torch.nn.Linear(2, 2), part)
    with pytest.raises(ValueError, match="accelerated=True"):
        sequence_parallel(Transformer(Config(vocab=9, layers=1), accelerated=False), part)
