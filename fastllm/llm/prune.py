"""`fastllm prune`: fewer attention heads, feed-forward channels and layers; the model that is left is a smaller one.

What goes is what matters least: by the size of its weights, or, with calibration text, by how much the loss would
change without it, to first order (Molchanov et al. 2019, arXiv:1906.10771): the square of the sum of weight times
gradient over all that belongs to a head or a channel, summed over batches. Query heads go with the key head that they
share.
"""

import copy
import dataclasses
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from fastllm.llm import rows
from fastllm.llm.checkpoint import Loaded, load_model, write_model
from fastllm.llm.files import atomic_folder, check_free
from fastllm.llm.measure import compare, read_text, show_comparison
from fastllm.llm.packed import packing
from fastllm.llm.prompts import ChatTemplate
from fastllm.llm.runs import remove
from fastllm.llm.sessions import generates, positions_of
from fastllm.llm.tasks import TASKS
from fastllm.model import Transformer

SUITED = (64, 16)  # multiples that the kernels work in: the larger one where a layer is wide enough
WINDOW, WINDOWS = 128, 32  # tokens of a batch of calibration text, and how many of them


@dataclasses.dataclass(frozen=True)
class Family:
    """Where a model keeps its layers, and what is one head's or one channel's in each.

    rows are layers of which it is outputs, columns those of which it is inputs; fields name the sizes in the config.
    Without query the config cannot say that there are fewer heads of the same size.
    """

    layers: str
    feed_rows: tuple[str, ...]
    feed_columns: str
    fields: dict[str, str]
    query: str = ""
    key: str = ""
    value: str = ""
    out: str = ""


LLAMA = Family(
    "model.layers",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
    dict(
        heads="num_attention_heads",
        kv_heads="num_key_value_heads",
        feed="intermediate_size",
        layers="num_hidden_layers",
    ),
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
)
BERT_FIELDS = dict(feed="intermediate_size", layers="num_hidden_layers")
FAMILIES = {
    **{f"{name}ForCausalLM": LLAMA for name in "Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Gemma3".split()},
    "GPT2LMHeadModel": Family("transformer.h", ("mlp.c_fc",), "mlp.c_proj", dict(feed="n_inner", layers="n_layer")),
    "BertForSequenceClassification": Family("bert.encoder.layer", ("intermediate.dense",), "output.dense", BERT_FIELDS),
    "BertForMaskedLM": Family("bert.encoder.layer", ("intermediate.dense",), "output.dense", BERT_FIELDS),
    "BertModel": Family("encoder.layer", ("intermediate.dense",), "output.dense", BERT_FIELDS),
}


def family_of(model) -> Family:
    """Raises ValueError for a model of none of them."""
    name = type(model).__name__
    if name in FAMILIES:
        return FAMILIES[name]
    if name != "Transformer" or model.config.kind == "encoder-decoder":
        name = "an encoder-decoder" if name == "Transformer" else name
        raise ValueError(f"prune: {name} is none of Transformer (encoder or decoder), {', '.join(FAMILIES)}")
    rows = ("feed_forward.gate", "feed_forward.up") if model.config.activation == "swiglu" else ("feed_forward.up",)
    parts = (f"attention.{part}" for part in ("query", "key", "value", "out"))
    fields = dict(heads="heads", kv_heads="kv_heads", feed="d_ff", layers="layers")
    return Family(f"{model.config.kind}.blocks", rows, "feed_forward.down", fields, *parts)


def importances(model, tokens=None):
    """Of heads [layers, key heads], channels [layers, channels] and layers [layers]: by size, or on `tokens` [N, T]."""
    family = family_of(model)
    if tokens is None:
        return _importances(model, family, lambda parameter: parameter.detach().float().square())
    found = None
    for batch in tokens.split(1):
        model.zero_grad(set_to_none=True)
        _loss(model, batch).backward()
        once = _importances(model, family, lambda p: p.detach().float() * (0 if p.grad is None else p.grad.float()))
        once = [x.square() for x in once]
        found = once if found is None else [a + b for a, b in zip(found, once, strict=True)]
    model.zero_grad(set_to_none=True)
    return found


def _loss(model, tokens):
    """Of the next token; of an encoder, whose labels are not known here, of what it thinks likeliest itself."""
    found = model(tokens)
    logits = getattr(found, "logits", found)
    if not isinstance(logits, torch.Tensor):
        raise ValueError(f"prune: {type(model).__name__} has no head to calibrate on; leave the text away")
    if generates(model):
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
    logits = logits.flatten(0, -2).float()
    return F.cross_entropy(logits, logits.argmax(-1))


def _importances(model, family, of):
    """Sums of `of`(parameter) over what belongs to each head, channel and layer."""
    heads, channels, layers = [], [], []
    for layer in model.get_submodule(family.layers):
        channels.append(
            sum(_along(layer.get_submodule(name), 0, of) for name in family.feed_rows)
            + _along(layer.get_submodule(family.feed_columns), 1, of)
        )
        if family.query:
            groups = _key_heads(model, family)
            parts = [_along(layer.get_submodule(name), 0, of) for name in (family.query, family.key, family.value)]
            parts.append(_along(layer.get_submodule(family.out), 1, of))
            heads.append(sum(part.view(groups, -1).sum(1) for part in parts))
        layers.append(sum(of(p).sum() for p in layer.parameters()))
    return [torch.stack(heads) if heads else torch.empty(len(layers), 0), torch.stack(channels), torch.stack(layers)]


def _key_heads(model, family):
    named = family.fields
    return getattr(model.config, named["kv_heads"]) or getattr(model.config, named["heads"])


def _flipped(module):
    return type(module).__name__ == "Conv1D"  # GPT-2 keeps the transpose


def _along(module, dim, of):
    """[outputs] (dim 0, with the bias) or [inputs] (dim 1)."""
    found = of(module.weight).sum(dim if _flipped(module) else 1 - dim)
    return found + of(module.bias) if dim == 0 and module.bias is not None else found


def prune_model(model, *, heads=1.0, channels=1.0, layers=1.0, tokens=None):
    """A smaller copy of `model` with these shares of its heads, feed-forward channels and layers, the most important.

    Every layer keeps as many as the others, its own best ones; channels are rounded to a multiple of 64, or of 16 in
    layers that are too narrow for that, heads to whole key heads. Raises ValueError for shares outside (0, 1], for what
    the model's config cannot say, and for a model of no known family.
    """
    for name, share in (("heads", heads), ("channels", channels), ("layers", layers)):
        if not 0 < share <= 1:
            raise ValueError(f"prune: {name} must be in (0, 1], the share that is kept, got {share}")
    family = family_of(model)
    if heads < 1 and not family.query:
        raise ValueError(f"prune: the config of {type(model).__name__} cannot say that there are fewer heads")
    of_heads, of_channels, of_layers = importances(model, tokens)
    whole, width = len(of_layers), of_channels.shape[1]
    kept_layers = _best(of_layers, max(1, round(layers * whole)))
    kept_channels = [_best(of_channels[n], suited(channels, width)) for n in kept_layers]
    groups, kept_heads = of_heads.shape[1], []
    if groups:
        kept_heads = [_best(of_heads[n], max(1, round(heads * groups))) for n in kept_layers]
    config = _smaller(model, family, kept_layers, kept_channels, kept_heads)
    made = Transformer(config, model.accelerated) if isinstance(model, Transformer) else type(model)(config)
    dtype = next(model.parameters()).dtype
    state = _sliced(model, family, kept_layers, kept_channels, kept_heads)
    made.to(dtype).load_state_dict(state)
    return made.eval()


def suited(share, width) -> int:
    """How many of `width` channels a share is, rounded to what suits the kernels; all of them stay all."""
    if share == 1:
        return width
    step = next((step for step in SUITED if width >= 4 * step), 1)
    return min(width, max(step, round(share * width / step) * step))


def _best(importance, count):
    return importance.topk(count).indices.sort().values.tolist()


def _smaller(model, family, layers, channels, heads):
    """The config that says so."""
    sizes = {family.fields["layers"]: len(layers), family.fields["feed"]: len(channels[0])}
    if heads and len(heads[0]) < _key_heads(model, family):
        many, few = (getattr(model.config, family.fields[name]) for name in ("heads", "kv_heads"))
        sizes[family.fields["heads"]] = len(heads[0]) * (many // (few or many))
        sizes[family.fields["kv_heads"]] = len(heads[0])
        sizes["head_dim"] = _head_dim(model, family)
    if isinstance(model, Transformer):
        return dataclasses.replace(model.config, **sizes)
    config = copy.deepcopy(model.config)
    for name, size in sizes.items():
        setattr(config, name, size)
    if getattr(config, "layer_types", None):
        config.layer_types = [model.config.layer_types[n] for n in layers]
    return config


def _head_dim(model, family):
    key = model.get_submodule(family.layers)[0].get_submodule(family.key)
    return key.weight.shape[0] // _key_heads(model, family)


def _sliced(model, family, layers, channels, heads):
    """The state dict of the smaller model."""
    state = {k: v for k, v in model.state_dict().items() if not k.startswith(family.layers + ".")}
    modules = model.get_submodule(family.layers)
    for new, old in enumerate(layers):
        layer, chosen = modules[old], {}
        for name in family.feed_rows:
            chosen[name] = channels[new], 0
        chosen[family.feed_columns] = channels[new], 1
        if heads:
            groups = _key_heads(model, family)
            for name, dim in ((family.query, 0), (family.key, 0), (family.value, 0), (family.out, 1)):
                weight = layer.get_submodule(name).weight
                size = weight.shape[dim] // groups
                chosen[name] = [h * size + i for h in heads[new] for i in range(size)], dim
        for key, value in layer.state_dict().items():
            name, _, what = key.rpartition(".")
            if name in chosen and (what == "weight" or chosen[name][1] == 0):
                index, dim = chosen[name]
                value = value.index_select(
                    1 - dim if _flipped(layer.get_submodule(name)) and what == "weight" else dim, torch.tensor(index)
                )
            state[f"{family.layers}.{new}.{key}"] = value
    return state


def calibration(loaded, text: str):
    """[N, T] tokens, windows spread over a text."""
    tokens = torch.tensor(loaded.tokenizer.encode(text))
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
    the size of weights does), text one whose perplexity is measured before and after. finetune is a folder of data for
    the model's task, on which what is left is trained, all of it, with the options `training` of `finetune.run`: then
    `out` is the folder of that run, with the model before it in out/pruned. Returns what `quantize.run` does, and then
    also the loss on the test rows before and after, and under "pruned" that of out/pruned.
    Raises ValueError as `prune_model` and `finetune.run` do, for a packed model, where nothing would go, and for
    a folder `out` that is there, unless it has a model (with finetune: a run) in it and `fresh` is given.
    """
    if min(heads, channels, layers) == 1:
        raise ValueError("prune: nothing would go; give --heads, --channels or --layers a share below 1")
    check_free("prune", out, fresh=fresh, mark="config.json" if finetune is None else "run.json", source=model)
    calibrate, text = (None if path is None else read_text(path) for path in (calibrate, text))
    loaded = load_model(model, accelerate=False)
    if packing(loaded.model)["layers"]:
        raise ValueError(f"prune: {model} is packed; prune first, then quantize")
    if finetune is not None:
        task = trainable(loaded, finetune)
    tokens = None if calibrate is None else calibration(loaded, calibrate)
    made = prune_model(loaded.model, heads=heads, channels=channels, layers=layers, tokens=tokens)
    meta = {name: value for name, value in loaded.meta.items() if name != "new"}
    with atomic_folder(out if finetune is None else Path(out) / "pruned") as folder:
        write_model(folder, made, loaded.tokenizer, **meta)
        ChatTemplate.load(loaded.source, loaded.tokenizer).save(folder)
    after = Loaded(made, loaded.tokenizer, meta, Path(out))
    if finetune is None:
        return compare(loaded, after, text) if measure else {}
    result = tune(task, Path(out), finetune, training)
    tuned = load_model(out, accelerate=False)
    length = tuned.meta["max_len"]  # of all three, or their windows would differ
    losses = {name: test_loss(one, finetune, length) for name, one in (("before", loaded), ("pruned", after))}
    found = compare(loaded, tuned, text) if measure else dict(before={}, after={})
    found["before"]["loss"], found["after"]["loss"] = losses["before"], result["test"]["loss"]
    return found | dict(pruned=dict(loss=losses["pruned"]))


def trainable(loaded, data) -> str:
    """The task of a model, as `finetune` calls it. Raises ValueError where there is none, or data for another."""
    from fastllm.llm.finetune import NAMES

    names = {found: name for name, found in NAMES.items()}
    if loaded.meta["task"] not in names:
        raise ValueError(f"prune: {loaded.source} has no task to fine-tune it for; `fastllm finetune` gives it one")
    for split in ("train", "valid", "test"):
        rows.find(data, split, TASKS[loaded.meta["task"]].extensions)
    return names[loaded.meta["task"]]


def test_loss(loaded, data, max_len) -> float:
    from fastllm.llm.finetune import task_for

    task = task_for(loaded, max_len)
    return task.scores(loaded.model, task.rows(rows.find(data, "test", task.extensions)), 16, quick=True)["loss"]


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
    parser.add_argument("--calibrate", metavar="FILE", help="text on which it shows what matters")
    parser.add_argument("--text", metavar="FILE", help="text whose perplexity is measured before and after")
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
        print(f"loss on test between pruning and training: {found['pruned']['loss']:.3f}; the model: {out}/best")
    return 0
