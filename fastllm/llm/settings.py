"""The settings of a training run: presets that come with the package, files in TOML, and what overrides them."""

import difflib
from dataclasses import MISSING, fields
from pathlib import Path

from fastllm.llm import require
from fastllm.llm.objectives import OBJECTIVES
from fastllm.llm.train import Recipe
from fastllm.model import Config

PRESETS = Path(__file__).parent / "presets"
# Of the model's Config, these follow from the data and the task.
DERIVED = ("vocab", "kind", "classes", "masked_lm", "max_len")


def defaults(cls, but=()) -> dict:
    return {f.name: None if f.default is MISSING else f.default for f in fields(cls) if f.name not in but}


SECTIONS = {
    "data": dict(tokenizer="bpe", vocab=8192, spacy=None, context=512),
    "model": defaults(Config, DERIVED),
    "training": defaults(Recipe) | dict(batch=8, label_smoothing=0.0, keep=2, tensorboard=False),
}
# What a value without a default is where it is given.
OPTIONAL = dict(kv_heads=int, head_dim=int, window=list, seconds=float, spacy=str)
FREE = ("steps", "patience", "seconds", "keep", "tensorboard", "sample_every", "save_every")  # may change on resuming


def names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def read(config: str) -> dict:
    """The settings of a preset or a file, {"task": ..., key: value, ...}, with the defaults for what it does not say.

    Raises ValueError for a name that is neither, for what is not TOML, for a key that is not known (naming the nearest
    one that is) and for a value of another type.
    """
    path = Path(config)
    if path.suffix != ".toml" and config in names():
        path = PRESETS / f"{config}.toml"
    if not path.is_file():
        raise ValueError(f"config: {config!r} is no file and no preset; there are {', '.join(names())}")
    try:
        import tomllib
    except ModuleNotFoundError:  # Python 3.10
        tomllib = require("tomli")
    try:
        found = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"config: {path} is not TOML: {error}") from None
    task = found.pop("task", None)
    if task not in OBJECTIVES:
        raise ValueError(f"config: {path}: task must be one of {', '.join(OBJECTIVES)}, got {task!r}")
    settings = dict(task=task)
    for section, keys in SECTIONS.items():
        given = found.pop(section, {})
        settings |= keys | {key: checked(key, value, keys, f"{path}: [{section}]") for key, value in given.items()}
    for key in found:
        raise ValueError(f"config: {path}: {unknown(key, ['task', *SECTIONS])}")
    return settings


def overridden(settings: dict, changes: dict) -> dict:
    """The settings with changes by key, of any section."""
    known = {key: value for keys in SECTIONS.values() for key, value in keys.items()}
    return settings | {key: checked(key, value, known, "pretrain") for key, value in changes.items()}


def checked(key, value, known: dict, where: str):
    """The value in the type of its key."""
    if key not in known:
        raise ValueError(f"config: {where}: {unknown(key, known)}")
    wanted = kind_of(key, known[key])
    if value is None and key in OPTIONAL:
        return None
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted and not (wanted is list and isinstance(value, tuple)):
        raise ValueError(f"config: {where}: {key} must be {wanted.__name__}, got {value!r}")
    return value


def kind_of(key, default) -> type:
    return OPTIONAL.get(key, type(default))


def unknown(key: str, known) -> str:
    nearest = difflib.get_close_matches(key, list(known), n=1, cutoff=0.0)
    return f"unknown key {key!r}; did you mean {nearest[0]!r}?"
