"""The reference transformer: encoder, decoder and encoder-decoder, on plain PyTorch or on the kernels by one switch.

    model = Transformer(Config(vocab=256, kind="decoder"), accelerated=True)
    logits = model(tokens)                       # [B, T, vocab]
    model.generate(tokens, 100, temperature=0.8)

Both implementations have the same parameters in the same order, so one seed gives one model and one state dict fits
both. The blocks are pre-norm (Xiong et al. 2020, arXiv:2002.04745): what a block adds to the residual stream is handed
on un-added, so that the next norm can add it and normalise in one pass over memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastllm
import fastllm.nn
from fastllm.naive import (
    NaiveAttention,
    NaiveLayerNorm,
    NaiveRMSNorm,
    NaiveRotary,
    naive_activated,
    naive_swiglu,
)
from fastllm.sampling import sample

__all__ = ["Config", "Transformer"]

KINDS = ("encoder", "decoder", "encoder-decoder")
NORMS = ("layernorm", "rmsnorm")
POSITIONS = ("sinusoidal", "learned", "rotary")
ACTIVATIONS = ("relu", "gelu", "swiglu")
POOLINGS = ("mean", "mean-max")
LARGE_VOCAB = 4096  # where one product of all rows stops to be faster than many of 128


@dataclass(frozen=True)
class Config:
    """The sizes and choices of a transformer. The defaults are the sizes of Vaswani et al. 2017 (arXiv:1706.03762).

    classes > 0 gives an encoder a classification head over what is not padding (pooling="mean", or "mean-max", both
    side by side), with per_token one for every position; masked_lm gives it one over the vocabulary for every position.
    dropout is that of the paper, on the embeddings and on what every block adds; attention_dropout is the one on
    attention probabilities.
    scale_embedding multiplies embeddings by sqrt(d_model). max_len is the longest sequence, whatever the positions.
    kv_heads are the heads of keys and values where there are fewer than queries', head_dim is d_model / heads unless it
    is given. window is `fastllm.attention`'s, of every self-attention. tie_embeddings gives a head over the vocabulary
    the embedding's weight.
    Raises ValueError for a name that is not offered and for sizes that do not fit together.
    """

    vocab: int
    kind: str = "decoder"
    classes: int = 0
    per_token: bool = False
    masked_lm: bool = False
    d_model: int = 512
    heads: int = 8
    kv_heads: int | None = None
    layers: int = 6
    d_ff: int = 2048
    dropout: float = 0.1
    attention_dropout: float = 0.0
    norm: str = "layernorm"
    positions: str = "sinusoidal"
    activation: str = "relu"
    tie_embeddings: bool = True
    scale_embedding: bool = True
    window: tuple[int, int] | None = None
    max_len: int = 2048
    head_dim: int | None = None
    pooling: str = "mean"

    def __post_init__(self):
        choices = dict(kind=KINDS, norm=NORMS, positions=POSITIONS, activation=ACTIVATIONS, pooling=POOLINGS)
        for name, offered in choices.items():
            if getattr(self, name) not in offered:
                raise ValueError(f"Config: {name} must be one of {', '.join(offered)}, got {getattr(self, name)!r}")
        for name in ("vocab", "d_model", "heads", "layers", "d_ff", "max_len", "kv_heads", "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"Config: {name} must be at least 1, got {getattr(self, name)}")
        if (self.head_dim is None and self.d_model % self.heads) or self.heads % (self.kv_heads or self.heads):
            raise ValueError(
                "Config: heads must divide d_model where there is no head_dim, and kv_heads divide heads, "
                f"got d_model={self.d_model}, heads={self.heads}, kv_heads={self.kv_heads}"
            )
        if (self.classes or self.masked_lm) and self.kind != "encoder":
            head = f"classes={self.classes}" if self.classes else "masked_lm=True"
            raise ValueError(f"Config: only an encoder classifies or fills in, got {head} and kind={self.kind!r}")
        if self.classes and self.masked_lm:
            raise ValueError(f"Config: classes={self.classes} and masked_lm=True are two heads, there can be one")


@dataclass(frozen=True)
class Parts:
    """The classes and functions that the switch chooses between."""

    attention: type
    layernorm: type
    rmsnorm: type
    rotary: type
    linear: type
    activated: Callable
    swiglu: Callable

    def norm(self, config):
        return self.layernorm(config.d_model) if config.norm == "layernorm" else self.rmsnorm(config.d_model, eps=1e-6)


NAIVE = Parts(NaiveAttention, NaiveLayerNorm, NaiveRMSNorm, NaiveRotary, nn.Linear, naive_activated, naive_swiglu)
KERNELS = Parts(
    fastllm.nn.Attention,
    fastllm.nn.LayerNorm,
    fastllm.nn.RMSNorm,
    fastllm.nn.Rotary,
    fastllm.nn.Linear,
    fastllm.nn.linear.activated,
    fastllm.swiglu,
)


class FeedForward(nn.Module):
    """down(act(up(x))), or down(silu(gate(x)) * up(x)) for SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config, parts):
        super().__init__()
        self.parts, self.activation = parts, config.activation
        self.up = parts.linear(config.d_model, config.d_ff)
        self.gate = parts.linear(config.d_model, config.d_ff) if config.activation == "swiglu" else None
        self.down = parts.linear(config.d_ff, config.d_model)

    def forward(self, x):
        if self.gate is None:
            return self.down(self.parts.activated(self.up, x, self.activation))
        return self.down(self.parts.swiglu(self.gate(x), self.up(x)))


class Block(nn.Module):
    """One layer: self-attention, cross-attention where `cross`, feed-forward, each on a normed input.

    forward takes and returns (stream, added): the residual stream, and what is still to be added to it (None at first),
    behind the dropout that the next norm applies too.
    """

    def __init__(self, config, parts, causal, cross, rotary):
        super().__init__()
        sizes = dict(d_model=config.d_model, heads=config.heads, kv_heads=config.kv_heads, head_dim=config.head_dim)
        sizes["dropout"] = config.attention_dropout
        self.attention_norm = parts.norm(config)
        self.attention = parts.attention(**sizes, causal=causal, window=config.window, rotary=rotary)
        if cross:
            self.cross_norm = parts.norm(config)
            self.cross_attention = parts.attention(**sizes)
        self.feed_forward_norm = parts.norm(config)
        self.feed_forward = FeedForward(config, parts)
        self.dropout = config.dropout

    def forward(self, stream, added, mask=None, context=None, context_mask=None, cache=(None, None), cu_seqlens=None):
        dropout_p = self.dropout if self.training else 0.0
        x, stream = add_norm(self.attention_norm, stream, added, dropout_p)
        added = self.attention(x, mask=mask, cache=cache[0], cu_seqlens=cu_seqlens)
        if context is not None:
            x, stream = add_norm(self.cross_norm, stream, added, dropout_p)
            added = self.cross_attention(x, context, mask=context_mask, cache=cache[1])
        x, stream = add_norm(self.feed_forward_norm, stream, added, dropout_p)
        return stream, self.feed_forward(x)


def add_norm(norm, stream, added, dropout_p):
    """(norm(h), h) with h = stream + dropout(added)."""
    return (norm(stream), stream) if added is None else norm(added, stream, dropout_p=dropout_p)


class Stack(nn.Module):
    """The blocks of an encoder or a decoder and the norm behind them: [B, T, d_model] to the same.

    checkpointing=True keeps each block's input for the backward pass, and computes the rest of it again there.
    """

    checkpointing = False

    def __init__(self, config, parts, *, causal=False, cross=False, rotary=None):
        super().__init__()
        self.blocks = nn.ModuleList(Block(config, parts, causal, cross, rotary) for _ in range(config.layers))
        self.norm, self.dropout = parts.norm(config), config.dropout

    def forward(self, x, mask=None, context=None, context_mask=None, caches=None, cu_seqlens=None):
        stream, added = x, None
        for n, block in enumerate(self.blocks):
            cache = (None, None) if caches is None else caches[n]
            run = partial(checkpoint, block, use_reentrant=False) if self.checkpointing and self.training else block
            stream, added = run(stream, added, mask, context, context_mask, cache, cu_seqlens)
        return add_norm(self.norm, stream, added, self.dropout if self.training else 0.0)[0]


def sinusoids(max_len, d_model):
    """[max_len, d_model]: sin(p f_i) in the even columns, cos(p f_i) in the odd ones, f_i = 10000^(-2i / d_model)."""
    i = torch.arange(d_model, dtype=torch.float64)
    angles = torch.arange(max_len, dtype=torch.float64)[:, None] * 10000.0 ** (-(i - i % 2) / d_model)
    return torch.where(i % 2 == 0, angles.sin(), angles.cos()).float()


class Transformer(nn.Module):
    """tokens [B, T] int64 to logits, by config.kind:

    encoder: [B, classes], with per_token [B, T, classes], with masked_lm [B, T, vocab], or else the hidden states
    [B, T, d_model]. decoder: [B, T, vocab], causal.
    encoder-decoder: [B, T, vocab] for the target `tokens`, given `source` [B, S]; both sides share the embedding.
    mask [B, T] and source_mask [B, S] are boolean, True = a real token, False = padding; None = no padding.
    With targets [B, T], the tokens to come (or those that are masked), forward returns their mean cross-entropy instead
    of logits; -100 does not count, and label_smoothing is cross_entropy's. cu_seqlens [n + 1] packs n sequences into
    tokens [1, T], which then need no padding and see nothing of each other (not with a source, nor where an encoder
    pools for its classes). Accelerated, the logits of a vocabulary from LARGE_VOCAB on are never all in memory where
    there are targets.
    accelerated=False runs plain PyTorch as the tutorials write it, True the fastllm kernels.
    Under `fastllm.nn.sequence_parallel` every sequence is this rank's part of one, and the loss that of this part.
    Raises ValueError for sequences past max_len, for a source that is missing, not wanted or packed, for targets of an
    encoder without masked_lm, for packed sequences that are to be pooled.
    """

    sequence = None

    def __init__(self, config, accelerated=True):
        super().__init__()
        self.config, self.accelerated = config, accelerated
        parts = KERNELS if accelerated else NAIVE
        self.embedding = nn.Embedding(config.vocab, config.d_model)
        rotary = None
        if config.positions == "rotary":
            rotary = parts.rotary(config.head_dim or config.d_model // config.heads, config.max_len)
        elif config.positions == "learned":
            self.positions = nn.Parameter(torch.empty(config.max_len, config.d_model))
        else:
            self.register_buffer("positions", sinusoids(config.max_len, config.d_model), persistent=False)
        self.dropout = nn.Dropout(config.dropout)
        if config.kind != "decoder":
            self.encoder = Stack(config, parts, rotary=rotary)
        if config.kind != "encoder":
            self.decoder = Stack(config, parts, causal=True, cross=config.kind == "encoder-decoder", rotary=rotary)
        if config.classes:
            pooled = 1 if config.per_token else len(config.pooling.split("-"))
            self.head = parts.linear(pooled * config.d_model, config.classes)
        elif config.kind != "encoder" or config.masked_lm:
            self.head = parts.linear(config.d_model, config.vocab, bias=False)
        self._initialise()

    def _initialise(self):
        """Xavier for matrices, zero for biases, embeddings such that they enter the first block with unit variance or
        (unscaled) GPT-2's 0.02; what ends a block is divided by the root of the number of additions to the stream."""
        config = self.config
        spread = config.d_model**-0.5 if config.scale_embedding else 0.02
        additions = config.layers * (3 if config.kind == "encoder-decoder" else 2)
        for name, parameter in self.named_parameters():
            if name in ("embedding.weight", "positions"):
                nn.init.normal_(parameter, std=spread if name == "embedding.weight" else 0.02)
            elif parameter.ndim == 2:
                nn.init.xavier_uniform_(parameter)
                if name.endswith(("out.weight", "down.weight")):
                    parameter.data /= math.sqrt(additions)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
        if config.tie_embeddings and (config.kind != "encoder" or config.masked_lm):
            self.head.weight = self.embedding.weight

    def gradient_checkpointing_enable(self):
        for stack in (module for module in self.children() if isinstance(module, Stack)):
            stack.checkpointing = True

    def embed(self, tokens, position=0, cu_seqlens=None):
        at, end = slice(position, position + tokens.shape[1]), position + tokens.shape[1]
        if self.sequence is not None:
            at, end = self.sequence.positions(tokens.shape[1], tokens.device), tokens.shape[1] * self.sequence.ranks
        if cu_seqlens is not None:
            at, end = fastllm.nn.attention.packed_positions(cu_seqlens, tokens.shape[1]), int(cu_seqlens.diff().max())
        if end > self.config.max_len:
            raise ValueError(f"Transformer: {end} positions, but max_len={self.config.max_len}")
        x = self.embedding(tokens)
        if self.config.scale_embedding:
            x = x * math.sqrt(self.config.d_model)
        if self.config.positions != "rotary":
            x = x + self.positions[at]
        return self.dropout(x)

    def encode(self, tokens, mask=None, cu_seqlens=None):
        """Hidden states [B, T, d_model] of the encoder."""
        return self.encoder(self.embed(tokens, cu_seqlens=cu_seqlens), mask, cu_seqlens=cu_seqlens)

    def decode(self, tokens, mask=None, context=None, context_mask=None, caches=None, cu_seqlens=None):
        """Hidden states [B, T, d_model] of the decoder; with `caches`, tokens continue the positions in them."""
        x = self.embed(tokens, 0 if caches is None else len(caches[0][0]), cu_seqlens)
        return self.decoder(x, mask, context, context_mask, caches, cu_seqlens)

    def forward(
        self, tokens, mask=None, source=None, source_mask=None, targets=None, cu_seqlens=None, label_smoothing=0.0
    ):
        self._check_source(source)
        if cu_seqlens is not None and source is not None:
            raise ValueError("Transformer: a source cannot be packed (cu_seqlens)")
        if cu_seqlens is not None and self.config.classes and not self.config.per_token:
            raise ValueError(
                "Transformer: packed sequences (cu_seqlens) cannot be pooled, only per_token=True takes them"
            )
        if self.config.kind == "encoder":
            x = self.encode(tokens, mask, cu_seqlens)
            if not self.config.masked_lm:
                if targets is not None:
                    raise ValueError("Transformer: kind='encoder' takes no targets without masked_lm")
                if not self.config.classes:
                    return x
                return self.head(x if self.config.per_token else pool(x, mask, self.config.pooling))
        else:
            context = None if source is None else self.encode(source, source_mask)
            x = self.decode(tokens, mask, context, source_mask, cu_seqlens=cu_seqlens)
        if targets is None:
            return self.head(x)
        if self.accelerated and self.config.vocab >= LARGE_VOCAB:
            return fastllm.linear_cross_entropy(x, self.head_weight(x.dtype), targets, label_smoothing=label_smoothing)
        cross_entropy = fastllm.cross_entropy if self.accelerated else F.cross_entropy
        return cross_entropy(self.head(x).flatten(0, 1), targets.flatten(), label_smoothing=label_smoothing)

    def _check_source(self, source):
        if (source is not None) != (self.config.kind == "encoder-decoder"):
            wanted = "needs a source" if source is None else "takes no source"
            raise ValueError(f"Transformer: kind={self.config.kind!r} {wanted}")

    def head_weight(self, dtype) -> torch.Tensor:
        """[V, d_model]; of a head that is packed in few bits what its numbers stand for, in `dtype`."""
        weight = self.head.weight
        return weight if isinstance(weight, torch.Tensor) else weight.dequantize(dtype)

    @torch.no_grad()
    def generate(
        self,
        tokens,
        count,
        *,
        source=None,
        source_mask=None,
        temperature=0.0,
        top_k=None,
        stop=None,
        cache=True,
        generator=None,
        ended=torch.all,
    ):
        """[B, T + new]: `tokens` [B, T], continued by `count` or, where all have stopped, fewer. temperature=0 takes
        the likeliest token, else samples from softmax(logits / temperature), from the top_k likeliest only where given.
        A sequence that has produced `stop` goes on with it, and generation ends when all have: when ended(done), done
        [B] bool, says so, by which processes that gather parameters together can end together. cache=False computes
        every position anew each time. The prompts must have one length: padding is not supported here, but in a source,
        by its mask. Raises ValueError for an encoder, a source that is missing or not wanted, an empty prompt, and past
        max_len.
        """
        if self.config.kind == "encoder":
            raise ValueError("Transformer.generate: an encoder does not generate")
        self._check_source(source)
        if not tokens.shape[1]:
            raise ValueError("Transformer.generate: the prompt is empty, a token to start from is needed")
        was_training = self.training
        self.eval()
        context = None if source is None else self.encode(source, source_mask)
        caches = [(fastllm.nn.KeyValues(), fastllm.nn.KeyValues()) for _ in self.decoder.blocks] if cache else None
        fresh, done = tokens, torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        try:
            for _ in range(count):
                x = self.decode(fresh, context=context, context_mask=source_mask, caches=caches)
                logits = self.head(x[:, -1])
                greedy = temperature <= 0
                chosen = logits.argmax(-1) if greedy else sample(logits, temperature, top_k, generator=generator)
                if stop is not None:
                    chosen = chosen.masked_fill(done, stop)
                    done = done | (chosen == stop)
                tokens = torch.cat([tokens, chosen[:, None]], 1)
                if ended(done):
                    break
                fresh = chosen[:, None] if cache else tokens
        finally:
            self.train(was_training)
        return tokens


def pool(x, mask, pooling="mean"):
    """The mean of x [B, T, D] over the positions that are not padding, [B, D]; with "mean-max" their largest values
    behind it, [B, 2 D]."""
    if mask is None:
        mean = x.mean(1)
    else:
        kept = mask.unsqueeze(-1).to(x.dtype)
        mean = (x * kept).sum(1) / kept.sum(1).clamp(min=1)
    if pooling == "mean":
        return mean
    hidden = x if mask is None else x.masked_fill(~mask.unsqueeze(-1), torch.finfo(x.dtype).min)
    return torch.cat([mean, hidden.amax(1)], -1)
