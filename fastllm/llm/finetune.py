"""`fastllm finetune`: teach a model that exists a task, all of it or a part: classification, language, seq2seq, QA."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

import fastllm
from fastllm.llm import distributed, rows
from fastllm.llm import lora as adapters
from fastllm.llm.checkpoint import Loaded, load_model, read_json, resolve, save_model
from fastllm.llm.files import atomic
from fastllm.llm.ranks import Ranks
from fastllm.llm.runs import Run, add_run_arguments, point
from fastllm.llm.tasks import TASKS
from fastllm.llm.tasks.base import is_ours, real_tokens
from fastllm.llm.train import OPTIMIZERS, PRECISIONS, Recipe, parameter_groups, train
from fastllm.model import Transformer

NAMES = {"classification": "classification", "language": "language-model"}  # what is typed, and in a model's folder
NAMES |= {"seq2seq": "encoder-decoder", "questions": "question-answering"}


def run(
    task,
    model,
    data,
    out=None,
    *,
    lora=0,
    alpha=None,
    lora_dropout=0.0,
    targets=None,
    freeze=None,
    layer_decay=1.0,
    epochs=3,
    batch=16,
    accumulate=1,
    max_len=None,
    optimizer="adamw",
    lr=None,
    warmup=0.1,
    weight_decay=0.01,
    patience=3,
    evaluations=2,
    seconds=None,
    precision="fp32",
    seed=0,
    naive=False,
    resume=False,
    fresh=False,
    ranks=None,
) -> dict:
    """Fine-tune the model in a folder, of ours or of Hugging Face, on the files train, valid and test of another.

    task is "classification", "language", "seq2seq" or "questions"; fastllm/llm/tasks says which files each reads. With
    `lora`, a rank, only low-rank updates train (of layers that `targets`, a regular expression, chooses), and a new
    head. freeze is "embeddings", or a number: embeddings and that many layers stay. layer_decay multiplies the
    learning rate of each layer below the head once more. There are `evaluations` in an epoch.

    Writes a run folder (see `runs.Run`): `best` is the model of the lowest validation loss, with LoRA merged into its
    weights and beside it `adapter`, in peft's format; result.json is what is returned: scores on test, history.
    Several processes (`distributed.start`) take the steps of one; the first of them writes.
    Raises ValueError, before anything is written, for data or a model that does not fit.
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "resume", "fresh", "seconds", "ranks")}
    ranks = ranks or Ranks()
    ranks.check(batch, accumulate)
    name, out = _task_name(task), Path(out or f"runs/finetune-{task}")
    kind, path = TASKS[name], {s: rows.find(data, s, TASKS[name].extensions) for s in ("train", "valid", "test")}
    torch.manual_seed(seed)
    loaded = prepare(model, name, kind.learn(path["train"]), accelerate=not naive)
    if max_len is None:
        max_len = min(kind.default_length, positions_of(loaded.model))
    made = task_for(loaded, max_len)
    examples = made.load(path["train"])
    for split in ("valid", "test"):  # what is wrong in them is said now, not after an hour
        for row in made.rows(path[split]):
            made.encode(row)
    meta = dict(loaded.meta, task=name, max_len=max_len, base=str(model), new=None)
    meta = {k: v for k, v in meta.items() if v is not None}
    if lora:
        if getattr(ranks, "mode", "ddp") == "fsdp":
            raise ValueError("finetune: with --lora little is trained, and --parallel fsdp does not merge it: take ddp")
        head = trained_whole(loaded) if kind.headed else ()
        options = dict(alpha=alpha, dropout=lora_dropout, targets=targets, keep=head)
        adapters.adapt(loaded.model, lora, **options)
        meta["lora"] = lora
    if freeze is not None:
        freeze_layers(loaded.model, freeze)
    if not naive and not is_ours(loaded.model):
        fastllm.accelerate(loaded.model)
    trained = sum(p.numel() for p in loaded.model.parameters() if p.requires_grad)
    batches = made.epochs(examples, batch, seed)
    steps = max(1, epochs * batches.per_epoch // accumulate)
    recipe = Recipe(
        steps=steps,
        optimizer=optimizer,
        lr=lr or (2e-4 if lora else 5e-5),
        warmup=int(warmup * steps),
        weight_decay=weight_decay,
        accumulate=accumulate,
        precision=precision,
        evaluate_every=max(1, batches.per_epoch // accumulate // evaluations),
        patience=patience,
        seconds=seconds,
        seed=seed,
    )
    settings |= dict(model=str(model), data=str(data))
    rates = groups(loaded.model, weight_decay, layer_decay)
    options = dict(resume=resume, fresh=fresh, free=("data",))
    with distributed.shared(ranks, lambda: Run(out, settings, **options)) as folder:
        history = train(
            loaded.model,
            batches,
            made.loss,
            real_tokens,
            recipe,
            weight_of=made.weight,
            evaluate=lambda model: numbers(made.scores(model, made.rows(path["valid"]), batch, True, ranks)),
            run=folder,
            tokenizer=loaded.tokenizer,
            meta=meta,
            ranks=ranks,
            groups=rates,
            what=f"finetune {task}",
        )
        if lora:
            if ranks.first:
                more = {name: value for name, value in meta.items() if name not in ("lora", "base")}
                adapters.save_adapter(out / "adapter", loaded.model, base=model, **more)
            plain = adapters.merge(loaded.model)
            if ranks.first:
                del meta["lora"]
                save_model(out / "merged", plain, loaded.tokenizer, **meta)
                point(out / "best", "merged")
        with ranks.evaluating(loaded.model):
            test = made.scores(loaded.model, made.rows(path["test"]), batch, ranks=ranks)
        result = dict(task=name, settings=settings, recipe=asdict(recipe), trained=trained, history=history, test=test)
        if ranks.first:
            with atomic(out / "result.json") as file:
                json.dump(result, file)
    return result


def _task_name(task) -> str:
    if task not in NAMES:
        raise ValueError(f"finetune: the task must be one of {', '.join(NAMES)}, got {task!r}")
    return NAMES[task]


def prepare(path, task, learned, *, accelerate=True, **options) -> Loaded:
    """The model of a folder, with a head for the task; a new one where it has none, or one for other classes.

    Models of transformers are as transformers makes them, by the options of its from_pretrained: accelerate them when
    they are complete. A model of ours runs on the kernels with accelerate=True.
    """
    classes = learned.get("classes")
    config = read_json(resolve(path) / "config.json")
    if "packing" in (config.get("fastllm") or config):
        raise ValueError(f"finetune: {path} is packed in few bits; fine-tune the model it was made from, then quantize")
    if config.get("format") != "fastllm":
        if classes:
            labels = dict(enumerate(classes))
            options |= dict(num_labels=len(classes), id2label=labels, label2id={c: n for n, c in labels.items()})
            options["ignore_mismatched_sizes"] = True
        loaded = load_model(path, task=task, accelerate=False, **options)
        if getattr(loaded.model.config, "pad_token_id", None) is None:
            loaded.model.config.pad_token_id = loaded.tokenizer.pad
        loaded.meta |= learned
        return loaded
    if not TASKS[task].headed:
        return load_model(path, task=task, accelerate=accelerate, **options)
    loaded = load_model(path, accelerate=accelerate, **options)
    if loaded.meta.get("task") == task and loaded.meta.get("classes") == classes:
        return loaded
    before = loaded.model
    if before.config.kind == "decoder":
        raise ValueError(
            f"finetune: {path} holds a language model that reads from left to right; {task} needs an encoder"
        )
    sizes = dict(kind="encoder", classes=len(classes or "se"), per_token=task == "question-answering", masked_lm=False)
    model = Transformer(replace(before.config, **sizes), accelerate)
    own, kept = model.state_dict(), before.state_dict()
    new = [n for n in own if n.startswith("head.") or n not in kept]
    model.load_state_dict({n: v for n, v in kept.items() if n in own and n not in new}, strict=False)
    return Loaded(model.eval(), loaded.tokenizer, dict(learned, task=task, new=new), loaded.source)


def task_for(loaded, max_len=None):
    """The task that a loaded model is for. Raises ValueError for a model that is for none."""
    name, meta = loaded.meta.get("task"), dict(loaded.meta)
    if name not in TASKS:
        known = ", ".join(NAMES)
        raise ValueError(f"{loaded.source} holds a model for {name}, which is none of the tasks {known}")
    kind = TASKS[name]
    if name == "classification" and "classes" not in meta and not is_ours(loaded.model):
        meta["classes"] = [loaded.model.config.id2label[n] for n in range(loaded.model.config.num_labels)]
    if name == "language-model":
        from fastllm.llm.prompts import ChatTemplate

        meta["template"] = ChatTemplate.load(loaded.source, loaded.tokenizer)
    length = max_len or meta.get("max_len") or min(kind.default_length, positions_of(loaded.model))
    if length < 8 or length > positions_of(loaded.model):
        raise ValueError(f"max-len must be between 8 and {positions_of(loaded.model)} for this model, got {length}")
    return kind(loaded.tokenizer, length, meta)


def positions_of(model) -> int:
    """How many tokens the model takes."""
    names = ("max_len", "n_positions", "max_position_embeddings")
    return next((n for name in names if (n := getattr(model.config, name, None))), 4096)


def heads(model) -> tuple[str, ...]:
    """The names of the modules on top of a model's encoder."""
    if is_ours(model):
        return ("head",)
    children = [name for name, child in model.named_children() if list(child.parameters())]
    return tuple(name for name in children if name != model.base_model_prefix)


def trained_whole(loaded) -> list[str]:
    """What LoRA must not freeze: the head, and modules that were drawn anew, in which nothing has been learnt."""
    found = list(heads(loaded.model))
    for name in loaded.meta.get("new") or ():
        owner = name.rpartition(".")[0]
        if owner and not any(f"{owner}.".startswith(f"{other}.") for other in found):
            found.append(owner)
    return found


def depths(model) -> tuple[dict[str, int], int]:
    """(parameter -> depth, greatest depth): embeddings 0, layer i of a stack i + 1, what is on top the greatest."""
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stacks = [name for name in stacks if not any(name.startswith(f"{other}.") for other in stacks)]
    if not stacks:
        raise ValueError(f"{type(model).__name__} has no stack of layers")
    top = max(len(model.get_submodule(name)) for name in stacks) + 1
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found = {}
    for name, parameter in model.named_parameters():
        stack = next((s for s in stacks if name.startswith(f"{s}.")), None)
        if stack is not None:
            found[name] = int(name.removeprefix(f"{stack}.").partition(".")[0]) + 1
        else:
            low = id(parameter) in tables or "embed" in name or name == "positions"
            found[name] = 0 if low else top
    return found, top


def freeze_layers(model, what):
    """Freeze the embeddings and the `what` lowest layers of each stack; "embeddings" is those alone."""
    number = 0 if what == "embeddings" else int(what) if str(what).isdecimal() else -1
    found, top = depths(model)
    if not 0 <= number < top:
        raise ValueError(f"freeze: 'embeddings' or a number of layers up to {top - 1} is needed, got {what!r}")
    for name, parameter in model.named_parameters():
        if found[name] <= number:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"freeze: nothing is left to train with {what!r}")


def groups(model, weight_decay, layer_decay) -> list[dict]:
    """The optimizer's groups: a parameter `d` below the top learns layer_decay^d times as fast."""
    found = parameter_groups(model, weight_decay)
    if layer_decay == 1:
        return found
    if not 0 < layer_decay < 1:
        raise ValueError(f"layer-decay must be above 0 and at most 1, got {layer_decay}")
    depth, top = depths(model)
    depth = {id(p): depth[name] for name, p in model.named_parameters()}
    split = []
    for group in found:
        for at in range(top + 1):
            if params := [p for p in group["params"] if depth[id(p)] == at]:
                split.append(group | dict(params=params, lr_scale=layer_decay ** (top - at)))
    return split


def add_arguments(subparsers):
    parser = subparsers.add_parser("finetune", help="teach a model of a folder a task, all of it or with LoRA")
    parser.add_argument("task", choices=NAMES)
    parser.add_argument("--model", required=True, help="folder of a model, of fastllm or of Hugging Face")
    parser.add_argument("--data", required=True, help="folder with train, valid and test files")
    parser.add_argument("--out", help="folder of the run (default: runs/finetune-TASK)")
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="train low-rank updates instead of weights")
    parser.add_argument("--alpha", type=float, help="of LoRA (default: the rank)")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--targets", help="regular expression of layers for LoRA (default: attention, feed-forward)")
    parser.add_argument("--freeze", metavar="N", help="'embeddings', or a number: those and the N lowest layers")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    for name, kind, default, meaning in (
        ("layer-decay", float, 1.0, "the learning rate of a layer over that of the one above it"),
        ("epochs", int, 3, ""),
        ("batch", int, 16, ""),
        ("accumulate", int, 1, "batches of a step"),
        ("max-len", int, None, "tokens of an example (default: what the task has, or the model)"),
        ("lr", float, None, "default 5e-5, with LoRA 2e-4"),
        ("warmup", float, 0.1, "share of the steps"),
        ("weight-decay", float, 0.01, ""),
        ("patience", int, 3, "evaluations without a better loss"),
        ("evaluations", int, 2, "in an epoch"),
        ("seconds", float, None, "stop after so much training"),
        ("seed", int, 0, ""),
    ):
        given = "" if default is None else f"(default: {default})"
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"{meaning} {given}".strip())
    add_run_arguments(parser)
    distributed.add_mode_argument(parser)
    parser.add_argument("--naive", action="store_true", help="plain PyTorch instead of the kernels")
    parser.set_defaults(run=main)


def main(args) -> int:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "run", "traceback", "parallel")}
    with distributed.start(args.parallel) as ranks:
        result = run(**options, ranks=ranks)
        show_scores(result["test"])
        history, out = result["history"], args.out or f"runs/finetune-{args.task}"
        print(f"{history['tokens_per_s']:,.0f} tokens/s; best at step {history['best']['step']}; {history['stopped']}")
        print(f"the model: {out}/best" + f"; its adapter: {out}/adapter" * bool(args.lora))
    return 0


def numbers(scores: dict) -> dict:
    return {name: value for name, value in scores.items() if isinstance(value, (int, float))}


def show_scores(scores: dict):
    from fastllm.text import show

    show(("test", "score"), [(name, f"{value:.4g}") for name, value in numbers(scores).items()])
