"""attention: output, log-sum-exp and every gradient, each backend, against fp64 and beside PyTorch's own kernel."""

import itertools

import pytest
import torch
from check import assert_as_accurate, compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import attention as ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def arguments(causal=False, window=None, q_offset=None, scale=None, **rest):
    """The public function's arguments as a function of shapes, in the reference's terms."""

    def of(q, k):
        left, right = (-1 if x is None else x for x in (window or (-1, -1)))
        right = 0 if causal and right < 0 else min(right, 0) if causal else right
        return dict(
            scale=q.shape[-1] ** -0.5 if scale is None else scale,
            q_offset=k.shape[2] - q.shape[2] if q_offset is None else q_offset,
            window_left=left,
            window_right=right,
            **rest,
        )

    return of


def torch_attention(of):
    """PyTorch's kernel on the same problem, its mask made dense. It has no other options."""

    def peer(q, k, v):
        args = of(q, k)
        mask = args.pop("mask", None)
        scale = args.pop("scale")
        scores = reference.attention_scores(q.detach(), k.detach(), scale=1.0, mask=mask, **args)
        visible = scores > -torch.inf
        sees = visible.any(-1, keepdim=True)  # SDPA is asked only for rows that see something
        o = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=visible | ~sees, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return o * sees

    return peer


def tensors(B=2, H=4, Hkv=2, T=37, S=53, D=40, Dv=None, device="cpu"):
    q, k = torch.randn(B, H, T, D), torch.randn(B, Hkv, S, D)
    v = torch.randn(B, Hkv, S, Dv or D)
    return [x.to(device) for x in (q, k, v)], torch.randn(B, H, T, Dv or D).to(device)


def check(shape, dtype, device, lse=False, **options):
    inputs, do = tensors(device=device, **shape)
    of = arguments(**options)
    grads = [do, torch.randn(do.shape[:3]).to(device)] if lse else [do]

    def ours(q, k, v):
        return fastllm.attention(q, k, v, return_lse=lse, **options)

    def exact(q, k, v):
        o, l = reference.attention(q, k, v, **of(q, k))
        return (o, l) if lse else o

    compare(ours, exact if lse else torch_attention(of), exact, inputs, grads, dtype)


SMALL = dict(B=1, H=2, Hkv=1, T=33, S=47, D=24)
OPTIONS = {
    "full": {},
    "causal": dict(causal=True),
    "causal top-left": dict(causal=True, q_offset=0),
    "offset": dict(causal=True, q_offset=-20),
    "window": dict(window=(7, 3)),
    "window left": dict(window=(9, None)),
    "causal window": dict(causal=True, window=(16, 5)),
    "scale": dict(scale=0.37),
    "negative scale": dict(scale=-0.2),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name, dtype):
    check(SMALL, dtype, backend, **OPTIONS[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["full", "causal", "offset", "causal window"])
def test_lse_is_differentiable(backend, name, dtype):
    check(SMALL, dtype, backend, lse=True, **OPTIONS[name])


@pytest.mark.parametrize(
    "shape",
    [
        dict(H=3, Hkv=3, T=1, S=1, D=1),
        dict(H=1, Hkv=1, T=1, S=70, D=16),
        dict(H=6, Hkv=2, T=15, S=17, D=33),
        dict(H=4, Hkv=1, T=63, S=95, D=64),
        dict(H=2, Hkv=2, T=64, S=96, D=64),
        dict(H=2, Hkv=1, T=65, S=97, D=65, Dv=31),
        dict(B=1, H=1, Hkv=1, T=129, S=50, D=80, Dv=96),
        dict(B=1, H=2, Hkv=2, T=16, S=130, D=128),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(backend, shape, dtype, causal):
    check(shape, dtype, backend, causal=causal)


@pytest.mark.parametrize("shape", [(1, 1, 33, 47), (1, 2, 1, 47), (1, 1, 1, 47), (33, 47), (1, 1, 33, 1), ()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_mask(backend, shape, dtype, causal):
    mask = (torch.rand(shape) > 0.4).to(backend)
    check(SMALL, dtype, backend, mask=mask, causal=causal)


# Options that PyTorch's kernel does not have: the peer is the reference, run in the same dtype.
# Gradients of a bias or a sink per head are few numbers: with two heads the rule would be a lottery. Elsewhere two do,
# at a quarter of what Triton's interpreter takes for eight.
PER_HEAD = {"sink", "bias per head"}
MANY, FEW = dict(H=8, Hkv=4), dict(H=2, Hkv=1)
SCORES = {
    "softcap": dict(softcap=1.5),
    "bias": dict(bias=(1, "H", 33, 47)),
    "bias per batch": dict(bias=(2, 1, 33, 47)),
    "bias for all": dict(bias=(33, 47)),
    "bias per key": dict(bias=(2, "H", 1, 47)),
    "bias per query": dict(bias=("H", 33, 1)),
    "bias per head": dict(bias=("H", 1, 1)),
    "alibi": dict(alibi_slopes=("H",)),
    "alibi per batch": dict(alibi_slopes=(2, "H")),
    "sink": dict(sink=("H",)),
}
RULES = {
    "": {},
    "causal": dict(causal=True),
    "window": dict(window=(9, 4)),
    "mask": dict(mask=(2, 1, 33, 47)),
    "unseeing": dict(mask="hidden rows"),
}


def check_scores(backend, dtype, options, shape):
    """`check` for options with tensors, of which bias and sink have gradients; shapes stand for random tensors."""
    inputs, do = tensors(device=backend, **shape)
    options = dict(options)
    for name in ("bias", "alibi_slopes", "sink", "mask"):
        if name in options:
            hidden_rows = options[name] == "hidden rows"
            sizes = (33, 47) if hidden_rows else [shape["H"] if n == "H" else n for n in options[name]]
            x = torch.randn(sizes, device=backend)
            if hidden_rows:
                x[[0, 7, 32]] = -9
            options[name] = x > -0.5 if name == "mask" else x.abs() if name == "alibi_slopes" else x
    leaves = [name for name in ("bias", "sink") if name in options]
    fixed = {name: x for name, x in options.items() if name not in leaves}
    of = arguments(**fixed)

    def ours(q, k, v, *scores):
        return fastllm.attention(q, k, v, return_lse=True, **fixed, **dict(zip(leaves, scores, strict=True)))

    def exact(q, k, v, *scores):
        return reference.attention(q, k, v, **of(q, k), **dict(zip(leaves, scores, strict=True)))

    grads = [do, torch.randn(do.shape[:3], device=backend)]
    compare(ours, exact, exact, inputs + [options[name] for name in leaves], grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", SCORES)
def test_scores(backend, name, rule, dtype):
    shape = dict(SMALL, B=2) | (MANY if name in PER_HEAD else FEW)
    check_scores(backend, dtype, SCORES[name] | RULES[rule], shape)


@pytest.mark.parametrize("pair", list(itertools.combinations(["softcap", "bias", "alibi", "sink"], 2)), ids="+".join)
@pytest.mark.parametrize("rule", RULES)
def test_pairs_of_scores(backend, pair, rule):
    is_fast = dispatch._forced == "cpu"  # and the more numbers, the less is the largest error of a gradient a lottery
    shape = dict(SMALL, B=2) | (MANY if PER_HEAD & {*pair} or is_fast else FEW)
    check_scores(backend, torch.float32, SCORES[pair[0]] | SCORES[pair[1]] | RULES[rule], shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, dict(causal=True, softcap=2.0), dict(window=(11, 2))], ids=str)
def test_dropout(backend, dtype, options):
    """Which probabilities are dropped follows from the seed alone: the reference, told the seed, drops the same."""
    inputs, do = tensors(device=backend, **dict(SMALL, B=2))
    of = arguments(**options)
    torch.manual_seed(5)
    seed = torch.randint(2**62, (), device=backend)

    def ours(q, k, v):
        torch.manual_seed(5)
        return fastllm.attention(q, k, v, dropout_p=0.3, **options)

    def exact(q, k, v):
        return reference.attention(q, k, v, dropout_p=0.3, seed=seed, **of(q, k))[0]

    compare(ours, exact, exact, inputs, [do], dtype)


@pytest.mark.parametrize("p", [0.1, 0.6])
def test_dropout_drops_the_same_everywhere(backend, p):
    """Bit for bit: where v is the identity, o shows which probabilities are left."""
    B, H, T, S = 2, 2, 35, 50
    q, k = torch.randn(B, H, T, 8, device=backend), torch.randn(B, 1, S, 8, device=backend)
    v = torch.eye(S, device=backend).expand(B, 1, S, S)
    torch.manual_seed(7)
    o = fastllm.attention(q, k, v, dropout_p=p)
    torch.manual_seed(7)
    keep = reference.dropout_keep(torch.randint(2**62, (), device=backend), p, B, H, T, S)
    assert torch.equal(o != 0, keep != 0)


@pytest.mark.parametrize("name", ["attention", "varlen", "scaled_dot_product_attention"])
def test_dropout_of_everything(name):
    """As PyTorch's kernel: zeros, with gradients of zeros; lse does not see it."""
    inputs = [x.requires_grad_() for x in tensors(B=1, H=2, T=5, S=5, D=8)[0]]
    if name == "scaled_dot_product_attention":
        o, lse = fastllm.compat.scaled_dot_product_attention(*inputs, dropout_p=1.0, enable_gqa=True), None
    elif name == "varlen":
        packed = [x[0].transpose(0, 1) for x in inputs]
        bounds = dict(cu_seqlens_q=torch.tensor([0, 2, 5]), cu_seqlens_k=torch.tensor([0, 2, 5]))
        o, lse = fastllm.attention_varlen(*packed, **bounds, dropout_p=1.0, return_lse=True)
        assert torch.equal(lse, fastllm.attention_varlen(*packed, **bounds, return_lse=True)[1])
    else:
        o, lse = fastllm.attention(*inputs, dropout_p=1.0, return_lse=True)
        assert torch.equal(lse, fastllm.attention(*inputs, return_lse=True)[1])
    grads = torch.autograd.grad(o, inputs, torch.randn(o.shape), create_graph=True)
    assert not any(x.any() for x in (o, *grads, *torch.autograd.grad(grads[0].sum(), inputs)))


def test_dropout_rate_and_seeds():
    keep = reference.dropout_keep(torch.tensor(3), 0.25, 2, 3, 64, 65)
    assert abs((keep == 0).double().mean() - 0.25) < 0.01 and ((keep == 0) | (keep == 1 / 0.75)).all()
    assert not torch.equal(keep, reference.dropout_keep(torch.tensor(4), 0.25, 2, 3, 64, 65))
    q = torch.randn(1, 2, 8, 4)
    one, two = (fastllm.attention(q, q, q, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, S", [(1, 1), (5, 1), (33, 1), (1, 200), (9, 70), (65, 150)])
def test_a_single_key_has_no_gradient_of_scores(cpu_backend, T, S, dtype):
    """Its probability is 1 whatever its score: exactly 0 comes back, as from PyTorch's materialised softmax."""
    inputs, do = tensors(H=8, Hkv=4, T=T, S=S, D=64)
    mask = torch.zeros(T, S, dtype=torch.bool)
    mask[torch.arange(T), torch.randint(S, (T,))] = True
    bias = torch.randn(T, S)
    leaves = [x.to(dtype) for x in (*inputs, bias)]
    _, (dq, dk, dv, dbias) = run(
        lambda q, k, v, bias: fastllm.attention(q, k, v, mask=mask, bias=bias), leaves, [do.to(dtype)]
    )
    assert not dq.any() and not dk.any() and not dbias.any()
    assert torch.isfinite(dv).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keys", [2, 3, None])
@pytest.mark.parametrize("T, S, D", [(1, 130, 128), (4, 33, 64), (9, 97, 80), (33, 47, 128), (70, 12, 64)])
def test_few_queries_or_keys(cpu_backend, T, S, D, keys, dtype):
    """Where little is summed, the order of every sum shows. Heads enough that errors are statistics, not a lottery."""
    shape = dict(B=4, H=8, Hkv=4, T=T, S=S, D=D)
    options = dict(mask=torch.rand(T, S).argsort(-1) < keys) if keys else {}
    check(shape, dtype, "cpu", **options)
    inputs, do = tensors(**shape)
    of = arguments(**options)

    def ours(q, k, v, bias):
        return fastllm.attention(q, k, v, bias=bias, return_lse=True, **options)

    def exact(q, k, v, bias):
        return reference.attention(q, k, v, bias=bias, **of(q, k))

    grads = [do, torch.randn(do.shape[:3])]
    compare(ours, exact, exact, [*inputs, torch.randn(1, 8, T, S)], grads, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, S", [(1, 1100), (3, 600), (2, 513), (8, 70)])
@pytest.mark.parametrize("name", ["plain", "lse", "causal", "window", "mask", "softcap", "sink", "all"])
def test_few_queries_of_many_keys(cpu_backend, name, T, S, dtype):
    """The rows of a key head together, forward and backward; where a bias has no gradient, with it."""
    B, heads = 2, 8
    inputs, do = tensors(B=B, H=heads, Hkv=heads // 2, T=T, S=S, D=40, Dv=24)
    if T == 1:  # with one probability that outweighs the others, its rounding alone would be the largest error
        inputs[0] *= 0.25
    alibi, bias, sink = torch.rand(B, heads), torch.randn(B, 1, T, S), torch.randn(heads)
    mask = torch.rand(B, 1, 1, S) < 0.7
    options = {
        "causal": dict(causal=True),
        "window": dict(window=(S - 20, 2), q_offset=S - 40),
        "mask": dict(mask=mask),
        "softcap": dict(softcap=1.5),
        "all": dict(causal=True, window=(S - 20, -1), softcap=1.5, alibi_slopes=alibi, bias=bias, mask=mask),
    }.get(name, {})
    leaves = [sink] if name in ("sink", "all") else []
    of = arguments(**options)

    def ours(q, k, v, *sink):
        return fastllm.attention(q, k, v, return_lse=True, **options, **dict(zip(["sink"], sink, strict=False)))

    def exact(q, k, v, *sink):
        return reference.attention(q, k, v, **of(q, k), **dict(zip(["sink"], sink, strict=False)))

    grads = [do, torch.randn(do.shape[:3]) if name in ("lse", "all") else None]
    compare(ours, exact, exact, [*inputs, *leaves], grads, dtype)


@pytest.mark.parametrize("S", [100, 1500])
def test_lse_between_the_passes(cpu_backend, S):
    """Every gradient is made from it: its sum of exponentials is as close to fp64 as PyTorch's, for many keys too."""
    (q, k, v), _ = tensors(B=1, H=16, Hkv=16, T=40, S=S, D=32)
    lse = ops.attention_fwd("cpu", q, k, v, *(None,) * 5, 0.2, 0.0, 0, -1, -1, 0.0)[1]
    truth = torch.logsumexp(q.double() @ k.double().mT * 0.2, -1)
    scores = q @ k.mT * 0.2
    top = scores.amax(-1)
    peer = top.double() + (scores - top[..., None]).exp().sum(-1).double().log()
    assert_as_accurate((lse - truth).exp(), (peer - truth).exp(), torch.ones_like(truth), "sums")


def test_row_that_sees_nothing(backend):
    (q, k, v), do = tensors(device=backend, T=20, S=12)
    mask = torch.ones(20, 12, dtype=torch.bool, device=backend)
    mask[3] = False
    (o, lse), grads = run(
        lambda q, k, v: fastllm.attention(q, k, v, mask=mask, causal=True, return_lse=True),
        (q, k, v),
        [do, torch.ones(do.shape[:3], device=backend)],
    )
    hidden = torch.zeros(20, dtype=torch.bool)
    hidden[:8] = True  # causal, bottom-right: the first T - S queries stand before every key
    hidden[3] = True
    assert (o[:, :, hidden] == 0).all() and (lse[:, :, hidden] == -torch.inf).all()
    assert (grads[0][:, :, hidden] == 0).all() and not any(g.isnan().any() for g in grads)


@pytest.mark.parametrize("sizes", [(0, 4, 5, 6), (2, 4, 0, 6), (2, 4, 5, 0), (2, 0, 5, 6)], ids=str)
def test_empty(backend, sizes):
    B, H, T, S = sizes
    inputs, do = tensors(B=B, H=H, Hkv=H // 2, T=T, S=S, D=8, device=backend)
    (o, lse), grads = run(lambda *x: fastllm.attention(*x, return_lse=True), inputs, [do, None])
    assert o.shape == (B, H, T, 8) and (o == 0).all() and (lse == -torch.inf).all()
    assert [g.shape for g in grads] == [x.shape for x in inputs] and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_views(backend, dtype):
    """[B, T, H, D] views, slices of a fused projection, a broadcast head, a step in the last dimension."""
    B, T, H, D = 2, 19, 4, 16
    qkv = torch.randn(B, T, 3, H, D).to(backend, dtype)
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
    wide = torch.randn(B, H, T, 2 * D).to(backend, dtype)[..., ::2]
    shared = torch.randn(B, 1, T, D).to(backend, dtype).expand(B, H, T, D)
    of = arguments(causal=True)
    for inputs in ((q, k, v), (q, wide, shared), (wide, shared, k)):
        do = torch.randn(B, T, H, D).to(backend, dtype).transpose(1, 2)
        expected = run(torch_attention(of), [x.contiguous() for x in inputs], [do])
        truth = run(
            lambda q, k, v: reference.attention(q, k, v, **of(q, k))[0], inputs, [do.double()], dtype=torch.float64
        )
        leaves = [x.detach().requires_grad_() for x in inputs]
        o = fastllm.attention(*leaves, causal=True)
        got = [o], torch.autograd.grad(o, leaves, do)
        for a, b, c in zip(itertools.chain(*got), itertools.chain(*expected), itertools.chain(*truth), strict=True):
            assert_as_accurate(a, b, c)


def test_inputs_are_not_mutated_and_runs_repeat(backend):
    (q, k, v), do = tensors(T=70, S=100, device=backend)
    before = [x.clone() for x in (q, k, v, do)]
    first = run(lambda *x: fastllm.attention(*x, causal=True, return_lse=True), (q, k, v), [do, do[..., 0]])
    again = run(lambda *x: fastllm.attention(*x, causal=True, return_lse=True), (q, k, v), [do, do[..., 0]])
    for x, y in zip((q, k, v, do), before, strict=True):
        assert torch.equal(x, y)
    for x, y in zip(itertools.chain(*first), itertools.chain(*again), strict=True):
        assert torch.equal(x, y)


def test_large_scores_and_nan(backend):
    (q, k, v), do = tensors(B=1, H=1, Hkv=1, T=9, S=20, D=16, device=backend)
    q *= 60
    of = arguments()
    exact = run(lambda q, k, v: reference.attention(q, k, v, **of(q, k))[0], (q, k, v), [do], dtype=torch.float64)
    got = run(fastllm.attention, (q, k, v), [do])
    peer = run(torch_attention(of), (q, k, v), [do])
    for a, b, c in zip(itertools.chain(*got), itertools.chain(*peer), itertools.chain(*exact), strict=True):
        assert_as_accurate(a, b, c)
    q[0, 0, 4, 3] = torch.nan
    o = fastllm.attention(q, k, v)
    assert o[0, 0, 4].isnan().all() and not o[0, 0, :4].isnan().any()


def test_softcap_of_scores_far_beyond_it(backend):
    """Scores of up to 200 times the cap: tanh is 1 there, however large e^2x."""
    q = torch.linspace(-200, 200, 161, device=backend).view(1, 1, 161, 1)
    k, v = torch.tensor([1.0, 0.0], device=backend).view(1, 1, 2, 1), torch.randn(1, 1, 2, 1, device=backend)
    options = dict(scale=1.0, softcap=1.0)

    def exact(q, k, v):
        return reference.attention(q, k, v, **options)[0]

    do = torch.randn(1, 1, 161, 1, device=backend)
    compare(lambda q, k, v: fastllm.attention(q, k, v, **options), exact, exact, [q, k, v], [do], torch.float32)


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
def test_gradcheck():
    q, k, v = (torch.randn(1, h, n, 5, dtype=torch.float64, requires_grad=True) for h, n in ((2, 6), (1, 7), (1, 7)))
    with fastllm.backend("cpu"):
        assert torch.autograd.gradcheck(lambda *x: fastllm.attention(*x, causal=True, return_lse=True), (q, k, v))
        assert torch.autograd.gradgradcheck(lambda *x: fastllm.attention(*x, causal=True), (q, k, v))
        x = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradgradcheck(lambda x: fastllm.attention(x, x, x), (x,))


@pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
@pytest.mark.parametrize("layout", ["BHTD", "BTHD"])
def test_opcheck(layout):
    (q, k, v), do = tensors(T=9, S=11, D=8)
    if layout == "BTHD":
        q, k, v, do = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v, do))
    mask = torch.rand(1, 1, 9, 11) > 0.3
    options = (None, None, None, None, 0.3, 0.0, 2, -1, 0, 0.0)
    torch.library.opcheck(ops.attention_fwd.dispatched, (q, k, v, mask, *options))
    o, lse = ops.attention_fwd.dispatched(q, k, v, mask, *options)
    torch.library.opcheck(ops.attention_plain, (q, k, v, 0.3, 2, 5, 0))
    torch.library.opcheck(ops.attention_bwd.dispatched, (do, lse, q, k, v, o, lse, mask, *options, False, False))


@pytest.mark.parametrize("kib, stages", [(227, 2), (99, 1)])
def test_large_heads_fit_into_little_shared_memory(monkeypatch, kib, stages):
    """The backward pass of head size 256 takes 100 KiB with two stages (triton_compile_table.json), 96 with one."""
    kernels = pytest.importorskip("fastllm.kernels.attention", exc_type=ImportError)
    monkeypatch.setattr(kernels, "shared_bytes", lambda device: kib << 10)
    q = torch.empty(1, 2, 8, 256, dtype=torch.bfloat16, device="meta")
    call = kernels.call(q, q, q, None, 0.1, 0.0, None, 0.0)
    assert call.launch("dq", q)["num_stages"] == stages
