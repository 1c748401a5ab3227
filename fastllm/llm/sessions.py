"""Sequences of any model that generates: in the compiled decoder's `Session`, else through the model's own forward."""

import copy
import inspect
import itertools

import torch

import fastllm.nn
from fastllm import dispatch, generation
from fastllm.decoder import Unsupported

POSITIONS = 4096  # of a sequence unless the caller or the model says otherwise: what a cache has room for


def positions_of(model) -> int:
    """How many positions the model has, or was trained for; POSITIONS where it does not say."""
    config = model.config
    for name in ("max_len", "n_positions", "max_position_embeddings"):
        if found := getattr(config, name, None):
            return int(found)
    return POSITIONS


def is_encoder_decoder(model) -> bool:
    config = model.config
    return bool(getattr(config, "is_encoder_decoder", False)) or getattr(config, "kind", None) == "encoder-decoder"


def generates(model) -> bool:
    """Whether tokens can follow tokens: a decoder with a head over a vocabulary."""
    if type(model).__name__ == "Transformer":
        return model.config.kind != "encoder"
    return callable(getattr(model, "can_generate", None)) and model.can_generate()


def session_of(model, weights, slots, positions, start=None):
    """(session, None), or (session of the model's own forward, the reason why it is not the compiled decoder).

    `start` is the token that an encoder-decoder's answers start with, where its config has none.
    Raises ValueError for a model that does not generate, and for `weights` where only its own forward is left.
    """
    if not generates(model):
        what = "is not a language model with a head, so it writes no text; `fastllm evaluate` scores such models"
        raise ValueError(f"generate: {type(model).__name__} {what}")
    try:
        plan, reason = generation.plan(model, weights), None
    except Unsupported as problem:
        reason = str(problem)
    like = next(model.parameters())
    if dispatch.choose("generate", like, lambda backend: reason) != "reference":
        return plan.session(slots, positions), None
    if weights != "model":
        raise ValueError(f"generate: weights={weights!r} is for the compiled decoder only: {reason}")
    return OwnForward(model, slots, positions, start), reason or "the reference was asked for"


class OwnForward:
    """`fastllm.session.Session` for every other model: one sequence after the other, each with the model's own cache.

    An encoder-decoder reads a prompt as its source; what is generated starts behind its start token.
    """

    def __init__(self, model, slots, positions, start=None):
        self.model, self.positions = model.eval(), positions
        self.lengths, self.caches, self.contexts = [0] * slots, [None] * slots, [None] * slots
        self.device = next(model.parameters()).device
        self.ours, self.two = type(model).__name__ == "Transformer", is_encoder_decoder(model)
        self.start = start
        if self.two and not self.ours:
            config = getattr(model, "generation_config", model.config)
            self.start = getattr(config, "decoder_start_token_id", None)
            self.start = model.config.decoder_start_token_id if self.start is None else self.start
        if self.two and self.start is None:
            raise ValueError("generate: this encoder-decoder's tokenizer has no token for answers to start with")

    def clear(self, slot):
        self.lengths[slot], self.caches[slot], self.contexts[slot] = 0, None, None

    def keep(self, slot, count) -> int:
        """As `Session.keep`; 0 where the model's own cache cannot be cut back to `count` tokens."""
        if not cut_back(self.caches[slot], count):
            self.clear(slot)
            return 0
        self.lengths[slot] = count
        return count

    def copy(self, sources, targets, since=0):
        for s, t in zip(sources.tolist(), targets.tolist(), strict=True):
            self.caches[t] = copy.deepcopy(self.caches[s])
            self.lengths[t], self.contexts[t] = self.lengths[s], self.contexts[s]

    @torch.no_grad()
    def prefill(self, prompts, slots=None):
        slots = range(len(prompts)) if slots is None else slots.tolist()
        return torch.cat([self._prefill(prompt, slot) for prompt, slot in zip(prompts, slots)])

    @torch.no_grad()
    def step(self, tokens, slots=None):
        slots = range(len(tokens)) if slots is None else slots.tolist()
        return torch.cat([self._forward(token[None], slot) for token, slot in zip(tokens, slots)])

    def _prefill(self, prompt, slot):
        if not self.two:
            return self._forward(prompt, slot)
        source = prompt[None].to(self.device)
        encoder = self.model.encode if self.ours else self.model.get_encoder()
        self.contexts[slot] = encoder(source)
        return self._forward(torch.tensor([self.start]), slot)

    def _forward(self, tokens, slot):
        self.lengths[slot] += len(tokens)
        if self.lengths[slot] > self.positions:
            raise ValueError(f"generate: all {self.positions} positions of this session are used")
        ids = tokens[None].to(self.device)
        if self.ours:
            if self.caches[slot] is None:
                pair = fastllm.nn.KeyValues
                self.caches[slot] = [(pair(), pair()) for _ in self.model.decoder.blocks]
            x = self.model.decode(ids, context=self.contexts[slot], caches=self.caches[slot])
            return self.model.head(x[:, -1]).float().cpu()
        inputs = dict(input_ids=ids)
        if self.two:
            inputs = dict(decoder_input_ids=ids, encoder_outputs=self.contexts[slot])
        if "logits_to_keep" in inspect.signature(self.model.forward).parameters:
            inputs["logits_to_keep"] = 1
        found = self.model(**inputs, past_key_values=self.caches[slot], use_cache=True)
        self.caches[slot] = found.past_key_values
        return found.logits[:, -1].float().cpu()


def cut_back(cache, count) -> bool:
    """Forget all but the first `count` tokens, in a cache of ours or of transformers; False where that cannot be."""
    if not count or cache is None:
        return False
    if isinstance(cache, list):
        for pair in itertools.chain(*cache):
            pair.cut(count)
        return True
    layers = getattr(cache, "layers", None)
    if not layers or not all(type(layer).__name__ == "DynamicLayer" for layer in layers):
        return False  # a window's layer, or a state, has no longer what it would go back to
    if (more := cache.get_seq_length() - count) > 0:
        cache.crop(-more)
    return True
