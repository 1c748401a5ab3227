"""A decoder-only model ready to generate: its weights in a `Plan`, its sequences in a `Session`.

A session has slots. Each holds the keys and values of one sequence, which starts, grows and ends independently of the
others: `prefill` puts tokens behind some of them through the ordinary kernels, `step` one token behind each of some,
in a single call of fastllm._C.Decoder for the whole stack of layers. What a row gives does not depend on the others.
"""

import torch

from fastllm import dispatch
from fastllm.addresses import Addresses, threads_that_wait
from fastllm.decoder import ACTIVATIONS, WEIGHTS, Unsupported, describe
from fastllm.ops.attention import attention
from fastllm.ops.varlen import attention_varlen
from fastllm.ops.weight_only import NARROW


class Plan:
    """A model's weights, ready for generation: "model" (as they are), "fp32", "bf16", "int8" or "int4".

    "model" reads the model's own memory where its layout allows (GPT-2's layers and GPT-NeoX's attention are copied);
    the others are copies. int8 has a scale per row and int4 one per 64 numbers (`fastllm.quantize_weight`), the head
    included; the embedding stays as it is. The cache of keys and values is fp32 for a model in fp32 whose weights stay
    so, bf16 for one whose weights have fewer bits, else it has the model's dtype. Raises
    `fastllm.decoder.Unsupported` for a model that is of no known family, and ValueError for another name of weights.
    """

    def __init__(self, model, weights="model"):
        if weights not in WEIGHTS:
            raise ValueError(f"generate: weights must be one of {', '.join(WEIGHTS)}, got {weights!r}")
        if dispatch.extension is None:
            raise Unsupported(dispatch.missing_extension)
        self.description = describe(model).stored_as(weights)
        self.weights, self.made_from = weights, fingerprint(model)
        own, packed = self.description.dtype, self.description.packed
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(weights, own)  # of the prompt's activations
        self.cache_dtype = torch.bfloat16 if packed and own == torch.float32 else self.dtype

    def session(self, slots, positions):
        """A `Session` of `slots` sequences of at most `positions` tokens."""
        return Session(self, slots, positions)


def fingerprint(model):
    """Changes when a parameter or a packed weight is replaced or written to."""
    return [(p.data_ptr(), p._version) for p in (*model.parameters(), *model.buffers())]


class Session:
    """`slots` sequences and their keys and values: `prefill` each of them, then `step` for every token.

    `lengths` [slots] are the tokens in each. Memory of positions that no token has reached is not touched, and so, with
    an allocator that maps large blocks on demand, not used. Raises ValueError for positions that the model lacks.
    """

    def __init__(self, plan, slots, positions):
        d = plan.description
        if d.max_positions is not None and positions > d.max_positions:
            raise ValueError(f"generate: {positions} positions, but the model has {d.max_positions}")
        self.plan, self.positions = plan, positions
        self.lengths, self.all = torch.zeros(slots, dtype=torch.int64), torch.arange(slots)
        shape = len(d.layers), slots, d.kv_heads, positions, d.head_dim
        self.keys, self.values = (torch.empty(shape, dtype=plan.cache_dtype) for _ in "kv")
        self.tables = d.tables(positions)
        self.places = None if d.places is None else d.places[:positions].contiguous()
        self.vocabulary = d.embedding.weight.shape[0]
        self.logits = torch.empty(slots, d.head.weight.shape[0])
        rotated = {2 * cos.shape[-1] for cos, _ in self.tables.values()}
        self._addresses = Addresses()
        self._native = dispatch.extension.Decoder(
            {
                "slots": slots,
                "positions": positions,
                "width": d.embedding.weight.shape[1],
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
                "embedding": self._addresses.linear(d.embedding),
                "places": self._addresses.of(self.places),
                "final_norm": self._addresses.norm(d.norm),
                "head": self._addresses.linear(d.head),
                "layers": [self._layer(layer, n) for n, layer in enumerate(d.layers)],
                "threads": threads_that_wait(),
            }
        )

    def _layer(self, layer, n):
        cos, sin = self.tables.get(layer.rope, (None, None))
        norms = ("attention_norm", "q_norm", "k_norm", "after_attention", "feed_norm", "after_feed")
        made = {name: self._addresses.norm(getattr(layer, name)) for name in norms}
        made |= {name: [self._addresses.linear(getattr(layer, name))] for name in ("out", "gate", "down")}
        made |= {"up": [] if layer.up is None else [self._addresses.linear(layer.up)]}
        made |= {
            "qkv": [self._addresses.linear(x) for x in layer.qkv],
            "parallel": layer.parallel,
            "window": layer.window,
        }
        made |= {"cos": self._addresses.of(cos), "sin": self._addresses.of(sin)}
        return made | {"k": self._addresses.of(self.keys[n]), "v": self._addresses.of(self.values[n])}

    def clear(self, slot):
        """The sequence of this slot is over; another may start there."""
        self.lengths[slot] = 0

    def keep(self, slot, count) -> int:
        """Of the sequence in this slot the first `count` tokens stay, for another to go on from. Returns `count`."""
        self.lengths[slot] = count
        return count

    def copy(self, sources, targets, since=0):
        """The sequences in the slots `sources` [n] also in `targets` [n], which have the first `since` tokens already.

        No slot may be both.
        """
        longest = int(self.lengths[sources].max())
        for cache in (self.keys, self.values):
            for source, target in zip(sources.tolist(), targets.tolist(), strict=True):
                cache[:, target, :, since:longest] = cache[:, source, :, since:longest]
        self.lengths[targets] = self.lengths[sources]

    def _check(self, fresh, tokens):
        """`fresh` are the lengths that sequences are to get."""
        if int(fresh.max()) > self.positions:
            raise ValueError(f"generate: all {self.positions} positions of this session are used")
        if int(tokens.min()) < 0 or int(tokens.max()) >= self.vocabulary:
            raise IndexError(f"generate: tokens must be in [0, {self.vocabulary})")

    @torch.no_grad()
    def prefill(self, prompts, slots=None):
        """Logits [n, V] in fp32 behind `prompts`, a list of [length] int64 tensors, none of them empty.

        Each is put behind the tokens that its slot has already; the slots are the first ones unless given, [n].
        """
        d, dtype = self.plan.description, self.plan.dtype
        slots = self.all[: len(prompts)] if slots is None else slots
        counts, before, tokens = torch.tensor([len(p) for p in prompts]), self.lengths[slots], torch.cat(prompts)
        self._check(before + counts, tokens)
        bounds = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        spans = list(zip(slots.tolist(), before.tolist(), counts.tolist(), bounds.tolist()))
        place = torch.cat([torch.arange(start, start + n) for _, start, n, _ in spans])
        x = d.embedding.rows(tokens, dtype)  # [total, width], the sequences one after the other
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
            for slot, start, count, at in spans:
                self.keys[n, slot, :, start : start + count] = k[at : at + count].transpose(0, 1)
                self.values[n, slot, :, start : start + count] = v[at : at + count].transpose(0, 1)
            options = dict(causal=True, scale=d.scale, softcap=d.softcap)
            options["window"] = (layer.window - 1, 0) if layer.window else None
            if len(prompts) > 1 and not any(start for _, start, _, _ in spans):
                o = attention_varlen(q, k, v, cu_seqlens_q=bounds, cu_seqlens_k=bounds, **options)
            else:
                o = torch.cat([self._attend(n, q, k, v, span, options) for span in spans])
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
        self.lengths[slots] = before + counts
        logits = d.head(d.norm(x[bounds[1:] - 1])).float()
        return d.logit_softcap * torch.tanh(logits / d.logit_softcap) if d.logit_softcap else logits

    def _attend(self, n, q, k, v, span, options):
        """[count, heads, D] of one sequence in layer n, over what its slot has and the `count` new tokens from `at`."""
        slot, start, count, at = span
        q, k, v = (y[at : at + count].transpose(0, 1) for y in (q, k, v))
        if start:
            k, v = (cache[n, slot, :, : start + count].to(q.dtype) for cache in (self.keys, self.values))
        return attention(q[None], k[None], v[None], q_offset=start, **options)[0].transpose(0, 1)

    def step(self, tokens, slots=None):
        """Logits [n, V] in fp32 behind one more token [n] of the sequences in `slots` [n], without them in all.

        The next step overwrites them. Each row is the same bit for bit whatever the others are, but for packed weights
        on the portable kernels, where the last bit depends on how many rows there are.
        """
        slots = self.all if slots is None else slots.contiguous()
        tokens, lengths, logits = tokens.contiguous(), self.lengths[slots], self.logits[: len(slots)]
        self._check(lengths + 1, tokens)
        self._native.step(len(slots), *(x.data_ptr() for x in (tokens, lengths, slots, logits)))
        self.lengths[slots] = lengths + 1
        return logits


def _rotate(x, cos, sin):
    """The first 2 * cos.shape[-1] numbers of every head turned, their halves being the pairs; the rest as it is."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat([(a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest], -1)
