"""`fastllm chat`: a conversation in the terminal."""

import sys
from dataclasses import dataclass, field

from fastllm.llm.checkpoint import load_model
from fastllm.llm.engine import Engine, Request
from fastllm.llm.generate import add_model_arguments, add_sampling_arguments, printable
from fastllm.llm.prompts import ChatTemplate
from fastllm.sampling import Sampling

HELP = "/new begins anew, /system TEXT says how to answer, /quit ends; Ctrl-C stops an answer"


@dataclass
class Conversation:
    """Turns of a user and of the model. `say` answers; what no longer fits the model's positions is left behind."""

    engine: Engine
    template: ChatTemplate
    sampling: Sampling = Sampling()
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    system: str = ""
    turns: list[dict] = field(default_factory=list)
    forgotten: int = 0  # turns that were left behind

    def say(self, text):
        """Yields the answer's text as it comes; closed before its end, it keeps what was said until then.

        Raises ValueError for a text that does not fit, and then it was not said.
        """
        self.turns.append(dict(role="user", content=text))
        try:
            prompt = self._prompt()
        except ValueError:
            self.turns.pop()
            raise
        stop = (*self.template.stop, *self.stop)
        max_tokens = min(self.max_tokens, self.engine.room(len(prompt)))
        answer = self.engine.submit(Request(prompt, max_tokens, self.sampling, stop, strip=True))
        said = ""
        try:
            for piece in answer:
                said += piece
                yield piece
        finally:
            answer.cancel()
            self.turns.append(dict(role="assistant", content=said))

    def _prompt(self):
        """The tokens of the conversation, without the oldest turns where there would be no room for an answer."""
        system = [dict(role="system", content=self.system)] if self.system else []
        while True:
            prompt = self.template.encode(system + self.turns)
            if self.engine.room(len(prompt)) >= min(self.max_tokens, self.engine.positions // 4):
                return prompt
            if len(self.turns) < 3:
                raise ValueError(f"chat: {len(prompt)} tokens leave no room for an answer in {self.engine.positions}")
            del self.turns[:2]
            self.forgotten += 2


def run(
    model,
    lines,
    write,
    *,
    system="",
    max_tokens=512,
    temperature=0.8,
    top_k=0,
    top_p=0.95,
    min_p=0.0,
    repetition_penalty=1.0,
    stop=(),
    seed=None,
    weights="model",
    positions=None,
) -> Conversation:
    """Answer one line of `lines` after the other with the model in a folder; write(piece) gets the answers.

    A line may be a command: /new, /system TEXT, /help, /quit. KeyboardInterrupt ends an answer, not the conversation.
    Raises ValueError for a folder, and for options, that do not fit.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed=seed)
    loaded = load_model(model)
    template = ChatTemplate.load(loaded.source, loaded.tokenizer)
    options = dict(weights=weights, positions=positions, slots=1, reuse=True)
    with Engine(loaded.model, loaded.tokenizer, **options) as engine:
        talk = Conversation(engine, template, sampling, max_tokens, tuple(stop), system)
        for line in lines:
            command, _, rest = line.strip().partition(" ")
            if command == "/quit":
                break
            if command == "/new":
                talk.turns.clear()
            elif command == "/system":
                talk.system = rest.strip()
            elif command.startswith("/"):
                write(HELP + "\n")
            elif line.strip():
                _answer(talk, line, write)
        return talk


def _answer(talk, line, write):
    before, pieces = talk.forgotten, talk.say(line)
    try:
        for piece in pieces:
            write(printable(piece))
    except KeyboardInterrupt:
        pieces.close()
    except ValueError as problem:
        write(str(problem))
    if talk.forgotten > before:
        write(f"\n({talk.forgotten - before} turns were left behind: the conversation is longer than the model reads)")
    write("\n\n")


def add_arguments(subparsers):
    parser = subparsers.add_parser("chat", help="talk with a language model")
    add_model_arguments(parser)
    parser.add_argument("--system", default="", help="how the model is to answer")
    parser.add_argument("--max-tokens", type=int, default=512, help="of each answer (default 512)")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end at this text; may be repeated")
    add_sampling_arguments(parser, seed=None)
    parser.set_defaults(run=main)


def main(args) -> int:
    names = "system max_tokens temperature top_k top_p min_p repetition_penalty stop seed weights positions".split()
    run(args.model, typed(), lambda text: print(text, end="", flush=True), **{n: getattr(args, n) for n in names})
    return 0


def typed():
    """Lines of standard input, with a prompt and a history where somebody types."""
    asks = sys.stdin.isatty()
    if asks:
        import readline  # noqa: F401, gives input() its editing

        print(HELP)
    while True:
        try:
            yield input("> " if asks else "")
        except (EOFError, KeyboardInterrupt):
            return
