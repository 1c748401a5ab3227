"""The cases: what each op is given, what it must cost, who else can do it. `verify`, bench and pytest share them.

A case is one call at one size; dtype and pass (forward, backward, both) are chosen by whoever runs it. Every callable
takes the same inputs. Sizes of the bench are those of real models, sizes of `verify` are small and awkward.
"""

from fastllm.bench.cases.activation import bias_gelu, gated
from fastllm.bench.cases.adamw import adamw
from fastllm.bench.cases.attention import attention, kvcache, merge, varlen, visible_pairs
from fastllm.bench.cases.case import PASSES, Case
from fastllm.bench.cases.linear import linear, lora_linear, weight_only
from fastllm.bench.cases.loss import cross_entropy, linear_cross_entropy
from fastllm.bench.cases.norm import norm
from fastllm.bench.cases.rope import rope
from fastllm.bench.cases.softmax import softmax

__all__ = ["BENCH", "PASSES", "QUICK", "VERIFY", "Case", "merge", "visible_pairs"]

BENCH = [
    attention(1, 8, 2048, 64, causal=True),
    attention(4, 12, 1024, 64, causal=True),  # GPT-2 small
    attention(1, 32, 2048, 128, causal=True),  # Llama 7B
    attention(1, 32, 2048, 64, Hkv=8, causal=True),  # Llama 3.2 1B
    attention(1, 8, 512, 64),
    attention(1, 8, 512, 64, causal=True),
    attention(16, 12, 128, 64),  # BERT base
    attention(16, 12, 128, 64, causal=True),
    attention(64, 4, 64, 32),  # a small classifier on short sentences
    attention(64, 4, 64, 32, causal=True),
    attention(1, 8, 1021, 64, causal=True),  # no whole block anywhere
    attention(1, 8, 1024, 80, causal=True),
    attention(1, 8, 1024, 96, causal=True),
    attention(1, 16, 1024, 64, Hkv=4, causal=True),
    attention(1, 8, 4096, 64, window=(511, 0)),
    attention(1, 8, 1024, 128, Dv=64, causal=True),
    attention(1, 8, 1024, 64, biased=True),
    attention(1, 8, 1024, 64, dropout_p=0.1),
    attention(1, 32, 1, 128, Hkv=8, S=1024),  # a step of decoding
    attention(1, 32, 1, 128, Hkv=8, S=4096),
    attention(1, 32, 1, 128, Hkv=8, S=32768),
    attention(1, 32, 1, 128, S=1024),
    attention(1, 32, 1, 128, S=4096),
    attention(16, 12, 1, 64, S=1024),
    attention(1, 4, 16, 32),  # calls, hardly any work
    norm("layer_norm", 2048, 768),
    norm("layer_norm", 2048, 768, residual=True),
    norm("layer_norm", 8192, 2048),
    norm("rms_norm", 2048, 768),
    norm("rms_norm", 2048, 768, residual=True),
    norm("rms_norm", 4096, 768),
    norm("rms_norm", 4096, 4096, residual=True),
    softmax(512, 512),
    softmax(4096, 1024),
    softmax(8, 12, 256, 256, causal=True),
    softmax(4096, 1024, log=True),
    *(weight_only(1, N, K, bits) for N, K in ((768, 768), (4096, 4096), (14336, 4096)) for bits in (16, 8, 4)),
    weight_only(8, 4096, 4096, 4),
    *(weight_only(M, 4096, 4096, bits) for M in (16, 512) for bits in (8, 4)),
    weight_only(64, 4096, 4096, 8),
    varlen([round(16 * 32 ** (n / 31)) for n in range(32)], 8, 64, causal=True),  # 32 of 16 to 512, log-uniform
    linear(512, 768, 768),
    linear(512, 3072, 768),
    linear(2048, 768, 3072),
    linear(2048, 3072, 768),
    linear(512, 3072, 768, activation="gelu"),
    linear(2048, 3072, 768, activation="gelu_tanh"),
    linear(2048, 3072, 768, activation="relu"),
    lora_linear(2048, 768, 768, 8),
    lora_linear(2048, 3072, 768, 16),
    kvcache(1, 32, 8, 4096, 128),
    kvcache(8, 32, 8, 2048, 128, page_size=16),
    cross_entropy(128, 32000),
    cross_entropy(512, 50304),
    linear_cross_entropy(1024, 768, 50304),  # GPT-2 small
    gated("swiglu", 2048, 3072),
    gated("swiglu", 256, 3072),
    gated("swiglu", 4096, 6144),
    gated("geglu", 2048, 3072, approximate="tanh"),
    gated("geglu", 2048, 3072, approximate="none"),
    bias_gelu(2048, 3072, approximate="tanh"),
    bias_gelu(2048, 3072, approximate="none"),
    rope(1, 2048, 32, 64),
    rope(1, 2048, 32, 128, Hkv=8),  # Llama 3 8B
    rope(8, 256, 6, 64),
    adamw(64, 4096),  # in the second-level cache
    adamw(64, 65536),
    adamw(4, 4194304),
]
_QUICK = (
    "attention 1x8x2048x64 causal",
    "attention 16x12x128x64",
    "attention 1x32/8x1/4096x128",
    "layer_norm 2048x768",
    "rms_norm 2048x768 residual",
    "softmax 512x512",
    "softmax 4096x1024",
    "weight_only_linear 1x4096x4096 int8",
    "cross_entropy 512x50304",
    "swiglu 2048x3072",
    "geglu 2048x3072 tanh",
    "rope 1x2048x32x64",
)
QUICK = [case for case in BENCH if str(case) in _QUICK]

VERIFY = [
    attention(2, 3, 129, 64),
    attention(2, 4, 127, 64, causal=True),
    attention(1, 4, 200, 32, Hkv=2, causal=True),
    attention(1, 6, 65, 128, Hkv=1, Dv=80),
    attention(1, 2, 33, 64, S=190, causal=True),
    attention(1, 2, 100, 64, S=150, causal=True, q_offset=0),
    attention(1, 4, 160, 64, Hkv=2, window=(31, 16)),
    attention(1, 2, 90, 40, masked=True),
    attention(1, 2, 96, 64, causal=True, lse=True),
    attention(1, 2, 80, 40, biased=True),
    attention(1, 2, 80, 64, dropout_p=0.2),
    attention(2, 4, 1, 64, Hkv=2, S=600),
    varlen([5, 1, 70, 33], 4, 64, Hkv=2, causal=True),
    kvcache(2, 4, 4, 75, 40),
    kvcache(3, 6, 2, 80, 64, page_size=16),
    norm("layer_norm", 127, 768),
    norm("layer_norm", 64, 1000, residual=True),
    norm("rms_norm", 127, 768),
    norm("rms_norm", 64, 1000, residual=True),
    softmax(63, 1001),
    softmax(2, 3, 70, 90, causal=True, scale=0.125),
    softmax(63, 1001, log=True),
    *(weight_only(M, 100, 192, bits) for M, bits in ((1, 16), (1, 8), (2, 8), (3, 4))),
    linear(129, 520, 777),
    linear(65, 260, 130, activation="gelu"),
    linear(65, 260, 130, activation="silu"),
    lora_linear(129, 520, 777, 8),
    cross_entropy(33, 5001),
    cross_entropy(64, 1000, ignored=0.3, label_smoothing=0.1),
    cross_entropy(40, 777, ignored=0.3, reduction="none"),
    linear_cross_entropy(200, 48, 1001),
    linear_cross_entropy(130, 33, 777, bias=True, ignored=0.3, label_smoothing=0.1, reduction="none"),
    gated("swiglu", 63, 1001),
    gated("geglu", 63, 1001, approximate="tanh"),
    gated("geglu", 63, 1001, approximate="none"),
    bias_gelu(127, 1000, approximate="tanh"),
    bias_gelu(127, 1000, approximate="none"),
    rope(2, 33, 4, 64, Hkv=1),
    rope(2, 33, 3, 80, R=32),
    rope(2, 33, 3, 66, interleaved=True),
    adamw(5, 1001),
]
