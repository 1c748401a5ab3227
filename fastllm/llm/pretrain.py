"""`fastllm pretrain`: train a language model, a masked language model or an encoder-decoder from scratch."""

import argparse
import json
import sys
from pathlib import Path

import torch

from fastllm.llm import distributed, settings, shards
from fastllm.llm.files import atomic
from fastllm.llm.objectives import OBJECTIVES
from fastllm.llm.ranks import Ranks
from fastllm.llm.runs import Run, add_run_arguments
from fastllm.llm.train import Recipe, train
from fastllm.model import Config, Transformer


def run(
    data=None,
    out="runs/pretrain",
    *,
    config="llama-cpu",
    prompt="",
    naive=False,
    resume=False,
    fresh=False,
    ranks=None,
    **changes,
) -> dict:
    """Train on a folder that `fastllm data` made, with checkpoints in `out` (see `runs.Run`); evaluate on test, write
    out/result.json and return it.

    config is a preset or a TOML file, changes are settings by key (lr=1e-3, d_model=256, ...). resume goes on with what
    `out` was begun with; `settings.FREE` may be changed then. naive is plain PyTorch instead of the kernels.
    Raises ValueError for settings that are not known or do not fit, and what `Run` raises.
    """
    ranks, begun = ranks or Ranks(), Path(out) / "run.json"
    if resume and not begun.exists():
        raise ValueError(f"pretrain: {out} has no run in it to resume; --out names the folder of one")
    if resume:
        chosen = json.loads(begun.read_text("utf-8"))
        data = chosen["data"] if data is None else str(data)
    else:
        chosen = settings.read(config)
    if data is None:
        raise ValueError("pretrain: which data? A folder that `fastllm data` made is needed")
    naive = naive or chosen.get("naive", False)
    chosen = settings.overridden(chosen, changes) | dict(data=str(data), naive=naive)
    parts = {name: {key: chosen[key] for key in keys} for name, keys in settings.SECTIONS.items()}
    own = {key: parts["training"].pop(key) for key in ("batch", "label_smoothing", "keep", "tensorboard")}
    recipe = Recipe(**parts["training"])
    ranks.check(own["batch"], recipe.accumulate)
    tokens = ranks.first and shards.tokenized(data, chosen["tokenizer"], chosen["vocab"], chosen.get("spacy"))
    folder = ranks.tell(tokens)  # the others wait until it is there
    chosen["fingerprint"] = shards.read_meta(folder)["fingerprint"]
    objective = OBJECTIVES[chosen["task"]]
    task = objective(folder, chosen["context"], own["batch"], recipe.seed, own["label_smoothing"])
    task.packed = getattr(ranks, "sequence", None) is None
    parts["model"]["window"] = parts["model"]["window"] and tuple(parts["model"]["window"])
    model_config = Config(
        vocab=task.tokenizer.size,
        kind=task.kind,
        masked_lm=task.masked_lm,
        max_len=chosen["context"],
        **parts["model"],
    )
    torch.manual_seed(recipe.seed)
    model = Transformer(model_config, not naive).to("cuda" if torch.cuda.is_available() else "cpu")
    options = dict(resume=resume, fresh=fresh, keep=own["keep"], free=("data", *settings.FREE))
    with distributed.shared(ranks, lambda: Run(out, chosen, **options)) as folder:
        if ranks.first and not resume:
            print(f"pretrain: tokens of {tokens}; --tokenizer and --vocab choose others", file=sys.stderr)
        history = train(
            model,
            task,
            task.loss_of,
            task.tokens_in,
            recipe,
            weight_of=task.weight_of,
            length=chosen["context"],
            evaluate=lambda model: task.evaluate(model, ranks=ranks),
            sample=lambda model: task.sample(model, prompt),
            run=folder,
            tokenizer=task.tokenizer,
            meta=dict(task=chosen["task"], data=str(data)),
            ranks=ranks,
            tensorboard=own["tensorboard"],
            what="pretrain",
        )
        with ranks.evaluating(model):
            test = task.evaluate(model, "test", None, ranks)
            result = dict(settings=chosen, history=history, test=test, sample=task.sample(model, prompt))
        result["parameters"] = sum(p.numel() for p in model.parameters())
        if ranks.first:
            with atomic(Path(out) / "result.json") as file:
                json.dump(result, file)
    return result


def add_arguments(subparsers):
    parser = subparsers.add_parser("pretrain", help="train a language model from scratch")
    parser.add_argument("data", nargs="?", help="folder as `fastllm data` makes them")
    parser.add_argument(
        "--config", default="llama-cpu", help=f"a TOML file, or {', '.join(settings.names())} (default: llama-cpu)"
    )
    parser.add_argument("--out", default="runs/pretrain", help="folder of the run (default: runs/pretrain)")
    add_run_arguments(parser)
    distributed.add_parallel_arguments(parser)
    parser.add_argument("--prompt", default="", help="what the samples continue")
    parser.add_argument("--naive", action="store_true", help="plain PyTorch instead of the kernels")
    for section, keys in settings.SECTIONS.items():
        group = parser.add_argument_group(f"{section}: overrides what the config says")
        for key, default in keys.items():
            name, kind = f"--{key.replace('_', '-')}", settings.kind_of(key, default)
            if kind is bool:
                how = dict(action=argparse.BooleanOptionalAction)
            elif kind is list:
                how = dict(type=int, nargs=2, metavar=("LEFT", "RIGHT"))
            else:
                how = dict(type=kind, metavar=kind.__name__)
            group.add_argument(name, dest=key, default=None, help=f"without a config: {default}", **how)
    parser.set_defaults(run=main)


def main(args) -> int:
    fixed = ("data", "config", "out", "prompt", "naive", "resume", "fresh")
    keys = {key for keys in settings.SECTIONS.values() for key in keys}
    changes = {key: value for key, value in vars(args).items() if key in keys and value is not None}
    with distributed.start(args.parallel, args.sequence_ranks) as ranks:
        result = run(**{name: getattr(args, name) for name in fixed}, ranks=ranks, **changes)
        history, test = result["history"], result["test"]
        print(f"test: perplexity {test['perplexity']:.2f} per token" + (
            f", {test['bits_per_character']:.3f} bits per character" if "bits_per_character" in test else ""
        ))  # fmt: skip
        memory = history["activation_bytes"]
        print(
            f"{result['parameters']:,} parameters, {history['tokens_per_s']:,.0f} tokens/s"
            + (f", activations {memory / 2**20:,.0f} MiB" if memory else "")
            + f"; best at step {history['best']['step']}; {history['stopped']}"
        )
        print(f"sample: {result['sample']}\n\ncheckpoints and result: {args.out}")
    return 0
