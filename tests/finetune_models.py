"""Tiny models and reviews to fine-tune on, as fixtures: a plugin of pytest. Skipped where a package is missing."""

import csv

import pytest
import torch
from conftest import tiny_corpus

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")
pytest.importorskip("sklearn")
pytest.importorskip("sacrebleu")
pytest.importorskip("rouge_score")
pytest.importorskip("jinja2")

from fastllm.llm.checkpoint import save_model
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

SIZES = dict(d_model=16, heads=2, layers=2, d_ff=32, dropout=0.0, max_len=128)


def write(path, header, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        csv.writer(file, delimiter="\t", lineterminator="\n").writerows([header, *table])


@pytest.fixture
def reviews(tmp_path):
    for split, table in tiny_corpus(n=96).items():
        write(tmp_path / "reviews" / f"{split}.tsv", ("text", "label"), table)
    return tmp_path / "reviews"


@pytest.fixture
def words():
    texts = [text for table in tiny_corpus().values() for text, _ in table]
    return Tokenizer.train_words([*texts, "where is the cat dog mat log on a red blue green"] * 2, 400)


def own(folder, tokenizer, **changes):
    torch.manual_seed(0)
    model = Transformer(Config(vocab=tokenizer.size, **SIZES | changes))
    save_model(folder, model, tokenizer)
    return folder


@pytest.fixture
def encoder(tmp_path, words):
    return own(tmp_path / "encoder", words, kind="encoder")


@pytest.fixture
def decoder(tmp_path):
    return own(tmp_path / "decoder", Tokenizer.bytes())


@pytest.fixture
def bert(tmp_path, words):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    sizes |= dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.3)
    config = transformers.BertConfig(vocab_size=words.size, max_position_embeddings=128, **sizes)
    save_model(tmp_path / "bert", transformers.BertModel(config), words)
    return tmp_path / "bert"
