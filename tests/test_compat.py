"""Other libraries' names: their signatures, layouts and alignments, against PyTorch's own functions and fp64."""

import inspect
import sys

import pytest
import torch
import torch.nn.functional as F
from check import assert_as_accurate, compare

from fastllm import compat, reference

B, T, S, H, HKV, D = 2, 33, 47, 4, 2, 16

SIGNATURES = {
    "flash_attn_func": "q k v dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
    " return_attn_probs",
    "flash_attn_kvpacked_func": "q kv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
    " return_attn_probs",
    "flash_attn_qkvpacked_func": "qkv dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
    " return_attn_probs",
    "flash_attn_varlen_func": "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p softmax_scale causal"
    " window_size softcap alibi_slopes deterministic return_attn_probs block_table",
    "flash_attn_varlen_kvpacked_func": "q kv cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k dropout_p"
    " softmax_scale causal window_size softcap alibi_slopes deterministic return_attn_probs",
    "flash_attn_varlen_qkvpacked_func": "qkv cu_seqlens max_seqlen dropout_p softmax_scale causal window_size softcap"
    " alibi_slopes deterministic return_attn_probs",
    "flash_attn_with_kvcache": "q k_cache v_cache k v rotary_cos rotary_sin cache_seqlens cache_batch_idx cache_leftpad"
    " block_table softmax_scale causal window_size softcap rotary_interleaved alibi_slopes num_splits"
    " return_softmax_lse",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal scale enable_gqa",
    "apply_rotary_emb": "x cos sin interleaved inplace seqlen_offsets cu_seqlens max_seqlen",
    "apply_rotary_pos_emb": "q k cos sin unsqueeze_dim rotary_dim",
    "liger_rope": "q k cos sin position_ids unsqueeze_dim rotary_dim",
    "layer_norm_fn": "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32"
    " zero_centered_weight is_rms_norm return_dropout_mask out_dtype out residual_out",
    "rms_norm_fn": "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32"
    " zero_centered_weight return_dropout_mask out_dtype out residual_out",
    "cross_entropy_loss": "logits labels precomputed_lse label_smoothing logit_scale lse_square_scale ignore_index"
    " inplace_backward process_group",
    "unpad_input": "hidden_states attention_mask unused_mask",
    "pad_input": "hidden_states indices batch seqlen",
    "liger_rms_norm": "X W eps offset casting_mode in_place",
    "liger_layer_norm": "X W B eps",
    "liger_softmax": "x",
    "liger_cross_entropy": "input target weight size_average ignore_index reduce reduction label_smoothing"
    " lse_square_scale softcap return_z_loss return_token_accuracy return_predicted_tokens",
    "liger_fused_linear_cross_entropy": "input weight target bias ce_weight ignore_index lse_square_scale"
    " label_smoothing reduction softcap return_z_loss accum_dtype use_token_scaling return_token_accuracy"
    " return_predicted_tokens chunk_mem_const",
    "liger_swiglu": "a b",
    "liger_geglu": "a b",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_argument_order_is_theirs(name):
    """Callers pass these by position."""
    assert list(inspect.signature(getattr(compat, name)).parameters) == SIGNATURES[name].split()


def truth(q, k, v, causal=False, window=(-1, -1), q_offset=None, **options):
    """[B, T, H, D] through the reference."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o, _ = reference.attention(
        q,
        k,
        v,
        scale=options.pop("scale", q.shape[-1] ** -0.5),
        q_offset=k.shape[2] - q.shape[2] if q_offset is None else q_offset,
        window_left=window[0],
        window_right=0 if causal else window[1],
        **options,
    )
    return o.transpose(1, 2)


def heads_inside(T=T, S=S, Hkv=HKV):
    return torch.randn(B, T, H, D), torch.randn(B, S, Hkv, D), torch.randn(B, S, Hkv, D)


OPTIONS = [
    ({}, {}),
    (dict(causal=True), dict(causal=True)),
    (dict(window_size=(5, 3)), dict(window=(5, 3))),
    (dict(causal=True, window_size=(7, 7)), dict(causal=True, window=(7, 7))),
    (dict(softmax_scale=0.4, softcap=2.0), dict(scale=0.4, softcap=2.0)),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given, meant", OPTIONS, ids=str)
def test_flash_attn_func(given, meant, dtype):
    compare(
        lambda *a: compat.flash_attn_func(*a, **given),
        lambda *a: truth(*a, **meant),
        lambda *a: truth(*a, **meant),
        heads_inside(),
        [torch.randn(B, T, H, D)],
        dtype,
    )


def test_flash_attn_returns_the_log_sum_exp():
    q, k, v = heads_inside()
    o, lse, probabilities = compat.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    expected = reference.attention(
        *(x.transpose(1, 2).double() for x in (q, k, v)), scale=D**-0.5, q_offset=S - T, window_right=0
    )
    torch.testing.assert_close(lse.double(), expected[1])
    assert lse.shape == (B, H, T) and probabilities is None and o.is_contiguous()


def test_alibi_and_dropout_reach_the_kernel():
    q, k, v = heads_inside()
    slopes = torch.rand(H)
    torch.testing.assert_close(
        compat.flash_attn_func(q, k, v, alibi_slopes=slopes), truth(q, k, v, alibi_slopes=slopes)
    )
    torch.manual_seed(3)
    a = compat.flash_attn_func(q, k, v, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(a, compat.flash_attn_func(q, k, v, 0.5)) and not torch.equal(a, compat.flash_attn_func(q, k, v))


def test_packed_forms_are_views_of_the_same():
    q, k, v = heads_inside(S=T, Hkv=H)
    expected = compat.flash_attn_func(q, k, v, causal=True, window_size=(9, 0))
    options = 0.0, None, True, (9, 0)
    assert torch.equal(compat.flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), *options), expected)
    assert torch.equal(compat.flash_attn_kvpacked_func(q, torch.stack([k, v], 2), *options), expected)
    cu = torch.arange(B + 1, dtype=torch.int32) * T
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    varlen = compat.flash_attn_varlen_func(q, k, v, cu, cu, T, T, *options)
    torch.testing.assert_close(varlen.view(B, T, H, D), expected)
    assert torch.equal(compat.flash_attn_varlen_qkvpacked_func(torch.stack([q, k, v], 1), cu, T, *options), varlen)
    kv = torch.stack([k, v], 1)
    assert torch.equal(compat.flash_attn_varlen_kvpacked_func(q, kv, cu, cu, T, T, *options), varlen)
    o, lse, _ = compat.flash_attn_varlen_func(q, k, v, cu, cu, T, T, *options, return_attn_probs=True)
    assert torch.equal(o, varlen) and lse.shape == (H, B * T)


def test_pages_are_refused():
    with pytest.raises(ValueError, match="block_table"):
        compat.flash_attn_varlen_func(*[torch.zeros(3, 1, 4)] * 3, *[torch.tensor([0, 3])] * 2, 3, 3, block_table=1)


@pytest.mark.parametrize("paged", [False, True])
def test_flash_attn_with_kvcache(paged):
    """Keys are written into the caller's cache, turned, and seen by the queries after them."""
    new, held = 3, torch.tensor([4, 9], dtype=torch.int32)
    q, k, v = torch.randn(B, new, H, D), torch.randn(B, new, HKV, D), torch.randn(B, new, HKV, D)
    k_cache, v_cache = torch.randn(B, 16, HKV, D), torch.randn(B, 16, HKV, D)
    angles = torch.rand(16, D // 2)
    cos, sin = angles.cos(), angles.sin()

    def turned(x, start):  # pairs (2i, 2i + 1), flash-attn's default for caches
        c, s = cos[start : start + new, None], sin[start : start + new, None]
        a, b = x[..., ::2], x[..., 1::2]
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(-2)

    table, caches = None, (k_cache.clone(), v_cache.clone())
    if paged:
        table = torch.tensor([[3, 0, 1, 6], [5, 2, 7, 4]], dtype=torch.int32)
        pages = [torch.empty(8, 4, HKV, D) for _ in caches]
        for page, cache in zip(pages, caches):
            page[table.flatten().long()] = cache.reshape(8, 4, HKV, D)
        caches = pages
    o, lse = compat.flash_attn_with_kvcache(
        q, *caches, k, v, cos, sin, held, block_table=table, causal=True, window_size=(6, 0), return_softmax_lse=True
    )
    assert o.shape == q.shape and lse.shape == (B, H, new)
    for n, length in enumerate(held.tolist()):
        kn = torch.cat([k_cache[n, :length], turned(k[n], length)])[None]
        vn = torch.cat([v_cache[n, :length], v[n]])[None]
        expected = truth(turned(q[n], length)[None], kn, vn, causal=True, window=(6, 0))
        torch.testing.assert_close(o[n : n + 1], expected)
        held_now = caches[0][table[n].long()].flatten(0, 1) if paged else caches[0][n]
        torch.testing.assert_close(held_now[: length + new], kn[0])


def test_flash_attn_with_a_full_cache():
    q, k, v = heads_inside(T=1)
    o = compat.flash_attn_with_kvcache(q, k, v)
    torch.testing.assert_close(o, truth(q, k, v))


def test_what_a_cache_cannot_do_is_refused():
    q, k, v = heads_inside(T=2)
    with pytest.raises(ValueError, match="cache_leftpad"):
        compat.flash_attn_with_kvcache(q, k, v, cache_leftpad=torch.zeros(B, dtype=torch.int32))
    with pytest.raises(ValueError, match="must be causal"):
        compat.flash_attn_with_kvcache(q, k, v, rotary_cos=torch.ones(S, 8), rotary_sin=torch.ones(S, 8))


def test_padding_goes_out_and_comes_back():
    x = torch.randn(3, 7, 2, 5, requires_grad=True)
    mask = torch.arange(7) < torch.tensor([[7], [0], [4]])
    packed, indices, cu_seqlens, longest, lengths = compat.unpad_input(x, mask)
    assert cu_seqlens.tolist() == [0, 7, 7, 11] and longest == 7 and lengths.tolist() == [7, 0, 4]
    assert torch.equal(packed, x[mask])
    padded = compat.pad_input(packed, indices, 3, 7)
    assert torch.equal(padded, x * mask[:, :, None, None])
    (padded * 2).sum().backward()
    assert torch.equal(x.grad, 2.0 * mask[:, :, None, None].expand_as(x))
    more = compat.unpad_input(x, mask.int(), (~mask).int())
    assert len(more[0]) == 21 and more[4].tolist() == [7, 0, 4]


MASKS = {
    "none": lambda: None,
    "padding": lambda: (torch.arange(S) < torch.tensor([[S], [9]]))[:, None, None],
    "boolean": lambda: torch.rand(T, S) > 0.3,
    "additive": lambda: torch.randn(B, 1, T, S),
    "per head": lambda: torch.randn(1, H, 1, S),
}


@pytest.mark.parametrize("mask", MASKS)
def test_sdpa_masks(mask):
    mask = MASKS[mask]()  # made here, so that its numbers do not depend on which other files were collected
    q, k, v = torch.randn(B, H, T, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D + 8)
    additive = mask is not None and mask.is_floating_point()
    inputs = [q, k, v, mask] if additive else [q, k, v]

    def call(function):
        return lambda q, k, v, bias=None: function(q, k, v, bias if additive else mask, scale=0.3)

    torchs = call(F.scaled_dot_product_attention)
    compare(call(compat.scaled_dot_product_attention), torchs, torchs, inputs, [torch.randn(B, H, T, D + 8)], q.dtype)


SHAPES = [((T, D), (S, D)), ((3, T, D), (3, S, D)), ((2, 1, 3, T, D), (1, 2, 3, S, D)), ((B, H, T, D), (B, 1, S, D))]


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("q_shape, k_shape", SHAPES, ids=str)
def test_sdpa_leading_dimensions(q_shape, k_shape, is_causal):
    q, k, v = torch.randn(q_shape), torch.randn(k_shape), torch.randn(k_shape)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=is_causal)
    got = compat.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    assert_as_accurate(got, F.scaled_dot_product_attention(q, k, v, is_causal=is_causal), expected)


def test_sdpa_fewer_key_heads():
    q, k, v = torch.randn(3, B, H, T, D), torch.randn(3, B, HKV, S, D), torch.randn(3, B, HKV, S, D)
    options = dict(is_causal=True, enable_gqa=True)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), **options)
    got = compat.scaled_dot_product_attention(q, k, v, **options)
    assert_as_accurate(got, F.scaled_dot_product_attention(q, k, v, **options), expected)
    torch.testing.assert_close(compat.scaled_dot_product_attention(q[0], k[0], v[0], **options), got[0])
    one = compat.scaled_dot_product_attention(q, k, v[:, :, :1], **options)  # keys and values may differ in it
    torch.testing.assert_close(one, F.scaled_dot_product_attention(q, k, v[:, :, :1], **options))
    with pytest.raises(ValueError, match="multiple of 5"):
        compat.scaled_dot_product_attention(q, k, torch.randn(3, B, 5, S, D), **options)
    with pytest.raises(RuntimeError, match="broadcast"):
        compat.scaled_dot_product_attention(q, k, v)
    with pytest.raises(ValueError, match="is_causal"):
        compat.scaled_dot_product_attention(q, k, v, torch.ones(T, S, dtype=torch.bool), is_causal=True)


def test_stand_in_only_on_request():
    assert "flash_attn" not in sys.modules
    compat.install_flash_attn()
    compat.install_flash_attn()
    try:
        from flash_attn import flash_attn_func
        from flash_attn.bert_padding import pad_input, unpad_input
        from flash_attn.flash_attn_interface import flash_attn_varlen_func
        from flash_attn.layers.rotary import apply_rotary_emb
        from flash_attn.ops.triton.cross_entropy import cross_entropy_loss
        from flash_attn.ops.triton.layer_norm import rms_norm_fn

        assert cross_entropy_loss is compat.cross_entropy_loss
        assert apply_rotary_emb is compat.apply_rotary_emb
        assert (flash_attn_func, pad_input, unpad_input) == (
            compat.flash_attn_func,
            compat.pad_input,
            compat.unpad_input,
        )
        assert (flash_attn_varlen_func, rms_norm_fn) == (compat.flash_attn_varlen_func, compat.rms_norm_fn)
    finally:
        compat.uninstall_flash_attn()
    assert not [name for name in sys.modules if name.startswith("flash_attn")]


def test_the_real_package_is_not_hidden(monkeypatch, tmp_path):
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn/__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RuntimeError, match="real flash_attn"):
        compat.install_flash_attn()
