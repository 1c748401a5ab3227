"""`fastllm classify`: train and evaluate the reference transformer as a text classifier on TSV files."""

import json
import math
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from fastllm.llm import require
from fastllm.llm.batches import Epochs, bucketed, collate
from fastllm.llm.data import SPLITS, read_tsv
from fastllm.llm.files import atomic
from fastllm.llm.runs import Run, add_run_arguments
from fastllm.llm.tokens import Tokenizer
from fastllm.llm.train import OPTIMIZERS, Recipe, train
from fastllm.model import Config, Transformer

# "paper": the sizes of Vaswani et al. 2017. "cpu": minutes on two cores. "small": for some ten thousand texts, which
# more would learn by heart: what is pooled is mostly the words' own embeddings, and these begin small.
PRESETS = {
    "small": dict(d_model=64, heads=4, layers=1, d_ff=128, pooling="mean-max")
    | dict(positions="learned", scale_embedding=False, activation="gelu"),
    "paper": dict(d_model=512, heads=8, layers=6, d_ff=2048),
    "cpu": dict(d_model=128, heads=4, layers=2, d_ff=512),
}


@dataclass
class Task:
    """A classification set as numbers: the splits as lists of (token numbers, class number)."""

    tokenizer: Tokenizer
    classes: list[str]
    splits: dict
    rows: dict
    left_out: dict = field(default_factory=dict)

    @classmethod
    def load(cls, folder, *, vocabulary=20000, max_len=256):
        """From train.tsv, valid.tsv, test.tsv. A class that is not in train is left out of the others, and counted."""
        rows, left_out = {}, {}
        for split in SPLITS:
            if not (Path(folder) / f"{split}.tsv").is_file():
                made = "a folder with train.tsv, valid.tsv and test.tsv is needed; `fastllm data FILE.tsv` makes one"
                raise ValueError(f"classify: there is no {folder}/{split}.tsv: {made}")
            rows[split], left_out[f"{split} malformed"] = read_tsv(Path(folder) / f"{split}.tsv")
        classes = sorted({label for _, label in rows["train"]})
        if len(classes) < 2:
            raise ValueError(f"{folder}/train.tsv: two classes at least are needed, got {classes}")
        number = {label: n for n, label in enumerate(classes)}
        for split in ("valid", "test"):
            known = [row for row in rows[split] if row[1] in number]
            left_out[f"{split} of unknown class"] = len(rows[split]) - len(known)
            rows[split] = known
        words = Tokenizer.train_words((text for text, _ in rows["train"]), vocabulary)
        splits = {}
        for split in SPLITS:
            encoded = words.encode_batch(text for text, _ in rows[split])
            # A text without any word is one unknown word, so that no sequence is empty.
            found = [ids[:max_len] or [words.unknown] for ids in encoded]
            splits[split] = [(ids, number[label]) for ids, (_, label) in zip(found, rows[split], strict=True)]
        return cls(words, classes, splits, rows, {what: n for what, n in left_out.items() if n})

    def make(self, split, indices):
        data = self.splits[split]
        return collate([data[i][0] for i in indices], [data[i][1] for i in indices])

    def batches(self, split, batch):
        """One pass over a split, sorted by length."""
        for indices in bucketed([len(tokens) for tokens, _ in self.splits[split]], batch, None):
            yield self.make(split, indices)

    def epochs(self, batch, seed) -> Epochs:
        """Passes over the train split without end."""
        lengths = [len(tokens) for tokens, _ in self.splits["train"]]
        return Epochs(lengths, batch, seed, lambda indices: self.make("train", indices))

    def config(self, preset="cpu", **changes) -> Config:
        sizes = dict(vocab=self.tokenizer.size, kind="encoder", classes=len(self.classes), max_len=1024)
        return Config(**sizes | PRESETS[preset] | changes)


def loss_of(model, batch, word_dropout=0.0):
    """The mean cross-entropy of texts that lack a share word_dropout of their words (Iyyer et al. 2015)."""
    tokens, mask = batch.tokens, batch.mask
    if word_dropout:
        tokens, mask = fewer_words(tokens, mask, word_dropout)
    return F.cross_entropy(model(tokens, mask), batch.labels)


def fewer_words(tokens, mask, share):
    """(tokens, mask) of texts without a random share of their words, each keeping one at least; what is left moves up,
    so that a step on shorter texts takes less time."""
    kept = torch.rand(tokens.shape, device=tokens.device) >= share
    if mask is not None:
        kept &= mask
    kept[:, 0] |= ~kept.any(1)
    order = (~kept).sort(dim=1, stable=True).indices[:, : int(kept.sum(1).max())]
    return tokens.gather(1, order), kept.gather(1, order)


def tokens_in(batch):
    return batch.real_tokens


def rows_in(batch):
    return len(batch.labels)


@torch.no_grad()
def predict(model, task, split, batch=64):
    """(logits [N, classes], labels [N]) over a split."""
    model.eval()
    pairs = [(model(b.tokens, b.mask), b.labels) for b in task.batches(split, batch)]
    return torch.cat([logits for logits, _ in pairs]), torch.cat([labels for _, labels in pairs])


def valid_loss(task):
    def evaluate(model):
        logits, labels = predict(model, task, "valid")
        return dict(
            loss=float(F.cross_entropy(logits, labels)), accuracy=float((logits.argmax(-1) == labels).float().mean())
        )

    return evaluate


def scores(truth, predicted) -> dict:
    """Accuracy, and precision, recall and F1 averaged over the classes with equal weight."""
    metrics = require("sklearn.metrics", "scikit-learn")
    precision, recall, f1, _ = metrics.precision_recall_fscore_support(
        truth, predicted, average="macro", zero_division=0
    )
    return dict(
        accuracy=float(metrics.accuracy_score(truth, predicted)),
        precision=float(precision),
        recall=float(recall),
        f1=float(f1),
    )


def baselines(task) -> dict:
    """Test scores of always the most frequent class, and of TF-IDF with logistic regression."""
    text = require("sklearn.feature_extraction.text", "scikit-learn")
    linear = require("sklearn.linear_model", "scikit-learn")
    (train_x, train_y), (test_x, test_y) = (zip(*task.rows[split], strict=True) for split in ("train", "test"))
    majority = max(sorted(set(train_y)), key=train_y.count)
    vectors = text.TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    model = linear.LogisticRegression(max_iter=1000, C=10.0)
    model.fit(vectors.fit_transform(train_x), train_y)
    return {
        "most frequent class": scores(test_y, [majority] * len(test_y)),
        "TF-IDF + logistic regression": scores(test_y, model.predict(vectors.transform(test_x))),
    }


def fit(task, config, recipe, *, batch=32, word_dropout=0.0, accelerated=True, run=None, what="classifier"):
    """Train on the task's train split. Returns the model with its best parameters, and the history."""
    torch.manual_seed(recipe.seed)
    model = Transformer(config, accelerated)
    history = train(
        model,
        task.epochs(batch, recipe.seed),
        partial(loss_of, word_dropout=word_dropout),
        lambda batch: tokens_in(batch) * (1 - word_dropout),  # that are read
        recipe,
        weight_of=rows_in,
        evaluate=valid_loss(task),
        run=run,
        tokenizer=task.tokenizer,
        meta=dict(classes=task.classes),
        what=what,
    )
    return model, history


def run(
    data,
    out="runs/classify",
    *,
    preset="small",
    epochs=5,
    batch=64,
    vocabulary=8000,
    max_len=256,
    optimizer="adamw",
    lr=2e-3,
    dropout=0.5,
    word_dropout=0.3,
    average=0.99,
    weight_decay=0.05,
    patience=3,
    best="accuracy",
    seed=0,
    naive=False,
    resume=False,
    fresh=False,
) -> dict:
    """Train, with checkpoints in `out` (see `runs.Run`), evaluate on test, write out/result.json and return it.

    The defaults are for ten thousand texts or fewer: a small model, much dropout, of words too, and an average of the
    parameters of all steps (`Recipe.average`). Longer texts want more words (vocabulary, max_len) and may lose more of
    them: bench/llm.py has what was best on validation texts of three sets.
    """
    settings = {k: v for k, v in locals().items() if k not in ("out", "resume", "fresh")}
    require("sklearn.metrics", "scikit-learn")
    task = Task.load(data, vocabulary=vocabulary, max_len=max_len)
    per_epoch = math.ceil(len(task.splits["train"]) / batch)
    recipe = Recipe(
        steps=epochs * per_epoch,
        optimizer=optimizer,
        lr=lr,
        warmup=min(200, per_epoch),
        weight_decay=weight_decay,
        average=average,
        evaluate_every=per_epoch,
        patience=patience,
        best=best,
        seed=seed,
    )
    config = task.config(preset, dropout=dropout)
    with Run(out, settings | dict(data=str(data)), resume=resume, fresh=fresh, free=("data",)) as run:
        options = dict(batch=batch, word_dropout=word_dropout, accelerated=not naive)
        model, history = fit(task, config, recipe, run=run, **options)
    logits, labels = predict(model, task, "test")
    result = dict(
        data=str(data),
        config=asdict(config),
        left_out=task.left_out,
        history=history,
        test={"transformer": scores(labels, logits.argmax(-1))} | baselines(task),
    )
    with atomic(Path(out) / "result.json") as file:
        json.dump(result, file)
    return result


def add_arguments(subparsers):
    parser = subparsers.add_parser("classify", help="train a text classifier on train.tsv, valid.tsv, test.tsv")
    parser.add_argument("data", help="folder with the three files, as `fastllm data` builds them")
    parser.add_argument("--out", default="runs/classify")
    parser.add_argument("--preset", choices=PRESETS, default="small", help="default small")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="adamw")
    help_best = "what the best evaluation is known by: loss (the lowest) or accuracy (default)"
    parser.add_argument("--best", choices=("loss", "accuracy"), default="accuracy", help=help_best)
    for name, kind, default in (
        ("epochs", int, 5),
        ("batch", int, 64),
        ("vocabulary", int, 8000),
        ("max-len", int, 256),
        ("lr", float, 2e-3),
        ("dropout", float, 0.5),
        ("word-dropout", float, 0.3),
        ("average", float, 0.99),
        ("weight-decay", float, 0.05),
        ("patience", int, 3),
        ("seed", int, 0),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default {default}")
    add_run_arguments(parser)
    parser.add_argument("--naive", action="store_true", help="plain PyTorch instead of the kernels")
    parser.set_defaults(run=main)


def main(args) -> int:
    options = {k: v for k, v in vars(args).items() if k not in ("command", "run", "traceback")}
    result = run(**options)
    show_scores(result["test"])
    if result["left_out"]:
        said = ", ".join(f"{what} ({count})" for what, count in result["left_out"].items())
        print(f"rows left out: {said}; `fastllm data FILE` writes down which and why")
    history = result["history"]
    print(f"{history['tokens_per_s']:,.0f} tokens/s; best at step {history['best']['step']}; {history['stopped']}")
    print(f"checkpoints and result: {args.out}")
    return 0


def show_scores(test: dict):
    from fastllm.text import show

    names = ("accuracy", "precision", "recall", "f1")
    show(("test", *names), [(who, *(f"{found[name]:.3f}" for name in names)) for who, found in test.items()])
