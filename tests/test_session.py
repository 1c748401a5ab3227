"""Sessions: sequences that start, grow and end at different times, each as if it were alone."""

import pytest
import torch
from check import assert_as_accurate

import fastllm.nn
from fastllm import dispatch, generation
from fastllm.model import Config, Transformer

pytestmark = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")

SIZES = dict(vocab=61, d_model=48, heads=6, kv_heads=2, layers=2, d_ff=80, max_len=700, dropout=0.0)
MODERN = dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False)
LENGTHS = [3, 40, 1, 17, 520, 9, 9]


def model_of(**changes):
    torch.manual_seed(0)
    return Transformer(Config(**SIZES | MODERN | changes)).eval()


@pytest.mark.parametrize("weights", ["model", "bf16", "int8", "int4"])
def test_a_row_of_a_step_does_not_depend_on_the_others(cpu_backend, weights):
    """Bit for bit, in any company and any slot: also past 512 keys, where a sequence is worked on in parts."""
    if weights.startswith("int") and dispatch.extension.selected() == "scalar":
        pytest.skip("with packed weights the portable kernel's last bit depends on the number of rows")
    plan, tokens = generation.Plan(model_of(), weights), torch.randint(61, (7, 560))
    session = plan.session(7, 560)
    for slot, length in enumerate(LENGTHS):
        session.prefill([tokens[slot, :length]], torch.tensor([slot]))
    keys, values, lengths = session.keys.clone(), session.values.clone(), session.lengths.clone()

    def steps(slots):
        session.keys.copy_(keys), session.values.copy_(values), session.lengths.copy_(lengths)
        slots, found = torch.tensor(slots), []
        for n in range(3):
            found.append(session.step(tokens[slots, lengths[slots] + n], slots).clone())
        return torch.stack(found, 1)

    alone = torch.cat([steps([slot]) for slot in range(7)])
    assert alone.isfinite().all()
    for company in ([0, 1, 2, 3, 4, 5, 6], [6, 2, 4], [5, 0], [3, 4, 1, 6, 2]):
        assert torch.equal(steps(company), alone[company]), company


@pytest.mark.parametrize("changes", [{}, dict(window=(6, 0)), dict(positions="learned", norm="layernorm")], ids=str)
def test_a_prompt_in_pieces_is_the_prompt(cpu_backend, changes):
    model, tokens = model_of(**changes), torch.randint(61, (1, 50))
    session = generation.Plan(model).session(3, 60)
    session.prefill([tokens[0, :8]], torch.tensor([1]))
    for begin, end in ((0, 20), (20, 21), (21, 50)):
        found = session.prefill([tokens[0, begin:end]], torch.tensor([2]))
    with torch.no_grad():
        peer, exact = model(tokens)[:, -1], model_of(**changes).double()(tokens)[:, -1]
    assert_as_accurate(found.half(), peer.half(), exact, "in pieces")
    assert session.lengths.tolist() == [0, 8, 50]
    session.clear(2)
    session.prefill([tokens[0, 8:15], tokens[0, :30]], torch.tensor([1, 2]))  # one goes on, one starts anew
    assert session.lengths.tolist() == [0, 15, 30]
    with torch.no_grad():
        peer, exact = model(tokens[:, :15])[:, -1], model_of(**changes).double()(tokens[:, :15])[:, -1]
    session.lengths[1] = 14
    assert_as_accurate(session.step(tokens[0, 14:15], torch.tensor([1])).half(), peer.half(), exact, "both")


def test_copies_go_on_alike():
    plan, tokens = generation.Plan(model_of()), torch.randint(61, (40,))
    session = plan.session(3, 50)
    session.prefill([tokens], torch.tensor([0]))
    session.copy(torch.tensor([0, 0]), torch.tensor([1, 2]))
    found = session.step(tokens[:3]).clone()
    assert session.lengths.tolist() == [41] * 3
    session.copy(torch.tensor([0]), torch.tensor([2]), since=40)
    again = session.step(torch.tensor([5, 7, 5]))
    assert torch.equal(again[0], again[2]) and not torch.equal(again[0], again[1])
    assert not torch.equal(found[0], found[1])


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_weights_of_a_model(cpu_backend, bits):
    """A model whose layers, and embedding, are packed gives what the numbers that they stand for give."""
    model, plain = model_of(), model_of()
    packed = fastllm.quantize_weight(model.embedding.weight, bits)
    model.embedding, model.head = fastllm.nn.QuantizedEmbedding(packed), fastllm.nn.QuantizedLinear(packed)
    plain.embedding.weight.data = plain.head.weight.data = packed.dequantize()
    for ours, theirs in zip(model.decoder.blocks, plain.decoder.blocks, strict=True):
        down = fastllm.nn.QuantizedLinear.from_linear(ours.feed_forward.down, bits)
        ours.feed_forward.down = down
        theirs.feed_forward.down.weight.data = down.weight.dequantize()
    tokens = torch.randint(61, (1, 30))
    session = generation.Plan(model).session(1, 30)
    found = [session.prefill([tokens[0, :20]]).clone()]
    found += [session.step(tokens[:, n]).clone() for n in range(20, 30)]
    with torch.no_grad():
        peer, own, exact = plain(tokens)[0, 19:], model(tokens)[0, 19:], plain.double()(tokens)[0, 19:]
    assert_as_accurate(own.bfloat16(), peer.bfloat16(), exact, "its own forward")
    assert_as_accurate(torch.cat(found).bfloat16(), peer.bfloat16(), exact, "generation")
    assert (
        generation.Plan(model, "fp32").description.packed is bool(bits)
        and not generation.Plan(plain.float()).description.packed
    )
