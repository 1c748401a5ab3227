"""Generation: a decoder-only model compiled once, then one C++ call per token for the whole stack.

    ids = fastllm.generate(model, input_ids, max_new_tokens=64)                  # Hugging Face's arguments
    ids = fastllm.generate(model, input_ids, max_new_tokens=64, weights="int8")  # weights in 8 bits

Every step of a small model on PyTorch is mostly calls. Here a step is one call of fastllm._C.Decoder, which runs norms,
projections, rotation, attention over the cache, feed-forward and head on threads that are started once. Prompts go
through the ordinary kernels, packed, so that padding costs nothing.
"""

import weakref

import torch

from fastllm import dispatch
from fastllm.beam import beam_search
from fastllm.decoder import Unsupported
from fastllm.sampling import penalised, sample
from fastllm.session import Plan, fingerprint

__all__ = ["generate", "plan"]

_plans = weakref.WeakKeyDictionary()  # model -> {weights: Plan}


def plan(model, weights="model") -> Plan:
    """The `Plan` of a model, made at the first call and again when its parameters have changed since."""
    plans = _plans.setdefault(model, {})
    if weights not in plans or plans[weights].made_from != fingerprint(model):
        plans[weights] = Plan(model, weights)
    return plans[weights]


@torch.no_grad()
def generate(
    model,
    input_ids,
    attention_mask=None,
    *,
    max_new_tokens=20,
    do_sample=False,
    temperature=1.0,
    top_k=50,
    top_p=1.0,
    min_p=None,
    repetition_penalty=1.0,
    num_beams=1,
    length_penalty=1.0,
    early_stopping=False,
    eos_token_id=None,
    pad_token_id=None,
    streamer=None,
    generator=None,
    weights="model",
    **others,
):
    """`input_ids` [B, T] int64, continued: [B, T + new], as Hugging Face's model.generate returns it.

    The arguments are Hugging Face's, with its defaults: of the model's generation_config only the tokens count that end
    and pad. attention_mask [B, T] marks padding, on either side, which no token sees. A sequence that has produced an
    eos_token_id (a number, or several; default: the model's own) goes on with pad_token_id (default: the model's own,
    else the first eos, else 0), and generation ends when all have. do_sample=False takes the likeliest token: of a
    model in fp32 with weights="model" the same as the model itself; with num_beams above 1 beam search takes the
    likeliest text. do_sample=True draws: repetition_penalty, temperature, top_k, top_p and min_p are applied, in this
    order. The penalty leaves padding out, except where model.generate penalises it too (transformers before 5.23).
    streamer gets `put(tokens)`, first of the prompt and then of every step, and `end()`; or it is a function of the
    tokens. `weights` is that of `Plan`. Computed in fp32, prompts in the model's dtype.

    What this cannot do (another family of models, arguments beside these, beams that are drawn, streamed or, with
    early_stopping="never", not stopped early, a model on a GPU) goes to model.generate; `fastllm.explain` says so, a
    warning does once, and FASTLLM_STRICT=1 makes it an error.
    Raises ValueError for shapes that do not fit, for options out of their range, for an empty prompt and for positions
    that the model does not have.
    """
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype != torch.int64:
        raise ValueError(
            f"generate: input_ids must be int64 [B, T] and not empty, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be {list(input_ids.shape)} like input_ids, got {list(attention_mask.shape)}"
        )
    if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1 or repetition_penalty <= 0 or num_beams < 1:
        raise ValueError(
            "generate: max_new_tokens and num_beams must be at least 1, temperature and repetition_penalty above 0, "
            f"top_p in (0, 1]; got {max_new_tokens}, {num_beams}, {temperature}, {repetition_penalty}, {top_p}"
        )
    if eos_token_id is None:
        eos_token_id = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = [] if eos_token_id is None else [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)
    if pad_token_id is None:
        pad_token_id = getattr(getattr(model, "generation_config", None), "pad_token_id", None)
    pad = pad_token_id if pad_token_id is not None else eos[0] if eos else 0
    try:
        if others:
            raise Unsupported(f"the argument {', '.join(sorted(others))}")
        if num_beams > 1 and (do_sample or streamer is not None or early_stopping not in (False, True)):
            raise Unsupported("beams that are drawn, streamed or never stopped early")
        made = plan(model, weights)
        reason = None
    except Unsupported as problem:
        reason = str(problem)
    if dispatch.choose("generate", input_ids, lambda backend: reason) == "reference":
        dispatch._warn_once(f"generate: {reason or 'the reference was asked for'}")
        others |= {"generator": generator} if generator is not None else {}
        others |= {"min_p": min_p} if min_p else {}
        if num_beams > 1:
            others |= dict(num_beams=num_beams, length_penalty=length_penalty, early_stopping=early_stopping)
        chosen = (do_sample, temperature, top_k, top_p, repetition_penalty)
        return _by_the_model(model, input_ids, attention_mask, max_new_tokens, chosen, eos, pad, streamer, others)
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    prompts = [ids[keep] for ids, keep in zip(input_ids, kept, strict=True)]
    if not all(map(len, prompts)):
        raise ValueError("generate: attention_mask leaves nothing of a prompt")
    batch, longest = len(prompts), max(map(len, prompts))
    seen = input_ids
    if repetition_penalty != 1.0 and not kept.all() and not _penalises_padding(model):
        seen = torch.where(kept, input_ids, torch.stack([prompt[0] for prompt in prompts])[:, None])
    if num_beams > 1:
        session = made.session(num_beams, longest + max_new_tokens)
        options = dict(length_penalty=length_penalty, early_stopping=early_stopping)
        options["repetition_penalty"] = repetition_penalty
        found = [
            beam_search(session, prompt, num_beams, max_new_tokens, eos, seen=row, **options)
            for prompt, row in zip(prompts, seen, strict=True)
        ]
        fresh = input_ids.new_full((batch, max(map(len, found))), pad)
        for row, tokens in zip(fresh, found, strict=True):
            row[: len(tokens)] = torch.tensor(tokens)
        return torch.cat([input_ids, fresh], 1)
    session = made.session(batch, longest + max_new_tokens)
    put, end = (streamer.put, streamer.end) if hasattr(streamer, "put") else (streamer, None)
    ids = torch.cat([input_ids, input_ids.new_full((batch, max_new_tokens), pad)], 1)
    width, done = input_ids.shape[1], torch.zeros(batch, dtype=torch.bool)
    stops = torch.tensor(eos, dtype=torch.int64)
    if put is not None:
        put(input_ids)
    for n in range(max_new_tokens):
        logits = session.prefill(prompts) if n == 0 else session.step(ids[:, width + n - 1])
        if repetition_penalty != 1.0:
            logits = penalised(logits, torch.cat([seen, ids[:, width : width + n]], 1), repetition_penalty)
        if do_sample:
            chosen = sample(logits, temperature, top_k, top_p, min_p or 0.0, generator)
        else:
            chosen = logits.argmax(-1)
        if eos:
            chosen[done] = pad
            done |= torch.isin(chosen, stops)
        ids[:, width + n] = chosen
        if put is not None:
            put(chosen)
        if eos and done.all():
            ids = ids[:, : width + n + 1]
            break
    if end is not None:
        end()
    return ids


def _penalises_padding(model) -> bool:
    """Whether the repetition penalty of model.generate falls on padding tokens too: what its own processor does.

    Transformers has a public class of this processor, but what it is told of the padding is decided where it is made.
    """
    if not hasattr(model, "_get_logits_processor"):
        return False
    config = type(model.generation_config)(repetition_penalty=2.0)
    made = model._get_logits_processor(config, 2, model_kwargs={"attention_mask": torch.tensor([[0, 1]])})
    return bool(made(torch.tensor([[0, 1]]), torch.ones(1, 2))[0, 0] != 1)


def _by_the_model(model, input_ids, attention_mask, max_new_tokens, chosen, eos, pad, streamer, others):
    do_sample, temperature, top_k, top_p, penalty = chosen
    if type(model).__name__ == "Transformer":
        if attention_mask is not None or top_p != 1.0 or penalty != 1.0 or streamer is not None or len(eos) > 1:
            raise ValueError("generate: this model's own generate takes temperature, top_k and one eos_token_id")
        options = dict(temperature=temperature, top_k=top_k or None) if do_sample else {}
        return model.generate(input_ids, max_new_tokens, stop=eos[0] if eos else None, **options, **others)
    options = dict(do_sample=do_sample, max_new_tokens=max_new_tokens, streamer=streamer)
    options |= {"repetition_penalty": penalty} if penalty != 1.0 else {}
    options |= dict(temperature=temperature, top_k=top_k, top_p=top_p) if do_sample else {}
    options |= dict(eos_token_id=eos) if eos else {}
    return model.generate(input_ids, attention_mask=attention_mask, pad_token_id=pad, **options, **others)
