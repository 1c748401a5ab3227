"""accelerate and restore in the wrong hands: twice, on other threads, devices and dtypes, beside other libraries."""

import copy
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate
from torch import nn
from torch_models import Block, D, GatedMLP, H, T, WrittenNorm, ops

import fastllm
import fastllm.nn


def test_twice_and_back_twice():
    model, x = nn.Sequential(Block(), nn.LayerNorm(D)), torch.randn(2, T, D)
    before, expected = [type(m) for m in model.modules()], model(x)
    fastllm.accelerate(model)
    report = fastllm.accelerate(model)
    model(x)
    assert all(row.calls == 1 for row in report.rows)
    for _ in range(2):
        assert fastllm.restore(model) is model
        assert [type(m) for m in model.modules()] == before and torch.equal(model(x), expected)
    assert not [name for m in model.modules() for name in vars(m) if "fastllm" in name]


def test_context_puts_back_what_was_there():
    model, x = nn.Sequential(Block(), nn.LayerNorm(D)), torch.randn(2, T, D)
    with fastllm.accelerated(model):
        with fastllm.accelerated(model, attention=False):
            assert ops(model, x) == {"layer_norm"}
        assert ops(model, x) == {"layer_norm", "attention"}
    assert not ops(model, x)
    with pytest.raises(ZeroDivisionError), fastllm.accelerated(model):
        raise ZeroDivisionError
    assert not ops(model, x)


def test_only_this_instance():
    model, other, x = nn.LayerNorm(D), nn.LayerNorm(D), torch.randn(2, D)
    fastllm.accelerate(model)
    assert ops(model, x) and not ops(other, x) and type(other) is nn.LayerNorm


def test_not_a_module():
    with pytest.raises(TypeError, match="must be a torch.nn.Module, got function"):
        fastllm.accelerate(lambda x: x)


def test_hooks_parameters_and_state_stay():
    model, x = nn.Sequential(nn.LayerNorm(D)), torch.randn(2, D)
    seen = []
    model[0].register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    state, parameters = model.state_dict(), list(model.parameters())
    fastllm.accelerate(model)
    model(x)
    assert seen == ["LayerNorm"]
    assert list(model.state_dict()) == list(state) and all(a is b for a, b in zip(model.parameters(), parameters))
    model[0].register_forward_pre_hook(lambda module, args: seen.append("before"))
    fastllm.restore(model)
    model(x)
    assert seen == ["LayerNorm", "before", "LayerNorm"]


def test_copies_are_plain():
    model, x = nn.Sequential(nn.LayerNorm(D), nn.MultiheadAttention(D, H)), torch.randn(2, D)
    fastllm.accelerate(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model[0])):
        assert {type(m) for m in other.modules()} <= {
            type(m) for m in nn.Sequential(nn.LayerNorm(2), nn.MultiheadAttention(2, 1)).modules()
        }
    assert not ops(copy.deepcopy(model[0]), x)
    assert b"fastllm" not in pickle.dumps(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_later(dtype):
    model, x = nn.Sequential(Block(), nn.RMSNorm(D)), torch.randn(2, T, D, dtype=torch.float64)
    exact = copy.deepcopy(model).double()(x)
    peer = copy.deepcopy(model).to(dtype)(x.to(dtype))
    fastllm.accelerate(model)
    got = model.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert_as_accurate(got.bfloat16(), peer.bfloat16(), exact)


def test_parametrized_weights():
    """torch.nn.utils.parametrize changes the class of a module too, before or after."""

    class Double(nn.Module):
        def forward(self, w):
            return 2 * w

    x = torch.randn(2, D)
    for first in (True, False):
        model = nn.Sequential(nn.LayerNorm(D))
        if first:
            fastllm.accelerate(model)
        nn.utils.parametrize.register_parametrization(model[0], "weight", Double())
        if not first:
            fastllm.accelerate(model)
        torch.testing.assert_close(model(x), F.layer_norm(x, (D,), model[0].weight, model[0].bias))
        assert ops(model, x) == {"layer_norm"}
        fastllm.restore(model)
        torch.testing.assert_close(model(x), F.layer_norm(x, (D,), model[0].weight, model[0].bias))
        assert not ops(model, x)


def test_a_replaced_forward_is_left_alone():
    """As accelerate's device hooks replace it."""
    model, x = nn.Sequential(nn.LayerNorm(D)), torch.randn(2, D)
    model[0].forward = lambda x: x * 0
    (row,) = fastllm.accelerate(model).left_alone
    assert "another library" in row.reason and torch.equal(model(x), x * 0)


def test_a_forward_that_was_kept_is_plain_again():
    """Another library holds the accelerated method beyond restore."""
    model, x = nn.Sequential(nn.LayerNorm(D)), torch.randn(2, D)
    fastllm.accelerate(model)
    kept = model[0].forward
    assert ops(kept, x)
    fastllm.restore(model)
    assert not ops(kept, x) and torch.equal(kept(x), model(x))


def test_scripted_modules_are_left_alone():
    model = nn.Sequential(torch.jit.script(nn.LayerNorm(D)))
    assert not fastllm.accelerate(model).accelerated


def test_patched_while_another_thread_runs():
    model = nn.Sequential(*(Block() for _ in range(3)), GatedMLP(), nn.LayerNorm(D)).eval()
    x, wrong, stop = torch.randn(2, T, D), [], threading.Event()
    expected = model(x).detach()

    def work():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.allclose(model(x), expected, atol=1e-5):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(40):
        fastllm.accelerate(model)
        fastllm.restore(model)
    stop.set()
    for t in threads:
        t.join()
    assert not wrong


@pytest.mark.parametrize("accelerate_first", [False, True])
def test_compile(accelerate_first):
    model, x = nn.Sequential(Block(), WrittenNorm()), torch.randn(2, T, D)
    expected = model(x)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    if not accelerate_first:
        torch.testing.assert_close(compiled(x), expected)
    fastllm.accelerate(model)
    torch.testing.assert_close(compiled(x), expected)
    fastllm.restore(model)
    assert torch.equal(model(x), expected)
    torch.testing.assert_close(compiled(x), expected)


def stack():
    """Everything that accelerate knows in plain PyTorch."""
    return nn.Sequential(Block(), GatedMLP(), WrittenNorm(), nn.LayerNorm(D))


@pytest.mark.usefixtures("every_size")
def test_moved_to_a_device_without_kernels():
    """After it was accelerated; the answer there is plain PyTorch's, and back it is the kernel's."""
    model, x = stack(), torch.randn(2, T, D)
    expected = model(x)
    fastllm.accelerate(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    assert model(x.to("meta")).shape == x.shape
    told = fastllm.explain(model, x.to("meta"))
    assert {call.kernel for call in told.calls} == {"PyTorch"} and all("meta" in c.reason for c in told.calls)
    model.to_empty(device="cpu").load_state_dict(state)
    got = model(x)
    assert ops(model, x) == {"attention", "layer_norm", "rms_norm", "swiglu"}
    truth = copy.deepcopy(model).double()(x.double())
    assert_as_accurate(got, expected, truth)


def test_restored_where_nothing_was_accelerated():
    model = stack()
    before = [type(m) for m in model.modules()]
    assert fastllm.restore(model) is model and [type(m) for m in model.modules()] == before


@pytest.mark.usefixtures("every_size")
def test_a_part_is_restored_and_accelerated_again():
    model, x = stack(), torch.randn(2, T, D)
    fastllm.accelerate(model)
    fastllm.restore(model[0])
    assert ops(model, x) == {"layer_norm", "rms_norm", "swiglu"}
    fastllm.accelerate(model[0], norms=False)
    assert ops(model, x) == {"attention", "layer_norm", "rms_norm", "swiglu"}
    fastllm.restore(model)
    assert not ops(model, x)


@pytest.mark.usefixtures("every_size")
def test_subclasses_with_a_forward_of_their_own():
    """Of what is known by its class: left alone, with the reason. Of what is tried: by what it gives."""

    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    class Layer(nn.TransformerEncoderLayer):
        def forward(self, x):
            return super().forward(x)

    class MLP(GatedMLP):
        def forward(self, x):
            return super().forward(x)

    class Linear(nn.Linear):
        def forward(self, x):
            return -super().forward(x)

    model = nn.ModuleDict(dict(attention=Attention(D, H), layer=Layer(D, H), mlp=MLP(), linear=Linear(D, D)))
    rows = {row.name: row for row in fastllm.accelerate(model).rows}
    for name in ("attention", "layer"):
        assert rows[name].reason == "its class has a forward of its own"
    assert rows["mlp"].runs == "swiglu" and "linear" not in rows
    x = torch.randn(2, D)
    assert torch.equal(model["linear"](x), -F.linear(x, model["linear"].weight, model["linear"].bias))


def test_a_class_made_of_an_accelerated_modules_class():
    """It runs its own forward, and that of the class it was made of, plain."""
    model, x = nn.LayerNorm(D), torch.randn(2, D)
    fastllm.accelerate(model)

    class Doubled(type(model)):
        def forward(self, x):
            return 2 * super().forward(x)

    other = Doubled(D)
    assert torch.equal(other(x), 2 * F.layer_norm(x, (D,), other.weight, other.bias)) and not ops(other, x)
