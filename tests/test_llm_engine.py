"""Continuous batching: whoever else is there, an answer is the same; slots are given back; bad requests are refused."""

import contextlib
import threading
import time
import warnings

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed")

import fastllm
from fastllm import dispatch
from fastllm.llm.engine import PIECE, Busy, Engine, Request
from fastllm.llm.sessions import session_of
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer
from fastllm.sampling import Sampling

TOKENS = Tokenizer.bytes()
SIZES = dict(vocab=TOKENS.size, d_model=48, heads=4, kv_heads=2, layers=2, d_ff=80, max_len=700, dropout=0.0)
SIZES |= dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False)
needs_kernels = pytest.mark.skipif(dispatch.extension is None, reason="the C++ extension is not built")


def model_of(seed=0, **changes):
    torch.manual_seed(seed)
    model = Transformer(Config(**SIZES | changes)).eval()
    with torch.no_grad():  # so that tokens vary
        model.head.weight.mul_(4)
    return model


def prompts(count):
    random = torch.Generator().manual_seed(0)
    lengths = [1, 300, 7, PIECE, 60, PIECE + 1, 33, 2][:count]
    return [torch.randint(5, TOKENS.size, (n,), generator=random).tolist() for n in lengths]


def requests(count=8):
    kinds = (Sampling(), Sampling(1.0, seed=3), Sampling(0.8, 20, 0.9, seed=5, repetition_penalty=1.2))
    return [Request(prompt, 12 + 5 * n, kinds[n % 3], ignore_eos=True) for n, prompt in enumerate(prompts(count))]


@needs_kernels
def test_an_answer_is_the_same_alone_and_in_company():
    """Also where requests come while others are answered, and where there are more of them than slots."""
    model = model_of()
    with Engine(model, TOKENS, slots=3) as engine:
        alone = []
        for request in requests():
            answer = engine.submit(request)
            alone.append((answer.text(), answer.tokens))
            assert answer.finish == "length" and len(answer.tokens) == request.max_tokens
        together = [engine.submit(request) for request in requests()]
        found = [(answer.text(), answer.tokens) for answer in together]
        late = []
        for request in reversed(requests()):
            late.append(engine.submit(request))
            time.sleep(0.003)
        found_late = [(answer.text(), answer.tokens) for answer in reversed(late)]
        assert engine.load == (0, 0)
    assert found == alone and found_late == alone
    assert len({tuple(tokens) for _, tokens in alone}) == len(alone)


@needs_kernels
def test_greedy_answers_are_those_of_generate():
    model = model_of()
    with Engine(model, TOKENS, slots=2) as engine:
        for prompt in prompts(4):
            answer = engine.submit(Request(prompt, 10, ignore_eos=True))
            answer.text()
            wanted = fastllm.generate(model, torch.tensor([prompt]), max_new_tokens=10)
            assert answer.tokens == wanted[0, len(prompt) :].tolist()


def turns(engine, count=4, length=90):
    """The requests of a conversation, each with the answer before it and something new, and their answers."""
    random, said = torch.Generator().manual_seed(1), []
    for n in range(count):
        said += torch.randint(5, TOKENS.size, (length + n,), generator=random).tolist()
        answer = engine.submit(Request(list(said), 15, ignore_eos=True))
        answer.text()
        yield answer
        said += answer.tokens


def counting(engine, monkeypatch):
    """A list that gets the number of tokens of each piece that the model reads."""
    read, prefill = [], engine.session.prefill
    monkeypatch.setattr(engine.session, "prefill", lambda p, s: read.append(len(p[0])) or prefill(p, s))
    return read


@pytest.mark.parametrize("own", [pytest.param(False, marks=needs_kernels), True], ids=["decoder", "own forward"])
def test_a_conversation_goes_on_where_it_was_with_the_same_answers(own, monkeypatch):
    model = model_of()
    with fastllm.backend("reference") if own else contextlib.nullcontext():
        with Engine(model, TOKENS, slots=2) as engine:
            wanted = [answer.tokens for answer in turns(engine)]
            assert engine.totals.reused == 0
        with Engine(model, TOKENS, slots=2, reuse=True) as engine:
            assert bool(engine.reason) == own
            read = counting(engine, monkeypatch)
            found = list(turns(engine))
    assert [answer.tokens for answer in found] == wanted
    # The last token of an answer was chosen and not read: the next turn reads it before what is new.
    assert read == [90, 92, 93, 94]
    assert [answer.reused for answer in found] == [0, 104, 210, 317]
    assert (engine.totals.read, engine.totals.reused) == (sum(read), 104 + 210 + 317)
    assert engine.totals.generated == 60 and engine.totals.finished == {"length": 4} and engine.tokens_per_s > 0


@needs_kernels
def test_a_slot_is_left_to_the_conversation_that_may_come_back(monkeypatch):
    with Engine(model_of(), TOKENS, slots=2, reuse=True) as engine:
        read = counting(engine, monkeypatch)

        def ask(prompt):
            answer = engine.submit(Request(list(prompt), 2, ignore_eos=True))
            answer.text()
            return [*prompt, *answer.tokens]

        first = ask(range(10, 50))
        second = ask([*range(10, 14), *range(60, 100)])  # four tokens alike are not half of a conversation
        ask([*first, 7])
        ask([*second, 7])
        assert read == [40, 44, 2, 2]
        ask([*range(200, 230)])  # in the slot that was left first
        ask([*second, 8])
        ask([*first, 8])
        assert read[4:] == [30, 1, 43]
        same = [*range(100, 120)]
        assert ask(same) == ask(same) and read[-1] == 1  # the last token is read for its logits


@needs_kernels
def test_what_was_cut_short_is_reused_and_what_failed_is_not(monkeypatch):
    prompt = TOKENS.encode("a" * 30)
    with Engine(model_of(), TOKENS, slots=1) as engine:
        wanted = engine.submit(Request(prompt + TOKENS.encode("b"), 20, ignore_eos=True)).text()
    with Engine(model_of(), TOKENS, slots=1, reuse=True) as engine:
        endless = engine.submit(Request(prompt, ignore_eos=True))
        next(iter(endless))
        endless.cancel()
        answer = engine.submit(Request(prompt + TOKENS.encode("b"), 20, ignore_eos=True))
        assert answer.text() == wanted and answer.reused == 30
        with monkeypatch.context() as patch:
            patch.setattr(engine.session, "step", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                engine.submit(Request(prompt, 20, ignore_eos=True)).text()
        answer = engine.submit(Request(prompt + TOKENS.encode("b"), 20, ignore_eos=True))
        assert answer.text() == wanted and answer.reused == 0
        assert engine.totals.finished == {"cancelled": 1, "length": 2, "error": 1}


@needs_kernels
def test_end_tokens_and_stop_strings():
    model, prompt = model_of(), TOKENS.encode("ab")
    with Engine(model, TOKENS, slots=1) as engine:
        free = engine.submit(Request(prompt, 30, ignore_eos=True))
        text, tokens = free.text(), free.tokens
        visible = [n for n, token in enumerate(tokens) if TOKENS.decode([token]).isalnum()]
        where = visible[-1]
        stop = TOKENS.decode([tokens[where]])
        answer = engine.submit(Request(prompt, 30, stop=(stop,), ignore_eos=True))
        assert answer.text() == text[: text.index(stop)] and answer.finish == "stop"
        assert len(answer.tokens) == tokens.index(tokens[where]) + 1
    with Engine(model, TOKENS, slots=1, eos=[tokens[7]]) as engine:
        answer = engine.submit(Request(prompt, 30))
        assert answer.text() == TOKENS.decode(answer.tokens[:-1]) and answer.finish == "stop"
        assert answer.tokens == tokens[: tokens.index(tokens[7]) + 1]
        assert engine.submit(Request(prompt, 30, ignore_eos=True)).text() == text


@needs_kernels
def test_a_cancelled_answer_frees_its_slot():
    with Engine(model_of(), TOKENS, slots=1, queue_size=2) as engine:
        endless = engine.submit(Request(TOKENS.encode("a"), ignore_eos=True))
        next(iter(endless))
        waiting, gone = engine.submit(Request(TOKENS.encode("b"), 3)), engine.submit(Request(TOKENS.encode("c"), 3))
        with pytest.raises(Busy, match="1 requests are being answered and 2 wait"):
            engine.submit(Request(TOKENS.encode("d"), 3))
        gone.cancel()
        assert gone.text() == "" and gone.finish == "cancelled"  # although nothing of it was running
        endless.cancel()
        rest = "".join(endless)
        assert endless.finish == "cancelled" and len(endless.tokens) < 690 and isinstance(rest, str)
        waiting.text()
        assert waiting.finish == "length" and engine.load == (0, 0)


@needs_kernels
def test_closing_ends_what_is_under_way():
    with Engine(model_of(), TOKENS, slots=1) as engine:
        running = engine.submit(Request(TOKENS.encode("a"), ignore_eos=True))
        waiting = engine.submit(Request(TOKENS.encode("a"), ignore_eos=True))
        next(iter(running))
    assert "".join(waiting) == "" and waiting.finish == "cancelled"
    "".join(running)
    assert running.finish in ("cancelled", "length")
    with pytest.raises(Busy, match="closed"):
        engine.submit(Request(TOKENS.encode("a")))
    assert not any(thread.name == "fastllm engine" for thread in threading.enumerate())


@needs_kernels
def test_one_failing_prompt_does_not_harm_the_others(monkeypatch):
    with Engine(model_of(), TOKENS, slots=2) as engine:
        good = Request(TOKENS.encode("good"), 20)
        wanted = engine.submit(good).text()
        prefill = engine.session.prefill

        def failing(pieces, slots):
            if pieces[0].tolist() == TOKENS.encode("bad"):
                raise RuntimeError("out of luck")
            return prefill(pieces, slots)

        monkeypatch.setattr(engine.session, "prefill", failing)
        first, bad, second = (engine.submit(r) for r in (good, Request(TOKENS.encode("bad"), 5), good))
        with pytest.raises(RuntimeError, match="out of luck"):
            bad.text()
        assert bad.finish == "error" and first.text() == second.text() == wanted
        monkeypatch.setattr(engine.session, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            engine.submit(good).text()
        monkeypatch.undo()
        assert engine.submit(good).text() == wanted and engine.load == (0, 0)


@needs_kernels
def test_the_last_position_is_used():
    with Engine(model_of(), TOKENS, slots=1, positions=20) as engine:
        answer = engine.submit(Request([10] * 19, ignore_eos=True))
        answer.text()
        assert len(answer.tokens) == 1 and answer.finish == "length"
        answer = engine.submit(Request([10] * 5, ignore_eos=True))
        answer.text()
        assert len(answer.tokens) == 15


@pytest.mark.parametrize(
    ("request_", "why"),
    [
        (Request([]), "the prompt has no tokens"),
        (Request([10] * 20), "the prompt has 20 tokens and 1 more are wanted, but there are 20 positions"),
        (Request([10] * 15, 6), "the prompt has 15 tokens and 6 more are wanted, but there are 20 positions"),
        (Request([10], 0), "max_tokens must be at least 1"),
        (Request([10, TOKENS.size]), "tokens of the prompt must be in"),
        (Request([-1]), "tokens of the prompt must be in"),
        (Request([10], sampling=Sampling(bias={TOKENS.size: 1.0})), "tokens of the bias must be in"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_requests_that_cannot_be_answered(request_, why):
    with Engine(model_of(max_len=30), TOKENS, slots=1, positions=20) as engine, pytest.raises(ValueError, match=why):
        engine.submit(request_)


def test_engines_that_cannot_be():
    with pytest.raises(ValueError, match="slots must be at least 1"):
        Engine(model_of(), TOKENS, slots=0)
    with pytest.raises(ValueError, match=r"positions must be in \[2, 700\]"):
        Engine(model_of(), TOKENS, positions=701)
    encoder = Transformer(Config(vocab=9, kind="encoder", d_model=16, heads=2, layers=1))
    with pytest.raises(ValueError, match="not a language model"):
        Engine(encoder, TOKENS)


def test_models_that_the_compiled_decoder_lacks_run_on_their_own_forward():
    """Of ours an encoder-decoder; the answers are those of its own generate, and the reason is said once."""
    model = model_of(kind="encoder-decoder", positions="sinusoidal", tie_embeddings=True)
    dispatch._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            with Engine(model, TOKENS, slots=2) as engine:
                answers = [engine.submit(Request(prompt, 9, ignore_eos=True)) for prompt in prompts(3)]
                [answer.text() for answer in answers]
    assert [str(w.message).count("own forward: a Transformer of kind 'encoder-decoder'") for w in said] == [1]
    for prompt, answer in zip(prompts(3), answers, strict=True):
        wanted = model.generate(torch.tensor([[TOKENS.bos]]), 9, source=torch.tensor([prompt]))
        assert answer.tokens == wanted[0, 1:].tolist()
    with pytest.raises(ValueError, match="weights='int8' is for the compiled decoder only"):
        session_of(model, "int8", 1, 100)


@pytest.mark.parametrize("kind", ["bloom", "t5"])
def test_hugging_face_models_on_their_own_forward(kind):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if kind == "bloom":
        config = transformers.BloomConfig(vocab_size=TOKENS.size, hidden_size=32, n_layer=2, n_head=4)
        model = transformers.BloomForCausalLM(config)
    else:
        sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=TOKENS.size, **sizes))
    model.eval().generation_config.eos_token_id = None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    with Engine(model, TOKENS, slots=2, positions=400) as engine:
        assert engine.reason
        answers = [engine.submit(Request(prompt, 7, ignore_eos=True)) for prompt in prompts(3)]
        [answer.text() for answer in answers]
    for prompt, answer in zip(prompts(3), answers, strict=True):
        wanted = model.generate(torch.tensor([prompt]), max_new_tokens=7, do_sample=False)
        assert answer.tokens == wanted[0, -7:].tolist()
