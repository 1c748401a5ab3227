"""AdamW: parameters and moments after some steps, on every backend, against fp64 and beside torch's own."""

import copy

import pytest
import torch
from check import assert_as_accurate

import fastllm
from fastllm import dispatch
from fastllm.ops.adamw import adamw_step
from fastllm.optim import AdamW

SHAPES = [(1,), (3, 5), (64,), (17, 65), (0,), (9, 1000)]
OPTIONS = {
    "defaults": {},
    "no decay": dict(lr=1e-2, weight_decay=0.0),
    "amsgrad": dict(amsgrad=True, betas=(0.5, 0.9)),
    "maximize": dict(maximize=True, eps=1e-4, weight_decay=0.1),
}
needs_extension = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


def numbers(dtype=torch.float32):
    return [torch.randn(shape).to(dtype) for shape in SHAPES]


def trained(optimizer, values, gradients, dtype, device="cpu", **options):
    """Parameters and moments after a step per list of gradients; a parameter whose gradient is None stays."""
    params = [torch.nn.Parameter(x.to(device, dtype, copy=True)) for x in values]
    made = optimizer(params, **options)
    for step in gradients:
        for p, g in zip(params, step, strict=True):
            p.grad = None if g is None else g.to(device, dtype)
        made.step()
    moments = [made.state[p][name] for p in params for name in ("exp_avg", "exp_avg_sq") if p in made.state]
    return [p.detach().cpu() for p in params], [x.cpu() for x in moments]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_steps(own_backend, name, dtype):
    values, gradients = numbers(dtype), [numbers(dtype) for _ in range(5)]
    got, moments = trained(AdamW, values, gradients, dtype, own_backend, **OPTIONS[name])
    peer, peer_moments = trained(torch.optim.AdamW, values, gradients, dtype, **OPTIONS[name])
    truth, true_moments = trained(torch.optim.AdamW, values, gradients, torch.float64, **OPTIONS[name])
    for x, y, z in zip(got, peer, truth, strict=True):
        assert_as_accurate(x, y, z, "parameter")
    for x, y, z in zip(moments, peer_moments, true_moments, strict=True):
        assert x.dtype == torch.float32
        assert_as_accurate(x, y.float(), z, "moment")


@pytest.mark.parametrize("own_backend", ["triton"], indirect=True)
def test_no_byte_outside_of_a_tensor_is_touched(own_backend):
    """The Triton kernel is given addresses, so its guards are here: NaN round all that it reads, and kept there."""
    dtypes = [torch.float32, torch.bfloat16, torch.float32, torch.float16]
    sizes = [5, 4096, 2049, 2047]  # one short of, at and past blocks
    shifts = [1, 0, 3, 2]  # elements: two of the four are not aligned to 16 bytes

    def guarded(values, shift):
        whole = torch.full((len(values) + 64,), torch.nan, dtype=values.dtype, device=own_backend)
        inside = whole[16 + shift : 16 + shift + len(values)]
        inside.copy_(values)
        return whole, inside

    everything, plain = [], []
    for dtype, size, shift in zip(dtypes, sizes, shifts, strict=True):
        p, grad = torch.randn(size).to(dtype), torch.randn(size).to(dtype)
        plain.append([p, grad, torch.randn(size), torch.rand(size)])
        everything.append([guarded(x, shift) for x in plain[-1]])
    lists = [[group[n][1] for group in everything] for n in range(4)]
    options = 1e-2, 0.9, 0.99, 1e-8, 0.1, False
    adamw_step("triton", *lists, [], [torch.tensor(3.0) for _ in dtypes], *options)
    for group, (p, grad, m, v) in zip(everything, plain, strict=True):
        for whole, inside in group:
            assert whole.isnan().sum() == 64 and not inside.isnan().any()
        alone = [x.to(own_backend, copy=True) for x in (p, grad, m, v)]
        adamw_step("triton", *([x] for x in alone), [], [torch.tensor(3.0)], *options)
        assert all(torch.equal(inside, x) for (_, inside), x in zip(group, alone, strict=True))
        assert not torch.equal(group[0][1].cpu(), p) and torch.equal(group[1][1].cpu(), grad)


@needs_extension
def test_moments_in_fp32_keep_what_bf16_loses():
    """A gradient of one size for long: a bf16 average of squares stops growing where a step is below its rounding."""
    p, q = (torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16)) for _ in "pq")
    ours, theirs = AdamW([p]), torch.optim.AdamW([q])
    for _ in range(500):
        for x, made in ((p, ours), (q, theirs)):
            x.grad = torch.ones_like(x)
            made.step()
    grown = [made.state[x]["exp_avg_sq"][0].item() for x, made in ((p, ours), (q, theirs))]
    exact = 1 - 0.999**500
    assert 100 * abs(grown[0] - exact) < abs(grown[1] - exact)


@needs_extension
def test_fp64():
    values, gradients = numbers(torch.float64), [numbers(torch.float64) for _ in range(3)]
    got, _ = trained(AdamW, values, gradients, torch.float64)
    peer, _ = trained(torch.optim.AdamW, values, gradients, torch.float64)
    for x, y in zip(got, peer, strict=True):
        assert_as_accurate(x, y, y)


def test_a_parameter_without_a_gradient_stays():
    values = numbers()
    gradients = [[g if i != 1 else None for i, g in enumerate(numbers())] for _ in range(2)]
    got, _ = trained(AdamW, values, gradients, torch.float32)
    assert torch.equal(got[1], values[1]) and not torch.equal(got[3], values[3])


def pair(optimizers, **options):
    """Two copies of a model, each with its optimiser and a function that takes a step on it."""
    made = []
    first = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2))
    x = torch.randn(8, 6)
    for optimizer in optimizers:
        model = copy.deepcopy(first)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 1e-2, "weight_decay": 0.3}]
        made.append((model, optimizer(groups, **options), x))
    return made


def steps(model, optimizer, x, n=3):
    for _ in range(n):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("kinds", [(AdamW, torch.optim.AdamW), (torch.optim.AdamW, AdamW)], ids=["out", "in"])
def test_each_takes_the_others_state_dict(kinds):
    (model, first, x), (_, second, _) = pair(kinds, amsgrad=True)
    steps(model, first, x)
    clone = copy.deepcopy(model)
    groups = [{"params": clone[0].parameters()}, {"params": clone[2].parameters()}]
    second = kinds[1](groups, amsgrad=True)
    second.load_state_dict(copy.deepcopy(first.state_dict()))  # torch does not copy what has the dtype already
    assert [g["lr"] for g in second.param_groups] == [1e-3, 1e-2]
    for a, b in zip(steps(model, first, x), steps(clone, second, x), strict=True):
        assert_as_accurate(b, a, a.double())


@needs_extension
def test_a_state_dict_keeps_fp32_moments():
    p = torch.nn.Parameter(torch.randn(50).bfloat16())
    made, loaded = AdamW([p]), AdamW([torch.nn.Parameter(p.detach().clone())])
    for _ in range(3):
        p.grad = torch.randn(50).bfloat16()
        made.step()
    loaded.load_state_dict(made.state_dict())
    (state,) = loaded.state.values()
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name], made.state[p][name]) and state[name].dtype == torch.float32
        assert state[name].data_ptr() != made.state[p][name].data_ptr()


def test_closure_scheduler_and_hooks():
    (model, optimizer, x), _ = pair((AdamW, AdamW))
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(2)]
    scheduler.step()
    assert losses[1] < losses[0] and len(seen) == 2 and optimizer.param_groups[0]["lr"] == 5e-4


@needs_extension
def test_same_bits_for_any_number_of_threads():
    values, gradients, before = [torch.randn(100_000)], [[torch.randn(100_000)] for _ in range(2)], None
    threads = torch.get_num_threads()
    for n in (1, 2, 3):
        torch.set_num_threads(n)
        got, _ = trained(AdamW, values, gradients, torch.float32)
        assert before is None or torch.equal(got[0], before)
        before = got[0]
    torch.set_num_threads(threads)


def test_what_runs_is_explained():
    p = torch.nn.Parameter(torch.randn(4))
    p.grad = torch.randn(4)
    (call,) = fastllm.explain(AdamW([p]).step).calls
    assert call.op == "adamw" and call.backend == ("reference" if dispatch.extension is None else "cpu")
    (call,) = fastllm.explain(AdamW([p], foreach=True).step).calls
    assert call.backend == "reference" and "foreach" in call.reason
    q = torch.nn.Parameter(torch.randn(4, 6).T)
    q.grad = torch.randn(6, 4)
    (call,) = fastllm.explain(AdamW([q]).step).calls
    assert call.backend == "reference" and "contiguous" in call.reason


def test_a_strided_gradient_and_a_sparse_one():
    p, q = (torch.nn.Parameter(torch.ones(5, 4)) for _ in "pq")
    g = torch.randn(4, 5)
    p.grad, q.grad = g.T, g.T.contiguous()
    AdamW([p]).step()
    AdamW([q]).step()
    assert torch.equal(p, q)
    p.grad = torch.randn(5, 4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse gradients"):
        AdamW([p]).step()


@needs_extension
def test_a_saved_parameter_is_known_to_have_changed():
    p = torch.nn.Parameter(torch.ones(3))
    loss = (p * p).sum()
    p.grad = torch.ones(3)
    AdamW([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@needs_extension
def test_bad_lists_are_refused():
    x, wide = torch.ones(3), torch.ones(3, dtype=torch.float64)
    numbers = 1e-3, 0.9, 0.999, 1e-8, 0.0, False
    for given in (([x], [x], [x], [], [], [x]), ([x], [x], [wide], [x], [], [torch.zeros(())])):
        with pytest.raises(RuntimeError, match="adamw_step"):
            adamw_step("cpu", *given, *numbers)


@needs_extension
def test_opcheck():
    def given():
        x = torch.randn(6)
        return [x], [torch.randn(6)], [torch.zeros(6)], [torch.zeros(6)], [], [torch.tensor(0.0)]

    torch.library.opcheck(adamw_step.dispatched, (*given(), 1e-3, 0.9, 0.999, 1e-8, 0.01, False))


@needs_extension
def test_forced_reference_is_torchs():
    values, gradients = numbers(), [numbers()]
    with fastllm.backend("reference"):
        got, _ = trained(AdamW, values, gradients, torch.float32)
    peer, _ = trained(torch.optim.AdamW, values, gradients, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip(got, peer, strict=True))
    assert dispatch.forced() is None
