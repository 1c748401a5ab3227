"""Options of attention together: a set of calls in which every two values of every two options meet, and random views.

Which pairs of kernels, tiles and options meet is what breaks in practice; test_attention.py has the options one by one.
"""

import itertools

import pytest
import torch
from check import compare, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_attention import arguments, torch_attention

import fastllm
from fastllm import reference

# Every query sees some forty keys and more: with a few, how far the gradients of fp32 are from fp64 is a lottery
# between two orders of summing the same products (bench/NOTES.md).
B, H, S = 2, 4, 150
CHOICES = {
    "dtype": [torch.float32, torch.bfloat16, torch.float16],
    "T": [1, 3, 9, 65],
    "Hkv": [4, 2, 1],
    "D": [(16, 16), (40, 24), (33, 64)],
    "position": [{}, dict(causal=True), dict(causal=True, q_offset=80), dict(window=(90, 4))],
    "mask": [None, (1, 1, "T", S), (B, H, 1, S)],
    "bias": [None, (1, H, "T", S), (B, 1, 1, S)],
    "alibi_slopes": [None, (H,), (B, H)],
    "sink": [None, (H,)],
    "softcap": [0.0, 2.0],
    "dropout_p": [0.0, 0.2],
    "layout": ["BHTD", "BTHD"],
}


def covering(choices):
    """Rows of choices in which every pair of values of every two columns stands; greedy, always the same."""
    names = list(choices)
    left = {
        (a, i, b, j)
        for a, b in itertools.combinations(names, 2)
        for i in range(len(choices[a]))
        for j in range(len(choices[b]))
    }
    rows = []
    while left:
        a, i, b, j = min(left)
        row = {a: i, b: j}
        for name in names:
            if name in row:
                continue

            def gain(value, name=name, row=row, left=left):
                return sum((name, value, o, v) in left or (o, v, name, value) in left for o, v in row.items())

            row[name] = max(range(len(choices[name])), key=lambda v: (gain(v), -v))
        left -= {(a, row[a], b, row[b]) for a, b in itertools.combinations(names, 2)}
        rows.append({name: choices[name][row[name]] for name in names})
    return rows


ROWS = covering(CHOICES)


def test_every_pair_is_there():
    for (a, one), (b, two) in itertools.combinations(CHOICES.items(), 2):
        for x, y in itertools.product(one, two):
            assert any(row[a] == x and row[b] == y for row in ROWS), (a, x, b, y)


def call(row):
    """Inputs, our call and the reference's for one row."""
    T, (D, Dv) = row["T"], row["D"]
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, row["Hkv"], S, D), torch.randn(B, row["Hkv"], S, Dv)
    if row["layout"] == "BTHD":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    fixed, leaves = dict(row["position"], softcap=row["softcap"], dropout_p=row["dropout_p"]), {}
    for name in ("mask", "bias", "alibi_slopes", "sink"):
        if row[name] is not None:
            x = torch.randn([T if n == "T" else n for n in row[name]])
            if name == "mask":
                fixed[name] = x > -0.5
            elif name == "alibi_slopes":
                fixed[name] = x.abs() / 50
            elif name == "sink":  # its gradient, four numbers, has tests of its own
                fixed[name] = x
            else:
                leaves[name] = x
    of = arguments(**fixed)

    def ours(q, k, v, *extra):
        torch.manual_seed(11)
        return fastllm.attention(q, k, v, return_lse=True, **fixed, **dict(zip(leaves, extra, strict=True)))

    def exact(q, k, v, *extra):
        torch.manual_seed(11)
        seed = torch.randint(2**62, ())
        return reference.attention(q, k, v, seed=seed, **of(q, k), **dict(zip(leaves, extra, strict=True)))

    return [q, k, v, *leaves.values()], ours, exact, [torch.randn(B, H, T, Dv), torch.randn(B, H, T)]


@pytest.mark.parametrize("n", range(len(ROWS)))
def test_pair(cpu_backend, n):
    row = ROWS[n]
    inputs, ours, exact, grads = call(row)
    few = row["dtype"] == torch.float32 and row["T"] < 9  # the same lottery as with few keys
    compare(ours, exact, exact, inputs, None if few else grads, row["dtype"])


@st.composite
def views(draw):
    """Shapes one would not think of, and memory in any order, with gaps, or shared by heads."""
    size = st.integers(1, 70)
    T, S, D, G, Hkv = draw(size), draw(size), draw(st.integers(1, 40)), draw(st.integers(1, 4)), draw(st.integers(1, 3))

    def tensor(heads, rows):
        order = draw(st.permutations(range(4)))
        gap = [draw(st.sampled_from([1, 1, 2])) for _ in range(4)]
        shape = [(2, heads, rows, D)[i] * gap[i] for i in order]
        x = torch.randn(shape).permute([order.index(i) for i in range(4)])
        x = x[tuple(slice(None, None, step) for step in gap)]
        return x[:, :1].expand(2, heads, rows, D) if draw(st.integers(0, 5)) == 0 else x

    options = dict(causal=draw(st.booleans()))
    if draw(st.booleans()):
        options["window"] = draw(st.integers(0, 60)), draw(st.integers(0, 60))
    if draw(st.booleans()):
        options["q_offset"] = draw(st.integers(-30, 60))
    return tensor(G * Hkv, T), tensor(Hkv, S), tensor(Hkv, S), options


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(views(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_view(cpu_backend, view, dtype):
    q, k, v, options = view
    of = arguments(**options)
    exact = lambda q, k, v: reference.attention(q, k, v, **of(q, k))[0]  # noqa: E731
    ours = lambda q, k, v: fastllm.attention(q, k, v, **options)  # noqa: E731
    q, k, v = (x.to(dtype) for x in (q, k, v))
    compare(ours, torch_attention(of), exact, [q, k, v], None, dtype)

    # Gradients are those of the same numbers in plain memory, bit for bit, where both take the same forward kernel.
    if q.shape[2] > 8:
        do = torch.randn(q.shape).to(dtype)
        found = [run(ours, [f(x) for x in (q, k, v)], [do])[1] for f in (torch.Tensor.detach, torch.Tensor.contiguous)]
        assert all(map(torch.equal, *found))
