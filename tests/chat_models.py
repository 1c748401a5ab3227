"""A tiny chat model with a byte vocabulary, for what serves one; skipped where what the server needs is missing."""

import pytest
import torch

pytest.importorskip("tokenizers", reason="tokenizers is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("safetensors", reason="safetensors is not installed")
pytest.importorskip("starlette", reason="starlette is not installed")
pytest.importorskip("uvicorn", reason="uvicorn is not installed")
pytest.importorskip("httpx", reason="httpx is not installed")

import httpx  # noqa: F401, for the tests

from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

TOKENS = Tokenizer.bytes(special=("<|im_start|>", "<|im_end|>"))
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SIZES = dict(vocab=TOKENS.size, d_model=48, heads=4, layers=2, d_ff=80, max_len=600, dropout=0.0)
SIZES |= dict(norm="rmsnorm", positions="rotary", activation="swiglu", tie_embeddings=False)


def model_of(**changes):
    torch.manual_seed(0)
    model = Transformer(Config(**SIZES | changes)).eval()
    with torch.no_grad():
        model.head.weight.mul_(3)  # so that tokens vary
        model.head.weight[TOKENS.eos] = 0  # and none is the end
    return model
