"""attention_with_kvcache and attention of few queries: against fp64, by the project's rule."""

import contextlib

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare, run

import fastllm
from fastllm import dispatch, reference
from fastllm.ops import kvcache as ops

needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "plain": {},
    "causal": dict(causal=True),
    "window": dict(window=(40, 0)),
    "q_offset": dict(causal=True, q_offset=20),
    "softcap": dict(softcap=3.0),
    "alibi": dict(alibi_slopes="slopes"),
    "bias": dict(bias="bias"),
    "sink": dict(sink="sink"),
    "mask": dict(mask="mask"),
    "all": dict(causal=True, window=(60, 3), softcap=3.0, alibi_slopes="slopes", bias="bias", sink="sink", mask="mask"),
}


def problem(B=3, H=4, Hkv=2, T=2, D=40, Dv=24, S_max=150, page_size=None, new=0, rotary=None, lengths=None):
    """Inputs of one call: floats to be rounded to the dtype under test, and the rest."""
    lengths = torch.tensor(lengths or [17, 0, S_max - new][:B])
    pages = S_max // (page_size or S_max)
    caches = (B * pages + 1 if page_size else B, Hkv, page_size or S_max)
    floats = [torch.randn(B, H, T, D), torch.randn(*caches, D), torch.randn(*caches, Dv)]
    floats += [torch.randn(B, Hkv, new, D), torch.randn(B, Hkv, new, Dv)] if new else []
    rest = dict(cache_seqlens=lengths)
    if page_size:
        rest["block_table"] = torch.randperm(B * pages + 1)[: B * pages].view(B, pages)
    if rotary:
        angles = torch.rand(S_max + 20, rotary // 2) * 6
        rest |= dict(cos=angles.cos(), sin=angles.sin())
    return floats, rest


def options_of(name, B, H, T, S):
    made = dict(
        slopes=torch.rand(B, H), bias=torch.randn(1, H, T, S), sink=torch.randn(H), mask=torch.rand(B, 1, 1, S) < 0.7
    )
    return {key: made.get(value, value) if isinstance(value, str) else value for key, value in OPTIONS[name].items()}


def on_copies(forced, rest, options):
    """The op on copies of the caches, which it returns with its outputs; `forced` is a backend, or None."""

    def function(q, k_cache, v_cache, *new):
        caches = k_cache.clone(), v_cache.clone()
        with fastllm.backend(forced) if forced else contextlib.nullcontext():
            o, lse = fastllm.attention_with_kvcache(q, *caches, *new, **rest, **options, return_lse=True)
        return o, lse, *caches

    return function


def on(device, floats, *named):
    return [x.to(device) for x in floats], *({n: _to(device, x) for n, x in d.items()} for d in named)


def _to(device, x):
    return x.to(device) if torch.is_tensor(x) else x


def check(device, floats, rest, options, dtype):
    """Hold the rule for outputs and caches, on the backend that is forced."""
    floats, rest, options = on(device, floats, rest, options)
    plain = on_copies("reference", rest, options)
    compare(on_copies(None, rest, options), plain, plain, floats, None, dtype)


@pytest.mark.parametrize("page_size", [None, 1, 10, 64], ids=lambda n: f"page{n}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_append_rotate_attend(backend, page_size, dtype):
    S_max = {None: 150, 1: 40, 10: 150, 64: 192}[page_size]
    for T, new, interleaved in ((1, 1, False), (3, 3, True), (20, 20, False), (2, 0, False)):
        floats, rest = problem(T=T, new=new, S_max=S_max, page_size=page_size, rotary=32, lengths=[17, 5, S_max - new])
        check(backend, floats, rest | dict(rope_interleaved=interleaved), dict(causal=True), dtype)


@pytest.mark.parametrize("T", [1, 2, 8, 9, 33])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(backend, name, T):
    """Few queries and many: two kernels that must not differ in what an option means."""
    floats, rest = problem(T=T, S_max=160, page_size=16 if T % 2 else None)
    check(backend, floats, rest, options_of(name, 3, 4, T, 160), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("S", [1, 15, 16, 17, 63, 64, 65, 511, 512, 513, 1100])
def test_lengths(backend, S, dtype):
    """One short of, at and past a vector, a pass and a range of keys."""
    floats, rest = problem(B=1, T=1, S_max=S, lengths=[S])
    check(backend, floats, rest, {}, dtype)


def test_fp64(cpu_backend):
    """Computed in fp64: what is left is the rounding to fp32 of the comparison."""
    floats, rest = problem(T=2, new=2, page_size=10, rotary=32, lengths=[17, 0, 100])

    def in_double(*floats):
        return [x.float() for x in on_copies("cpu", rest, {})(*(x.double() for x in floats))]

    plain = on_copies("reference", rest, {})
    rounded = lambda *floats: [x.float() for x in plain(*(x.double() for x in floats))]  # noqa: E731
    compare(in_double, rounded, plain, floats, None, torch.float32)


@pytest.mark.parametrize("D, Dv", [(1, 1), (7, 3), (16, 32), (33, 31), (64, 64), (80, 96), (128, 128), (256, 200)])
@pytest.mark.parametrize("H, Hkv", [(1, 1), (3, 1), (8, 8), (14, 2)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(backend, H, Hkv, D, Dv, dtype):
    floats, rest = problem(B=2, H=H, Hkv=Hkv, T=3, D=D, Dv=Dv, S_max=70, lengths=[70, 52])
    check(backend, floats, rest, {}, dtype)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_of_few_queries(cpu_backend, options, dtype):
    """Plain attention takes the same kernel, and its backward pass the lse from it."""
    T = 5 if dtype == torch.bfloat16 else 1
    extra = options_of(options, 2, 4, T, 600)

    def with_backend(name):
        def function(q, k, v):
            with fastllm.backend(name):
                return fastllm.attention(q, k, v, **extra, return_lse=True)

        return function

    inputs = torch.randn(2, 4, T, 40), torch.randn(2, 2, 600, 40), torch.randn(2, 2, 600, 24)
    plain = with_backend("reference")
    compare(with_backend("cpu"), plain, plain, inputs, [torch.randn(2, 4, T, 24), torch.randn(2, 4, T)], dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_beside_pytorchs_own(backend, dtype):
    q, k, v = (torch.randn(*shape, 64, device=backend) for shape in ((2, 8, 1), (2, 2, 700), (2, 2, 700)))
    peer = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)  # noqa: E731
    truth = lambda q, k, v: reference.attention(q, k, v, scale=64**-0.5)[0]  # noqa: E731
    compare(lambda *x: fastllm.attention(*x), peer, truth, (q, k, v), None, dtype)
    compare(lambda *x: fastllm.attention_with_kvcache(*x, cache_seqlens=700), peer, truth, (q, k, v), None, dtype)


def test_layouts(backend):
    """Caches [B, S, H, D] seen as [B, H, S, D], q likewise, and a head dimension that is strided."""
    floats, rest = problem(new=1, T=1)
    for layout in (lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), lambda x: x.mT.contiguous().mT):
        check(backend, [layout(x) for x in floats], rest, {}, torch.float32)


def test_only_new_rows_are_written(backend):
    floats, rest = on(backend, *problem(new=3, T=3, page_size=10, lengths=[8, 0, 100]))
    q, *floats = floats
    before = [x.clone() for x in floats]
    fastllm.attention_with_kvcache(q, *floats, **rest)
    table = rest["block_table"]
    for cache, old, new in zip(floats[:2], before[:2], floats[2:], strict=True):
        for b, had in enumerate(rest["cache_seqlens"].tolist()):
            for t in range(3):
                page, row = table[b, (had + t) // 10], (had + t) % 10
                assert torch.equal(cache[page, :, row], new[b, :, t])
                old[page, :, row] = new[b, :, t]
        assert torch.equal(cache, old)
    assert all(torch.equal(x, y) for x, y in zip(floats[2:], before[2:], strict=True))


def test_what_lies_behind_the_keys_is_not_read(backend):
    floats, rest = on(backend, *problem(T=1))
    q, k, v = floats
    expected = fastllm.attention_with_kvcache(q, k, v, **rest)
    for b, n in enumerate(rest["cache_seqlens"].tolist()):
        k[b, :, n:], v[b, :, n:] = torch.nan, torch.nan
    assert torch.equal(fastllm.attention_with_kvcache(q, k, v, **rest), expected)
    assert not expected[1].any(), "a sequence without keys gives zeros"


def test_same_bits_for_any_number_of_threads(cpu_backend):
    floats, rest = problem(B=1, H=2, Hkv=1, T=1, S_max=3000, lengths=[3000])
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(fastllm.attention_with_kvcache(*floats, **rest))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_generation_step_by_step(backend):
    """Prefill and then token by token gives what one causal call on the whole sequence gives."""
    q, k, v = (torch.randn(1, heads, 30, 16, device=backend) for heads in (4, 2, 2))
    caches = [torch.zeros(1, 2, 40, 16, device=backend) for _ in "kv"]
    parts, had = [], 0
    for n in (20, 1, 1, 5, 1, 2):
        new = [x[:, :, had : had + n] for x in (q, k, v)]
        parts.append(fastllm.attention_with_kvcache(new[0], *caches, *new[1:], cache_seqlens=had, causal=True))
        had += n
    with fastllm.backend("reference"):
        truth = fastllm.attention(q.double(), k.double(), v.double(), causal=True)
        peer = fastllm.attention(q, k, v, causal=True)
    assert_as_accurate(torch.cat(parts, 2), peer, truth)


PAGES = dict(block_table=torch.zeros(3, 2, dtype=torch.int64))
BAD = {
    "full cache": (ValueError, "room for", dict(cache_seqlens=torch.tensor([150, 0, 0]))),
    "negative length": (ValueError, "-1", dict(cache_seqlens=torch.tensor([-1, 0, 0]))),
    "lengths of another batch": (ValueError, "cache_seqlens", dict(cache_seqlens=torch.tensor([1, 2]))),
    "float lengths": (TypeError, "cache_seqlens", dict(cache_seqlens=torch.tensor([1.0, 2, 3]))),
    "k_new alone": (ValueError, "come together", dict(v_new=None)),
    "v_new of another size": (ValueError, "v_new", dict(v_new=torch.randn(3, 2, 1, 25))),
    "cos alone": (ValueError, "come together", dict(cos=torch.randn(200, 8))),
    "too few angles": (ValueError, "rows", dict(cos=torch.randn(9, 8), sin=torch.randn(9, 8))),
    "too many angles": (ValueError, "R <= 40", dict(cos=torch.randn(200, 21), sin=torch.randn(200, 21))),
    "a page that is not there": (ValueError, r"block_table\[0", dict(block_table=torch.full((3, 2), 3))),
    "other pages of values": (ValueError, "as many pages", dict(v_cache=torch.randn(2, 2, 150, 40)) | PAGES),
    "no pages": (
        ValueError,
        "as many pages",
        dict(k_cache=torch.randn(0, 2, 9, 40), v_cache=torch.randn(0, 2, 9, 24)) | PAGES,
    ),
    "a cache that is expanded": (ValueError, "expand", dict(k_cache=torch.randn(1, 2, 150, 40).expand(3, -1, -1, -1))),
    "a negative page": (ValueError, r"block_table\[0", dict(block_table=torch.full((3, 2), -1))),
    "block_table of another batch": (ValueError, "block_table", dict(block_table=torch.zeros(2, 2, dtype=torch.int32))),
    "three dimensions": (ValueError, "four dimensions", dict(q=torch.randn(3, 2, 40))),
    "another dtype": (TypeError, "k_cache", dict(k_cache=torch.randn(3, 2, 150, 40).bfloat16())),
    "another head size": (ValueError, "head size", dict(q=torch.randn(3, 4, 1, 41))),
    "a float mask": (TypeError, "bias=", dict(mask=torch.randn(3, 1, 1, 150))),
    "a bias that does not fit": (ValueError, "broadcast", dict(bias=torch.randn(3, 1, 1, 149))),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    error, words, change = BAD[name]
    floats, rest = problem(T=1, new=1)
    given = dict(zip(("q", "k_cache", "v_cache", "k_new", "v_new"), floats, strict=True)) | rest | change
    with pytest.raises((error, RuntimeError), match=f"attention_with_kvcache: .*{words}"):
        fastllm.attention_with_kvcache(**given)


def shared_caches():
    """Two caches [2, 3, 8, 4], or other shapes, and whether a number is in both."""
    one, two, wide = torch.zeros(2, 3, 8, 4), torch.zeros(2, 2, 3, 8, 4), torch.zeros(2, 3, 8, 6)
    beside, rows = torch.zeros(2, 8, 2, 3, 4).transpose(1, 3), torch.zeros(2, 8, 3 * 4 + 3 * 2)
    heads = [x.unflatten(2, (3, -1)).transpose(1, 2) for x in rows.split((12, 6), 2)]
    return {
        "one tensor": (one, one, True),
        "a view of it": (one, one.view_as(one), True),
        "some of its columns": (wide[..., 2:], wide[..., :3], True),
        "its last number": (one[1:], one.flatten()[-1:].view(1, 1, 1, 1), True),
        "halves": (*two, False),
        "keys beside values": (*beside.unbind(2), False),
        "columns": (wide[..., :4], wide[..., 4:], False),
        "columns of all heads": (*heads, False),
        "nothing": (one[..., :0], one, False),
    }


@pytest.mark.parametrize("k_cache, v_cache, shared", shared_caches().values(), ids=shared_caches())
def test_caches_that_share_memory(k_cache, v_cache, shared):
    assert ops._share_memory(k_cache, v_cache) == ops._share_memory(v_cache, k_cache) == shared
    if not shared or k_cache.shape[:3] != v_cache.shape[:3]:
        return
    q, new = (torch.randn(2, 3, 1, cache.shape[3]) for cache in (k_cache, v_cache))
    k_cache.normal_()
    before = k_cache.clone()
    with pytest.raises(ValueError, match="^attention_with_kvcache: .* share memory"):
        fastllm.attention_with_kvcache(q, k_cache, v_cache, q, new, cache_seqlens=3)
    assert torch.equal(k_cache, before)
    o = fastllm.attention_with_kvcache(q, k_cache, v_cache, cache_seqlens=3)  # which reads them alone
    assert torch.equal(o, fastllm.attention_with_kvcache(q, k_cache.clone(), v_cache.clone(), cache_seqlens=3))


@pytest.mark.parametrize("name", ["reference", pytest.param("cpu", marks=needs_extension)])
def test_nothing_is_written_where_one_cache_is_full(name):
    cache, q = torch.zeros(2, 1, 4, 8), torch.randn(2, 1, 1, 8)
    with pytest.raises((ValueError, RuntimeError), match="room for 4"), fastllm.backend(name):
        fastllm.attention_with_kvcache(q, cache, cache.clone(), q, q, cache_seqlens=torch.tensor([1, 4]))
    assert not cache.any()


def test_wants_no_gradient():
    floats, rest = problem(T=1)
    floats[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no backward pass"):
        fastllm.attention_with_kvcache(*floats, **rest)
    with torch.no_grad():
        fastllm.attention_with_kvcache(*floats, **rest)


@needs_extension
def test_opcheck_and_compile():
    floats, rest = problem(T=1, new=1, page_size=10, rotary=16, lengths=[3, 0, 30])
    arguments = (*floats, *(rest[n] for n in ("cache_seqlens", "block_table", "cos", "sin")), False)
    options = (None, None, None, None, 0.3, 0.0, None, -1, -1)
    torch.library.opcheck(ops.attention_kvcache_fwd.dispatched, (*arguments, *options))

    function = on_copies("cpu", rest, {})
    eager = function(*floats)
    with torch.no_grad():
        (compiled, *_), _ = run(
            torch.compile(lambda *x: fastllm.attention_with_kvcache(*x, **rest), fullgraph=True), floats
        )
    assert torch.equal(compiled, eager[0])
