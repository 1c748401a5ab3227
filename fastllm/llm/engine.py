"""Continuous batching: requests join and leave a running batch at every token.

    with Engine(model, tokenizer) as engine:
        answer = engine.submit(Request(tokenizer.encode("Once"), max_tokens=50, sampling=Sampling(temperature=0.8)))
        for text in answer:
            print(text, end="")

One thread owns the model. Between two tokens of the batch it takes new requests into free slots and reads at most one
piece of one prompt, so that a long prompt does not hold up those who are being answered. Pieces have the same borders
whoever else is there, and rows of a step do not depend on each other: so neither does an answer. With reuse=True a
prompt that begins as one before it is not read again up to where they part; then an answer depends, in the rounding of
keys and values that were made token by token or in other pieces, on what was asked before.
"""

import collections
import itertools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from fastllm import dispatch
from fastllm.llm.meter import Rate
from fastllm.llm.sessions import POSITIONS, is_encoder_decoder, positions_of, session_of
from fastllm.llm.stream import TextStream
from fastllm.llm.tokens import common
from fastllm.sampling import Chooser, Sampling

PIECE = 256  # tokens of a prompt that are read at a time


class Busy(Exception):
    """All slots are taken and the queue is full."""


@dataclass(frozen=True)
class Request:
    """What to continue and how. An answer ends at one of the `stop` strings, which is not part of it, at the model's
    end token, unless ignore_eos, or after max_tokens (None: as many as there are positions). With strip it does not
    begin with white space."""

    prompt: list[int]
    max_tokens: int | None = None
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    strip: bool = False


class Answer:
    """One request under way. Iterating gives pieces of text until it is over; `text()` waits for all of it.

    Then finish is "stop", "length", "cancelled" or "error", with the exception in `error`. `tokens` are those chosen so
    far, the end token among them; `reused` counts those of the prompt that were not read again. first_s is the time
    from submission to the first token, seconds that to the end.
    """

    def __init__(self, request, room, deliver=None):
        self.request = request
        self.tokens: list[int] = []
        self.finish: str | None = None
        self.error: Exception | None = None
        self.first_s: float | None = None
        self.seconds: float | None = None
        self.reused = 0
        self.most = room if request.max_tokens is None else request.max_tokens
        self.cancelled = threading.Event()
        self._began, self._pieces = time.perf_counter(), queue.SimpleQueue()
        self._deliver = deliver or self._pieces.put

    def end(self, finish, error=None):
        """Nothing more comes; called once, in the engine's thread."""
        self.finish, self.error, self.seconds = finish, error, time.perf_counter() - self._began
        self._deliver(None)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the tokens behind the first, which also waits for a slot and for its prompt; None where there are none."""
        if self.seconds is None or len(self.tokens) < 2:
            return None
        return (len(self.tokens) - 1) / (self.seconds - self.first_s)

    def cancel(self):
        """Ends it before the next token; its slot is free then."""
        self.cancelled.set()

    def __iter__(self):
        while (piece := self._pieces.get()) is not None:
            yield piece
        if self.error is not None:
            raise self.error

    def text(self) -> str:
        return "".join(self)


@dataclass
class Running:
    """An answer in a slot. `read` counts the tokens of the prompt that are in the cache, `seen` those of the answer."""

    answer: Answer
    slot: int
    chooser: Chooser
    stream: TextStream
    read: int = 0
    seen: int = 0
    fresh: int = field(default=-1)  # the token chosen last, that the model has not seen


@dataclass
class Totals:
    """Of an engine since its start: tokens of prompts that were read, and that did not have to be; tokens chosen;
    answers by how they ended."""

    read: int = 0
    reused: int = 0
    generated: int = 0
    finished: collections.Counter = field(default_factory=collections.Counter)


class Engine:
    """Answers requests on one model, `slots` at a time, each of at most `positions` tokens with its prompt.

    `queue_size` more may wait; then `submit` raises Busy. weights are those of `fastllm.generate`; models that the
    compiled decoder does not express run one after the other on their own forward, and a warning says so once.
    eos are the tokens that end an answer (default: the tokenizer's and the model's). With reuse a request takes a free
    slot whose last sequence begins as its prompt does, as the turns of a conversation do. `totals` counts.
    """

    def __init__(
        self, model, tokenizer, *, weights="model", slots=8, positions=None, queue_size=64, eos=None, reuse=False
    ):
        if slots < 1 or queue_size < 0:
            raise ValueError(f"Engine: slots must be at least 1, queue_size at least 0, got {slots}, {queue_size}")
        most = positions_of(model)
        self.positions = min(most, POSITIONS) if positions is None else positions
        if not 1 < self.positions <= most:
            raise ValueError(f"Engine: positions must be in [2, {most}], what the model has, got {positions}")
        self.tokenizer, self.slots, self.queue_size = tokenizer, slots, queue_size
        self.session, self.reason = session_of(model, weights, slots, self.positions, getattr(tokenizer, "bos", None))
        if self.reason:
            dispatch._warn_once(f"generate: one after the other on the model's own forward: {self.reason}")
        self.vocabulary = vocabulary_of(model)
        self.whole_prompts = is_encoder_decoder(model)  # an encoder sees all of its source at once
        self.eos = frozenset(end_tokens(model, tokenizer) if eos is None else eos)
        self.totals, self._rate = Totals(), Rate()
        self.reuse = reuse and not self.whole_prompts
        self._held = [[] for _ in range(slots)]  # the tokens whose keys and values a free slot still has
        self._waiting, self._running = collections.deque(), []
        self._free = list(range(slots))  # the one that was left first is the first
        self._changed, self._closed, self._threads = threading.Condition(), False, torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="fastllm engine", daemon=True)
        self._thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Cancels what is under way and ends the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def load(self) -> tuple[int, int]:
        """(running, waiting)."""
        return len(self._running), len(self._waiting)

    @property
    def tokens_per_s(self) -> float:
        """Chosen by all answers together, over the last seconds in which there were any."""
        return self._rate.per_s

    def room(self, prompt: int) -> int:
        """Tokens that can follow a prompt of so many."""
        if self.whole_prompts:  # as source, beside the answer
            return self.positions if prompt <= self.positions else 0
        return max(0, self.positions - prompt)

    def check(self, request):
        """Raises ValueError for a request that cannot be answered."""
        n, wanted = len(request.prompt), 1 if request.max_tokens is None else request.max_tokens
        if not n:
            raise ValueError("the prompt has no tokens")
        if wanted < 1:
            raise ValueError(f"max_tokens must be at least 1, got {wanted}")
        if wanted > self.room(n):
            raise ValueError(
                f"the prompt has {n} tokens and {wanted} more are wanted, but there are {self.positions} positions"
            )
        for name, tokens in (("prompt", request.prompt), ("bias", request.sampling.bias)):
            if tokens and not 0 <= min(tokens) <= max(tokens) < self.vocabulary:
                raise ValueError(f"tokens of the {name} must be in [0, {self.vocabulary})")

    def submit(self, request, deliver: Callable | None = None) -> Answer:
        """The answer, at once; its text comes as pieces, then None, to deliver(piece) in the engine's thread, or to
        whoever iterates over it. Raises ValueError for what cannot be answered, Busy where nothing more can wait."""
        self.check(request)
        answer = Answer(request, self.room(len(request.prompt)), deliver)
        with self._changed:
            if self._closed:
                raise Busy("the engine is closed")
            if len(self._waiting) >= self.queue_size + len(self._free):
                raise Busy(f"{len(self._running)} requests are being answered and {len(self._waiting)} wait")
            self._waiting.append(answer)
            self._changed.notify()
        return answer

    def _work(self):
        torch.set_num_threads(self._threads)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting or self._running)
                if self._closed:
                    break
                self._admit()
            try:
                self._cancel()
                self._read_a_piece()
                self._step()
            except Exception as error:  # of the model: whoever waits for it must not wait for ever
                for one in list(self._running):
                    self._finish(one, "error", error)
        for answer in [one.answer for one in self._running] + list(self._waiting):
            answer.end("cancelled")

    def _admit(self):
        while self._waiting and self._free:
            answer = self._waiting.popleft()
            request = answer.request
            slot, answer.reused = self._slot(request.prompt)
            before = [] if self.whole_prompts else request.prompt
            stream = TextStream(self.tokenizer.decode, request.stop, before, request.strip)
            chooser = Chooser(request.sampling, request.prompt)
            self._running.append(Running(answer, slot, chooser, stream, read=answer.reused))
            self.totals.reused += answer.reused

    def _slot(self, prompt):
        """(a free slot, how many tokens of the prompt it has): the one that has most of them, if that is at least half
        of what it holds, for another conversation may come back for the rest; else the one that was left first."""
        best = self._free[0]
        if self.reuse:
            shared = {slot: common(self._held[slot], prompt) for slot in self._free}
            most = max(self._free, key=shared.get)
            if 2 * shared[most] >= len(self._held[most]):
                best = most
        self._free.remove(best)
        kept = 0
        if self.reuse:  # the last token is read in any case: its logits are wanted
            kept = self.session.keep(best, min(common(self._held[best], prompt), len(prompt) - 1))
        else:
            self.session.clear(best)
        self._held[best] = []
        return best, kept

    def _cancel(self):
        for one in [one for one in self._running if one.answer.cancelled.is_set()]:
            self._finish(one, "cancelled")
        with self._changed:
            gone = [answer for answer in self._waiting if answer.cancelled.is_set()]
            for answer in gone:
                self._waiting.remove(answer)
        for answer in gone:
            self.totals.finished["cancelled"] += 1
            answer.end("cancelled")

    def _read_a_piece(self):
        """Of the prompt that has waited longest."""
        one = next((one for one in self._running if one.fresh < 0), None)
        if one is None:
            return
        prompt = one.answer.request.prompt
        end = len(prompt) if self.whole_prompts else min(len(prompt), one.read + PIECE)
        piece = torch.tensor(prompt[one.read : end])
        try:
            logits = self.session.prefill([piece], torch.tensor([one.slot]))
        except Exception as error:  # of this prompt alone
            return self._finish(one, "error", error)
        self.totals.read += end - one.read
        one.read = end
        if end == len(prompt):
            self._choose(one, logits[0])

    def _step(self):
        ready = [one for one in self._running if one.fresh >= 0]
        if ready:
            began = time.perf_counter()
            tokens = torch.tensor([one.fresh for one in ready])
            logits = self.session.step(tokens, torch.tensor([one.slot for one in ready]))
            for one, row in zip(ready, logits):
                one.seen += 1
                self._choose(one, row)
            self._rate.add(len(ready), time.perf_counter() - began)

    def _choose(self, one, logits):
        answer = one.answer
        one.fresh = one.chooser.choose(logits)
        answer.tokens.append(one.fresh)
        self.totals.generated += 1
        if answer.first_s is None:
            answer.first_s = time.perf_counter() - answer._began
        ended = one.fresh in self.eos and not answer.request.ignore_eos
        if not ended and (text := one.stream.put(one.fresh)):
            answer._deliver(text)
        if ended or one.stream.stopped:
            self._finish(one, "stop")
        elif len(answer.tokens) >= answer.most:
            self._finish(one, "length")

    def _finish(self, one, why, error=None):
        self._running.remove(one)
        if text := one.stream.end():
            one.answer._deliver(text)
        if error is None:
            self._held[one.slot] = one.answer.request.prompt[: one.read] + one.answer.tokens[: one.seen]
        self.totals.finished[why] += 1
        with self._changed:
            self._free.append(one.slot)
        one.answer.end(why, error)


def vocabulary_of(model) -> int:
    """Rows of the embedding: token numbers that the model takes."""
    return getattr(model.config, "vocab", None) or model.get_input_embeddings().weight.shape[0]


def end_tokens(model, tokenizer) -> set[int]:
    """What the tokenizer and the model's own configuration call the end of a text."""
    known = (getattr(getattr(model, name, None), "eos_token_id", None) for name in ("generation_config", "config"))
    lists = (x if isinstance(x, list | tuple) else [x] for x in (*known, getattr(tokenizer, "eos", None)))
    return {token for token in itertools.chain(*lists) if token is not None}
