"""Masks, caches and packed sequences of transformers, and masks of the user's own."""

import pytest
import torch

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

from hf_models import DECODERS, LENGTH, V, assert_same, inputs, make  # noqa: E402
from transformers import masking_utils  # noqa: E402

import fastllm.hf  # noqa: E402
from fastllm.hf import Mask  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")


@pytest.mark.parametrize("mask", ["boolean", "additive"])
@pytest.mark.parametrize("family", ["llama", "bert"])
def test_a_mask_of_the_users_own(family, mask):
    """[B, 1, T, S], as transformers lets it through: here each token sees the even ones up to and with itself."""
    visible = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.arange(LENGTH) % 2 == 0)
    visible = (visible | torch.eye(LENGTH, dtype=torch.bool)).expand(2, 1, -1, -1)
    additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    tokens = inputs(family)["input_ids"]
    expected = make(family)(tokens, attention_mask=additive).logits
    got = make(family, "fastllm")(tokens, attention_mask=visible if mask == "boolean" else additive).logits
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("family", DECODERS)
def test_a_cache_goes_on_in_pieces(family):
    """Queries that stand behind keys, and sliding caches that are cut to their window."""
    tokens = inputs(family)["input_ids"]
    found = []
    for attention in ("eager", "fastllm"):
        model, cache, logits = make(family, attention), transformers.DynamicCache(), []
        for part in tokens.split([8, 1, 5, 3], 1):
            logits.append(model(part, past_key_values=cache, use_cache=True).logits)
        found.append(torch.cat(logits, 1))
    torch.testing.assert_close(found[1], found[0])


PATTERNS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "window, both sides": masking_utils.sliding_window_bidirectional_mask_function(2),
    "packed": masking_utils.and_masks(
        masking_utils.causal_mask_function,
        masking_utils.packed_sequence_mask_function(torch.tensor([[0] * 4 + [1] * 5, [0] * 9])),
    ),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(2, dtype=torch.int64)),
    "alternatives": masking_utils.or_masks(
        masking_utils.causal_mask_function, masking_utils.bidirectional_mask_function
    ),
}

if hasattr(masking_utils, "packed_sequence_compatibility_function"):  # from transformers 5.23 on
    PATTERNS["packed, positions"] = masking_utils.packed_sequence_compatibility_function(
        masking_utils.sliding_window_causal_mask_function(3),
        torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], list(range(9))]),
        torch.tensor([[0] * 4 + [1] * 5, [0] * 9]),
    )


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_masks_mean_what_transformers_means(pattern, padded):
    options = dict(batch_size=2, q_length=9, kv_length=9, mask_function=PATTERNS[pattern])
    if padded:
        options["attention_mask"] = torch.arange(9) < torch.tensor([[9], [5]])
    options["allow_is_causal_skip"] = False
    dense = masking_utils.sdpa_mask(**options)
    mask = fastllm.hf.attention_mask(**options)
    known = pattern not in ("chunks", "alternatives") and not (pattern.startswith("packed") and padded)
    assert isinstance(mask, Mask) == known and mask.shape == dense.shape and mask.dtype == torch.bool
    assert torch.equal(mask[:, :, 1:], dense[:, :, 1:]) and torch.equal(mask | False, dense)
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    module = torch.nn.Module()
    got, _ = fastllm.hf.attention_forward(module, q, k, v, mask)
    expected, _ = fastllm.hf.attention_forward(module, q, k, v, dense)
    torch.testing.assert_close(got, expected)


def test_a_mask_keeps_its_offsets():
    """A cache that holds 7 keys, of which the first 3 were dropped."""
    options = dict(batch_size=1, q_length=2, kv_length=6, q_offset=7, kv_offset=3)
    dense = masking_utils.sdpa_mask(**options, allow_is_causal_skip=False)
    mask = fastllm.hf.attention_mask(**options)
    assert torch.equal(mask.dense(), dense) and mask.structure.q_offset == 4
    assert torch.equal(mask.contiguous().detach().dense(), dense)


def test_a_mask_is_right_in_eager_attention():
    """Attention that changes between a mask and its use, and models that add whatever mask they get."""
    scores = torch.randn(1, 2, 5, 5)
    mask = fastllm.hf.attention_mask(1, 5, 5)
    visible = torch.ones(5, 5, dtype=torch.bool).tril()
    expected = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    for added in (scores + mask, mask + scores, scores.clone().add_(mask[:, :, :, :5])):
        torch.testing.assert_close(added.softmax(-1), expected)


def sequences(lengths=(5, 3, 9)):
    random = torch.Generator().manual_seed(2)
    return [torch.randint(3, V, (n,), generator=random).tolist() for n in lengths]


@pytest.mark.parametrize("lengths_given", [False, True], ids=["positions", "cu_seq_lens"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
def test_packed_sequences_do_not_see_each_other(family, lengths_given):
    """Padding-free: one row of DataCollatorWithFlattening is what the sequences are alone, forward and backward."""
    alone, model = make(family), make(family, "fastllm")
    collate = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=lengths_given, return_tensors="pt")
    batch = collate([{"input_ids": tokens} for tokens in sequences()])
    told = fastllm.explain(model, **batch, use_cache=False)
    assert {call.op for call in told.calls} == {"attention_varlen"}
    total = sum(len(tokens) - 1 for tokens in sequences())
    loss = sum(
        alone(t, labels=t).loss * (t.shape[1] - 1) / total for t in (torch.tensor([tokens]) for tokens in sequences())
    )
    loss.backward()
    expected = torch.cat([alone(torch.tensor([tokens])).logits[0] for tokens in sequences()])
    gradients = {n: p.grad for n, p in alone.named_parameters() if p.grad is not None}
    told.result.loss.backward()
    got = told.result.logits[0], told.result.loss, {n: p.grad for n, p in model.named_parameters()}
    assert_same(got, (expected, loss, gradients))


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_packed_sequences_of_a_model_that_keeps_a_cache(family):
    """By their positions, as flash-attn knows them: transformers' masks tell them apart without a cache only."""
    model = make(family, "fastllm")
    batch = transformers.DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": t} for t in sequences()])
    expected = model(**batch, use_cache=False).logits
    torch.testing.assert_close(model(**batch, use_cache=True).logits, expected)
    rows = {name: x.expand(2, -1) for name, x in batch.items()}  # no single row: flash-attn sees one sequence in each
    eager = make(family)
    torch.testing.assert_close(model(**rows, use_cache=True).logits, eager(**rows, use_cache=True).logits)


def test_an_encoder_without_padding():
    """bert on packed rows, told where they end: what `unpad_input` makes of a padded batch."""
    model, batch = make("bert"), inputs("bert")
    expected = model(batch["input_ids"], batch["attention_mask"]).logits[batch["attention_mask"].bool()]
    packed, _, cu_seqlens, longest, _ = fastllm.unpad_input(batch["input_ids"][..., None], batch["attention_mask"])
    positions = torch.cat([torch.arange(n) for n in cu_seqlens.diff()])
    bounds = dict(cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=longest, max_length_k=longest)
    with fastllm.accelerated(model):
        got = model(packed.view(1, -1), position_ids=positions[None], **bounds).logits[0]
    torch.testing.assert_close(got, expected)
