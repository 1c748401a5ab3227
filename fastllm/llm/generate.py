"""`fastllm generate`: continue prompts with a language model, token by token as they come."""

import json
import sys
import time
import unicodedata

import torch

from fastllm.beam import beam_search
from fastllm.decoder import WEIGHTS
from fastllm.llm.checkpoint import load_model
from fastllm.llm.engine import Engine, Request, end_tokens
from fastllm.llm.sessions import is_encoder_decoder, positions_of, session_of
from fastllm.llm.stream import TextStream
from fastllm.sampling import Sampling

MAX_TOKENS = 128  # of an answer, unless told else


def run(
    model,
    prompts,
    *,
    max_tokens=None,
    temperature=0.8,
    top_k=0,
    top_p=0.95,
    min_p=0.0,
    repetition_penalty=1.0,
    beams=1,
    stop=(),
    seed=0,
    weights="model",
    positions=None,
    write=None,
) -> list[dict]:
    """Continue each of `prompts` with the model in a folder, or with a Loaded one.

    All prompts are computed at once, whatever their lengths; an answer has max_tokens, without it MAX_TOKENS or what
    there is room for. temperature=0 is greedy, beams > 1 a search for the likeliest text, which draws nothing.
    write(n, text) gets the text of prompt n as it comes, of one prompt after the other, first an empty one. The same
    seed gives the same texts. Returns a dict for each: prompt, text, tokens, finish ("stop" or "length"), first_s and
    seconds. Raises ValueError for prompts and options that do not fit the model.
    """
    if isinstance(prompts, str):
        raise TypeError("generate: prompts must be a list of texts, got one text")
    loaded = load_model(model) if isinstance(model, str) or hasattr(model, "__fspath__") else model
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    tokens = [loaded.tokenizer.encode(prompt) for prompt in prompts]
    for prompt, ids in zip(prompts, tokens, strict=True):
        if not ids:
            raise ValueError(f"generate: the prompt {prompt!r} has no tokens; give it some text")
    if beams < 1:
        raise ValueError(f"generate: beams must be at least 1, got {beams}")
    write = write or (lambda n, text: None)
    if beams > 1:
        options = dict(weights=weights, positions=positions)
        return _by_beams(loaded, prompts, tokens, max_tokens, repetition_penalty, beams, stop, options, write)
    slots = dict(slots=len(prompts), queue_size=0)
    with Engine(loaded.model, loaded.tokenizer, weights=weights, positions=positions, **slots) as engine:
        requests = []
        for ids in tokens:
            most = min(MAX_TOKENS, engine.room(len(ids))) or 1 if max_tokens is None else max_tokens
            requests.append(Request(ids, most, sampling, tuple(stop)))
            engine.check(requests[-1])
        began = time.perf_counter()
        answers = [engine.submit(request) for request in requests]
        results = []
        for n, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            text = ""
            write(n, text)
            for piece in answer:
                text += piece
                write(n, piece)
            seconds = time.perf_counter() - began
            results.append(dict(prompt=prompt, text=text, tokens=answer.tokens, finish=answer.finish))
            results[-1] |= dict(first_s=answer.first_s, seconds=seconds)
    return results


def _by_beams(loaded, prompts, tokens, max_tokens, repetition_penalty, beams, stop, options, write):
    model, tokenizer = loaded.model, loaded.tokenizer
    most = positions_of(model) if options["positions"] is None else options["positions"]
    two, eos, results = is_encoder_decoder(model), end_tokens(model, tokenizer), []
    room = most if two else most - max(map(len, tokens))
    count = min(MAX_TOKENS, room) if max_tokens is None else max_tokens
    if not 1 <= count <= room:
        raise ValueError(f"generate: there is room for {room} tokens behind the longest prompt, got max_tokens={count}")
    longest = max(map(len, tokens)) + count
    session, _ = session_of(model, options["weights"], beams, min(most, longest), tokenizer.bos)
    for n, (prompt, ids) in enumerate(zip(prompts, tokens, strict=True)):
        write(n, "")
        began = time.perf_counter()
        penalty = dict(repetition_penalty=1.0 if two else repetition_penalty)
        found = beam_search(session, torch.tensor(ids), beams, count, eos, **penalty)
        stream = TextStream(tokenizer.decode, stop, () if two else ids)
        text = "".join(stream.put(token) for token in found if token not in eos) + stream.end()
        write(n, text)
        seconds = time.perf_counter() - began
        finish = "stop" if stream.stopped or found[-1] in eos else "length"
        results.append(dict(prompt=prompt, text=text, tokens=found, finish=finish, first_s=seconds, seconds=seconds))
    return results


def add_sampling_arguments(parser, *, temperature=0.8, seed=0):
    """The options of a choice of tokens, which several commands have."""
    for name, kind, default, what in (
        ("temperature", float, temperature, "0 takes the likeliest token"),
        ("top-k", int, 0, "only the K likeliest tokens (0: all)"),
        ("top-p", float, 0.95, "only the likeliest tokens that hold this probability"),
        ("min-p", float, 0.0, "only tokens at least this times as likely as the likeliest"),
        ("repetition-penalty", float, 1.0, "above 1: tokens that were there become less likely"),
        ("seed", int, seed, "the same seed gives the same text"),
    ):
        shown = "" if default is None else f" (default {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=what + shown)


def add_model_arguments(parser):
    parser.add_argument("model", help="folder of a model: ours, a run's, or Hugging Face's")
    parser.add_argument("--weights", choices=WEIGHTS, default="model", help="precision (default: the model's own)")
    parser.add_argument("--positions", type=int, help="room for prompt and answer (default: the model's, at most 4096)")


def add_arguments(subparsers):
    parser = subparsers.add_parser("generate", help="continue prompts with a language model")
    add_model_arguments(parser)
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="text to continue; - reads standard input")
    parser.add_argument("--max-tokens", type=int, help=f"of each answer (default {MAX_TOKENS}, or what fits)")
    parser.add_argument("--beams", type=int, default=1, help="search for the likeliest text with this many beams")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    parser.add_argument("--json", action="store_true", help="one JSON object per prompt instead of the text")
    add_sampling_arguments(parser)
    parser.set_defaults(run=main)


def main(args) -> int:
    prompts = [sys.stdin.read() if prompt == "-" else prompt for prompt in args.prompts]
    names = "max_tokens temperature top_k top_p min_p repetition_penalty beams stop seed weights positions".split()
    options = {name: getattr(args, name) for name in names}
    if args.json:
        for result in run(args.model, prompts, **options):
            print(json.dumps(result, ensure_ascii=False))
        return 0

    loaded = load_model(args.model)
    between = "\n" if is_encoder_decoder(loaded.model) else ""  # whose answer is no continuation

    def write(n, piece):
        if not piece:
            print("\n\n" if n else "", prompts[n], between, sep="", end="")
        print(printable(piece), end="", flush=True)

    results = run(loaded, prompts, write=write, **options)
    print(flush=True)
    count, seconds = sum(len(r["tokens"]) for r in results), max(r["seconds"] for r in results)
    first = min(r["first_s"] for r in results)
    rate = f"{count} tokens, {count / seconds:,.1f} tokens/s, the first after {first:.2f} s"
    print(f"{rate} ({', '.join(sorted({r['finish'] for r in results}))})", file=sys.stderr)
    return 0


def printable(text: str) -> str:
    """Without control characters but line ends and tabs: a model must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
