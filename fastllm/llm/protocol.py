"""OpenAI's completion requests and answers as plain data: what is read, what is refused and why, what is written."""

import itertools
import secrets
import time
from dataclasses import dataclass, field

from fastllm.llm.engine import Busy, Engine, Request
from fastllm.llm.prompts import ChatTemplate
from fastllm.sampling import Sampling

SHARED = {"model", "max_tokens", "temperature", "top_p", "n", "stop", "stream", "stream_options", "seed"}
SHARED |= {"presence_penalty", "frequency_penalty", "logit_bias"}
SHARED |= {"top_k", "min_p", "repetition_penalty"}  # not OpenAI's; its client sends them as extra_body
FIELDS = {True: SHARED | {"messages", "max_completion_tokens"}, False: SHARED | {"prompt"}}
# What clients send that changes nothing here, and what would change the answer and cannot be had.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
DEFAULTS = dict(logprobs=(False, 0), top_logprobs=(0,), best_of=(1,), echo=(False,), suffix=("",), tools=([],))
DEFAULTS |= dict(functions=([],), tool_choice=("none",), response_format=({"type": "text"},), modalities=(["text"],))
COMPLETION_TOKENS = 16  # OpenAI's default of the older of the two kinds
MOST_STOPS, LONGEST_STOP = 16, 200


class BadRequest(Exception):
    """A request that is refused, with its HTTP status and what OpenAI's errors consist of."""

    def __init__(self, message, *, param=None, code=None, status=400, kind="invalid_request_error"):
        super().__init__(message)
        self.status, self.error = status, dict(message=message, type=kind, param=param, code=code)


@dataclass(frozen=True)
class Limits:
    """What one request may ask for. None: what the model has positions for."""

    body_bytes: int = 1 << 20
    prompt_tokens: int | None = None
    max_tokens: int | None = None


@dataclass
class Completion:
    """One request: the engine's requests that it comes to, and what is written of their answers."""

    chat: bool
    model: str
    requests: list[Request]
    stream: bool = False
    include_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def _frame(self, choices, streamed, **more):
        kind = ("chat.completion" if self.chat else "text_completion") + (".chunk" if streamed and self.chat else "")
        name = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return dict(id=name, object=kind, created=self.created, model=self.model, choices=choices, **more)

    def whole(self, texts, answers) -> dict:
        """The answer as one object."""
        choices = []
        for index, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            said = dict(message=dict(role="assistant", content=text)) if self.chat else dict(text=text)
            choices.append(dict(index=index, **said, logprobs=None, finish_reason=answer.finish))
        return self._frame(choices, False, usage=self.usage(answers))

    def first(self, index) -> dict | None:
        """The chunk before the text of an answer."""
        return self._chunk(index, dict(role="assistant", content="")) if self.chat else None

    def piece(self, index, text) -> dict:
        return self._chunk(index, dict(content=text) if self.chat else text)

    def last(self, index, answer) -> dict:
        return self._chunk(index, {} if self.chat else "", answer.finish)

    def with_usage(self, answers) -> dict:
        return self._frame([], True, usage=self.usage(answers))

    def _chunk(self, index, said, finish=None):
        said = dict(delta=said) if self.chat else dict(text=said)
        return self._frame([dict(index=index, **said, logprobs=None, finish_reason=finish)], True)

    def usage(self, answers) -> dict:
        """Tokens, of the prompts also those that were not read again (of n answers to one, its first's), and
        tokens_per_s, not OpenAI's: of the answers together, where any has two tokens."""
        prompts = {}  # n answers share one
        for answer in answers:
            prompts.setdefault(id(answer.request.prompt), answer)
        read = sum(len(answer.request.prompt) for answer in prompts.values())
        written = sum(len(answer.tokens) for answer in answers)
        found = dict(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)
        found["prompt_tokens_details"] = dict(cached_tokens=sum(answer.reused for answer in prompts.values()))
        if rates := [answer.tokens_per_s for answer in answers if answer.tokens_per_s]:
            found["tokens_per_s"] = round(sum(rates), 1)
        return found

    def line(self, answers) -> str:
        """For a log: how much was read and written, how fast, and how it ended."""
        usage, what = self.usage(answers), "chat" if self.chat else "completion"
        reused = usage["prompt_tokens_details"]["cached_tokens"]
        parts = [f"{what}: {usage['prompt_tokens']} tokens read ({reused} of them before)"]
        parts.append(f"{usage['completion_tokens']} written")
        if firsts := [answer.first_s for answer in answers if answer.first_s is not None]:
            parts.append(f"{max(firsts):.2f} s to the first")
        if "tokens_per_s" in usage:
            parts.append(f"{usage['tokens_per_s']:,.1f} tokens/s")
        return ", ".join([*parts, " ".join(dict.fromkeys(answer.finish or "cancelled" for answer in answers))])


def read(body, chat: bool, engine: Engine, template: ChatTemplate, name: str, limits: Limits) -> Completion:
    """The completion that a request's JSON asks for. Raises BadRequest with the reason for one that is refused."""
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    for key in body:
        if key in DEFAULTS:
            if body[key] is not None and body[key] not in DEFAULTS[key]:
                raise BadRequest(f"{key} is not supported by this server", param=key, code="unsupported_parameter")
        elif key not in FIELDS[chat] | IGNORED:
            raise BadRequest(f"unrecognized request argument: {key}", param=key, code="unknown_parameter")
    get = _Reader(body)
    if get("model", str, name) != name:
        text = f"the model {body['model']!r} does not exist; this server has {name!r}"
        raise BadRequest(text, param="model", code="model_not_found", status=404)
    prompts = _prompts(get, chat, engine, template)
    stop = _stop(get) + (template.stop if chat else ())
    n = get("n", int, 1)
    if n < 1 or n * len(prompts) > engine.slots:
        raise BadRequest(f"n times the number of prompts must be in [1, {engine.slots}]", param="n")
    max_tokens = get("max_tokens", int, None)
    if chat:
        max_tokens = get("max_completion_tokens", int, max_tokens)
    longest = max(map(len, prompts))
    if limits.prompt_tokens is not None and longest > limits.prompt_tokens:
        text = f"the prompt has {longest} tokens, and this server takes {limits.prompt_tokens} at most"
        raise BadRequest(text, param="messages" if chat else "prompt", code="context_length_exceeded")
    if limits.max_tokens is not None and (max_tokens or 0) > limits.max_tokens:
        raise BadRequest(f"max_tokens must be at most {limits.max_tokens} here", param="max_tokens")
    room = engine.room(longest)
    if max_tokens is None and room > 0:  # without a wish: what there is
        max_tokens = min(x for x in (room, limits.max_tokens, None if chat else COMPLETION_TOKENS) if x is not None)
    try:
        samplings = [_sampling(get, index) for index in range(n)]
        pairs = itertools.product(prompts, samplings)
        requests = [Request(prompt, max_tokens, sampling, stop, strip=chat) for prompt, sampling in pairs]
        for request in requests:
            engine.check(request)
    except ValueError as problem:
        over = room < (max_tokens or 1)
        raise BadRequest(str(problem), code="context_length_exceeded" if over else None) from None
    options = get("stream_options", dict, {})
    usage = _Reader(options)("include_usage", bool, False)
    return Completion(chat, name, requests, get("stream", bool, False), usage)


class _Reader:
    """Fields of a JSON object by name and type; null is as good as none."""

    def __init__(self, body):
        self.body = body

    def __call__(self, name, kind, default):
        found = self.body.get(name)
        if found is None:
            return default
        fits = isinstance(found, (int, float) if kind is float else kind) and (
            kind is bool or found not in (True, False)
        )
        if not fits and not (kind in (int, float) and type(found) in (int, float) and kind(found) == found):
            wanted = {str: "a string", int: "an integer", float: "a number", bool: "true or false", dict: "an object"}
            raise BadRequest(f"{name} must be {wanted[kind]}, got {found!r}"[:200], param=name)
        return kind(found)


def _prompts(get, chat, engine, template):
    if not chat:
        given = get.body.get("prompt")
        several = isinstance(given, list) and given and all(isinstance(one, str | list) for one in given)
        prompts = [_tokens(one, engine) for one in (given if several else [given])]
        if not all(prompts):
            raise BadRequest("the prompt has no tokens", param="prompt")
        return prompts
    messages = get.body.get("messages")
    try:
        return [template.encode([_message(one) for one in messages] if isinstance(messages, list) else messages)]
    except ValueError as problem:
        raise BadRequest(str(problem), param="messages") from None


def _tokens(prompt, engine):
    if isinstance(prompt, str):
        return engine.tokenizer.encode(prompt)
    if isinstance(prompt, list) and all(type(token) is int for token in prompt):
        return prompt
    raise BadRequest("prompt must be a string, a list of tokens, or a list of these", param="prompt")


def _message(message):
    """With the parts of its text joined, and today's name of the system's role."""
    if not isinstance(message, dict):
        return message
    content, role = message.get("content"), message.get("role")
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        if other := [part.get("type") for part in content if part.get("type") != "text"]:
            raise ValueError(f"this model reads text only, not {other[0]!r}")
        content = "".join(str(part.get("text", "")) for part in content)
    return dict(role="system" if role == "developer" else role, content=content)


def _stop(get):
    given = get.body.get("stop")
    stops = [] if given is None else [given] if isinstance(given, str) else given
    fits = isinstance(stops, list) and all(isinstance(s, str) and 0 < len(s) <= LONGEST_STOP for s in stops)
    if not fits or len(stops) > MOST_STOPS:
        text = f"stop must be a string or up to {MOST_STOPS} of them, of 1 to {LONGEST_STOP} characters each"
        raise BadRequest(text, param="stop")
    return tuple(stops)


def _sampling(get, index):
    seed, bias = get("seed", int, None), get("logit_bias", dict, {})
    numbers = [
        name for name in ("min_p", "repetition_penalty", "presence_penalty", "frequency_penalty") if name in get.body
    ]
    try:
        bias = {int(token): min(100.0, max(-100.0, float(amount))) for token, amount in bias.items()}
    except (TypeError, ValueError):
        raise BadRequest("logit_bias must map token numbers to numbers", param="logit_bias") from None
    return Sampling(
        temperature=get("temperature", float, 1.0),
        top_p=get("top_p", float, 1.0),
        top_k=get("top_k", int, 0),
        bias=bias,
        seed=None if seed is None else seed % (1 << 63) + index,
        **{name: get(name, float, getattr(Sampling, name)) for name in numbers},
    )


def busy(why: Busy) -> BadRequest:
    text = f"{why}; try again later"
    return BadRequest(text, status=429, kind="rate_limit_error", code="rate_limit_exceeded")
