"""Training, evaluation and the demo, on small texts of our own."""

import copy
import json
import math
import subprocess
import sys

import pytest
import torch
from check import assert_as_accurate

from fastllm.cli import main as cli
from fastllm.llm import bytelevel, classify, data, demo, report, require, train
from fastllm.llm.checkpoint import load_model
from fastllm.llm.compare import compare
from fastllm.llm.runs import Run
from fastllm.model import Config, Transformer


def tiny_task(registered):
    return classify.Task.load(data.build("tiny", registered / "tiny")["folder"])


TINY = dict(d_model=16, heads=2, layers=1, d_ff=32, dropout=0.0)


def test_schedule():
    recipe = train.Recipe(steps=100, lr=1.0, warmup=10, final_lr=0.1)
    rates = [recipe.lr_at(step) for step in range(100)]
    assert rates[:10] == [n / 10 for n in range(1, 11)]
    assert rates[10] == 1.0 and rates[10:] == sorted(rates[10:], reverse=True) and 0.1 <= rates[-1] < 0.101
    with pytest.raises(ValueError, match="optimizer must be one of"):
        train.Recipe(optimizer="lion")


@pytest.mark.parametrize("optimizer", train.OPTIMIZERS)
def test_classifier_learns_and_is_deterministic(registered, optimizer, tmp_path):
    task = tiny_task(registered)
    lr = 0.3 if optimizer == "sgd" else 1e-2
    recipe = train.Recipe(steps=60, optimizer=optimizer, lr=lr, warmup=5, evaluate_every=20)
    runs = []
    for n in range(2 if optimizer == "adamw" else 1):
        with Run(tmp_path / str(n)) as run:
            model, history = classify.fit(task, task.config(**TINY | dict(dropout=0.1)), recipe, batch=16, run=run)
        runs.append(history["loss"])
    assert all(run == runs[0] for run in runs)
    json.dumps(history)
    logits, labels = classify.predict(model, task, "test")
    assert classify.scores(labels, logits.argmax(-1))["accuracy"] == 1.0
    saved = load_model(tmp_path / "0", task="classification", accelerate=False)
    assert saved.meta["metrics"] == history["best"] and saved.meta["classes"] == task.classes
    assert torch.equal(classify.predict(saved.model, task, "test")[0].argmax(-1), logits.argmax(-1))


def test_the_callers_random_state_is_left_alone(registered):
    task = tiny_task(registered)
    model = Transformer(task.config(**TINY))
    before = torch.random.get_rng_state()
    train.train(model, task.epochs(8, 0), classify.loss_of, classify.tokens_in, train.Recipe(steps=2))
    assert torch.equal(before, torch.random.get_rng_state())


def test_early_stopping_keeps_the_best(registered, tmp_path):
    task = tiny_task(registered)
    model = Transformer(task.config(**TINY))
    losses, kept = iter([3.0, 2.0, 2.5, 2.1, 9.0]), []

    def evaluate(model):
        kept.append({name: value.clone() for name, value in model.state_dict().items()})
        return dict(loss=next(losses))

    recipe = train.Recipe(steps=50, evaluate_every=2, patience=2)
    with Run(tmp_path / "run") as run:
        parts = model, task.epochs(8, 0), classify.loss_of, classify.tokens_in, recipe
        history = train.train(*parts, evaluate=evaluate, run=run, tokenizer=task.tokenizer)
    assert len(history["loss"]) == 8 and history["stopped"].startswith("early")
    assert history["best"] == dict(step=4, loss=2.0)
    for state in (model.state_dict(), load_model(tmp_path / "run").model.state_dict()):
        assert all(torch.equal(value, kept[1][name]) for name, value in state.items())
    assert not model.training


def test_the_best_is_known_by_the_score_that_is_named(registered):
    task = tiny_task(registered)
    model, found = Transformer(task.config(**TINY)), iter([(1.0, 0.5), (2.0, 0.7), (3.0, 0.7), (4.0, 0.6), (0.1, 0.9)])
    recipe = train.Recipe(steps=50, evaluate_every=2, patience=2, best="accuracy")
    history = train.train(
        *(model, task.epochs(8, 0), classify.loss_of, classify.tokens_in, recipe),
        evaluate=lambda model: dict(zip(("loss", "accuracy"), next(found), strict=True)),
    )
    assert history["best"] == dict(step=4, loss=2.0, accuracy=0.7) and len(history["loss"]) == 8
    assert history["stopped"] == "early: no better validation accuracy in 2 evaluations"


def test_time_that_is_used_up_ends_a_run(registered):
    task = tiny_task(registered)
    models = [Transformer(task.config(**TINY)) for _ in range(2)]
    recipe = train.Recipe(steps=50, evaluate_every=20, seconds=0.0)
    history = train.train(
        models[0], task.epochs(8, 0), classify.loss_of, classify.tokens_in, recipe, evaluate=classify.valid_loss(task)
    )
    assert history["stopped"] == "0 s were used up after 1 of 50 steps" and history["best"]["step"] == 1
    batches = [task.epochs(8, 0)[0]] * 20
    found = compare(dict(a=models[0], b=models[1]), batches, classify.loss_of, classify.tokens_in, recipe, block=2)
    assert found["steps"] == 6


def test_a_loss_that_is_not_finite_stops_the_run(registered):
    task = tiny_task(registered)
    model = Transformer(task.config(**TINY))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 1"):
        train.train(
            model,
            task.epochs(8, 0),
            lambda m, b: classify.loss_of(m, b) * math.nan,
            classify.tokens_in,
            train.Recipe(steps=5),
        )


def test_weight_decay_spares_embeddings_norms_and_biases():
    model = Transformer(Config(vocab=9, kind="encoder", classes=2, **TINY))
    stepper = train.Stepper(model, train.Recipe(weight_decay=0.5), None)
    decayed, spared = (group["params"] for group in stepper.optimizer.param_groups)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed)
    assert {"embedding.weight", "head.bias", "encoder.norm.weight"} <= {names[id(p)] for p in spared}


def test_compare_gives_both_the_same_batches(registered):
    task = tiny_task(registered)
    config, models = task.config(**TINY), {}
    for name, accelerated in (("naive", False), ("ours", True)):
        torch.manual_seed(0)
        models[name] = Transformer(config, accelerated)
    batches = [task.epochs(16, seed)[0] for seed in range(9)]
    exact = copy.deepcopy(models["naive"]).double()
    recipe = train.Recipe(
        steps=9, optimizer="sgd", lr=0.1, warmup=1
    )  # Adam turns rounding of a zero gradient into steps
    found = compare(models, batches, classify.loss_of, classify.tokens_in, recipe, block=2)
    assert found["loss"]["naive"][0] != found["loss"]["naive"][-1]
    assert len(found["loss"]["ours"]) == 9 and len(found["ratio"]["values"]) == 4
    stepper = train.Stepper(exact, recipe, classify.loss_of)
    truth = torch.tensor([stepper([batch]) for batch in batches], dtype=torch.float64)
    # Roundings of nine steps add up, luckily or not: fp16 sees what is more than that.
    ours, naive = (torch.tensor(found["loss"][name]).half() for name in ("ours", "naive"))
    assert_as_accurate(ours, naive, truth)
    assert found["ratio"]["p20"] <= found["ratio"]["median"] <= found["ratio"]["p80"]
    json.dumps(found)


def test_words_that_are_dropped_are_not_read(registered):
    task = tiny_task(registered)
    model, batch = Transformer(task.config(**TINY)), task.make("train", range(40))
    read = []
    model.embedding.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    for share in (0.0, 1.0):
        classify.loss_of(model, batch, share)
    assert torch.equal(read[0], batch.tokens) and torch.equal(read[1], batch.tokens[:, :1])
    tokens, mask = classify.fewer_words(batch.tokens, batch.mask, 0.4)
    assert tokens.shape == mask.shape and int(mask.sum(1).max()) == tokens.shape[1]
    assert 0.4 < int(mask.sum()) / batch.real_tokens < 0.8
    for row, kept, whole, real in zip(tokens, mask, batch.tokens, batch.mask, strict=True):
        left, words = row[kept].tolist(), iter(whole[real].tolist())
        assert left and all(word in words for word in left)  # in the order that they had
    counted = [
        classify.fit(task, task.config(**TINY), train.Recipe(steps=2), batch=16, word_dropout=share)[1]["tokens"]
        for share in (0.0, 0.5)
    ]
    assert counted[1] == [n / 2 for n in counted[0]]


def test_classes_that_train_lacks_are_left_out(registered):
    folder = registered / "tiny"
    data.build("tiny", folder)
    with open(folder / "test.tsv", "a") as file:
        file.write("a text\tugly\n")
    task = classify.Task.load(folder)
    assert task.classes == ["bad", "good"] and task.left_out == {"test of unknown class": 1}
    assert len(task.splits["test"]) == len(task.rows["test"]) == 24


def test_what_is_no_folder_of_rows_is_said(tmp_path):
    (tmp_path / "rows.tsv").write_text("text\tlabel\na\tb\n")
    for path in ("rows.tsv", "nowhere"):
        with pytest.raises(ValueError, match=rf"classify: there is no .*{path}/train.tsv: .*`fastllm data FILE.tsv`"):
            classify.Task.load(tmp_path / path)


def test_scores_are_macro_averages():
    found = classify.scores([0, 0, 0, 1], [0, 0, 0, 0])
    assert found == dict(accuracy=0.75, precision=0.375, recall=0.5, f1=pytest.approx(3 / 7))


def test_perplexity_of_a_model_that_knows_nothing(registered):
    task = bytelevel.Task.load(data.build("prose", registered / "prose")["folder"], 32)
    model = Transformer(task.config(**TINY))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    found = bytelevel.perplexity(model, task.splits["test"], 32)
    assert found["perplexity"] == pytest.approx(task.tokenizer.size)
    with pytest.raises(ValueError, match="too few for a context"):
        bytelevel.Task.load(registered / "prose", 10**6)


def test_commands(registered, tmp_path, capsys):
    assert cli(["data", "tiny", "--out", str(tmp_path / "t")]) == 0
    assert "160" in capsys.readouterr().out
    with open(tmp_path / "t" / "test.tsv", "a") as file:
        file.write("a text\tugly\nno label\n")
    assert cli(["classify", str(tmp_path / "t"), "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert load_model(tmp_path / "run", task="classification")
    said = capsys.readouterr().out
    assert "TF-IDF" in said and "rows left out: test malformed (1), test of unknown class (1)" in said
    assert cli(["data", "gone", "--out", str(tmp_path / "g")]) == 2
    assert capsys.readouterr().err == "fastllm: error: no network here\n"


SMALL = demo.Sizes(
    dtypes=("float32",),
    cases=1,
    batch=16,
    compare_steps=4,
    epochs=1,
    context=32,
    text_batch=2,
    text_compare_steps=4,
    text_steps=6,
    block=2,
    text_block=2,
    sample=20,
)


def test_demo_writes_a_report_and_skips_what_is_done(registered, tmp_path, capsys):
    options = dict(data="gone", text="silent", data_root=registered, sizes=SMALL)
    first = demo.run(tmp_path / "report", **options)
    said = capsys.readouterr().out
    assert "gone is not available, so tiny is used: no network here" in said and "kept" not in said
    stored = json.loads((tmp_path / "report" / "demo.json").read_text())
    assert stored["tables"] == first["tables"] and {"machine", "git", "info", "verify"} <= stored.keys()
    assert all(len(row) == len(table["header"]) for table in stored["tables"] for row in table["rows"])
    page = (tmp_path / "report" / "index.html").read_text()
    assert page.count("<svg") == 6 and "no network here" in page
    for leftover in ("{{", "{%", "#01020", 'src="http', 'href="http://fonts'):
        assert leftover not in page

    second = demo.run(tmp_path / "report", **options)
    assert capsys.readouterr().out.count("done before, kept") == 5
    assert second["classifier"] == json.loads(json.dumps(first["classifier"]))

    stage = tmp_path / "report" / "stages" / "language-compared.json"
    stage.write_text(stage.read_text()[:100])  # cut short
    demo.run(tmp_path / "report", **options)
    assert capsys.readouterr().out.count("done before, kept") == 4


def test_the_report_shows_failures(registered, tmp_path):
    result = demo.run(tmp_path / "report", data="tiny", text="prose", data_root=registered, sizes=SMALL)
    row = json.loads(json.dumps(result["verify"][0]))
    row.update(fallback="", verdict="FAIL: <script>", accuracy=row["accuracy"] | dict(share=3.0, problem="<script>"))
    result["verify"][0] = row
    result["tables"] = report.tables(result)
    page = report.html(result)
    assert "FAIL: &lt;script&gt;" in page and "<script>" not in page
    assert any("1 are not" in line for line in report.summary(result))


def test_a_stage_runs_again_when_its_settings_change(tmp_path):
    calls = []
    for settings, fresh in ((1, False), (1, False), (2, False), (2, True)):
        demo.Stages(tmp_path, "common", fresh).run("stage", settings, lambda: calls.append(1), say=lambda text: None)
    assert len(calls) == 3
    demo.Stages(tmp_path, "other code").run("stage", 2, lambda: calls.append(1), say=lambda text: None)
    assert len(calls) == 4


def test_missing_packages_are_named():
    with pytest.raises(ImportError, match=r"no_such_thing.*pip install 'fastllm-kernels\[llm\]'"):
        require("no_such_thing")


def test_fastllm_imports_nothing_that_is_optional():
    """Of fastllm and of every module of llm: what is not PyTorch, and its compiler, is imported when it is used."""
    modules = [
        "fastllm",
        "fastllm.nn",
        "fastllm.model",
        *(f"fastllm.llm.{name}" for name in ("data", "demo", "pretrain")),
    ]
    optional = {"rich", "matplotlib", "sklearn", "jinja2", "torch._dynamo"}
    script = f"import sys, {', '.join(modules)}; print(sorted({optional} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
