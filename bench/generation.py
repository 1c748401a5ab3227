"""`python -m fastllm.bench.generation`: tokens per second of generation beside PyTorch's, one step after another.

A contender is one step of one sequence with `context` tokens in its cache; all have the same weights. PyTorch is
Hugging Face's Llama, eager with its dynamic cache and compiled with its static one. Contenders run in turn in one
process, as everywhere in this folder. "of read" is the rate at which weights are read over that of torch.sum.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch

from fastllm import generation, text
from fastllm.bench import timing

SIZES = {  # vocabulary, width, feed-forward, layers, heads, key heads; context
    "18M": (8192, 384, 1024, 6, 6, 6, 256),
    "124M": (50304, 768, 2048, 12, 12, 12, 512),
    "0.8B": (32000, 1536, 6144, 20, 16, 4, 1024),
}


def model_of(name, dtype):
    from transformers import LlamaConfig, LlamaForCausalLM

    vocabulary, width, feed, layers, heads, kv_heads, context = SIZES[name]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=feed,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context + 8,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval().to(dtype), context


def hugging_face_step(model, prompt, compiled):
    """A function that gives the logits [1, V] behind `prompt` and its last token once more, ever again at one place."""
    from transformers import DynamicCache, StaticCache

    T = prompt.shape[1]
    if compiled:
        cache = StaticCache(config=model.config, max_cache_len=T + 8)
        step = torch.compile(model, dynamic=False)
    else:
        cache, step = DynamicCache(config=model.config), model
    model(prompt, past_key_values=cache, use_cache=True)
    token, place = prompt[:, -1:], torch.tensor([[T]])

    def call():
        if compiled:
            for layer in cache.layers:  # a static cache counts for itself where the next token goes
                layer.cumulative_length.fill_(T)
        out = step(token, past_key_values=cache, position_ids=place, cache_position=place[0], use_cache=True)
        if not compiled:
            cache.crop(-1)
        return out.logits[:, -1]

    return call


def our_step(model, prompt, weights):
    session = generation.Plan(model, weights).session(1, prompt.shape[1] + 8)
    session.prefill([prompt[0]])
    token, place = prompt[:, -1].contiguous(), prompt.shape[1]

    def call():
        session.lengths.fill_(place)
        return session.step(token)

    d = session.plan.description
    linear = [x for layer in d.layers for x in (*layer.qkv, layer.out, layer.gate, layer.up, layer.down)]
    return call, sum(x.weight.nbytes for x in (*linear, d.head) if x is not None)


def main(arguments=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sizes", nargs="*", default=["18M", "124M"], help=f"of {', '.join(SIZES)}; default 18M 124M")
    offered, rivals = text.some_of(("fp32", "bf16", "int8", "int4")), text.some_of(("eager", "compile", "fp32"))
    parser.add_argument("--weights", type=offered, default=["bf16", "int8", "int4"], help="default bf16,int8,int4")
    parser.add_argument("--rivals", type=rivals, default=["eager", "compile"], help="eager,compile: bf16. fp32: eager")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--block-ms", type=float, default=40.0)
    parser.add_argument("--knobs", choices=("stock", "tuned"), default="stock")
    parser.add_argument("--out", metavar="FILE", help="write figures and raw samples there")
    options = parser.parse_args(arguments)
    turned = timing.tune() if options.knobs == "tuned" else []
    report = {"knobs": turned, "rows": []}
    for name in options.sizes:
        model, context = model_of(name, torch.float32)
        prompt = torch.randint(SIZES[name][0], (1, context))
        contenders, sizes = {}, {}
        with torch.no_grad():
            for weights in options.weights:
                contenders[weights], sizes[weights] = our_step(model, prompt, weights)
            narrow, _ = model_of(name, torch.bfloat16)
            if "eager" in options.rivals:
                contenders["torch bf16"] = hugging_face_step(narrow, prompt, False)
            if "compile" in options.rivals:
                contenders["torch bf16 compiled"] = hugging_face_step(narrow, prompt, True)
            if "fp32" in options.rivals:
                contenders["torch fp32"] = hugging_face_step(model, prompt, False)
            memory = torch.ones(max(sizes.values()) // 4)
            contenders["read"] = memory.sum
            samples, foreign = timing.interleave(contenders, options.rounds, options.block_ms / 1e3)
        rows, rivals = [], [n for n in contenders if n.startswith("torch")]
        bandwidth = memory.nbytes / statistics.median(samples["read"])
        for one in [*options.weights, *rivals]:
            spread = timing.Spread.of(samples[one])
            rate = 1 / spread.median
            versus = {rival: timing.ratios(samples[rival], samples[one]) for rival in rivals}
            share = f"{sizes[one] * rate / bandwidth:.0%}" if one in sizes else "-"
            cells = [f"{v.median:.2f}x ({v.p20:.2f}-{v.p80:.2f})" for v in versus.values()]
            rows.append((name, str(context), one, f"{rate:.1f}", share, *cells))
            versus = {rival: vars(v) for rival, v in versus.items()}
            row = {"model": name, "context": context, "weights": one, "tokens_per_s": rate, "ratio": versus}
            report["rows"].append(row | {"samples_s": samples[one], "read_gb_per_s": bandwidth / 1e9})
        header = ("model", "context", "weights", "tokens/s", "of read", *(f"vs {rival}" for rival in rivals))
        text.show(header, rows, f"{options.knobs} PyTorch{': ' + '; '.join(turned) if turned else ''}")
        print(f"read {bandwidth / 1e9:.1f} GB/s; others took {max(foreign):.0%} of the machine at most")
    if options.out:
        Path(options.out).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
