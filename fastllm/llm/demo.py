"""`fastllm demo`, what `make demo` runs: are the kernels right, is training the same with them, how fast is it.

Each stage writes report/stages/NAME.json under a key made of its settings, the data and the code; a stage whose key has
not changed is not run again. Whatever is measured is what is reported.
"""

import hashlib
import itertools
import json
import math
import platform
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import fastllm
from fastllm import info, verify
from fastllm.bench import store
from fastllm.llm import bytelevel, classify, report, require
from fastllm.llm.checkpoint import save_model
from fastllm.llm.compare import compare
from fastllm.llm.data import build_or_fall_back
from fastllm.llm.files import atomic
from fastllm.llm.train import Recipe
from fastllm.model import Transformer


@dataclass(frozen=True)
class Sizes:
    """How much of everything. The language model's context is GPT-2's; the classifier sees short articles whole."""

    dtypes: tuple = ("float32", "bfloat16")
    cases: int | None = None  # of `fastllm verify`, per op; None = all
    preset: str = "cpu"
    batch: int = 32
    max_len: int = 256
    compare_steps: int = 60
    epochs: int = 3
    context: int = 1024
    text_batch: int = 2
    text_compare_steps: int = 30
    text_steps: int = 240
    block: int = 6
    text_block: int = 3
    compare_seconds: float = 45  # a busy or slow machine is given up on, so that the whole stays under five minutes
    train_seconds: float = 75
    sample: int = 400


FULL = Sizes()
QUICK = Sizes(
    cases=2,
    compare_steps=20,
    epochs=1,
    context=256,
    text_compare_steps=12,
    text_steps=20,
    block=5,
    text_block=3,
    sample=100,
)
DATA, TEXT = "r8", "austen"


class Stages:
    """Runs stages, or takes what an earlier run with the same key has left in the folder."""

    def __init__(self, folder, common, fresh=False):
        self.folder, self.common, self.fresh, self.seconds = Path(folder), common, fresh, {}

    def run(self, name, settings, function, say=print):
        text = json.dumps([self.common, settings], sort_keys=True, default=str)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = self.folder / f"{name}.json"
        try:
            found = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            found = {}
        if found.get("key") == key and not self.fresh:
            say(f"{name}: done before, kept (--fresh runs it again)")
        else:
            say(f"{name} ...")
            before = time.perf_counter()
            found = dict(key=key, result=function())
            found["seconds"] = time.perf_counter() - before
            with atomic(path) as file:
                json.dump(found, file)
            say(f"{name}: {found['seconds']:.0f} s")
        self.seconds[name] = found["seconds"]
        return found["result"]


def code_digest() -> str:
    """Of everything in the package that a measurement depends on, the C++ binary included."""
    digest = hashlib.sha256(fastllm.__version__.encode())
    root = Path(fastllm.__file__).parent
    for path in sorted([*root.glob("**/*.py"), *(root / "bench").glob("cases.py"), *root.glob("_C.*")]):
        if path.name not in ("report.py", "cli.py", "info.py", "text.py", "readme.py"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def verify_ops(sizes) -> list[dict]:
    """The rows of `fastllm verify` as plain values."""
    from fastllm.bench.cases import VERIFY

    taken, cases = {}, []
    for case in VERIFY:
        taken[case.op] = taken.get(case.op, 0) + 1
        if sizes.cases is None or taken[case.op] <= sizes.cases:
            cases.append(case)
    rows = verify.run(dtypes=sizes.dtypes, cases=cases)
    return [dict(asdict(row), verdict=row.verdict) for row in rows]


def kernels_used(model, loss_of, batch) -> list[dict]:
    """What `fastllm.explain` says about one forward pass, equal calls counted."""
    names = "op", "backend", "kernel", "shape", "dtype", "reason"
    calls = fastllm.explain(loss_of, model, batch).calls
    counts = Counter(tuple(getattr(call, name) for name in names) for call in calls)
    return [dict(zip(names, call, strict=True)) | dict(calls=count) for call, count in counts.items()]


def naive_and_kernels(task_module, config, batches, recipe, block, what) -> dict:
    """The same parameters, batches and recipe on plain PyTorch and on the kernels, with dropout 0."""
    config, models = replace(config, dropout=0.0), {}
    for name, accelerated in (("naive PyTorch", False), ("fastllm", True)):
        torch.manual_seed(recipe.seed)
        models[name] = Transformer(config, accelerated)
    used = kernels_used(models["fastllm"], task_module.loss_of, batches[0])
    found = compare(models, batches, task_module.loss_of, task_module.tokens_in, recipe, block=block, what=what)
    parameters = sum(p.numel() for p in models["fastllm"].parameters())
    return found | dict(kernels=used, config=asdict(config), parameters=parameters)


def classifier_comparison(task, sizes) -> dict:
    recipe = Recipe(steps=sizes.compare_steps, lr=5e-4, warmup=20, seconds=sizes.compare_seconds)
    batches = list(itertools.islice(task.epochs(sizes.batch, recipe.seed), sizes.compare_steps))
    found = naive_and_kernels(classify, task.config(sizes.preset), batches, recipe, sizes.block, "classifier, in turn")
    longest = max(batch.tokens.shape[1] for batch in batches)
    return found | dict(shape=f"{sizes.batch} x up to {longest} words")


def classifier_training(task, sizes, folder) -> dict:
    per_epoch = math.ceil(len(task.splits["train"]) / sizes.batch)
    recipe = Recipe(
        steps=sizes.epochs * per_epoch,
        lr=1e-3,
        warmup=min(100, per_epoch),
        weight_decay=0.05,
        evaluate_every=max(1, per_epoch // 2),
        patience=3,
        seconds=sizes.train_seconds,
    )
    config = task.config(sizes.preset, dropout=0.2)
    model, history = classify.fit(task, config, recipe, batch=sizes.batch)
    save_model(folder, model, task.tokenizer, classes=task.classes)
    logits, labels = classify.predict(model, task, "test")
    test = {"transformer on fastllm": classify.scores(labels, logits.argmax(-1))} | classify.baselines(task)
    return dict(history=history, test=test, config=asdict(config))


def language_comparison(task, sizes) -> dict:
    recipe = Recipe(steps=sizes.text_compare_steps, lr=1e-3, warmup=10, seconds=sizes.compare_seconds)
    batches = list(itertools.islice(task.batches(sizes.text_batch, recipe.seed), sizes.text_compare_steps))
    config = task.config(sizes.preset)
    found = naive_and_kernels(bytelevel, config, batches, recipe, sizes.text_block, "language model, in turn")
    return found | dict(shape=f"{sizes.text_batch} x {sizes.context} bytes")


def language_training(task, sizes, folder) -> dict:
    recipe = Recipe(
        steps=sizes.text_steps,
        lr=3e-3,
        warmup=max(1, sizes.text_steps // 10),
        weight_decay=0.1,
        evaluate_every=max(1, sizes.text_steps // 5),
        patience=3,
        seconds=sizes.train_seconds,
    )
    config = task.config(sizes.preset, dropout=0.0)
    model, history = bytelevel.fit(task, config, recipe, batch=sizes.text_batch)
    save_model(folder, model, task.tokenizer)
    test = {"transformer on fastllm": bytelevel.perplexity(model, task.splits["test"], sizes.context, limit=1 << 16)}
    prompt = bytelevel.prompt_from(task)
    text = bytelevel.sample(model, task.tokenizer, prompt, min(sizes.sample, sizes.context - len(prompt.encode())))
    return dict(
        history=history, test=test | bytelevel.baselines(task), config=asdict(config), prompt=prompt, sample=text
    )


def run(out="report", *, quick=False, fresh=False, data=DATA, text=TEXT, data_root="data", threads=None, sizes=None):
    """Run what is not done yet, write out/index.html and out/demo.json, and return the content of the latter, which
    names the commit that this code is of.

    data and text name sets of `fastllm data`; what cannot be fetched is replaced by the zero-install set, and the
    report says so. Raises ImportError where a package of the `llm` extra is missing.
    """
    for module, package in (("sklearn", "scikit-learn"), ("matplotlib", None), ("jinja2", None)):
        require(module, package)
    if threads:
        torch.set_num_threads(threads)
    out, sizes, began = Path(out), sizes or (QUICK if quick else FULL), time.perf_counter()
    machine = info.collect()
    print(info.lines(machine) + "\n", flush=True)
    rows, prose = (build_or_fall_back(name, data_root) for name in (data, text))
    for meta in (rows, prose):
        print(f"data: {meta['name']}, {meta['origin']}")
        if "fallback" in meta:
            print(f"data: {meta['fallback']}")
    common = [code_digest(), torch.__version__, machine["cpu"], platform.python_version()]
    stages = Stages(out / "stages", common, fresh)
    result = dict(machine=machine_line(machine), info=machine, git=store.git(), sizes=asdict(sizes), quick=quick)
    result["data"] = dict(classifier=rows, language=prose)
    result["verify"] = stages.run("verify", asdict(sizes), lambda: verify_ops(sizes))
    task = classify.Task.load(rows["folder"], max_len=sizes.max_len)
    result["vocabulary"], result["left_out"] = task.tokenizer.size, task.left_out
    settings = [asdict(sizes), rows["fingerprint"]]
    result["classifier"] = stages.run("classifier-compared", settings, lambda: classifier_comparison(task, sizes))
    result["classifier_training"] = stages.run(
        "classifier-trained", settings, lambda: classifier_training(task, sizes, out / "classifier")
    )
    task = bytelevel.Task.load(prose["folder"], sizes.context)
    settings = [asdict(sizes), prose["fingerprint"]]
    result["language"] = stages.run("language-compared", settings, lambda: language_comparison(task, sizes))
    result["language_training"] = stages.run(
        "language-trained", settings, lambda: language_training(task, sizes, out / "language")
    )
    result["seconds"] = dict(stages.seconds, this_run=time.perf_counter() - began)
    result["tables"] = report.tables(result)
    result["summary"] = report.summary(result)
    with atomic(out / "demo.json") as file:
        json.dump(result, file)
    with atomic(out / "index.html") as file:
        file.write(report.html(result))
    return result


def machine_line(found: dict) -> str:
    cpu, versions = found["cpu"], found["versions"]
    kernels = f"C++ kernels {cpu['instruction_set']}" if cpu["instruction_set"] else "no C++ kernels: plain PyTorch"
    return f"{cpu['model']}, {cpu['threads']} threads, {kernels}, PyTorch {versions['torch']}, fp32 training"


def add_arguments(subparsers):
    parser = subparsers.add_parser("demo", help="verify the kernels, train with and without them, write a report")
    parser.add_argument("--out", default="report", help="folder of the report (default: report)")
    parser.add_argument("--quick", action="store_true", help="a minute instead of five: a look, not a measurement")
    parser.add_argument("--fresh", action="store_true", help="run finished stages again")
    parser.add_argument("--data", default=DATA, help=f"classification set of `fastllm data` (default: {DATA})")
    parser.add_argument("--text", default=TEXT, help=f"text of `fastllm data` (default: {TEXT})")
    parser.add_argument("--data-root", default="data", help="folder where the sets are built (default: data)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: PyTorch's choice)")
    parser.set_defaults(run=main)


def main(args) -> int:
    from fastllm.text import show

    options = {k: v for k, v in vars(args).items() if k not in ("command", "run", "traceback")}
    result = run(**options)
    print()
    for table in result["tables"]:
        show(table["header"], table["rows"], title=table["title"])
    print(f"sample of the language model, prompt {result['language_training']['prompt']!r}:")
    print(result["language_training"]["sample"] + "\n")
    for line in result["summary"]:
        print(line)
    print(f"report: {Path(args.out) / 'index.html'} and {Path(args.out) / 'demo.json'}")
    return int(any(row["verdict"].startswith("FAIL") for row in result["verify"]))
