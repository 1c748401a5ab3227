"""Data, tokens, training, evaluation and the demo, on small texts of our own."""

import copy
import json
import math
import struct
import subprocess
import sys
import zlib

import pytest
import torch
from check import assert_as_accurate

from fastllm.cli import main as cli
from fastllm.llm import classify, data, demo, pretrain, report, require, sources, tokens, train
from fastllm.model import Config, Transformer

REVIEWS = """category,text,movie_name,has_plot_and_reviews
fresh,"A delight, from
start to end",alpha,True
rotten,Dull.,alpha,True
plot,A man walks.,alpha,True
FRESH?,Unknown label,beta,True
rotten,,beta,True
fresh,DULL.,beta,True
rotten,cut short
fresh,"one, too, many",gamma,True,surplus
"""


def tiny_corpus(seed=0, n=160):
    """Two classes that one word decides, and text in which every fourth letter is known from the one before it."""
    random = torch.Generator().manual_seed(seed)
    filler = "lorem ipsum dolor sit amet consetetur".split()

    def row(i):
        label = ("bad", "good")[i % 2]
        length = int(torch.randint(3, 12, (1,), generator=random))
        body = [filler[j] for j in torch.randint(len(filler), (length,), generator=random)]
        body.insert(int(torch.randint(length, (1,), generator=random)), {"bad": "awful", "good": "lovely"}[label])
        return f"{' '.join(body)} {i}", label

    return {split: [row(i) for i in range(size)] for split, size in (("train", n), ("valid", 24), ("test", 24))}


@pytest.fixture
def registered(monkeypatch, tmp_path):
    """The sets `tiny` and `prose` and the folder that they are built in; `gone` and `silent` cannot be had."""

    def unavailable():
        raise sources.Unavailable("no network here")

    prose = {
        split: "the cat sat on the mat; the dog lay on the log.\n" * n for split, n in zip(sources.SPLITS, (60, 8, 8))
    }
    builders = {"tiny": lambda: sources.Corpus(tiny_corpus(), "this file"), "gone": unavailable}
    texts = {"prose": lambda: sources.Corpus(prose, "this file"), "silent": unavailable}
    monkeypatch.setattr(data, "CLASSIFICATION", builders)
    monkeypatch.setattr(data, "TEXT", texts)
    monkeypatch.setattr(data, "OFFLINE", {"classification": "tiny", "text": "prose"})
    return tmp_path / "data"


def tiny_task(registered):
    return classify.Task.load(data.build("tiny", registered / "tiny")["folder"])


TINY = dict(d_model=16, heads=2, layers=1, d_ff=32, dropout=0.0)


# ---- sources


def test_reviews_are_parsed_and_what_is_wrong_is_counted():
    rows, counts = sources.parse_reviews(REVIEWS)
    assert rows == [("A delight, from start to end", "fresh", "alpha"), ("Dull.", "rotten", "alpha")]
    assert counts == dict(rows=8, malformed=4, plots=1, duplicates=1)


def test_tab_files_keep_quotes_and_count_what_is_wrong():
    text = (
        'Category\tText\nd\tstring\nclass\t\n\nearn\tthe "first line\nearn\t\n\tno label\nno tab\nacq\tit"s\ttwo tabs\n'
    )
    rows, counts = sources.parse_tab(text)
    assert rows == [('the "first line', "earn"), ('it"s two tabs', "acq")]
    assert counts == dict(rows=5, malformed=3)


def test_official_splits_share_no_text():
    header = "Category\tText\nd\tstring\nclass\t\n"
    train_text = header + "".join(f"earn\ttext {i}\n" for i in range(200)) + "earn\tIn Both\nacq\ttext 3\n"
    corpus = sources.split_officially(train_text, header + "acq\tin both\nacq\tlast\nacq\tlast\n", "here")
    texts = {split: {text.lower() for text, _ in rows} for split, rows in corpus.splits.items()}
    assert texts["test"] == {"in both", "last"}
    assert len(texts["train"]) + len(texts["valid"]) == 200 and 5 < len(texts["valid"]) < 50
    assert not texts["train"] & texts["valid"] and not (texts["train"] | texts["valid"]) & texts["test"]
    assert corpus.counts == dict(rows=205, malformed=0, duplicates=3)


def test_splits_by_key_are_stable_and_sized():
    found = [sources.split_of(str(i)) for i in range(2000)]
    assert found == [sources.split_of(str(i)) for i in range(2000)]
    assert 1500 < found.count("train") < 1700 and found.count("test") > 150 < found.count("valid")


def test_topics_that_contain_each_other_share_no_paragraph():
    topics = {"big": "one\n\ntwo\n\nthree"} | {f"part {i}": f"two\n\nown {i}" for i in range(40)}
    splits, repeats = sources.split_topics(topics)
    paragraphs = [p for text in splits.values() for p in text.strip().split("\n\n")]
    assert sorted(paragraphs) == sorted(["one", "two", "three", *(f"own {i}" for i in range(40))])
    assert repeats == 40


def r_strings(strings):
    out = b"X\n" + struct.pack(">3i", 3, 0x40201, 0x30500) + struct.pack(">i", 5) + b"UTF-8"
    out += struct.pack(">2i", 16, len(strings))
    for s in strings:
        raw = b"" if s is None else s.encode()
        out += struct.pack(">2i", 9, -1 if s is None else len(raw)) + raw
    return out


def test_r_database_is_read_without_r():
    database = b""
    for lines in (["EMMA", "", "Emma Woodhouse, handsome\u2014"], ["Persuasion", None, "Sir Walter"]):
        raw = r_strings(lines)
        database += struct.pack(">I", len(raw)) + zlib.compress(raw)
    novels = sources.parse_novels(database)
    assert novels == {"EMMA": "EMMA\n\nEmma Woodhouse, handsome\u2014\n", "Persuasion": "Persuasion\n\nSir Walter\n"}
    wrong = zlib.compress(r_strings(["x"]).replace(struct.pack(">i", 16), struct.pack(">i", 13)))
    for broken in (database[:-9], b"\0\0\0\1not zlib", b"\0\0\0\1" + wrong):
        with pytest.raises(sources.Unavailable, match="not as expected"):
            sources.parse_novels(broken)


@pytest.mark.parametrize("name", ["pydoc", "stdlib-docstrings"])
def test_zero_install_sets(name, tmp_path):
    meta = data.build(name, tmp_path)
    assert all(meta["splits"][split] for split in sources.SPLITS)
    if name == "pydoc":
        texts = [(tmp_path / f"{split}.txt").read_text() for split in sources.SPLITS]
        assert sum(map(len, texts)) > 200_000
    else:
        assert len(meta["classes"]) >= 4
        rows = {split: data.read_tsv(tmp_path / f"{split}.tsv")[0] for split in sources.SPLITS}
        seen = [text.casefold() for split in rows.values() for text, _ in split]
        assert len(seen) == len(set(seen)) > 1000


# ---- files


def test_build_is_complete_or_absent_and_not_repeated(registered, monkeypatch):
    folder = registered / "tiny"
    first = data.build("tiny", folder)
    assert first["splits"] == dict(train=160, valid=24, test=24) and first["classes"] == dict(bad=80, good=80)
    assert not list(folder.glob(".*")), "temporary files are left"
    monkeypatch.setitem(data.CLASSIFICATION, "tiny", lambda: pytest.fail("a complete set was built again"))
    assert data.build("tiny", folder) == first
    (folder / "valid.tsv").unlink()
    assert data.describe(folder) is None


def test_fallback_says_why(registered):
    meta = data.build_or_fall_back("gone", registered)
    assert meta["name"] == "tiny" and "gone is not available, so tiny is used: no network here" in meta["fallback"]
    with pytest.raises(ValueError, match="unknown name 'nonsense'; there are tiny"):
        data.build_or_fall_back("nonsense", registered)


def test_a_client_that_fails_is_one_line(tmp_path):
    with pytest.raises(sources.Unavailable, match=r"^it cannot be fetched: ERROR: nothing found$"):
        script = "import sys; print('noise\\nERROR: nothing found\\nmore', file=sys.stderr); sys.exit(1)"
        sources.run_client([sys.executable, "-c", script], "it", tmp_path)
    with pytest.raises(sources.Unavailable, match="it cannot be fetched"):
        sources.run_client(["/no/such/client"], "it", tmp_path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    train.save(path, step=1, model={"w": torch.ones(2)})

    class Unpicklable:
        def __reduce__(self):
            raise RuntimeError("the disk is full")

    with pytest.raises(RuntimeError, match="the disk is full"):
        train.save(path, step=2, model={"w": torch.zeros(1000)}, extra=Unpicklable())
    assert train.load(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_read_tsv_counts_malformed_rows(tmp_path):
    path = tmp_path / "x.tsv"
    path.write_text('label\ttext\ngood\t"two\nlines ""quoted"""\nbad\t\n\nbad\ta\tb\n\tnothing\nbad\tnul\0l\n')
    assert data.read_tsv(path) == ([('two\nlines "quoted"', "good"), ("null", "bad")], 3)
    for text, message in (("", "must name the columns"), ("a\tb\n", "must name"), ("text\tlabel\n", "no row has")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            data.read_tsv(path)


# ---- tokens


def test_vocabulary_is_bounded_and_deterministic():
    texts = ["The cat, the dog", "a cat the end", "dog dog zebra"]
    vocabulary = tokens.Vocabulary.of(texts, max_size=4)
    assert vocabulary.entries == ["<pad>", "<unknown>", "dog", "the"]
    assert vocabulary.encode("THE zebra dog the dog", 4) == [3, 1, 2, 3]
    assert vocabulary.encode(" ", 4) == [tokens.UNKNOWN]
    with pytest.raises(ValueError, match="max_size"):
        tokens.Vocabulary.of(texts, 2)


def test_bytes_round_trip():
    text = "na\u00efve \u2014 \U0001f600\n"
    assert tokens.Bytes().decode(tokens.Bytes().encode(text)) == text


def test_buckets_hold_everything_once_and_little_padding():
    lengths = torch.randint(1, 200, (500,)).tolist()
    for seed in (None, 3):
        batches = tokens.bucketed(lengths, 16, seed)
        assert sorted(i for b in batches for i in b) == list(range(500))
        padded = sum(len(b) * max(lengths[i] for i in b) for b in batches)
        assert padded < 1.2 * sum(lengths)
    assert tokens.bucketed(lengths, 16, 3) == batches != tokens.bucketed(lengths, 16, 4)


def test_collate_masks_padding_only_where_there_is_some():
    batch = tokens.collate([[5, 6, 7], [8]], [0, 1])
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 0, 0]] and batch.mask.sum(1).tolist() == [3, 1]
    assert batch.real_tokens == 4
    assert tokens.collate([[5, 6]], [0]).mask is None


def test_windows_are_deterministic_and_inside():
    text = torch.arange(50, dtype=torch.uint8)
    a, b = (next(tokens.windows(text, 10, 4, seed=1)) for _ in range(2))
    assert torch.equal(a, b) and a.shape == (4, 11)
    assert torch.equal(a - a[:, :1], torch.arange(11).expand(4, 11))
    with pytest.raises(ValueError, match="too short"):
        next(tokens.windows(text, 50, 1, seed=0))


# ---- training


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
        model, history = classify.fit(
            task, task.config(**TINY | dict(dropout=0.1)), recipe, batch=16, checkpoint=tmp_path / f"{n}.pt"
        )
        runs.append(history["loss"])
    assert all(run == runs[0] for run in runs)
    json.dumps(history)
    logits, labels = classify.predict(model, task, "test")
    assert classify.scores(labels, logits.argmax(-1))["accuracy"] == 1.0
    saved = train.load(tmp_path / "0.pt")
    again = Transformer(Config(**saved["config"]), accelerated=False)
    again.load_state_dict(saved["model"])
    assert saved["metrics"] == history["best"]
    assert torch.equal(classify.predict(again, task, "test")[0].argmax(-1), logits.argmax(-1))


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
    history = train.train(
        model,
        task.epochs(8, 0),
        classify.loss_of,
        classify.tokens_in,
        recipe,
        evaluate=evaluate,
        checkpoint=tmp_path / "best.pt",
    )
    assert len(history["loss"]) == 8 and history["stopped"].startswith("early")
    assert history["best"] == dict(step=4, loss=2.0)
    for state in (model.state_dict(), train.load(tmp_path / "best.pt")["model"]):
        assert all(torch.equal(value, kept[1][name]) for name, value in state.items())
    assert not model.training


def test_time_that_is_used_up_ends_a_run(registered):
    task = tiny_task(registered)
    models = [Transformer(task.config(**TINY)) for _ in range(2)]
    recipe = train.Recipe(steps=50, evaluate_every=20, seconds=0.0)
    history = train.train(
        models[0], task.epochs(8, 0), classify.loss_of, classify.tokens_in, recipe, evaluate=classify.valid_loss(task)
    )
    assert history["stopped"] == "0 s were used up after 1 of 50 steps" and history["best"]["step"] == 1
    batches = [next(task.epochs(8, 0))] * 20
    found = train.compare(
        dict(a=models[0], b=models[1]), batches, classify.loss_of, classify.tokens_in, recipe, block=2
    )
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
    batches = [next(task.epochs(16, seed)) for seed in range(9)]
    exact = copy.deepcopy(models["naive"]).double()
    recipe = train.Recipe(
        steps=9, optimizer="sgd", lr=0.1, warmup=1
    )  # Adam turns rounding of a zero gradient into steps
    found = train.compare(models, batches, classify.loss_of, classify.tokens_in, recipe, block=2)
    assert found["loss"]["naive"][0] != found["loss"]["naive"][-1]
    assert len(found["loss"]["ours"]) == 9 and len(found["ratio"]["values"]) == 4
    stepper = train.Stepper(exact, recipe, classify.loss_of)
    truth = torch.tensor([stepper(batch) for batch in batches], dtype=torch.float64)
    # Roundings of nine steps add up, luckily or not: fp16 sees what is more than that.
    ours, naive = (torch.tensor(found["loss"][name]).half() for name in ("ours", "naive"))
    assert_as_accurate(ours, naive, truth)
    assert found["ratio"]["p20"] <= found["ratio"]["median"] <= found["ratio"]["p80"]
    json.dumps(found)


def test_classes_that_train_lacks_are_left_out(registered):
    folder = registered / "tiny"
    data.build("tiny", folder)
    with open(folder / "test.tsv", "a") as file:
        file.write("a text\tugly\n")
    task = classify.Task.load(folder)
    assert task.classes == ["bad", "good"] and task.left_out == {"test of unknown class": 1}
    assert len(task.splits["test"]) == len(task.rows["test"]) == 24


def test_scores_are_macro_averages():
    found = classify.scores([0, 0, 0, 1], [0, 0, 0, 0])
    assert found == dict(accuracy=0.75, precision=0.375, recall=0.5, f1=pytest.approx(3 / 7))


def test_perplexity_of_a_model_that_knows_nothing(registered):
    task = pretrain.Task.load(data.build("prose", registered / "prose")["folder"], 32)
    model = Transformer(task.config(**TINY))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    found = pretrain.perplexity(model, task.splits["test"], 32)
    assert found["perplexity"] == pytest.approx(256) and found["bits_per_byte"] == pytest.approx(8)
    with pytest.raises(ValueError, match="too few for a context"):
        pretrain.Task.load(registered / "prose", 10**6)


def test_language_model_learns(registered, tmp_path):
    folder = data.build("prose", registered / "prose")["folder"]
    assert cli(["pretrain", folder, "--out", str(tmp_path / "run"), "--steps", "30", "--context", "48"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["test"]["transformer"]["perplexity"] < result["test"]["byte frequencies"]["perplexity"]
    assert len(result["sample"].encode()) >= 40


def test_commands(registered, tmp_path, capsys):
    assert cli(["data", "tiny", "--out", str(tmp_path / "t")]) == 0
    assert "160" in capsys.readouterr().out
    assert cli(["classify", str(tmp_path / "t"), "--out", str(tmp_path / "run"), "--epochs", "1"]) == 0
    assert (tmp_path / "run" / "best.pt").exists()
    assert "TF-IDF" in capsys.readouterr().out
    assert cli(["data", "gone", "--out", str(tmp_path / "g")]) == 2
    assert capsys.readouterr().err == "fastllm: error: no network here\n"


# ---- the demo


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
    assert stored["tables"] == first["tables"] and {"machine", "info", "verify"} <= stored.keys()
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
    """Of fastllm and of every module of llm: third-party packages are imported when they are used."""
    modules = [
        "fastllm",
        "fastllm.nn",
        "fastllm.model",
        *(f"fastllm.llm.{name}" for name in ("data", "demo", "pretrain")),
    ]
    optional = {"rich", "matplotlib", "sklearn", "jinja2"}
    script = f"import sys, {', '.join(modules)}; print(sorted({optional} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]", done.stdout
