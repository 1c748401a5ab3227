"""LoRA on a whole model: which layers get an update, and adapters on the disk in the format of peft.

adapt(model, rank=8)                 # everything else is frozen
...                                  # train
save_adapter("adapter", model)       # peft.PeftModel.from_pretrained(base, "adapter") reads it
load_adapter("adapter", base)        # and this reads peft's
"""

import contextlib
import json
import re
from pathlib import Path

from torch import nn

from fastllm.llm import require
from fastllm.llm.files import atomic, atomic_folder
from fastllm.model import Transformer
from fastllm.nn import LoRALinear

MORE = "fastllm.json"  # in an adapter's folder: task, classes, ...
PREFIX = "base_model.model."  # of every name in an adapter's file
HEADS = (".score.weight", ".classifier.weight", ".classifier.out_proj.weight")  # of classifiers of transformers
# What an adapter of peft may say besides: of each name the values that mean nothing to an update like ours.
PLAIN = dict(
    bias=("none",),
    use_dora=(False,),
    alpha_pattern=({},),
    layer_replication=(None,),
    megatron_config=(None,),
    lora_bias=(False,),
)
TASK_TYPES = {
    "classification": "SEQ_CLS",
    "language-model": "CAUSAL_LM",
    "encoder-decoder": "SEQ_2_SEQ_LM",
    "question-answering": "QUESTION_ANS",
}


def is_projection(module) -> bool:
    """A torch.nn.Linear or Hugging Face's Conv1D."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def projections(model) -> list[str]:
    """The names of the linear layers in the model's stacks of layers: attention and feed-forward, no head."""
    stacks = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    layers = tuple(f"{name}." for name in stacks)
    return [name for name, module in model.named_modules() if name.startswith(layers) and is_projection(module)]


def adapt(model, rank, *, alpha=None, dropout=0.0, targets=None, keep=()) -> list[str]:
    """Freeze the model but for the modules named in `keep`, and give its linear layers a trainable update of `rank`.

    Adapt before `fastllm.accelerate`, which then knows that these layers do more than a product. targets is a regular
    expression for names of layers, searched in every linear layer's name ("query|value"); without
    it, all of attention and feed-forward have one. Returns the names of those layers. Raises ValueError where there is
    none, TypeError for a model that has updates already.
    """
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise TypeError("adapt: the model has an adapter already; merge it first")
    if targets is None:
        names = projections(model)
    else:
        names = [n for n, module in model.named_modules() if is_projection(module) and re.search(targets, n)]
    names = [name for name in names if not name.startswith(tuple(f"{k}." for k in keep)) and name not in keep]
    if not names:
        what = "no linear layer in a stack of layers" if targets is None else f"no linear layer named like {targets!r}"
        raise ValueError(f"adapt: {type(model).__name__} has {what}")
    model.requires_grad_(False)
    for name in keep:
        model.get_submodule(name).requires_grad_(True)
    for name in names:
        replace(model, name, LoRALinear(model.get_submodule(name), rank, alpha, dropout).train(model.training))
    return names


def replace(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def adapted(model) -> dict[str, LoRALinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


@contextlib.contextmanager
def merged(model):
    """Inside the block the updates are in the weights, and the model is as fast as without them."""
    for layer in adapted(model).values():
        layer.merge()
    try:
        yield model
    finally:
        for layer in adapted(model).values():
            layer.unmerge()


def merge(model):
    """Add the updates to the weights for good; what is left is the plain model. Returns it."""
    for name, layer in adapted(model).items():
        layer.merge()
        replace(model, name, layer.base)
    return model


def plain_state(model) -> dict:
    """The state dict that the model would have without an adapter: updates left out, names as before."""
    layers = adapted(model)
    kept = {}
    for name, value in model.state_dict().items():
        owner, _, rest = name.rpartition(".")
        if owner in layers:
            continue  # lora_A and lora_B
        parent, _, last = owner.rpartition(".")
        kept[f"{parent}.{rest}" if last == "base" and parent in layers else name] = value
    return kept


def adapter_state(model) -> dict:
    """What trains, by peft's names: lora_A and lora_B of every adapted layer, and whole parameters beside them."""
    layers, found = adapted(model), {}
    for name, parameter in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if owner in layers:
            name = f"{owner}.{last}.weight"
        elif not parameter.requires_grad:
            continue
        found[PREFIX + name] = parameter.detach().contiguous()
    return found


def save_adapter(folder, model, *, base="", task=None, **meta):
    """Write adapter_config.json and adapter_model.safetensors, complete or not at all, and MORE beside them, for what
    peft's files have no place for.

    base is the name or folder of the model that it belongs to, for the reader. Modules that train as a whole (a new
    head) are in it. meta is what `checkpoint.save_model` keeps of the whole model: names of classes and the like.
    Raises ValueError for a model without an adapter.
    """
    layers = adapted(model)
    if not layers:
        raise ValueError(f"save_adapter: {type(model).__name__} has no adapter")
    first = next(iter(layers.values()))
    whole = {n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad} - layers.keys()
    config = dict(
        peft_type="LORA",
        task_type=None if isinstance(model, Transformer) else TASK_TYPES.get(task),  # peft's are of transformers
        base_model_name_or_path=str(base),
        inference_mode=True,
        r=first.rank,
        lora_alpha=first.alpha,
        lora_dropout=first.dropout,
        use_rslora=first.rslora,
        target_modules=_shortest(layers, [name for name, _ in model.named_modules()]),
        modules_to_save=sorted(whole) or None,
        fan_in_fan_out=not isinstance(first.base, nn.Linear),
        bias="none",
    )
    with atomic_folder(folder) as temporary:
        state = adapter_state(model)
        require("safetensors.torch", "safetensors").save_file(state, temporary / "adapter_model.safetensors")
        with atomic(temporary / "adapter_config.json") as file:
            json.dump(config, file, indent=1)
        with atomic(temporary / MORE) as file:
            json.dump(meta if task is None else dict(task=task) | meta, file, indent=1)


def _shortest(layers, every) -> list[str]:
    """Names as peft takes them: a last part stands for all layers that end in it, where all of those are adapted."""
    taken = {name.rpartition(".")[2] for name in every if name not in layers}
    return sorted({name if (last := name.rpartition(".")[2]) in taken else last for name in layers})


def described(folder, labels: dict) -> dict:
    """What is known of an adapter beside its numbers: of ours what was kept, of peft's the task, and the names of
    classes for the head that it has: `labels`, number -> name, those of the base, where there are as many, else LABEL_0
    and so on, as transformers calls them."""
    if (Path(folder) / MORE).exists():
        return json.loads((Path(folder) / MORE).read_text("utf-8"))
    config = json.loads((Path(folder) / "adapter_config.json").read_text("utf-8"))
    tasks = {theirs: task for task, theirs in TASK_TYPES.items()}
    meta = {"task": tasks[config["task_type"]]} if config.get("task_type") in tasks else {}
    if meta.get("task") == "classification":
        with require("safetensors").safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
            heads = [name for name in file.keys() if name.endswith(HEADS)]
            count = file.get_slice(heads[0]).get_shape()[0] if heads else 0
        if heads:
            names = [labels.get(str(n)) for n in range(len(labels))]
            meta["classes"] = names if len(names) == count else [f"LABEL_{n}" for n in range(count)]
    return meta


def load_adapter(folder, model) -> dict:
    """Give the model the adapter in a folder of ours or of peft; everything else is frozen. Returns its configuration.

    Raises ValueError in one line for a folder that is none, an adapter of another kind or of another model.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "adapter_config.json").read_text("utf-8"))
        state = require("safetensors.torch", "safetensors").load_file(folder / "adapter_model.safetensors")
    except (OSError, ValueError, require("safetensors").SafetensorError) as error:
        raise ValueError(f"load_adapter: {folder} holds no adapter that can be read: {error}") from None
    if config.get("peft_type") != "LORA":
        raise ValueError(f"load_adapter: {folder} is an adapter of type {config.get('peft_type')}, LORA is needed")
    for name, plain in PLAIN.items():
        if config.get(name, plain[0]) not in (*plain, None):
            raise ValueError(f"load_adapter: {folder} has {name}={config[name]!r}, which is not supported")
    state = {name.removeprefix(PREFIX): value for name, value in state.items()}
    names = {n.removesuffix(".lora_A.weight") for n in state if n.endswith(".lora_A.weight")}
    modules = dict(model.named_modules())
    wrong = [name for name in sorted(names) if not is_projection(modules.get(name))]
    wrong += [n for n in sorted(state) if ".lora_" not in n and n not in dict(model.named_parameters())]
    if wrong or not names:
        what = f"it has no {wrong[0]}" if wrong else "the adapter is empty"
        raise ValueError(f"load_adapter: {folder} is not for this {type(model).__name__}: {what}")
    model.requires_grad_(False)
    for name in sorted(names):
        a, b = state.pop(f"{name}.lora_A.weight"), state.pop(f"{name}.lora_B.weight")
        given = config["lora_alpha"], config.get("lora_dropout", 0.0)
        layer = LoRALinear(modules[name], len(a), *given, rslora=config.get("use_rslora", False))
        if a.shape != layer.lora_A.shape or b.shape != layer.lora_B.shape:
            sizes = f"{list(a.shape)} and {list(b.shape)}"
            raise ValueError(f"load_adapter: {folder} is not for this model: {name} cannot take updates {sizes}")
        layer.lora_A.data.copy_(a), layer.lora_B.data.copy_(b)
        replace(model, name, layer.train(model.training))
    for name, value in state.items():
        parameter = model.get_parameter(name).requires_grad_(True)
        if parameter.shape != value.shape:
            raise ValueError(f"load_adapter: {folder} is not for this model: {name} is {list(value.shape)} there")
        parameter.data.copy_(value)
    return config
