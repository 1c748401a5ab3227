"""`fastllm evaluate`: score a model on a test file, row by row, and write a JSON file and a page."""

import json
import time
from pathlib import Path

import torch

import fastllm
from fastllm import drawing, info
from fastllm.llm import distributed, report, require, rows
from fastllm.llm.checkpoint import load_model
from fastllm.llm.files import atomic_folder, check_free
from fastllm.llm.finetune import NAMES, task_for
from fastllm.llm.ranks import Ranks

# Of each task: the title of its page, and the scores that stand on top of it.
TITLES = {
    "classification": ("Classification", ("accuracy", "precision", "recall", "f1")),
    "language-model": ("Language model", ("perplexity", "bits_per_byte", "loss")),
    "encoder-decoder": ("Sequence to sequence", ("bleu", "chrf", "rougeL", "perplexity")),
    "question-answering": ("Question answering", ("exact_match", "f1")),
}
FILES = ("result.json", "index.html", "confusion.png")
WORDS = {  # scores as people write them
    "f1": "F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "exact_match": "exact match",
    "bits_per_byte": "bits per byte",
}


def run(
    model,
    data,
    *,
    task=None,
    out=None,
    split="test",
    batch=32,
    max_len=None,
    naive=False,
    fresh=False,
    ranks=None,
) -> dict:
    """Score the model of a folder on a file, or on the file `split` of a folder.

    task says what a model of Hugging Face is to be loaded as ("classification", "language", "seq2seq", "questions");
    a model that was fine-tuned knows it. Memory does not grow with the data, and losses over a vocabulary are computed
    without the logits in memory. Several processes (`distributed.start`) each score a share of the rows with the whole
    model; what they return is one and the same, and the first of them writes.
    Writes out/result.json, out/index.html and for classes out/confusion.png where `out` is given, and returns the
    content of the first. Raises ValueError for a model and data that do not fit, and for a folder `out` that is there,
    unless it has an evaluation in it, nothing else, and `fresh` is given.
    """
    for needed, package in (("matplotlib", None), ("jinja2", None)):
        require(needed, package)
    if task is not None and task not in NAMES:
        raise ValueError(f"evaluate: the task must be one of {', '.join(NAMES)}, got {task!r}")
    if out is not None:
        check_free("evaluate", out, fresh=fresh, mark="result.json", names=FILES)
    loaded = load_model(model, task=NAMES.get(task), accelerate=not naive)
    made = task_for(loaded, max_len)
    path = Path(data)
    path = rows.find(data, split, made.extensions) if path.is_dir() else path
    if path.suffix not in made.extensions:
        raise ValueError(f"evaluate: {path} is no file for {made.name}: {' or '.join(made.extensions)} is needed")
    began = time.perf_counter()
    ranks = ranks or Ranks()
    scores = made.scores(loaded.model, made.rows(path), batch, ranks=ranks)
    result = dict(
        task=made.name,
        model=str(model),
        data=str(path),
        scores=scores,
        seconds=time.perf_counter() - began,
        settings=dict(batch=batch, max_len=made.max_len, naive=naive, processes=ranks.ranks),
        fastllm=fastllm.__version__,
        torch=torch.__version__,
        cpu=info.cpu_model(),
        threads=torch.get_num_threads(),
    )
    if out is not None and ranks.first:
        write(Path(out), result)
    return result


def write(out: Path, result: dict):
    with atomic_folder(out) as folder:
        if "confusion" in result["scores"]:
            made = confusion_figure(result["scores"], colours=("#1b2330", "#0b6e99"))
            made.savefig(folder / "confusion.png", dpi=150, facecolor="white", transparent=False)
        (folder / "index.html").write_text(html(result), "utf-8")
        (folder / "result.json").write_text(json.dumps(result, indent=1), "utf-8")


def named(score: str) -> str:
    return WORDS.get(score, score)


def shown(value) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def html(result) -> str:
    """The page. Everything is in it: no script, no font, no picture is fetched."""
    scores, (title, first) = result["scores"], TITLES[result["task"]]
    macro = {name: " (macro)" for name in scores.get("micro", ())}
    facts = [(shown(scores[name]), named(name) + macro.get(name, "")) for name in first if name in scores]
    values = [(name, value) for name, value in scores.items() if isinstance(value, (int, float))]
    numbers = [[named(name) + macro.get(name, ""), shown(value)] for name, value in values]
    numbers += [[f"{named(name)} (micro)", shown(v)] for name, v in scores.get("micro", {}).items()]
    numbers += [[f"{named(name)}, by sacrebleu", text] for name, text in scores.get("signatures", {}).items()]
    tables = dict(scores=dict(title="On the whole file", header=["score", "value"], rows=numbers), examples=None)
    confusion = None
    if "classes" in scores:
        confusion = drawing.svg(confusion_figure(scores), "confusion")
        header = ["class", "precision", "recall", "F1", "rows"]
        each = [[name, *map(shown, found.values())] for name, found in scores["classes"].items()]
        tables["classes"] = dict(title="Class by class", header=header, rows=each)
    if examples := scores.get("examples"):
        what = "Some mistakes" if result["task"] == "classification" else "Some answers"
        rows = [[str(value)[:400] for value in example.values()] for example in examples]
        tables["examples"] = dict(title="", heading=what, header=list(examples[0]), rows=rows)
    about = [[name, str(result[name])] for name in ("cpu", "threads", "torch", "fastllm")]
    about += [[name.replace("_", " "), str(value)] for name, value in result["settings"].items()]
    about.append(["seconds", f"{result['seconds']:.1f}"])
    tables["about"] = dict(title="", header=["", ""], rows=about)
    return report.render("evaluate.html", result=result, title=title, facts=facts, confusion=confusion, tables=tables)


def confusion_figure(scores, colours=(drawing.INK, drawing.OURS)):
    """The confusion matrix as fields whose depth is their share of the row."""
    ink, colour = colours
    classes, counts = list(scores["classes"]), scores["confusion"]
    size = len(classes)
    inches = min(14.0, max(3.6, 1.4 + 0.42 * size))
    made, axis = drawing.figure(inches + 0.6, inches)
    for t, row in enumerate(counts):
        for p, count in enumerate(row):
            share = count / sum(row) if sum(row) else 0.0
            axis.fill([p, p + 1, p + 1, p], [t, t, t + 1, t + 1], color=colour, alpha=0.85 * share, linewidth=0)
            if count:
                axis.text(p + 0.5, t + 0.5, count, ha="center", va="center", color=ink, fontsize=10 if size < 9 else 7)
    axis.set(xlim=(0, size), ylim=(size, 0), xlabel="said", ylabel="true", aspect="equal")
    places = [n + 0.5 for n in range(size)]
    turn = dict(rotation=45, ha="right", rotation_mode="anchor") if max(map(len, classes)) * size > 24 else {}
    axis.set_xticks(places, [c[:24] for c in classes], color=ink, **turn)
    axis.set_yticks(places, [c[:24] for c in classes], color=ink)
    axis.grid(False)
    return made


def add_arguments(subparsers):
    parser = subparsers.add_parser("evaluate", help="score a model on a test file; write a JSON file and a page")
    parser.add_argument("model", help="folder of a model, or of a run")
    parser.add_argument("data", help="a file, or a folder with one named test")
    parser.add_argument("--task", choices=NAMES, help="of a model of Hugging Face that does not say")
    parser.add_argument("--out", default="evaluation", help="folder of the result (default: evaluation)")
    parser.add_argument("--fresh", action="store_true", help="replace the evaluation in --out")
    parser.add_argument("--split", default="test", help="the file in a folder (default: test)")
    parser.add_argument("--batch", type=int, default=32, help="default 32")
    parser.add_argument("--max-len", type=int, help="tokens of an example (default: as it was trained)")
    parser.add_argument("--naive", action="store_true", help="plain PyTorch instead of the kernels")
    parser.set_defaults(run=main)


def main(args) -> int:
    from fastllm.llm.finetune import show_scores

    options = {k: v for k, v in vars(args).items() if k not in ("command", "run", "traceback")}
    with distributed.start(cure="nothing was written") as ranks:
        result = run(**options, ranks=ranks)
        show_scores(result["scores"])
        print(f"{result['seconds']:.1f} s; the page: {Path(args.out) / 'index.html'}")
    return 0
