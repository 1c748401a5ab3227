"""Launches in which sizes are 1 or options are missing: of such integers and of None Triton makes constants, which its
interpreter does not, so that what is interpreted well may still not compile. Beside triton_launches.py, for one chip.
"""


def edge_calls(torch):
    """Every launcher with sizes of 1, and with the optional tensors that triton_launches.py always gives."""
    from fastllm.kernels import (
        activation,
        adamw,
        attention,
        cross_entropy,
        kvcache,
        linear,
        merge_attention,
        norm,
        rope,
        softmax,
        weight_only,
    )

    def meta(*shape, dtype="bfloat16"):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    seed, lse, one = meta(dtype="int64"), meta(1, 1, 1, dtype="float64"), meta(1, 1)
    for D in (1, 40000):
        x, row = meta(1, D), meta(1, dtype="float32")
        norm.layer_norm_fwd(x, None, None, x, seed, 1e-5, 0.1)
        norm.layer_norm_bwd(x, x, x, None, row, row, seed, 0.1, True, True)
        norm.rms_norm_fwd(x, None, None, None, 1e-6, 1.0, 0.0)
        norm.rms_norm_bwd(x, None, x, None, row, None, 1.0, 0.0, False)
    head = meta(1, 1, 8, 32)  # one head, whose number is a constant
    options = None, None, None, None, seed, 0.1, 0.0, 0, -1, -1, 0.5
    attention.attention_fwd(head, head, head, *options)
    attention.attention_bwd(head, lse, head, head, head, head, lse, *options, False, False)
    cache, length = meta(1, 1, 1, 2), meta(1, dtype="int32")
    for table, angles in ((None, None), (meta(1, 1, dtype="int32"), meta(1, 1, dtype="float32"))):
        rest = length, table, angles, angles, True, None, None, None, None, 1.0, 0.0, None, -1, 0
        kvcache.attention_kvcache_fwd(cache, cache, cache, cache, cache, *rest)
    softmax.softmax_fwd(meta(1, 1, 1, 1), meta(1, 1, 1, 1, dtype="bool"), 1.0, True, True)
    softmax.softmax_bwd(one, one, 1.0, False)
    target = meta(1, dtype="int64")
    for ignored, weight in ((1, None), (0, meta(1))):
        numbers = (1.0, 1.0, 1.0) if weight is not None else (0.0, 0.0, 0.0)
        cross_entropy.cross_entropy_fwd(one, target, weight, ignored, 1, *numbers, True)
        cross_entropy.cross_entropy_bwd(one[0], one, target, weight, lse[0, 0], ignored, 0, *numbers)
    activation.swiglu_fwd(meta(1, 2), None)
    activation.swiglu_bwd(one, meta(1, 2), None)
    activation.bias_gelu_fwd(one, one[0], True)
    activation.bias_gelu_bwd(one, one, one[0], True)
    pairs = meta(1, 1, dtype="float32")
    rope.rope_fwd(meta(1, 1, 1, 3), None, pairs, pairs, meta(1, dtype="int64"), None, 1, False, False, False)
    moment = meta(1, dtype="float32")
    adamw.adamw_step([one[0]], [one[0]], [moment], [moment], [moment], [torch.ones(())], 1.0, 0.0, 0.5, 1.0, 0.0, True)
    merge_attention.merge_attention_fwd([one], [moment])
    merge_attention.merge_attention_bwd(one, moment, [one], [moment])
    codes, scales = meta(1, 1, 16, dtype="int32"), meta(1, 1, 16, dtype="float32")
    for bits in (8, 4):
        K = 32 // bits
        weight_only.quantized_linear_fwd(meta(1, K), codes, scales, None, None, 1, bits, K)
        weight_only.dequantize_fwd(codes, scales, None, one, 0, 1, 1, K, bits, K)
    weight_only.weight_only_linear_fwd(one, meta(1, 1, dtype="float16"), None)
    for bias in (None, one[0]):
        linear.linear_act_fwd(one, one, bias, 1, True)
    linear.bias_act_bwd(one, one, None, 1, False)
