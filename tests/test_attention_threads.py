"""How the CPU kernels of attention cut a call into pieces for threads: what comes out may not depend on it."""

import pytest
import torch
from test_attention import check, check_scores

import fastllm


def test_bias_with_few_heads_and_many_threads(backend):
    """One item would own the whole bias: the keys are cut into ranges, each with columns of its own."""
    shape = dict(B=2, H=2, Hkv=1, T=70, S=290, D=16)
    for bias in ((1, 1, 70, 290), (1, 2, 70, 1)):
        check_scores(backend, torch.float32, dict(bias=bias, causal=True), shape)


def test_one_key_head_is_split_over_threads(backend):
    """MQA, batch 1: the keys are cut into ranges; the sums of their parts must be those of the whole."""
    check(dict(B=1, H=3, Hkv=1, T=70, S=210, D=16), torch.float32, backend, causal=True)
    check(dict(B=1, H=1, Hkv=1, T=200, S=200, D=16), torch.float32, backend, window=(30, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(causal=True), dict(causal=True, softcap=5.0, dropout_p=0.1)], ids=str)
def test_blocks_of_queries_that_share_a_pass_over_long_keys_change_nothing(options, dtype):
    """With few threads they do, beyond 2 MiB of keys and values (csrc/cpu/attention_problem.h), with many not."""
    random, S = torch.Generator().manual_seed(0), 4200 if dtype == torch.float32 else 8300
    q = torch.randn(1, 1, 1090, 64, generator=random, dtype=dtype)
    k, v = (torch.randn(1, 1, S, 64, generator=random, dtype=dtype) for _ in range(2))
    mask = torch.rand(1, 1, 1090, S, generator=random) < 0.9
    mask[:, :, 64:200, :600] = False  # blocks that some of the queries skip
    before, found = torch.get_num_threads(), []
    for threads in (1, 5):
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        found.append(fastllm.attention(q, k, v, mask=mask, return_lse=True, **options))
    torch.set_num_threads(before)
    assert all(map(torch.equal, *found))
