"""The `fastllm` command.

info, verify and bench work from a plain install. The other commands come from the modules of fastllm.llm that have an
`add_arguments(subparsers)`; those are imported only when one of them, or the list of commands, is asked for.
"""

import argparse
import contextlib
import difflib
import importlib
import pkgutil
import re
import sys
import warnings
from pathlib import Path

from fastllm import tune_allocator

PLAIN = {"info": "fastllm.info", "verify": "fastllm.verify", "bench": "fastllm.bench.run"}


class Parser(argparse.ArgumentParser):
    """argparse's, whose errors are two lines, not the usage of every option and then the error; a word that is known
    but for a letter or two is named."""

    def parse_known_args(self, args=None, namespace=None):
        self.given = list(sys.argv[1:] if args is None else args)
        return super().parse_known_args(args, namespace)

    def error(self, message):
        choice = re.search(r"invalid choice: '?([^']*?)'? \(choose from (.*)\)$", message)
        if choice:
            known = [name.strip(" '") for name in choice[2].split(",")]
            if f" {choice[1]}: " in (self.epilog or ""):
                message = f"{choice[1]} is {self.epilog}"
            elif nearest := nearest_of(choice[1], known):
                message = message[: choice.end(1)].rstrip() + f"'; did you mean {nearest}?"
        elif "are required" in message and (wrong := self.unknown_option()):
            message += f"; {unrecognised([wrong], self)}"
        self.exit(2, f"{self.prog}: error: {message}\n{self.prog} --help says what there is\n")

    def unknown_option(self) -> str | None:
        """The first option that was given and is none: the one that is missing may be meant."""
        known = options_of(self)
        given = [word.partition("=")[0] for word in self.given if word.startswith("--") and word != "--"]
        return next((word for word in given if not any(name.startswith(word) for name in known)), None)


def build_parser(wanted: str | None = None) -> argparse.ArgumentParser:
    """The parser of one plain command, or of all commands where `wanted` is none of those."""
    import fastllm

    parser = Parser(
        prog="fastllm", description="Fused kernels for PyTorch transformers: what runs here, how exact, how fast."
    )
    parser.add_argument("--version", action="version", version=f"fastllm {fastllm.__version__}")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True)
    parser.commands = subparsers.choices
    for name in [wanted] if wanted in PLAIN else PLAIN:
        importlib.import_module(PLAIN[name]).add_arguments(subparsers)
    if wanted not in PLAIN:
        missing = add_llm_commands(subparsers)
        if missing:
            parser.epilog = "not available here: " + "; ".join(missing) + " (pip install 'fastllm-kernels[llm]')"
    return parser


def add_llm_commands(subparsers) -> list[str]:
    """Add what fastllm.llm offers. Returns "module: reason" for each module that lacks a third-party package."""
    missing = []
    folder = Path(__file__).parent / "llm"
    for name in sorted(module.name for module in pkgutil.iter_modules([str(folder)])):
        try:
            module = importlib.import_module(f"fastllm.llm.{name}")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] == "fastllm":
                raise
            missing.append(f"{name}: {error}")
            continue
        if hasattr(module, "add_arguments"):
            module.add_arguments(subparsers)
    return missing


def unrecognised(unknown: list[str], parser: argparse.ArgumentParser) -> str:
    """What is said about arguments that the parser of a command does not know, with the option that is nearest."""
    said = f"unrecognized arguments: {' '.join(unknown)}"
    option = next((word.partition("=")[0] for word in unknown if word.startswith("--")), "")
    nearest = nearest_of(option, options_of(parser))
    return f"{said}; did you mean {nearest}?" if nearest else said


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    return re.findall(r"--[a-z][\w-]*", parser.format_help())


def nearest_of(word: str, known) -> str | None:
    return next(iter(difflib.get_close_matches(word, known, n=1)), None)


@contextlib.contextmanager
def plain_warnings():
    """A warning is a line, without the line of our code that it comes from."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where, **more: f"warning: {' '.join(str(message).split())}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@plain_warnings()
def main(arguments=None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    wanted = next((a for a in arguments if not a.startswith("-")), None)
    try:
        parser = build_parser(wanted)
        args, unknown = parser.parse_known_args(arguments)
        if unknown:
            command = parser.commands[args.command]
            command.error(unrecognised(unknown, command))
        if args.command not in PLAIN:  # those measure PyTorch as it is
            tune_allocator()
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastllm verify | head` closed the pipe; nothing is left to say to it
        sys.stderr.close()
        return 0
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError) as error:
        if "--traceback" in arguments:
            raise
        print(f"fastllm: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
