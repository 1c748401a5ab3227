"""Other libraries' norms, losses and rotary embeddings: against PyTorch's own functions and fp64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare

from fastllm import compat

NORM_OPTIONS = [
    dict(zip(("residual", "second", "prenorm", "zero_centered_weight", "is_rms_norm"), on))
    for on in itertools.product([False, True], repeat=5)
]


@pytest.mark.parametrize("on", NORM_OPTIONS, ids=lambda on: "-".join(name for name, is_on in on.items() if is_on))
def test_layer_norm_fn(on):
    x, residual, x1 = (torch.randn(3, 5, 32) for _ in range(3))
    w, b, w1, b1 = (torch.randn(32) for _ in range(4))
    rowscale = torch.rand(3, 5)
    given = dict(zero_centered_weight=on["zero_centered_weight"], is_rms_norm=on["is_rms_norm"], prenorm=on["prenorm"])
    given |= dict(residual=residual) if on["residual"] else {}
    given |= dict(x1=x1, weight1=w1, bias1=b1) if on["second"] else {}
    h = x * rowscale[..., None] + x1 * on["second"] + residual * on["residual"]

    def norm(w, b):
        c = h if on["is_rms_norm"] else h - h.mean(-1, keepdim=True)
        return c / (c.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (w + on["zero_centered_weight"]) + b

    expected = [norm(w, b)] + [norm(w1, b1)] * on["second"] + [h] * on["prenorm"]
    got = compat.layer_norm_fn(x, w, b, rowscale=rowscale, **given)
    got = got if isinstance(got, tuple) else (got,)
    assert len(got) == len(expected)
    for a, e in zip(got, expected):
        torch.testing.assert_close(a, e)


def test_layer_norm_fn_keeps_the_stream_in_fp32():
    x, w = torch.randn(4, 32, dtype=torch.bfloat16), torch.ones(32, dtype=torch.bfloat16)
    y, h = compat.rms_norm_fn(x, w, None, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    y, h = compat.rms_norm_fn(x, w, None, residual=h, prenorm=True, residual_in_fp32=True)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, 2 * x.float())
    assert compat.layer_norm_fn(x, w, None, out_dtype=torch.float32).dtype == torch.float32
    with pytest.raises(ValueError, match="out"):
        compat.layer_norm_fn(x, w, None, out=x)


@pytest.mark.parametrize("second, residual", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("rms", [False, True])
def test_norm_with_dropout(rms, second, residual):
    """h is what is left of its parts, scaled, and y is the norm of that h; the kernel drops by torch's seed."""
    x, x1, r, w, w1 = torch.randn(50, 64), torch.randn(50, 64), torch.randn(50, 64), torch.rand(64), torch.rand(64)
    given = dict(x1=x1, weight1=w1) if second else {}
    given |= dict(residual=r) if residual else {}
    function = compat.rms_norm_fn if rms else compat.layer_norm_fn

    def run(prenorm=True):
        torch.manual_seed(5)
        return function(x, w, None, dropout_p=0.25, prenorm=prenorm, **given)

    y, *rest, h = run()
    left = h - r if residual else h
    choices = [torch.zeros_like(x), x / 0.75] if not second else [0 * x, x / 0.75, x1 / 0.75, (x + x1) / 0.75]
    nearest = torch.stack([(left - c).abs() for c in choices])
    assert nearest.amin(0).max() <= 4 * torch.finfo(x.dtype).eps * max(x.abs().max(), r.abs().max()) / 0.75
    dropped = (nearest.argmin(0) == 0).double().mean()
    assert abs(dropped - 0.25 ** (1 + second)) < 5 * (0.25 / x.numel()) ** 0.5, "five standard deviations"
    norm = F.rms_norm if rms else F.layer_norm
    for got, weight in zip((y, *rest), (w, w1)):
        exact = norm(h.double(), (64,), weight.double(), eps=1e-6)
        assert_as_accurate(got, norm(h, (64,), weight, eps=1e-6), exact)
    again = run(prenorm=False)
    for a, b in zip(again if second else [again], (y, *rest)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", [{}, dict(label_smoothing=0.1), dict(lse_square_scale=0.01), dict(logit_scale=0.3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_flash_attn_cross_entropy(dtype, given):
    """In fp32, whatever the logits are, one loss a label, its z-loss beside it."""
    logits, labels = 3 * torch.randn(40, 97), torch.randint(97, (40,))
    labels[7] = -100
    smoothing, scale, z = (given.get(name, 0.0) for name in ("label_smoothing", "logit_scale", "lse_square_scale"))

    def plain(logits):
        logits = logits * scale if scale else logits
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        z_losses = (z * logits.logsumexp(-1).square()).masked_fill(labels == -100, 0.0)
        return losses + z_losses, z_losses

    ours = lambda logits: compat.cross_entropy_loss(logits, labels, **given)  # noqa: E731
    compare(ours, plain, plain, [logits], [torch.randn(40), None], dtype)
    losses, z_losses = ours(logits.to(dtype))
    assert losses.dtype == z_losses.dtype == torch.float32 and losses[7] == z_losses[7] == 0


@pytest.mark.parametrize("interleaved", [False, True])
def test_apply_rotary_emb(interleaved):
    x, angle = torch.randn(2, 5, 3, 20), torch.randn(9, 8)
    cos, sin = angle.cos(), angle.sin()
    lengths = torch.tensor([0, 4], dtype=torch.int32)
    y = compat.apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=lengths)
    for b, first in enumerate(lengths.tolist()):
        c, s = (table[first : first + 5, None] for table in (cos, sin))
        a, b_ = (x[b, ..., :16:2], x[b, ..., 1:16:2]) if interleaved else (x[b, ..., :8], x[b, ..., 8:16])
        turned = [a * c - b_ * s, b_ * c + a * s]
        turned = torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)
        torch.testing.assert_close(y[b], torch.cat([turned, x[b, ..., 16:]], -1))
    cu_seqlens = torch.tensor([0, 5, 10], dtype=torch.int32)
    packed = compat.apply_rotary_emb(x.flatten(0, 1), cos, sin, interleaved, False, lengths, cu_seqlens, 5)
    assert torch.equal(packed, y.flatten(0, 1))
    before = x.clone()
    assert torch.equal(compat.apply_rotary_emb(x, cos, sin, interleaved, True, lengths), y)
    assert torch.equal(x, y) and not torch.equal(x, before)
    with pytest.raises(ValueError, match="R / 2"):
        compat.apply_rotary_emb(x, torch.ones(9, 20), torch.ones(9, 20))


@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("function", [compat.apply_rotary_pos_emb, compat.liger_rope])
def test_apply_rotary_pos_emb(function, unsqueeze_dim):
    shape = (2, 4, 5, 16) if unsqueeze_dim == 1 else (2, 5, 4, 16)
    q, k, angle = torch.randn(shape), torch.randn(shape), torch.randn(2, 5, 8)
    cos, sin = angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)

    def theirs(x):
        a, b = x.chunk(2, -1)
        return x * cos.unsqueeze(unsqueeze_dim) + torch.cat([-b, a], -1) * sin.unsqueeze(unsqueeze_dim)

    for got, x in zip(function(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim), (q, k), strict=True):
        torch.testing.assert_close(got, theirs(x))
    with pytest.raises(ValueError, match="unsqueeze_dim"):
        compat.apply_rotary_pos_emb(q, k, cos, sin, 0)


def test_liger_names():
    x, w, b = torch.randn(4, 32), torch.randn(32), torch.randn(32)
    torch.testing.assert_close(compat.liger_rms_norm(x, w, 1e-6, 1.0), F.rms_norm(x, (32,), w + 1, 1e-6))
    torch.testing.assert_close(compat.liger_layer_norm(x, w, b, 1e-5), F.layer_norm(x, (32,), w, b, 1e-5))
    torch.testing.assert_close(compat.liger_softmax(x), x.softmax(-1))
    torch.testing.assert_close(compat.liger_swiglu(x, x), F.silu(x) * x)
    torch.testing.assert_close(compat.liger_geglu(x, x), F.gelu(x, approximate="tanh") * x)


def test_liger_losses():
    x, w, b, classes = torch.randn(6, 8), torch.randn(9, 8), torch.randn(9), torch.rand(9)
    target = torch.tensor([0, 8, 3, -1, 2, 2])
    logits = F.linear(x, w, b)

    def plain(logits):
        """The loss and the z-loss in it."""
        capped = 30 * torch.tanh(logits / 30)
        z_loss = 0.01 * capped.logsumexp(-1)[target >= 0].square().mean()
        options = dict(ignore_index=-1, label_smoothing=0.1)
        return F.cross_entropy(capped, target, classes.to(logits.dtype), **options) + z_loss, z_loss

    peer, exact = plain(logits), plain(F.linear(x.double(), w.double(), b.double()))
    options = dict(ignore_index=-1, label_smoothing=0.1, lse_square_scale=0.01, softcap=30.0)
    assert_as_accurate(compat.liger_cross_entropy(logits, target, classes, **options), peer[0], exact[0])
    fused = compat.liger_fused_linear_cross_entropy(x, w, target, b, classes, **options)
    assert_as_accurate(fused, peer[0], exact[0])
    bare = F.cross_entropy(logits[:3], target[:3])
    assert_as_accurate(
        compat.liger_cross_entropy(logits[:3], target[:3]), bare, F.cross_entropy(logits[:3].double(), target[:3])
    )
    more = dict(return_z_loss=True, return_token_accuracy=True, return_predicted_tokens=True)
    found = compat.liger_cross_entropy(logits, target, classes, **options, **more)
    assert torch.equal(found.loss, compat.liger_cross_entropy(logits, target, classes, **options))
    assert_as_accurate(found.z_loss, peer[1], exact[1])
    predicted = logits.argmax(-1).masked_fill(target == -1, -1)
    assert torch.equal(found.predicted_tokens, predicted)
    assert found.token_accuracy == (predicted == target)[target >= 0].float().mean()
    fused = compat.liger_fused_linear_cross_entropy(x, w, target, b, classes, **options, return_token_accuracy=True)
    assert fused.token_accuracy == found.token_accuracy and fused.z_loss is fused.predicted_tokens is None
    for name in ("return_z_loss", "return_predicted_tokens", "use_token_scaling"):
        with pytest.raises(ValueError, match=f"{name} is not supported"):
            compat.liger_fused_linear_cross_entropy(x, w, target, **{name: True})
