"""`fastllm quantize`: the linear layers of a model in 8 or 4 bits, as a model folder that every other command reads."""

import json
from pathlib import Path

from fastllm.llm import require
from fastllm.llm.checkpoint import Loaded, load_model, without_ties, write_model
from fastllm.llm.files import atomic, atomic_folder, check_free
from fastllm.llm.measure import compare, scorer, show_comparison
from fastllm.llm.packed import GROUPS, packing, quantize_model
from fastllm.llm.prompts import ChatTemplate
from fastllm.model import Transformer


def run(model, out, *, bits=8, group_size=None, head_bits=8, text=None, measure=True, fresh=False) -> dict:
    """Write the model of a folder in fewer bits to the folder `out`, and say what it cost and brought.

    text is a file whose perplexity is measured before and after, of an encoder-decoder pairs whose loss and BLEU are;
    speed is that of one sequence. Returns {"before": ..., "after": ...} with bytes, tokens_per_s and those, as far as
    they were measured. Raises
    ValueError for a model that is packed already, for options that do not fit, and for a folder `out` that is there,
    unless it has a model in it and `fresh` is given.
    """
    check_free("quantize", out, fresh=fresh, source=model)
    loaded = load_model(model, accelerate=False)
    if packing(loaded.model)["layers"]:
        raise ValueError(f"quantize: {model} is packed already; start from the model that it was made from")
    score = scorer(loaded, text, "quantize")  # before anything is written
    made = quantize_model(loaded.model, bits, group_size, head_bits=head_bits)
    save_packed(out, Loaded(made, loaded.tokenizer, loaded.meta, loaded.source))
    return compare(loaded, load_model(out), score) if measure else {}


def save_packed(out, loaded):
    """A model folder as `save_model` writes it, with what is packed and how in config.json."""
    model, tokenizer = loaded.model, loaded.tokenizer
    meta = {name: value for name, value in loaded.meta.items() if name != "new"} | dict(packing=packing(model))
    with atomic_folder(out) as folder:
        if isinstance(model, Transformer):
            write_model(folder, model, tokenizer, **meta)
        else:
            save_file = require("safetensors.torch", "safetensors").save_file
            save_file(without_ties(model.state_dict()), folder / "model.safetensors")
            config = model.config.to_dict() | dict(architectures=[type(model).__name__])
            # transformers alone would draw the weights that it does not find anew; of this type it refuses the folder.
            config |= dict(model_type="fastllm_packed", fastllm=meta | dict(model_type=model.config.model_type))
            with atomic(folder / "config.json") as file:
                json.dump(config, file, indent=1, default=str)
            if model.can_generate():
                model.generation_config.save_pretrained(folder)
            tokenizer.save(folder)
        ChatTemplate.load(loaded.source, tokenizer).save(folder)


def add_arguments(subparsers):
    parser = subparsers.add_parser("quantize", help="write a model with 8-bit or 4-bit weights")
    parser.add_argument("model", help="folder of a model: ours, a run's, or Hugging Face's")
    parser.add_argument("--out", help="folder to write (default: MODEL-int8 or MODEL-int4)")
    parser.add_argument("--fresh", action="store_true", help="replace the model in --out")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8)
    parser.add_argument("--group", type=int, choices=GROUPS, help="numbers that share a scale (default: 8: row, 4: 64)")
    parser.add_argument("--head-bits", type=int, choices=(8, 4), default=8, help="of the head, and of a tied embedding")
    parser.add_argument("--text", metavar="FILE", help="text whose perplexity, or pairs whose BLEU, is measured")
    parser.set_defaults(run=main)


def main(args) -> int:
    out = args.out or f"{Path(args.model)}-int{args.bits}"
    options = dict(bits=args.bits, group_size=args.group, head_bits=args.head_bits, text=args.text, fresh=args.fresh)
    show_comparison(run(args.model, out, **options), out)
    return 0
