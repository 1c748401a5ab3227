"""`fastllm prune`: fewer attention heads, feed-forward channels and layers; the model that is left is a smaller one.

What goes is what matters least: by the size of its weights, or, with calibration text, by how much the loss would
change without it, to first order (Molchanov et al. 2019, arXiv:1906.10771): the square of the sum of weight times
gradient over all that belongs to a head or a channel, summed over batches. Query heads go with the key head that they
share.
"""

import copy
import dataclasses
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from fastllm.llm import rows
from fastllm.llm.checkpoint import Loaded, load_model, write_model
from fastllm.llm.families import family_of
from fastllm.llm.files import atomic_folder, check_free
from fastllm.llm.measure import compare, pairs_task, read_text, scorer, show_comparison
from fastllm.llm.packed import packing
from fastllm.llm.prompts import ChatTemplate
from fastllm.llm.runs import remove
from fastllm.llm.sessions import generates, is_encoder_decoder, positions_of
from fastllm.llm.tasks import TASKS, seq2seq
from fastllm.model import Transformer

SUITED = (64, 16)  # multiples that the kernels work in: the larger one where a layer is wide enough
WINDOW, WINDOWS, PAIRS = 128, 32, 8  # tokens of a batch of calibration text, batches, pairs of a batch


@dataclasses.dataclass(frozen=True)
class Importance:
    """Of a stack: heads, for each attention of a layer [layers, key heads]; channels [layers, channels]; layers
    [layers]."""

    heads: list[torch.Tensor]
    channels: torch.Tensor
    layers: torch.Tensor

    def over(self, function, other=None) -> "Importance":
        """With each tensor x as function(x), or function(x, that of another)."""
        each = [(*self.heads, self.channels, self.layers)]
        each += [] if other is None else [(*other.heads, other.channels, other.layers)]
        *heads, channels, layers = (function(*x) for x in zip(*each, strict=True))
        return Importance(heads, channels, layers)


def importances(model, batches=None) -> list[Importance]:
    """Of each stack, by size, or on batches: [N, T] tokens, a row each, or those of an encoder-decoder's task."""
    family = family_of(model)
    if batches is None:
        return _importances(model, family, lambda parameter: parameter.detach().float().square())
    found = None
    for batch in batches.split(1) if isinstance(batches, torch.Tensor) else batches:
        model.zero_grad(set_to_none=True)
        _loss(model, batch).backward()
        once = _importances(model, family, lambda p: p.detach().float() * (0 if p.grad is None else p.grad.float()))
        once = [stack.over(torch.square) for stack in once]
        found = once if found is None else [a.over(torch.add, b) for a, b in zip(found, once, strict=True)]
    model.zero_grad(set_to_none=True)
    return found


def _loss(model, batch):
    """Of the next token, or of an encoder-decoder's targets; of an encoder, whose labels are not known here, of what
    it thinks likeliest itself."""
    if isinstance(batch, dict):
        return seq2seq.loss_of(model, batch)
    found = model(batch)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"prune: {type(model).__name__} has no head to calibrate on; leave the text away")
    if generates(model):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
    logits = logits.flatten(0, -2).float()
    return F.cross_entropy(logits, logits.argmax(-1))


def _importances(model, family, of):
    """Sums of `of`(parameter) over what belongs to each head, channel and layer."""
    found = []
    for stack in family.stacks:
        heads, channels, layers = [], [], []
        for layer in model.get_submodule(stack):
            channels.append(
                sum(_along(layer.get_submodule(name), 0, of) for name in family.feed_rows)
                + _along(layer.get_submodule(family.feed_columns), 1, of)
            )
            heads.append([_of_heads(model, family, layer, names, of) for names in family.attentions_of(layer)])
            layers.append(sum(of(p).sum() for p in layer.parameters()))
        heads = [torch.stack(attention) for attention in zip(*heads, strict=True)]
        found.append(Importance(heads, torch.stack(channels), torch.stack(layers)))
    return found


def _of_heads(model, family, layer, names, of):
    parts = [_along(layer.get_submodule(name), dim, of) for name, dim in zip(names, (0, 0, 0, 1), strict=True)]
    return sum(part.view(_key_heads(model, family), -1).sum(1) for part in parts)


def _key_heads(model, family):
    named = family.fields
    return getattr(model.config, named["kv_heads"]) or getattr(model.config, named["heads"])


def _flipped(module):
    return type(module).__name__ == "Conv1D"  # GPT-2 keeps the transpose


def _along(module, dim, of):
    """[outputs] (dim 0, with the bias) or [inputs] (dim 1)."""
    found = of(module.weight).sum(dim if _flipped(module) else 1 - dim)
    return found + of(module.bias) if dim == 0 and module.bias is not None else found


@dataclasses.dataclass(frozen=True)
class Kept:
    """Of a stack, by number: layers, and of each of those the channels, and the key heads of each attention."""

    layers: list[int]
    channels: list[list[int]]
    heads: list[list[list[int]]]


def prune_model(model, *, heads=1.0, channels=1.0, layers=1.0, batches=None):
    """A smaller copy of `model` with these shares of its heads, feed-forward channels and layers, the most important
    on `batches` (see `importances`).

    Every layer keeps as many as the others, its own best ones, of an encoder-decoder in both stacks and in
    cross-attention too; channels are rounded to a multiple of 64, or of 16 in layers that are too narrow for that,
    heads to whole key heads. Raises ValueError for shares outside (0, 1], for what the model's config cannot say, and
    for a model of no known family.
    """
    for name, share in (("heads", heads), ("channels", channels), ("layers", layers)):
        if not 0 < share <= 1:
            raise ValueError(f"prune: {name} must be in (0, 1], the share that is kept, got {share}")
    family, kept = family_of(model), []
    if heads < 1 and not family.attentions:
        raise ValueError(f"prune: the config of {type(model).__name__} cannot say that there are fewer heads")
    for of in importances(model, batches):
        chosen = _best(of.layers, max(1, round(layers * len(of.layers))))
        widths = [_best(of.channels[n], suited(channels, of.channels.shape[1])) for n in chosen]
        whole = [[_best(x[n], max(1, round(heads * x.shape[1]))) for x in of.heads] for n in chosen]
        kept.append(Kept(chosen, widths, whole))
    config = _smaller(model, family, kept)
    made = Transformer(config, model.accelerated) if isinstance(model, Transformer) else type(model)(config)
    made.to(next(model.parameters()).dtype).load_state_dict(_sliced(model, family, kept))
    if hasattr(model, "generation_config"):  # where a text begins and ends, and what the checkpoint came with
        made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def suited(share, width) -> int:
    """How many of `width` channels a share is, rounded to what suits the kernels; all of them stay all."""
    if share == 1:
        return width
    step = next((step for step in SUITED if width >= 4 * step), 1)
    return min(width, max(step, round(share * width / step) * step))


def _best(importance, count):
    return importance.topk(count).indices.sort().values.tolist()


def _smaller(model, family, kept):
    """The config that says so."""
    sizes = {}
    for stack, one in zip(family.stacks, kept, strict=True):
        sizes[family.field("layers", stack)] = len(one.layers)
        sizes[family.field("feed", stack)] = len(one.channels[0])
    first = kept[0]
    if family.attentions and len(first.heads[0][0]) < _key_heads(model, family):
        groups = len(first.heads[0][0])
        many, few = (getattr(model.config, family.fields[name]) for name in ("heads", "kv_heads"))
        sizes[family.fields["heads"]] = groups * (many // (few or many))
        sizes[family.fields["kv_heads"]] = groups
        sizes["head_dim"] = _head_dim(model, family)
    if isinstance(model, Transformer):
        return dataclasses.replace(model.config, **sizes)
    config = copy.deepcopy(model.config)
    for name, size in sizes.items():
        setattr(config, name, size)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[n] for n in first.layers]
    return config


def _head_dim(model, family):
    key = model.get_submodule(family.stacks[0])[0].get_submodule(family.attentions[0][1])
    return key.weight.shape[0] // _key_heads(model, family)


def _sliced(model, family, kept):
    """The state dict of the smaller model."""
    inside = tuple(f"{stack}." for stack in family.stacks)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    for stack, one in zip(family.stacks, kept, strict=True):
        for new, old in enumerate(one.layers):
            layer = model.get_submodule(stack)[old]
            chosen = _chosen(model, family, layer, one.channels[new], one.heads[new])
            for key, value in layer.state_dict().items():
                name, _, what = key.rpartition(".")
                if name in chosen and (what == "weight" or chosen[name][1] == 0):
                    index, dim = chosen[name]
                    if what == "weight" and _flipped(layer.get_submodule(name)):
                        dim = 1 - dim
                    value = value.index_select(dim, torch.tensor(index))
                state[f"{stack}.{new}.{key}"] = value
    return state


def _chosen(model, family, layer, channels, heads):
    """{module: (numbers that stay, 0 for outputs and 1 for inputs)} of a layer."""
    found = {name: (channels, 0) for name in family.feed_rows} | {family.feed_columns: (channels, 1)}
    for names, kept in zip(family.attentions_of(layer), heads, strict=True):
        for name, dim in zip(names, (0, 0, 0, 1), strict=True):
            size = layer.get_submodule(name).weight.shape[dim] // _key_heads(model, family)
            found[name] = [h * size + i for h in kept for i in range(size)], dim
    return found


def calibration(loaded, path):
    """Batches for `importances`: windows spread over a text, or of pairs the first ones."""
    if is_encoder_decoder(loaded.model):
        task = pairs_task(loaded)
        found = list(itertools.islice(task.batches(task.rows(Path(path)), PAIRS), WINDOWS))
        return [task.collate(examples) for examples in found]
    tokens = torch.tensor(loaded.tokenizer.encode(read_text(path)))
    size = min(WINDOW, positions_of(loaded.model), len(tokens))
    if size < 2:
        raise ValueError(f"prune: a calibration text of {len(tokens)} tokens is too short")
    starts = torch.linspace(0, len(tokens) - size, min(WINDOWS, math.ceil(len(tokens) / size))).long()
    return tokens[starts[:, None] + torch.arange(size)]


def run(
    model,
    out,
    *,
    heads=1.0,
    channels=1.0,
    layers=1.0,
    calibrate=None,
    text=None,
    measure=True,
    finetune=None,
    fresh=False,
    **training,
) -> dict:
    """Write a smaller model than that of a folder to the folder `out`, and say what it cost and brought.

    heads, channels and layers are the shares that are kept; calibrate is a file of text that decides which (without it
    the size of weights does), text one whose perplexity is measured before and after; of an encoder-decoder both are
    files of pairs (source, target), and measured are the loss and BLEU. finetune is a folder of data for
    the model's task, on which what is left is trained, all of it, with the options `training` of `finetune.run`: then
    `out` is the folder of that run, with the model before it in out/pruned. Returns what `quantize.run` does, and then
    also the loss (and BLEU) on the test rows before and after, and under "pruned" that of out/pruned.
    Raises ValueError as `prune_model` and `finetune.run` do, for a packed model, where nothing would go, and for
    a folder `out` that is there, unless it has a model (with finetune: a run) in it and `fresh` is given.
    """
    if min(heads, channels, layers) == 1:
        raise ValueError("prune: nothing would go; give --heads, --channels or --layers a share below 1")
    check_free("prune", out, fresh=fresh, mark="config.json" if finetune is None else "run.json", source=model)
    loaded = load_model(model, accelerate=False)
    if packing(loaded.model)["layers"]:
        raise ValueError(f"prune: {model} is packed; prune first, then quantize")
    family_of(loaded.model)  # before anything is read or measured
    if finetune is not None:
        task = trainable(loaded, finetune)
    score = scorer(loaded, text, "prune")
    batches = None if calibrate is None else calibration(loaded, calibrate)
    made = prune_model(loaded.model, heads=heads, channels=channels, layers=layers, batches=batches)
    meta = {name: value for name, value in loaded.meta.items() if name != "new"}
    with atomic_folder(out if finetune is None else Path(out) / "pruned") as folder:
        write_model(folder, made, loaded.tokenizer, **meta)
        ChatTemplate.load(loaded.source, loaded.tokenizer).save(folder)
    after = Loaded(made, loaded.tokenizer, meta, Path(out))
    if finetune is None:
        return compare(loaded, after, score) if measure else {}
    result = tune(task, Path(out), finetune, training)
    tuned = load_model(out, accelerate=False)
    length = tuned.meta["max_len"]  # of all three, or their windows would differ
    tested = {name: on_test(one, finetune, length) for name, one in (("before", loaded), ("pruned", after))}
    found = compare(loaded, tuned, score) if measure else dict(before={}, after={})
    found["before"] |= tested["before"]
    found["after"] |= named(result["test"])
    return found | dict(pruned=tested["pruned"])


def trainable(loaded, data) -> str:
    """The task of a model, as `finetune` calls it. Raises ValueError where there is none, or data for another."""
    from fastllm.llm.finetune import NAMES

    names = {found: name for name, found in NAMES.items()}
    if loaded.meta["task"] not in names:
        raise ValueError(f"prune: {loaded.source} has no task to fine-tune it for; `fastllm finetune` gives it one")
    for split in ("train", "valid", "test"):
        rows.find(data, split, TASKS[loaded.meta["task"]].extensions)
    return names[loaded.meta["task"]]


def on_test(loaded, data, max_len) -> dict:
    """The loss on the test rows, and BLEU where there are targets."""
    from fastllm.llm.finetune import task_for

    task = task_for(loaded, max_len)
    path = rows.find(data, "test", task.extensions)
    return named(task.scores(loaded.model, task.rows(path), 16, quick=task.name != "encoder-decoder"))


def named(scores) -> dict:
    return {f"test_{name}": scores[name] for name in ("loss", "bleu") if name in scores}


def tune(task, out, data, training) -> dict:
    """Fine-tune out/pruned into the run folder `out`, which without a first step is left as if nothing was pruned."""
    from fastllm.llm.finetune import run as finetune

    try:
        return finetune(task, out / "pruned", data, out, fresh=True, **training)
    except ValueError:
        if not (out / "run.json").exists():
            remove(out)
        raise


def add_arguments(subparsers):
    parser = subparsers.add_parser("prune", help="write a model with fewer heads, channels and layers")
    parser.add_argument("model", help="folder of a model: ours, a run's, or Hugging Face's")
    parser.add_argument("--out", help="folder to write (default: MODEL-pruned, or MODEL-pruned-finetuned)")
    parser.add_argument("--fresh", action="store_true", help="replace the model in --out")
    for name, what in (("heads", "attention heads"), ("channels", "feed-forward channels"), ("layers", "layers")):
        parser.add_argument(f"--{name}", type=float, default=1.0, help=f"share of the {what} to keep (default 1)")
    parser.add_argument("--calibrate", metavar="FILE", help="text, or pairs, on which it shows what matters")
    parser.add_argument("--text", metavar="FILE", help="text whose perplexity, or pairs whose BLEU, is measured")
    tuning = parser.add_argument_group("and then train what is left, as `fastllm finetune` does")
    tuning.add_argument(
        "--finetune", metavar="DATA", help="folder with train, valid and test files for the model's task"
    )
    for name, kind, what in (
        ("epochs", int, "default 1"),
        ("batch", int, "default 16"),
        ("lr", float, "default 5e-5"),
        ("max-len", int, "tokens of an example"),
        ("seed", int, "default 0"),
    ):
        tuning.add_argument(f"--{name}", type=kind, help=what)
    parser.set_defaults(run=main)


def main(args) -> int:
    out = args.out or f"{Path(args.model)}-pruned" + ("" if args.finetune is None else "-finetuned")
    names = "heads channels layers calibrate text finetune fresh".split()
    training = {name: getattr(args, name) for name in "epochs batch lr max_len seed".split()}
    training = {name: value for name, value in training.items() if value is not None}
    if training and args.finetune is None:
        raise ValueError(f"prune: {', '.join(training)} is for --finetune DATA")
    training = dict(epochs=1) | training if args.finetune else {}
    found = run(args.model, out, **{name: getattr(args, name) for name in names}, **training)
    show_comparison(found, out)
    if "pruned" in found:
        print(f"loss on test between pruning and training: {found['pruned']['test_loss']:.3f}; the model: {out}/best")
    return 0
