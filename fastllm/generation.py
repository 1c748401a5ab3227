"""Generation: a decoder-only model compiled once, then one C++ call per token for the whole stack.

    ids = fastllm.generate(model, input_ids, max_new_tokens=64)                  # Hugging Face's arguments
    ids = fastllm.generate(model, input_ids, max_new_tokens=64, weights="int8")  # weights in 8 bits

Every step of a small model on PyTorch is mostly calls. Here a step is one call of fastllm._C.Decoder, which runs norms,
projections, rotation, attention over the cache, feed-forward and head on threads that are started once. Prompts go
through the ordinary kernels, packed, so that padding costs nothing.
"""

import math
import weakref

import torch

from fastllm import dispatch
from fastllm.decoder import ACTIVATIONS, WEIGHTS, Unsupported, describe
from fastllm.ops.attention import attention
from fastllm.ops.varlen import attention_varlen
from fastllm.ops.weight_only import NARROW, QuantizedWeight

_plans = weakref.WeakKeyDictionary()  # model -> {weights: Plan}


class Plan:
    """A model's weights, ready for generation: "model" (as they are), "fp32", "bf16", "int8" or "int4".

    "model" reads the model's own memory where its layout allows (GPT-2's layers and GPT-NeoX's attention are copied);
    the others are copies. int8 has a scale per row and int4 one per 64 numbers (`fastllm.quantize_weight`), the head
    included; the embedding stays as it is. The cache of keys and values is fp32 for a model in fp32 whose weights stay
    so, else it has the model's dtype, or bf16. Raises `fastllm.decoder.Unsupported` for a model that is of no known
    family, and ValueError for another name of weights.
    """

    def __init__(self, model, weights="model"):
        if weights not in WEIGHTS:
            raise ValueError(f"generate: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        if dispatch.extension is None:
            raise Unsupported(dispatch.missing_extension)
        self.description = describe(model).stored_as(weights)
        self.weights, self.made_from = weights, _fingerprint(model)
        own = self.description.embedding.dtype
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, own)  # of the prompt's activations
        wide = weights in ("model", "fp32") or own != torch.float32
        self.cache_dtype = self.dtype if wide else torch.bfloat16

    def session(self, batch, positions):
        """A `Session` of `batch` sequences of at most `positions` tokens."""
        return Session(self, batch, positions)


def _fingerprint(model):
    """Changes when a parameter is replaced or written to."""
    return [(p.data_ptr(), p._version) for p in model.parameters()]


class Session:
    """`batch` sequences and their keys and values: `prefill` once, then `step` for every token."""

    def __init__(self, plan, batch, positions):
        d = plan.description
        if d.max_positions is not None and positions > d.max_positions:
            raise ValueError(f"generate: {positions} positions, but the model has {d.max_positions}")
        self.plan, self.lengths = plan, torch.zeros(batch, dtype=torch.int64)
        shape = len(d.layers), batch, d.kv_heads, positions, d.head_dim
        self.keys, self.values = (torch.empty(shape, dtype=plan.cache_dtype) for _ in "kv")
        self.tables = d.tables(positions)
        self.places = None if d.places is None else d.places[:positions].contiguous()
        self.embedding = d.embedding.contiguous()
        self.logits = torch.empty(batch, d.head.weight.shape[0])
        rotated = {2 * cos.shape[-1] for cos, _ in self.tables.values()}
        self._kept = []  # what the C++ side has addresses of
        self._native = dispatch.extension.Decoder(
            {
                "batch": batch,
                "positions": positions,
                "width": d.embedding.shape[1],
                "heads": d.heads,
                "kv_heads": d.kv_heads,
                "head_dim": d.head_dim,
                "rotated": rotated.pop() if rotated else 0,
                "feed": d.layers[0].gate.weight.shape[0],
                "activation": ACTIVATIONS[d.activation][0],
                "cache_type": NARROW.index(plan.cache_dtype),
                "scale": d.scale,
                "softcap": d.softcap,
                "logit_softcap": d.logit_softcap,
                "embedding_scale": d.embedding_scale,
                "embedding": self._address(self.embedding),
                "embedding_type": NARROW.index(self.embedding.dtype),
                "places": self._address(self.places),
                "final_norm": self._norm(d.norm),
                "head": self._linear(d.head),
                "layers": [self._layer(layer, n) for n, layer in enumerate(d.layers)],
                # The threads wait for each other, so they must all run at once; OpenMP's do.
                "threads": torch.get_num_threads() if "OpenMP" in torch.__config__.parallel_info() else 1,
            }
        )

    def _address(self, x):
        if x is None:
            return None
        assert x.is_contiguous()
        self._kept.append(x)
        return x.data_ptr()

    def _norm(self, norm):
        if norm is None:
            return None
        return {
            "width": norm.weight.numel(),
            "weight": self._address(norm.weight),
            "bias": self._address(norm.bias),
            "eps": norm.eps,
            "centred": norm.centred,
            "offset": norm.offset,
        }

    def _linear(self, linear):
        w = linear.weight
        rows, columns = w.shape
        made = {"rows": rows, "columns": columns, "bias": self._address(linear.bias)}
        if isinstance(w, QuantizedWeight):
            scales, offsets = self._address(w.scales), self._address(w.offsets)
            made |= {"bits": w.bits, "group": w.group_size, "scales": scales, "offsets": offsets}
            return made | {"weight": self._address(w.codes), "stored": 0}
        return made | {"bits": 0, "weight": self._address(w.contiguous()), "stored": NARROW.index(w.dtype)}

    def _layer(self, layer, n):
        cos, sin = self.tables.get(layer.rope, (None, None))
        norms = ("attention_norm", "q_norm", "k_norm", "after_attention", "feed_norm", "after_feed")
        made = {name: self._norm(getattr(layer, name)) for name in norms}
        made |= {name: [self._linear(getattr(layer, name))] for name in ("out", "gate", "down")}
        made |= {"up": [] if layer.up is None else [self._linear(layer.up)]}
        made |= {"qkv": [self._linear(x) for x in layer.qkv], "parallel": layer.parallel, "window": layer.window}
        made |= {"cos": self._address(cos), "sin": self._address(sin)}
        return made | {"k": self._address(self.keys[n]), "v": self._address(self.values[n])}

    @torch.no_grad()
    def prefill(self, prompts):
        """Logits [batch, V] in fp32 behind the prompts, a list of [length] int64 tensors, none of them empty."""
        d, dtype = self.plan.description, self.plan.dtype
        counts = torch.tensor([len(p) for p in prompts])
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        place = torch.cat([torch.arange(n) for n in counts.tolist()])
        x = d.embedding[torch.cat(prompts)].to(dtype)  # [total, width], the sequences one after the other
        if d.embedding_scale != 1.0:
            x = x * d.embedding_scale
        if d.places is not None:
            x = x + d.places[place].to(dtype)
        sizes = [n * d.head_dim for n in (d.heads, d.kv_heads, d.kv_heads)]
        act = ACTIVATIONS[d.activation][1]
        for n, layer in enumerate(d.layers):
            h = layer.attention_norm(x)
            whole = torch.cat([project(h) for project in layer.qkv], -1)
            q, k, v = (part.unflatten(-1, (-1, d.head_dim)) for part in whole.split(sizes, -1))  # [total, heads, D]
            q, k = q if layer.q_norm is None else layer.q_norm(q), k if layer.k_norm is None else layer.k_norm(k)
            if layer.rope is not None:
                cos, sin = (table[place][:, None] for table in self.tables[layer.rope])
                q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
            for b, (begin, end) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)):
                self.keys[n, b, :, : end - begin] = k[begin:end].transpose(0, 1)
                self.values[n, b, :, : end - begin] = v[begin:end].transpose(0, 1)
            options = dict(causal=True, scale=d.scale, softcap=d.softcap)
            options["window"] = (layer.window - 1, 0) if layer.window else None
            if len(prompts) == 1:
                o = attention(*(y.transpose(0, 1)[None] for y in (q, k, v)), **options)[0].transpose(0, 1)
            else:
                o = attention_varlen(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
            added = layer.out(o.flatten(1))
            if layer.parallel:
                h = layer.feed_norm(x)
                x = x + added
            else:
                x = x + (added if layer.after_attention is None else layer.after_attention(added))
                h = layer.feed_norm(x)
            gated = act(layer.gate(h))
            added = layer.down(gated if layer.up is None else gated * layer.up(h))
            x = x + (added if layer.after_feed is None else layer.after_feed(added))
        self.lengths.copy_(counts)
        logits = d.head(d.norm(x[bounds[1:] - 1])).float()
        return d.logit_softcap * torch.tanh(logits / d.logit_softcap) if d.logit_softcap else logits

    def step(self, tokens):
        """Logits [batch, V] in fp32 behind one more token [batch] of each sequence; the next step overwrites them."""
        if int(self.lengths.max()) >= self.keys.shape[3]:
            raise ValueError(f"generate: all {self.keys.shape[3]} positions of this session are used")
        tokens = tokens.contiguous()
        if int(tokens.min()) < 0 or int(tokens.max()) >= len(self.embedding):
            raise IndexError(f"generate: tokens must be in [0, {len(self.embedding)})")
        self._native.step(tokens.data_ptr(), self.lengths.data_ptr(), self.logits.data_ptr())
        self.lengths += 1
        return self.logits


def _rotate(x, cos, sin):
    """The first 2 * cos.shape[-1] numbers of every head turned, their halves being the pairs; the rest as it is."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)


def plan(model, weights="model") -> Plan:
    """The `Plan` of a model, made at the first call and again when its parameters have changed since."""
    plans = _plans.setdefault(model, {})
    if weights not in plans or plans[weights].made_from != _fingerprint(model):
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
    repetition_penalty=1.0,
    eos_token_id=None,
    pad_token_id=None,
    streamer=None,
    generator=None,
    weights="model",
    **others,
):
    """`input_ids` [B, T] int64, continued: [B, T + new], as Hugging Face's model.generate returns it.

    The arguments are Hugging Face's, with its defaults. attention_mask [B, T] marks padding, on either side, which no
    token sees. A sequence that has produced an eos_token_id (a number, or several; default: the model's own) goes on
    with pad_token_id, and generation ends when all have. do_sample=False takes the likeliest token: of a model in fp32
    with weights="model" the same as the model itself. Otherwise repetition_penalty, temperature, top_k and top_p are
    applied, in this order. streamer gets `put(tokens)`, first of the prompt and then of every step, and `end()`; or it
    is a function of the tokens. `weights` is that of `Plan`. Computed in fp32, prompts in the model's dtype.

    What this cannot do (another family of models, arguments beside these such as num_beams, a model on a GPU) goes to
    model.generate; `fastllm.explain` says so, a warning does once, and FASTLLM_STRICT=1 makes it an error.
    Raises ValueError for shapes that do not fit, for an empty prompt and for positions that the model does not have.
    """
    if input_ids.ndim != 2 or not input_ids.numel() or input_ids.dtype != torch.int64:
        raise ValueError(
            f"generate: input_ids must be int64 [B, T] and not empty, got {input_ids.dtype} {list(input_ids.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"generate: attention_mask must be {list(input_ids.shape)} like input_ids, got {list(attention_mask.shape)}"
        )
    if max_new_tokens < 1 or temperature <= 0 or not 0 < top_p <= 1 or repetition_penalty <= 0:
        raise ValueError(
            "generate: max_new_tokens must be at least 1, temperature and repetition_penalty above 0, top_p in (0, 1]; "
            f"got {max_new_tokens}, {temperature}, {repetition_penalty}, {top_p}"
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
        made = plan(model, weights)
        reason = None
    except Unsupported as problem:
        reason = str(problem)
    if dispatch.choose("generate", input_ids, lambda backend: reason) == "reference":
        dispatch._warn_once(f"generate: {reason or 'the reference was asked for'}")
        others |= {"generator": generator} if generator is not None else {}
        chosen = (do_sample, temperature, top_k, top_p, repetition_penalty)
        return _by_the_model(model, input_ids, attention_mask, max_new_tokens, chosen, eos, pad, streamer, others)
    kept = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    prompts = [ids[keep] for ids, keep in zip(input_ids, kept, strict=True)]
    if not all(map(len, prompts)):
        raise ValueError("generate: attention_mask leaves nothing of a prompt")
    batch, longest = len(prompts), max(map(len, prompts))
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
            logits = _penalised(logits, ids[:, : width + n], repetition_penalty)
        if do_sample:
            chosen = sample(logits, temperature, top_k, top_p, generator)
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


def _penalised(logits, ids, penalty):
    """Logits of tokens that occur in `ids`, divided by the penalty where positive, multiplied where not."""
    found = logits.gather(1, ids)
    return logits.scatter(1, ids, torch.where(found < 0, found * penalty, found / penalty))


def sample(logits, temperature=1.0, top_k=50, top_p=1.0, generator=None):
    """A token [B] from softmax(logits [B, V] / temperature), of the top_k likeliest, of the fewest that hold top_p."""
    logits = logits / temperature
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -math.inf)
    if top_p < 1.0:
        ordered, place = logits.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        logits = logits.masked_fill(drop.scatter(1, place, drop), -math.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)


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
