"""Bad input raises, and says function, expectation and what came; empty input works; nothing crashes."""

import pytest
import torch

import fastllm


def t(*shape, **kw):
    return torch.zeros(*shape, **kw)


Q = (1, 4, 5, 8)


def attend(q=Q, k=Q, v=Q, dtypes=(torch.float32,) * 3, devices=("cpu",) * 3, **options):
    made = [t(*s, dtype=d, device=at) for s, d, at in zip((q, k, v), dtypes, devices, strict=True)]
    return fastllm.attention(*made, **options)


X, W, C = t(3, 8), t(8), t(3, dtype=torch.int64)


def turn(q=Q, k=None, cos=(9, 4), sin=None, dtype=torch.float32, **options):
    cos, sin = t(*cos), t(*(sin or cos))
    return fastllm.rope(t(*q), None if k is None else t(*k, dtype=dtype), cos, sin, **options)


F32, BF16, INT = torch.float32, torch.bfloat16, torch.int64
BAD = {  # what is wrong -> (call, error, what the message must say)
    "q rank": (lambda: attend(q=(4, 5, 8)), ValueError, ["attention", "q must be [B, H, T, D]", "[4, 5, 8]"]),
    "k rank": (lambda: attend(k=(1, 1, 4, 5, 8)), ValueError, ["attention", "k must be", "[1, 1, 4, 5, 8]"]),
    "q type": (lambda: fastllm.attention([1.0], X, X), TypeError, ["attention", "q must be a tensor", "list"]),
    "q integer": (lambda: attend(dtypes=(INT,) * 3), TypeError, ["attention", "float32", "int64"]),
    "dtype mix": (lambda: attend(dtypes=(F32, BF16, BF16)), TypeError, ["attention", "k must be", "bfloat16"]),
    "device mix": (
        lambda: attend(devices=("cpu", "meta", "cpu")),
        ValueError,
        ["attention", "k must be on cpu", "meta"],
    ),
    "batch": (lambda: attend(k=(2, 4, 5, 8), v=(2, 4, 5, 8)), ValueError, ["attention", "q's B", "[2, 4, 5, 8]"]),
    "keys": (lambda: attend(v=(1, 4, 6, 8)), ValueError, ["attention", "agree", "[1, 4, 6, 8]"]),
    "head size": (lambda: attend(k=(1, 4, 5, 16)), ValueError, ["attention", "D >= 1", "8 and 16"]),
    "no head size": (lambda: attend((1, 4, 5, 0), (1, 4, 5, 0)), ValueError, ["attention", "D >= 1", "0 and 0"]),
    "heads": (lambda: attend(k=(1, 3, 5, 8), v=(1, 3, 5, 8)), ValueError, ["attention", "4 heads", "3 heads"]),
    "no heads": (lambda: attend(k=(1, 0, 5, 8), v=(1, 0, 5, 8)), ValueError, ["attention", "4 heads", "0 heads"]),
    "window below -1": (lambda: attend(window=(-2, 0)), ValueError, ["attention", "window", "(-2, 0)"]),
    "window float": (lambda: attend(window=(1.5, 0)), ValueError, ["attention", "window", "1.5"]),
    "window int": (lambda: attend(window=3), ValueError, ["attention", "window must be (left, right)", "3"]),
    "window long": (lambda: attend(window=(1, 2, 3)), ValueError, ["attention", "(left, right)", "(1, 2, 3)"]),
    "offset float": (lambda: attend(q_offset=1.5), TypeError, ["attention", "q_offset", "integer", "1.5"]),
    "offset far": (lambda: attend(q_offset=2**63), ValueError, ["attention", "q_offset", "2^40", str(2**63)]),
    "scale trained": (lambda: attend(scale=t((), requires_grad=True)), TypeError, ["attention", "scale", "gradient"]),
    "mask shape": (lambda: attend(mask=t(5, 6).bool()), ValueError, ["attention", "mask", "[1, 4, 5, 5]", "[5, 6]"]),
    "mask rank": (lambda: attend(mask=t(1, 1, 4, 5, 5).bool()), ValueError, ["attention", "mask", "[1, 1, 4, 5, 5]"]),
    "float mask": (lambda: attend(mask=t(5, 5)), TypeError, ["attention", "mask must be bool", "bias="]),
    "int mask": (lambda: attend(mask=t(5, 5, dtype=INT)), TypeError, ["attention", "mask", "bool", "int64"]),
    "mask device": (lambda: attend(mask=t(5, 5, device="meta").bool()), ValueError, ["attention", "mask", "meta"]),
    "bias shape": (lambda: attend(bias=t(5, 6)), ValueError, ["attention", "bias", "[5, 6]"]),
    "bias integer": (lambda: attend(bias=t(5, 5, dtype=INT)), TypeError, ["attention", "bias", "int64"]),
    "slopes": (lambda: attend(alibi_slopes=t(3)), ValueError, ["attention", "alibi_slopes", "[4]", "[3]"]),
    "sink": (lambda: attend(sink=t(5)), ValueError, ["attention", "sink", "[4]", "[5]"]),
    "dropout": (lambda: attend(dropout_p=1.5), ValueError, ["attention", "dropout_p", "1.5"]),
    "softcap": (lambda: attend(softcap=-1.0), ValueError, ["attention", "softcap", "-1.0"]),
    "softcap nan": (lambda: attend(softcap=float("nan")), ValueError, ["attention", "softcap", "nan"]),
    "softcap None": (lambda: attend(softcap=None), ValueError, ["attention", "softcap", "None"]),
    "no dropout": (lambda: attend(dropout_p=None), ValueError, ["attention", "dropout_p", "None"]),
    "norm scalar": (lambda: fastllm.layer_norm(t(())), ValueError, ["layer_norm", "[..., D]", "[]"]),
    "norm D = 0": (lambda: fastllm.rms_norm(t(3, 0)), ValueError, ["rms_norm", "D >= 1", "[3, 0]"]),
    "norm type": (lambda: fastllm.rms_norm(3.0), TypeError, ["rms_norm", "x must be a tensor", "float"]),
    "norm integer": (lambda: fastllm.layer_norm(X.long()), TypeError, ["layer_norm", "float32", "int64"]),
    "weight size": (lambda: fastllm.layer_norm(X, t(7)), ValueError, ["layer_norm", "weight must be [8]", "[7]"]),
    "weight rank": (lambda: fastllm.rms_norm(X, t(1, 8)), ValueError, ["rms_norm", "weight must be [8]", "[1, 8]"]),
    "weight device": (lambda: fastllm.rms_norm(X, W.to("meta")), ValueError, ["rms_norm", "weight", "cpu", "meta"]),
    "weight integer": (lambda: fastllm.rms_norm(X, W.long()), TypeError, ["rms_norm", "weight", "int64"]),
    "bias size": (lambda: fastllm.layer_norm(X, W, t(9)), ValueError, ["layer_norm", "bias must be [8]", "[9]"]),
    "residual shape": (lambda: fastllm.rms_norm(X, residual=W), ValueError, ["rms_norm", "residual", "[3, 8]", "[8]"]),
    "residual dtype": (
        lambda: fastllm.layer_norm(X, residual=X.double()),
        TypeError,
        ["layer_norm", "residual", "float32", "float64"],
    ),
    "linear size": (lambda: fastllm.linear(X, t(4, 7)), ValueError, ["linear", "[N, K]", "[3, 8]", "[4, 7]"]),
    "linear scalar": (lambda: fastllm.linear(t(()), t(4, 1)), ValueError, ["linear", "[..., K]", "[]"]),
    "linear weight rank": (lambda: fastllm.linear(X, W), ValueError, ["linear", "weight [N, K]", "[8]"]),
    "linear bias": (lambda: fastllm.linear(X, t(4, 8), W), ValueError, ["linear", "bias must be [4]", "[8]"]),
    "linear dtype": (lambda: fastllm.linear(X, t(4, 8).double()), TypeError, ["linear", "weight", "float64"]),
    "linear type": (lambda: fastllm.linear(X, None), TypeError, ["linear", "weight must be a tensor", "NoneType"]),
    "linear device": (lambda: fastllm.linear(X, t(4, 8).to("meta")), ValueError, ["linear", "weight", "meta"]),
    "lora size": (
        lambda: fastllm.lora_linear(X, t(4, 8), t(2, 7), t(4, 2)),
        ValueError,
        ["lora_linear", "lora_a [rank, 8]", "lora_b [4, rank]", "[2, 7]"],
    ),
    "lora rank": (lambda: fastllm.lora_linear(X, t(4, 8), t(2, 8), t(4, 3)), ValueError, ["lora_linear", "[4, 3]"]),
    "lora weight": (lambda: fastllm.lora_linear(X, W, t(2, 8), t(4, 2)), ValueError, ["lora_linear", "weight [N, K]"]),
    "lora dtype": (
        lambda: fastllm.lora_linear(X, t(4, 8), t(2, 8).double(), t(4, 2)),
        TypeError,
        ["lora_linear", "lora_a", "float64"],
    ),
    "lora dropout": (
        lambda: fastllm.lora_linear(X, t(4, 8), t(2, 8), t(4, 2), dropout_p=1.5),
        ValueError,
        ["lora_linear", "dropout_p", "1.5"],
    ),
    "norm dropout": (lambda: fastllm.layer_norm(X, dropout_p=1.5), ValueError, ["layer_norm", "dropout_p", "1.5"]),
    "norm no dropout": (lambda: fastllm.rms_norm(X, dropout_p=None), ValueError, ["rms_norm", "dropout_p", "None"]),
    "gate scalar": (lambda: fastllm.swiglu(t(())), ValueError, ["swiglu", "[..., D]", "[]"]),
    "gate odd": (lambda: fastllm.swiglu(t(3, 7)), ValueError, ["swiglu", "packed", "[3, 7]"]),
    "gate integer": (lambda: fastllm.geglu(X.long()), TypeError, ["geglu", "gate", "int64"]),
    "up shape": (lambda: fastllm.swiglu(X, W), ValueError, ["swiglu", "up must be [3, 8]", "[8]"]),
    "up dtype": (lambda: fastllm.geglu(X, X.double()), TypeError, ["geglu", "up", "float32", "float64"]),
    "approximate": (lambda: fastllm.geglu(X, X, approximate="erf"), ValueError, ["geglu", "tanh", "'erf'"]),
    "gelu approximate": (lambda: fastllm.bias_gelu(X, approximate=None), ValueError, ["bias_gelu", "none", "None"]),
    "gelu bias": (lambda: fastllm.bias_gelu(X, t(7)), ValueError, ["bias_gelu", "bias must be [8]", "[7]"]),
    "gelu bias device": (lambda: fastllm.bias_gelu(X, W.to("meta")), ValueError, ["bias_gelu", "bias", "meta"]),
    "gelu D = 0": (lambda: fastllm.bias_gelu(t(3, 0)), ValueError, ["bias_gelu", "D >= 1", "[3, 0]"]),
    "rope rank": (lambda: turn(q=(4, 5, 8)), ValueError, ["rope", "q must be [B, H, T, D]", "[4, 5, 8]"]),
    "rope packed rank": (
        lambda: turn(cu_seqlens=torch.tensor([0, 5])),
        ValueError,
        ["rope", "q must be [T, H, D]", "[1, 4, 5, 8]"],
    ),
    "rope k": (lambda: turn(k=(1, 2, 6, 8)), ValueError, ["rope", "k must be [1, 4, 5, 8]", "[1, 2, 6, 8]"]),
    "rope k dtype": (lambda: turn(k=Q, dtype=BF16), TypeError, ["rope", "k must be", "bfloat16"]),
    "rope tables": (lambda: turn(cos=(9, 5)), ValueError, ["rope", "cos and sin", "D=8", "[9, 5]"]),
    "rope sin": (lambda: turn(sin=(9, 3)), ValueError, ["rope", "cos and sin", "[9, 3]"]),
    "rope batches": (lambda: turn(cos=(2, 9, 4)), ValueError, ["rope", "[1, ..]", "[2, 9, 4]"]),
    "rope short": (lambda: turn(cos=(4, 4)), ValueError, ["rope", "positions 0 to 4", "4 positions"]),
    "rope offset": (lambda: turn(offset=5), ValueError, ["rope", "positions 5 to 9", "9 positions"]),
    "rope negative": (lambda: turn(offset=-1), ValueError, ["rope", "positions -1"]),
    "rope float": (lambda: turn(offset=1.0), TypeError, ["rope", "offset", "1.0"]),
    "rope offsets": (lambda: turn(offset=torch.tensor([1, 2])), ValueError, ["rope", "offset", "[1]", "[2]"]),
    "rope offsets float": (lambda: turn(offset=t(1)), TypeError, ["rope", "offset", "int64", "float32"]),
    "rope cu_seqlens": (
        lambda: turn(q=(5, 4, 8), cu_seqlens=torch.tensor([5])),
        ValueError,
        ["rope", "cu_seqlens", "[1]"],
    ),
    "softmax dim": (lambda: fastllm.softmax(X, dim=2), ValueError, ["softmax", "dim", "[-2, 2)", "2"]),
    "softmax low dim": (lambda: fastllm.log_softmax(X, dim=-3), ValueError, ["log_softmax", "dim", "-3"]),
    "softmax causal 1-D": (lambda: fastllm.softmax(W, causal=True), ValueError, ["softmax", "causal", "[8]"]),
    "softmax causal dim": (lambda: fastllm.softmax(X, dim=0, causal=True), ValueError, ["softmax", "causal", "dim=0"]),
    "softmax mask": (lambda: fastllm.softmax(X, mask=t(3, 7).bool()), ValueError, ["softmax", "mask", "[3, 7]"]),
    "softmax float mask": (lambda: fastllm.softmax(X, mask=X), TypeError, ["softmax", "mask", "bool", "float32"]),
    "softmax integer": (lambda: fastllm.softmax(X.long()), TypeError, ["softmax", "float32", "int64"]),
    "softmax type": (lambda: fastllm.softmax(None), TypeError, ["softmax", "x must be a tensor", "NoneType"]),
    "logits scalar": (lambda: fastllm.cross_entropy(t(()), C), ValueError, ["cross_entropy", "[N, V, ...]", "[]"]),
    "no classes": (lambda: fastllm.cross_entropy(t(3, 0), C), ValueError, ["cross_entropy", "V >= 1", "[3, 0]"]),
    "logits integer": (lambda: fastllm.cross_entropy(X.long(), C), TypeError, ["cross_entropy", "float32", "int64"]),
    "target size": (lambda: fastllm.cross_entropy(X, C[:2]), ValueError, ["cross_entropy", "target", "[3]", "[2]"]),
    "target rank": (lambda: fastllm.cross_entropy(X, C[None]), ValueError, ["cross_entropy", "[3]", "[1, 3]"]),
    "target int32": (lambda: fastllm.cross_entropy(X, C.int()), TypeError, ["cross_entropy", "int64", "int32"]),
    "target list": (lambda: fastllm.cross_entropy(X, [0, 1, 2]), TypeError, ["cross_entropy", "target", "list"]),
    "target device": (lambda: fastllm.cross_entropy(X, C.to("meta")), ValueError, ["cross_entropy", "cpu", "meta"]),
    "target too large": (lambda: fastllm.cross_entropy(X, C + 8), RuntimeError, ["target 8 of row 0", "8 classes"]),
    "target negative": (lambda: fastllm.cross_entropy(X, C - 1), RuntimeError, ["target -1 of row 0", "ignore_index"]),
    "probabilities shape": (lambda: fastllm.cross_entropy(X, W), ValueError, ["cross_entropy", "[3, 8]", "[8]"]),
    "class weight": (lambda: fastllm.cross_entropy(X, C, t(7)), ValueError, ["cross_entropy", "weight", "[8]", "[7]"]),
    "class weight trained": (
        lambda: fastllm.cross_entropy(X, C, t(8, requires_grad=True)),
        ValueError,
        ["cross_entropy", "weight", "constant"],
    ),
    "reduction": (lambda: fastllm.cross_entropy(X, C, reduction="avg"), ValueError, ["none, mean, sum", "'avg'"]),
    "reductions": (lambda: fastllm.cross_entropy(X, C, reduction=["mean"]), ValueError, ["none, mean", "['mean']"]),
    "reductions of logits": (
        lambda: fastllm.linear_cross_entropy(X, t(4, 8), C, reduction=["mean"]),
        ValueError,
        ["linear_cross_entropy", "none, mean, sum", "['mean']"],
    ),
    "smoothing": (lambda: fastllm.cross_entropy(X, C, label_smoothing=1.5), ValueError, ["label_smoothing", "1.5"]),
    "logit softcap": (lambda: fastllm.cross_entropy(X, C, softcap=-1.0), ValueError, ["softcap", "-1.0"]),
    "z_loss": (lambda: fastllm.cross_entropy(X, C, z_loss=float("nan")), ValueError, ["z_loss", "nan"]),
    "backend name": (lambda: fastllm.backend("cudnn").__enter__(), ValueError, ["backend", "reference", "cudnn"]),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_says_what_came(what):
    call, error, words = BAD[what]
    with pytest.raises(error) as caught:
        call()
    assert caught.type is error
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in the message: {caught.value}"


@pytest.mark.parametrize("wrong", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_autocast_is_for_floats(dtype, wrong):
    """To bring other types to its own would drop what that cannot hold, as an imaginary part."""
    calls = {
        "attention": (lambda *qkv: fastllm.attention(*qkv), [t(Q)] * 3),
        "linear": (fastllm.linear, [X, t(4, 8), t(4)]),
        "linear_cross_entropy": (
            lambda x, weight, bias: fastllm.linear_cross_entropy(x, weight, C, linear_bias=bias),
            [X, t(4, 8), t(4)],
        ),
    }
    for low in (torch.bfloat16, torch.float16):
        for op, (call, given) in calls.items():
            given = [x.to(dtype) if i == wrong else x for i, x in enumerate(given)]
            name = str(dtype).removeprefix("torch.")
            with torch.autocast("cpu", low), pytest.raises(TypeError, match=f"{op}: .* must be .*, got .*{name}"):
                call(*given)


@pytest.mark.parametrize("empty", [(0, 4, 5, 5), (1, 4, 0, 5), (1, 4, 5, 0), (1, 0, 5, 5), (0, 4, 0, 0)])
def test_empty_attention(backend, empty):
    B, H, T, S = empty
    q = torch.randn(B, H, T, 8, device=backend, requires_grad=True)
    k, v = (torch.randn(B, H, S, 8, device=backend, requires_grad=True) for _ in "kv")
    o, lse = fastllm.attention(q, k, v, causal=True, return_lse=True)
    assert o.shape == (B, H, T, 8) and lse.shape == (B, H, T)
    assert (o == 0).all()
    assert (lse == -torch.inf).all() or S
    for x, grad in zip((q, k, v), torch.autograd.grad(o.sum(), (q, k, v)), strict=True):
        assert grad.shape == x.shape and (grad == 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
@pytest.mark.parametrize("op", [fastllm.layer_norm, fastllm.rms_norm])
def test_empty_norm(backend, op, shape):
    x = torch.randn(shape, device=backend, requires_grad=True)
    weight = torch.randn(8, device=backend, requires_grad=True)
    y, h = op(x, weight, residual=x)
    assert y.shape == h.shape == x.shape
    dx, dweight = torch.autograd.grad((y.sum(), h.sum()), (x, weight))
    assert dx.shape == x.shape and dweight.shape == (8,) and (dweight == 0).all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8)])
def test_empty_activations(backend, shape):
    x = torch.randn(shape, device=backend, requires_grad=True)
    bias = torch.randn(8, device=backend, requires_grad=True)
    for call in (fastllm.swiglu, fastllm.geglu, lambda x: fastllm.swiglu(x, x), lambda x: fastllm.bias_gelu(x, bias)):
        assert torch.autograd.grad(call(x).sum(), x)[0].shape == x.shape
    assert (torch.autograd.grad(fastllm.bias_gelu(x, bias).sum(), bias)[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 5, 8), (1, 4, 0, 8), (1, 0, 5, 8)])
def test_empty_rope(backend, shape):
    q, table = torch.randn(shape, device=backend, requires_grad=True), torch.randn(9, 4, device=backend)
    y, k = fastllm.rope(q, q, table, table)
    assert y.shape == k.shape == shape and torch.autograd.grad(y.sum() + k.sum(), q)[0].shape == shape


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 5, 5), (0,)])
@pytest.mark.parametrize("op", [fastllm.softmax, fastllm.log_softmax])
def test_empty_softmax(backend, op, shape):
    x = torch.randn(shape, device=backend, requires_grad=True)
    y = op(x)
    assert y.shape == x.shape and torch.autograd.grad(y.sum(), x)[0].shape == x.shape


def test_softmax_of_a_scalar_is_an_error_not_a_crash():
    with pytest.raises((ValueError, IndexError), match="softmax|dim"):
        fastllm.softmax(t(()))


NOT_DENSE = {
    "nested": lambda x: torch.nested.nested_tensor(list(x)),
    "jagged": lambda x: torch.nested.nested_tensor(list(x), layout=torch.jagged),
    "sparse coo": lambda x: x.to_sparse(),
    "sparse csr": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
}
OF_ANY = {
    "attention": lambda x: fastllm.attention(x, x, x),
    "attention v": lambda x: fastllm.attention(t(*Q), t(*Q), x),
    "attention bias": lambda x: fastllm.attention(t(*Q), t(*Q), t(*Q), bias=x),
    "attention_varlen": lambda x: fastllm.attention_varlen(x, x, x, cu_seqlens_q=C, cu_seqlens_k=C),
    "attention_with_kvcache": lambda x: fastllm.attention_with_kvcache(t(*Q), x, x, cache_seqlens=1),
    "merge_attention": lambda x: fastllm.merge_attention([x, x], [t(1, 4, 5)] * 2),
    "scaled_dot_product_attention": lambda x: fastllm.compat.scaled_dot_product_attention(x, x, x),
    "flash_attn_qkvpacked_func": lambda x: fastllm.flash_attn_qkvpacked_func(x),
    "flash_attn_varlen_kvpacked_func": lambda x: fastllm.flash_attn_varlen_kvpacked_func(t(3, 4, 8), x, C, C, 1, 1),
    "layer_norm": lambda x: fastllm.layer_norm(x, W),
    "rms_norm weight": lambda x: fastllm.rms_norm(X, x),
    "rms_norm residual": lambda x: fastllm.rms_norm(X, residual=x),
    "softmax": fastllm.softmax,
    "log_softmax": fastllm.log_softmax,
    "swiglu": fastllm.swiglu,
    "geglu": lambda x: fastllm.geglu(X, x),
    "bias_gelu": fastllm.bias_gelu,
    "rope": lambda x: fastllm.rope(x, None, t(9, 4), t(9, 4)),
    "cross_entropy": lambda x: fastllm.cross_entropy(x, C),
    "linear_cross_entropy": lambda x: fastllm.linear_cross_entropy(X, x, C),
    "lora_linear": lambda x: fastllm.lora_linear(x, t(4, 8), t(2, 8), t(4, 2)),
    "quantize_weight": fastllm.quantize_weight,
    "weight_only_linear": lambda x: fastllm.weight_only_linear(x, t(4, 8)),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse)")
@pytest.mark.parametrize("kind", NOT_DENSE)
@pytest.mark.parametrize("name", OF_ANY)
def test_what_is_not_dense(name, kind):
    """One line that names the function, instead of PyTorch's list of all its backends."""
    x = NOT_DENSE[kind](X)
    with pytest.raises(TypeError, match=f"^{name.split()[0]}: .* must be a dense tensor, got one that is ") as raised:
        OF_ANY[name](x)
    assert len(str(raised.value)) < 150


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse)")
@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=str)
def test_a_product_that_is_not_dense_is_pytorchs(dtype):
    x, w = torch.randn(3, 5, 8).to(dtype), torch.randn(4, 8).to(dtype)
    for kind in ("nested", "jagged"):
        y = fastllm.linear(NOT_DENSE[kind](x), w)
        assert y.is_nested and torch.equal(y.to_padded_tensor(0), torch.nn.functional.linear(x, w))
    x = x.flatten(0, 1)
    assert torch.equal(fastllm.linear(x.to_sparse(), w), torch.nn.functional.linear(x.to_sparse(), w))
    assert torch.equal(fastllm.linear(x, w.to_sparse()), torch.nn.functional.linear(x, w.to_sparse()))


HUGE = 2**50  # no machine can allocate the answer; the input is one number seen 2^50 times


@pytest.mark.parametrize(
    "call",
    [
        lambda x: fastllm.layer_norm(x.expand(HUGE, 8)),
        lambda x: fastllm.rms_norm(x.expand(HUGE, 8)),
        lambda x: fastllm.softmax(x.expand(HUGE, 8)),
        lambda x: fastllm.cross_entropy(x.expand(HUGE, 8), torch.zeros(1, dtype=torch.int64).expand(HUGE)),
        lambda x: fastllm.attention(*[x.expand(1, 1, HUGE, 8)] * 3, causal=True),
        lambda x: fastllm.swiglu(x.expand(HUGE, 8)),
        lambda x: fastllm.bias_gelu(x.expand(HUGE, 8)),
        lambda x: fastllm.rope(x.expand(1, HUGE, 5, 8), None, x.expand(9, 4), x.expand(9, 4)),
    ],
    ids="layer_norm rms_norm softmax cross_entropy attention swiglu bias_gelu rope".split(),
)
def test_huge_input_raises(call):
    with pytest.raises((RuntimeError, MemoryError), match="(?i)memory|alloc|overflow|too (big|large)|API call failed"):
        call(torch.zeros(1))


def test_a_device_without_kernels_still_answers():
    o = fastllm.attention(*[torch.empty(Q, device="meta")] * 3)
    assert o.device.type == "meta" and o.shape == Q
