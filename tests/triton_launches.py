"""What the launchers of the Triton kernels are called with, on meta tensors, for test_triton_compile.py.

Options that change the launch or cost registers stand in one call: if the kernel with all of them keeps the rules, so
do those with fewer.
"""


def attention_options(kind, H, meta):
    """alibi_slopes, sink, seed and then, from scale to dropout_p, the numbers."""
    slopes = meta(H) if kind in ("alibi", "pairs") else None
    sink = None if kind == "plain" else meta(H)
    seed, dropout_p = (meta(dtype="int64"), 0.1) if kind == "pairs" else (None, 0.0)
    softcap = 0.0 if kind in ("plain", "alibi") else 30.0
    return slopes, sink, seed, 0.1, softcap, 40, 100, 0, dropout_p


def attention_kinds():
    """(dtype, D, kind): in fp32 every kind is launched as "pairs"; fp16 is bf16 with other instruction names."""
    for D in (32, 64, 128, 256):
        yield from (("bfloat16", D, kind) for kind in ("plain", "softcap", "pairs"))
        yield "float32", D, "pairs"
    yield "bfloat16", 128, "alibi"
    yield from (("float16", 128, kind) for kind in ("plain", "pairs"))


def attention_calls(torch, attention):
    from fastllm.bench import tune

    attention_launches(torch, attention, attention_kinds())
    for kernel in tune.tunables():
        for change in kernel.changes if kernel.module == "attention" else ():
            if "tiles" in change:
                with tune.launching(kernel, change):
                    attention_launches(torch, attention, [("bfloat16", D, "plain") for D in (64, 128)])
    every = tune.Tunable("attention", "Call", "launch", None, [], [])
    with tune.launching(every, dict(tiles=True)):
        attention_launches(
            torch, attention, [("bfloat16", D, kind) for D in (64, 128) for kind in ("softcap", "pairs")]
        )


def attention_launches(torch, attention, kinds):
    for dtype, D, kind in kinds:
        size = D - 8 if kind == "pairs" else D  # a padded head

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        B, H, Hkv, T, S = 2, 4, 2, 1000, 1040
        q, k, v = meta(B, H, T, size), meta(B, Hkv, S, size), meta(B, Hkv, S, size)
        lse = meta(B, H, T, dtype="float64")
        mask, bias = (meta(B, 1, T, S, dtype="bool"), meta(1, H, T, S)) if kind == "pairs" else (None, None)
        options = mask, bias, *attention_options(kind, H, meta)
        attention.attention_fwd(q, k, v, *options)
        attention.attention_bwd(q, lse, q, k, v, q, lse, *options, True, False)


def attention_sm90_calls(torch, attention_sm90):
    from fastllm.kernels.attention_scores import Window

    for dtype, D in ((torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float16, 128)):
        q, k = (torch.empty(2, H, T, D, dtype=dtype, device="meta") for H, T in ((4, 1000), (2, 1040)))
        lse = torch.empty(2, 4, 1000, dtype=torch.float64, device="meta")
        attention_sm90.forward(q, k, k, q, lse, 0.1, Window(1000, 1040, 40, -1000, 40))


def varlen_calls(torch, varlen):
    for dtype, D, kind in attention_kinds():
        if kind == "plain" or dtype == "float16":
            continue

        def meta(*shape, dtype=dtype):
            return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

        H, Hkv, T, S = 4, 2, 1000, 1040
        q, k, v, lse = meta(T, H, D), meta(S, Hkv, D), meta(S, Hkv, D), meta(H, T, dtype="float64")
        cu = meta(8, dtype="int32")
        options = cu, cu, *attention_options(kind, H, meta)
        varlen.attention_varlen_fwd(q, k, v, *options)
        varlen.attention_varlen_bwd(q, lse, q, k, v, q, lse, *options)


def kvcache_calls(torch, kvcache):
    """Decoding one and a few positions with 8 heads a key head, and prefilling; pages of 16, and whole caches."""

    def meta(*shape, dtype="bfloat16"):
        return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")

    for dtype, D in [("bfloat16", D) for D in (32, 64, 128, 256)] + [("float32", D) for D in (64, 128, 256)]:
        B, H, Hkv = 4, 32, 4
        lengths, table, angles = (
            meta(B, dtype="int64"),
            meta(B, 512, dtype="int32"),
            meta(8192, D // 2, dtype="float32"),
        )
        pages, whole = meta(2048, Hkv, 16, D, dtype=dtype), meta(B, Hkv, 8192, D, dtype=dtype)
        mask, bias, heads = meta(B, 1, 1, 8192, dtype="bool"), meta(1, H, 1, 8192), meta(H, dtype="float32")
        for T, cache, table_or_none in ((1, pages, table), (1, whole, None), (4, whole, None), (64, pages, table)):
            q, new = meta(B, H, T, D, dtype=dtype), meta(B, Hkv, T, D, dtype=dtype)
            rest = lengths, table_or_none, angles, angles, False
            plain = None, None, None, None, 0.1, 0.0, None, -1, 0
            scored = mask, bias, heads, heads, 0.1, 30.0, None, 100, 0
            kvcache.attention_kvcache_fwd(q, cache, cache, new, new, *rest, *(scored if T > 1 else plain))


def norm_calls(torch, norm):
    for D in (64, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(4096, D, dtype=dtype, device="meta")
            w = torch.empty(D, dtype=dtype, device="meta")
            row = torch.empty(4096, dtype=torch.float32, device="meta")
            norm.layer_norm_fwd(x, w, w, x, None, 1e-5, 0.0)
            norm.layer_norm_bwd(x, x, x, w, row, row, None, 0.0, True, True)
            norm.rms_norm_fwd(x, w, None, None, 1e-5, 0.0, 0.0)
            norm.rms_norm_bwd(x, None, x, w, row, None, 0.0, 0.0, False)
            if D in (1024, 8192, 32768):
                seed = torch.empty((), dtype=torch.int64, device="meta")
                norm.layer_norm_fwd(x, w, w, x, seed, 1e-5, 0.1)
                norm.layer_norm_bwd(x, x, x, w, row, row, seed, 0.1, True, True)


def softmax_calls(torch, softmax):
    for S in (64, 1024, 2048, 4096, 8192, 16384, 32768):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(2, 4, 128, S, dtype=dtype, device="meta")
            mask = torch.empty(2, 1, 128, S, dtype=torch.bool, device="meta")
            softmax.softmax_fwd(x, mask, 0.5, True, False)
            softmax.softmax_fwd(x, None, 1.0, False, True)
            softmax.softmax_bwd(x, x, 0.5, False)
            softmax.softmax_bwd(x, x, 1.0, True)


def cross_entropy_calls(torch, cross_entropy):
    for V in (64, 1024, 4096, 32768, 262144):
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.empty(128, V, dtype=dtype, device="meta")
            target = torch.empty(128, dtype=torch.int64, device="meta")
            lse, total = (torch.empty(n, dtype=torch.float64, device="meta") for n in (128, 2))
            weight, dloss = (torch.empty(shape, dtype=torch.float32, device="meta") for shape in (V, ()))
            for given, *numbers in ((None, 0.0, 0.0, 0.0), (weight, 0.1, 30.0, 1e-4)):
                cross_entropy.cross_entropy_fwd(x, target, given, -100, 1, *numbers, given is not None)
                cross_entropy.cross_entropy_bwd(dloss, x, target, given, lse, -100, 1, *numbers)
                cross_entropy.cross_entropy_rows(x, target, given, total, dloss, -100, *numbers, False)


def activation_calls(torch, activation):
    for D in (128, 3072):
        for dtype in (torch.bfloat16, torch.float32) if D == 3072 else (torch.bfloat16,):
            x = torch.empty(64, 2 * D, dtype=dtype, device="meta")
            half, b = x[:, :D], torch.empty(D, dtype=dtype, device="meta")
            dense = half.contiguous()
            activation.swiglu_fwd(x, None)
            activation.swiglu_bwd(dense, x, None)
            for tanh in (False, True):
                activation.geglu_fwd(dense, dense, tanh)
                activation.geglu_bwd(dense, dense, dense, tanh)
                for bias in (None, b):
                    activation.bias_gelu_fwd(dense, bias, tanh)
                    activation.bias_gelu_bwd(dense, dense, bias, tanh)


def rope_calls(torch, rope):
    for D, R in ((64, 64), (128, 128), (80, 32)):
        for dtype in (torch.bfloat16, torch.float32):
            q = torch.empty(2, 1000, 4, D, dtype=dtype, device="meta").transpose(1, 2)
            pairs = torch.empty(2048, R // 2, dtype=torch.float32, device="meta")
            lengths = torch.empty(2, dtype=torch.int64, device="meta")
            rope.rope_fwd(q, None, pairs, pairs, None, None, 0, False, False, False)
            rope.rope_fwd(q, None, pairs, pairs, lengths, None, 0, True, False, True)
            if R == D:
                elements = torch.empty(2, 1000, D, dtype=dtype, device="meta")
                rope.rope_fwd(q, q, elements, elements, None, None, 0, False, True, False)


def adamw_calls(torch, adamw):
    for dtype in (torch.bfloat16, torch.float32):
        p = torch.empty(1000, dtype=dtype, device="meta")
        moment = torch.empty(1000, device="meta")
        for top in ([], [moment]):
            step = torch.ones(())
            adamw.adamw_step([p], [p], [moment], [moment], top, [step], 1e-3, 0.9, 0.999, 1e-8, 0.01, False)


def merge_attention_calls(torch, merge_attention):
    for dtype in (torch.bfloat16, torch.float32):
        for D, parts in ((64, 2), (128, 2), (128, 8), (256, 2)):
            outs = [torch.empty(2, 4, 1000, D, dtype=dtype, device="meta")] * parts
            lses = [torch.empty(2, 4, 1000, device="meta")] * parts
            merge_attention.merge_attention_fwd(outs, lses)
            merge_attention.merge_attention_bwd(outs[0], lses[0], outs, lses)


def weight_only_calls(torch, weight_only):
    """Decoding one sequence and some, in 8 bits (symmetric) and in 4 (with offsets); unpacking for many rows."""
    N, K, group = 4096, 4096, 64
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.empty(64, K, dtype=dtype, device="meta")
        bias = torch.empty(N, dtype=dtype, device="meta")
        for bits, groups, scale_dtype in ((8, 1, torch.float32), (4, K // group, torch.bfloat16)):
            codes = torch.empty(N // 16, K * bits // 32, 16, dtype=torch.int32, device="meta")
            scales = torch.empty(N // 16, groups, 16, dtype=scale_dtype, device="meta")
            packed = codes, scales, scales if bits == 4 else None
            for M in (1, 32, 64):
                weight_only.quantized_linear_fwd(x[:M], *packed, bias, N, bits, K // groups)
            weight_only.dequantize_fwd(*packed, x, 0, N, N, K, bits, K // groups)
        other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
        for M in (1, 64):
            weight_only.weight_only_linear_fwd(x[:M], torch.empty(N, K, dtype=other, device="meta"), bias)


def linear_calls(torch, linear):
    for dtype in (torch.bfloat16, torch.float32):
        x, w = (torch.empty(4096, 1024, dtype=dtype, device="meta") for _ in "xw")
        bias, y = torch.empty(4096, dtype=dtype, device="meta"), torch.empty(4096, 4096, dtype=dtype, device="meta")
        for activation in range(4):
            linear.linear_act_fwd(x, w, bias, activation, True)
            linear.bias_act_fwd(y, None, activation)
            linear.bias_act_bwd(y, y, None, activation, True)
        linear.linear_act_fwd(x, w.T.contiguous().T, None, 1, False)


CALLS = {
    "attention": attention_calls,
    "attention_sm90": attention_sm90_calls,
    "varlen": varlen_calls,
    "kvcache": kvcache_calls,
    "norm": norm_calls,
    "softmax": softmax_calls,
    "cross_entropy": cross_entropy_calls,
    "activation": activation_calls,
    "rope": rope_calls,
    "adamw": adamw_calls,
    "merge_attention": merge_attention_calls,
    "weight_only": weight_only_calls,
    "linear": linear_calls,
}
