"""Models on the disk: the folders that every command writes and reads.

A model folder of ours has config.json (what the model is), model.safetensors and tokenizer.json; one of Hugging Face
has what transformers' save_pretrained writes. A run folder holds model folders: `step-000100` and its like, and `best`.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

import fastllm
from fastllm.llm import require
from fastllm.llm.files import atomic, atomic_folder
from fastllm.llm.packed import unfilled
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

AUTO_CLASSES = {  # task -> the class of transformers, and how its models' names end
    "language-model": ("AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel")),
    "masked-lm": ("AutoModelForMaskedLM", ("ForMaskedLM",)),
    "encoder-decoder": ("AutoModelForSeq2SeqLM", ("ForConditionalGeneration", "MTModel", "ForSeq2SeqLM")),
    "classification": ("AutoModelForSequenceClassification", ("ForSequenceClassification",)),
    "question-answering": ("AutoModelForQuestionAnswering", ("ForQuestionAnswering",)),
    "encoder": ("AutoModel", ("Model",)),
}


@dataclass
class Loaded:
    """A model in eval(), its tokenizer, what was saved beside it ("task" always), and the folder that it came from."""

    model: nn.Module
    tokenizer: Tokenizer
    meta: dict[str, Any]
    source: Path


def task_of(config: Config) -> str:
    if config.kind != "encoder":
        return {"decoder": "language-model"}.get(config.kind, config.kind)
    return "masked-lm" if config.masked_lm else "classification" if config.classes else "encoder"


def save_model(folder, model, tokenizer: Tokenizer, *, state=None, **meta):
    """Write a model folder, complete or not at all; one that is there is replaced.

    model is a `Transformer`, or a model of transformers, which is saved its own way. state is its state dict where that
    is not model.state_dict() (gathered from several ranks, averaged, ...). meta is kept in config.json: names of
    classes, metrics, what it was trained on; "task" is inferred where it is not given.
    """
    with atomic_folder(folder) as temporary:
        write_model(temporary, model, tokenizer, state=state, **meta)


def write_model(folder, model, tokenizer, *, state=None, **meta):
    """The files of `save_model` into a folder that is there."""
    folder, state = Path(folder), model.state_dict() if state is None else state
    if isinstance(model, Transformer):
        require("safetensors.torch", "safetensors").save_file(without_ties(state), folder / "model.safetensors")
        config = dict(format="fastllm", version=fastllm.__version__, model=asdict(model.config))
        config |= dict(task=task_of(model.config)) | meta
    else:
        model.save_pretrained(folder, state_dict=state)
        config = json.loads((folder / "config.json").read_text("utf-8")) | dict(fastllm=meta)
    with atomic(folder / "config.json") as file:
        json.dump(config, file, indent=1)
    tokenizer.save(folder)


def load_model(path, *, task=None, accelerate=True, **options) -> Loaded:
    """The model of a folder: a model folder, a run folder (its `best`, else its latest) or one of Hugging Face.

    With a task ("language-model", "masked-lm", "encoder-decoder", "classification", "question-answering", "encoder")
    a model of ours must have it, and a folder of Hugging Face is loaded as that: parameters that it lacks are drawn
    anew, and named in meta["new"]. options go to its from_pretrained (dtype, num_labels, ...). accelerate=False gives
    plain PyTorch. A folder with a LoRA adapter is the model that it names as its base, the updates in the weights, with
    the head and the names of classes that it was trained with.
    Raises ValueError in one line for a folder that is none of these, lacks a file, has a damaged one, or holds a model
    of another task.
    """
    if is_adapter(path):
        return _load_adapted(Path(path), task, accelerate, options)
    folder = resolve(path)
    config = read_json(folder / "config.json")
    if config.get("lora") or config.get("fastllm", {}).get("lora"):  # whose weights lack the updates
        raise ValueError(f"load_model: {folder} is of a LoRA run that has not ended; resume it, or load its adapter")
    if config.get("format") == "fastllm":
        if options:
            raise ValueError(f"load_model: {', '.join(options)} is for folders of Hugging Face, {folder} is our own")
        return _load_ours(folder, config, task, accelerate)
    if "model_type" in config or "architectures" in config:
        return _load_hugging_face(folder, config, task, accelerate, options)
    raise ValueError(f"load_model: {folder}/config.json describes neither a model of fastllm nor one of Hugging Face")


def resolve(path) -> Path:
    """The model folder that `path` means."""
    path = Path(path)
    if (path / "config.json").exists():
        return path
    for folder in (path / "best", *reversed(steps(path))):
        if (folder / "config.json").exists():
            return folder
    if is_adapter(path):
        raise ValueError(f"load_model: {path} is a LoRA adapter, not a whole model; its run folder has that in `best`")
    what = "is no folder" if not path.is_dir() else "has no config.json, no `best` and no `step-...` folder"
    raise ValueError(f"load_model: {path} {what}; a model folder, a run folder or one of Hugging Face is needed")


def is_adapter(path) -> bool:
    return (Path(path) / "adapter_config.json").exists() and not (Path(path) / "config.json").exists()


def steps(run) -> list[Path]:
    """The folders step-... of a run, in order."""
    found = [path for path in Path(run).glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]))


def read_json(path) -> dict:
    try:
        found = json.loads(Path(path).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"load_model: {path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"load_model: {path} holds no JSON object")
    return found


def without_ties(state: dict) -> dict:
    """The state dict with every tensor once, contiguous: safetensors keeps no tensor under two names."""
    seen, kept = set(), {}
    for name, tensor in state.items():
        key = tensor.data_ptr(), tensor.shape
        if tensor.numel() == 0 or key not in seen:
            seen.add(key)
            kept[name] = tensor.detach().contiguous()
    return kept


def read_tensors(path) -> dict:
    """The tensors of a safetensors file. Raises ValueError where it is missing or damaged."""
    try:
        return require("safetensors.torch", "safetensors").load_file(path)
    except (OSError, require("safetensors").SafetensorError) as error:
        raise ValueError(f"load_model: {path} is missing or damaged: {error}") from None


def _load_ours(folder, config, task, accelerate) -> Loaded:
    meta = {name: value for name, value in config.items() if name not in ("format", "version", "model")}
    if task not in (None, meta.get("task")):
        raise ValueError(f"load_model: {folder} holds a model for {meta.get('task')}, one for {task} is needed")
    try:
        fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config["model"].items()}
        model = Transformer(Config(**fields), accelerate)
        if "packing" in meta:
            unfilled(model, meta["packing"])
    except (KeyError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"load_model: {folder}/config.json describes no model of this version: {error}") from None
    fill(model, folder)
    return Loaded(model.eval(), Tokenizer.load(folder), meta, folder)


def fill(model, folder):
    """Load the tensors of a folder, which are those of the model without its ties. Raises ValueError for others."""
    state = read_tensors(folder / "model.safetensors")
    wanted = without_ties(model.state_dict())
    if wrong := [n for n in wanted if n not in state or state[n].shape != wanted[n].shape] or state.keys() - wanted:
        raise ValueError(f"load_model: {folder}/model.safetensors does not fit its config.json, see {sorted(wrong)[0]}")
    model.load_state_dict(state, strict=False)


def _load_hugging_face(folder, config, task, accelerate, options) -> Loaded:
    transformers = require("transformers")
    name = (config.get("architectures") or ["AutoModel"])[0]
    if task is not None:
        if task not in AUTO_CLASSES:
            raise ValueError(f"load_model: task must be one of {', '.join(AUTO_CLASSES)}, got {task!r}")
        name = AUTO_CLASSES[task][0]
    model_class = getattr(transformers, name, transformers.AutoModel)
    if packing := config.get("fastllm", {}).get("packing"):
        return _load_packed(folder, config, task, accelerate, packing)
    try:
        model, info = model_class.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    except Exception as error:  # transformers, safetensors and torch raise a dozen kinds
        said = " ".join(str(error).partition("\nModel type should be one of")[0].split())  # and then a page of names
        raise ValueError(f"load_model: {folder} cannot be loaded as {model_class.__name__}: {said}") from None
    if (folder / "tokenizer.json").exists():
        tokenizer = Tokenizer.load(folder)
    else:
        tokenizer = Tokenizer.of_hugging_face(transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True))
    if accelerate:
        fastllm.accelerate(model)
    endings = ((kind, ends) for kind, (_, ends) in AUTO_CLASSES.items())
    kind = task or next((kind for kind, ends in endings if type(model).__name__.endswith(ends)), "encoder")
    meta = dict(task=kind) | config.get("fastllm", {}) | dict(new=sorted(info["missing_keys"]))
    return Loaded(model.eval(), tokenizer, meta, folder)


def _load_adapted(folder, task, accelerate, options) -> Loaded:
    from fastllm.llm import finetune, lora

    base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base or not Path(base).is_dir():
        cure = "start where that is, or take the whole model, which a run folder has in `best`"
        raise ValueError(f"load_model: {folder} is a LoRA adapter for {base}, which is no folder here: {cure}")
    base_config = read_json(resolve(base) / "config.json")
    try:
        meta = lora.described(folder, base_config.get("id2label") or {})
    except (OSError, ValueError, require("safetensors").SafetensorError) as error:
        raise ValueError(f"load_model: {folder} holds no adapter that can be read: {error}") from None
    if task not in (None, meta.get("task", task)):
        raise ValueError(f"load_model: {folder} is an adapter for {meta['task']}, one for {task} is needed")
    ours = base_config.get("format") == "fastllm"
    if "task" in meta:  # with a head like the one that is in the adapter
        learned = {name: meta[name] for name in ("classes",) if name in meta}
        loaded = finetune.prepare(base, meta["task"], learned, accelerate=accelerate, **options)
    else:
        loaded = load_model(base, task=task, accelerate=accelerate and ours, **options)
    try:
        lora.load_adapter(folder, loaded.model)
    except ValueError as error:
        raise ValueError(f"{error}; the whole model is in `best` of the run folder that it is from") from None
    lora.merge(loaded.model).requires_grad_(True)
    if accelerate and not ours:
        fastllm.accelerate(loaded.model)
    kept = {name: value for name, value in loaded.meta.items() if name != "new"}
    return Loaded(loaded.model, loaded.tokenizer, kept | meta, loaded.source)


def _load_packed(folder, config, task, accelerate, packing) -> Loaded:
    """What `fastllm quantize` made of a model of transformers."""
    transformers = require("transformers")
    meta = config["fastllm"]
    if task not in (None, meta.get("task")):
        raise ValueError(f"load_model: {folder} holds a packed model for {meta.get('task')}, one for {task} is needed")
    try:
        kind = transformers.CONFIG_MAPPING[meta["model_type"]]
        given = config | dict(model_type=meta["model_type"])
        model = getattr(transformers, config["architectures"][0])(kind.from_dict(given))
        unfilled(model, packing)
    except (KeyError, AttributeError, TypeError, ValueError, OSError) as error:
        raise ValueError(f"load_model: {folder}/config.json describes no model of this version: {error}") from None
    fill(model, folder)
    if (folder / "generation_config.json").exists():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    if accelerate:
        fastllm.accelerate(model)
    return Loaded(model.eval(), Tokenizer.load(folder), meta, folder)
