"""A run goes on bit for bit from wherever it was killed; what it writes is whole, or it is not there."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from check import assert_as_accurate

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fastllm.llm import files, meter, runs, train
from fastllm.llm.batches import Epochs, Windows
from fastllm.llm.checkpoint import load_model
from fastllm.llm.runs import Run
from fastllm.llm.tokens import Tokenizer
from fastllm.model import Config, Transformer

TEXT = torch.tensor(Tokenizer.bytes().encode("the cat sat on the mat; the dog lay on the log.\n" * 20))
RECIPE = dict(steps=24, lr=3e-3, warmup=4, accumulate=2, evaluate_every=8, save_every=3, patience=0)


def loss_of(model, batch):
    return model(batch[:, :-1], targets=batch[:, 1:])


def make(seed=0, **changes):
    torch.manual_seed(seed)
    sizes = dict(vocab=261, d_model=16, heads=2, layers=2, d_ff=32, dropout=0.1)
    return Transformer(Config(**sizes | changes))


def fit(folder, resume=False, stop=None, text=TEXT, **changes):
    """(model, history) of a run; with stop=n it is interrupted, as Ctrl-C does, in step n."""
    model, calls = make(), []

    def loss(model, batch):
        calls.append(1)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return loss_of(model, batch)

    recipe = train.Recipe(**RECIPE | changes)
    with Run(folder, resume=resume) as run:
        parts = model, Windows(text, 12, 2, 0), loss, torch.numel, recipe
        history = train.train(
            *parts,
            run=run,
            tokenizer=Tokenizer.bytes(),
            evaluate=lambda model: dict(loss=float(loss_of(model, text[None, :64]))),
        )
    return model, history


def test_a_run_of_few_steps_has_a_speed(tmp_path):
    assert fit(tmp_path, steps=2)[1]["tokens_per_s"] > 0


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def happened(history):
    return {
        name: value for name, value in history.items() if name not in ("seconds", "tokens_per_s", "activation_bytes")
    }


@pytest.fixture(autouse=True)
def one_thread():
    """Steps of a tiny model are shorter than the threads' meetings, on a busy machine by far."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The model and the history of a run that nothing interrupts."""
    return fit(tmp_path_factory.mktemp("whole") / "run")


@pytest.mark.parametrize("optimizer, stop", [("adamw", 1), ("adam", 5), ("sgd", 23), ("adamw", 40)])
def test_an_interrupted_run_goes_on_bit_for_bit(tmp_path, optimizer, stop):
    options = dict(optimizer=optimizer, precision="bf16" if stop == 23 else "fp32", average=0.8 if stop == 5 else 0.0)
    whole = fit(tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "parts", stop=stop, **options)
    parts = fit(tmp_path / "parts", resume=True, **options)
    assert happened(parts[1]) == happened(whole[1]) and len(parts[1]["loss"]) == 24
    assert same(parts[0], whole[0])
    again = fit(tmp_path / "parts", resume=True, stop=1, **options)  # it is done: no step is taken
    assert happened(again[1]) == happened(whole[1]) and same(again[0], whole[0])


def test_the_average_is_what_is_evaluated_kept_and_returned(tmp_path):
    """It is computed here from the parameters behind each step, by the formula."""
    seen, evaluated, recipe = [], [], train.Recipe(**RECIPE | dict(average=0.7, save_every=24))
    model = make()
    mean = [p.detach().clone() for p in model.parameters()]

    def loss(model, batch):
        seen.append([p.detach().clone() for p in model.parameters()])
        return loss_of(model, batch)

    def evaluate(model):
        evaluated.append([p.detach().clone() for p in model.parameters()])
        return dict(loss=-len(evaluated))  # the last is the best

    with Run(tmp_path / "run") as run:
        parts = model, Windows(TEXT, 12, 2, 0), loss, torch.numel, recipe
        train.train(*parts, run=run, tokenizer=Tokenizer.bytes(), evaluate=evaluate)
    for step, after in enumerate(seen[2::2]):  # two batches a step; what is before step n + 1 is behind step n
        share = 1 - min(0.7, (1 + step) / (10 + step))
        for one, parameter in zip(mean, after, strict=True):
            one.lerp_(parameter, share)
        if step == 15:
            assert all(map(torch.equal, mean, evaluated[1])) and not any(map(torch.equal, after[:1], evaluated[1]))
    assert all(map(torch.equal, model.parameters(), evaluated[2]))
    assert same(load_model(tmp_path / "run").model, model)
    plain = train.train(make(), Windows(TEXT, 12, 2, 0), loss_of, torch.numel, recipe)  # without an evaluation
    assert plain["best"] is None
    with pytest.raises(ValueError, match=r"average must be in \[0, 1\)"):
        train.Recipe(average=1.0)


SCRIPT = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import test_llm_train as t
torch.set_num_threads(1)
t.fit(sys.argv[2], resume=sys.argv[3] == "resume", **t.KILLED)
"""
KILLED = dict(steps=60, save_every=1)


def killed_at_random(folder, resume):
    """Run in another process, SIGKILL half a second behind its next checkpoint or earlier. False where it was done."""
    before = {path.name for path in runs.steps(folder)}
    command = [sys.executable, "-c", SCRIPT, os.path.dirname(__file__), str(folder)]
    with subprocess.Popen([*command, "resume" if resume else ""], stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and {path.name for path in runs.steps(folder)} <= before:
            time.sleep(0.005)
        time.sleep(random.random() / 2)
        process.send_signal(signal.SIGKILL)
        said = process.communicate()[1]
    assert process.returncode in (0, -signal.SIGKILL), said
    return process.returncode != 0


@pytest.mark.parametrize("kills", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_kill_9_at_any_moment(tmp_path, kills):
    random.seed(time.time_ns())  # another moment each time
    for n in range(kills):
        if not killed_at_random(tmp_path / "killed", resume=n > 0) and n == 0:
            pytest.skip("the whole run was faster than the kill")
    model, history = fit(tmp_path / "killed", resume=True, **KILLED)
    whole, expected = fit(tmp_path / "whole", **KILLED)
    assert happened(history) == happened(expected) and same(model, whole)
    assert {path.name for path in (tmp_path / "killed").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert load_model(tmp_path / "killed").meta == load_model(tmp_path / "whole").meta


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    elif kind == "cut short":
        path.write_bytes(path.read_bytes()[:-20])
    else:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name, kind",
    [
        ("model.safetensors", "cut short"),
        ("training.safetensors", "one bit"),
        ("config.json", "missing"),
        ("training.json", "cut short"),
    ],
)
def test_a_damaged_checkpoint_is_left_for_the_one_before(tmp_path, capsys, whole, name, kind):
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "run", stop=23)
    damage(tmp_path / "run" / "step-000009" / name, kind)
    assert [path.name for path in runs.steps(tmp_path / "run")] == ["step-000008", "step-000009"]
    model, history = fit(tmp_path / "run", resume=True)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "step-000009 is damaged and left aside" in said
    assert (tmp_path / "run" / "damaged-step-000009").exists()
    assert happened(history) == happened(whole[1]) and same(model, whole[0])
    for path in runs.steps(tmp_path / "run"):
        damage(path / "model.safetensors", "cut short")
    with pytest.raises(ValueError, match="none of its 2 checkpoints is whole"):
        fit(tmp_path / "run", resume=True)


def test_a_full_disk_stops_the_run_and_spares_what_is_there(tmp_path, monkeypatch, whole):
    sync, calls = files.sync, []

    def full(path):
        if "step-000006" in str(path):
            calls.append(path)
            if len(calls) == 3:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(path)

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(
            OSError, match="step-000006 could not be written: .*No space left.*; step-000003 is complete"
        ):
            fit(tmp_path / "run")
    assert not list((tmp_path / "run").glob(".step*"))
    model, history = fit(tmp_path / "run", resume=True)
    assert happened(history) == happened(whole[1]) and same(model, whole[0])


def test_a_file_that_may_not_grow(tmp_path):
    """The same from the system itself, in the middle of a file."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = sum(p.numel() for p in make().parameters()) * 4
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        with pytest.raises(OSError, match="step-000003 could not be written: .*File too large.*there is no checkpoint"):
            fit(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not runs.steps(tmp_path / "run")


def test_sigterm_ends_a_run_behind_a_checkpoint(tmp_path):
    model, taken = make(), []

    def loss(model, batch):
        taken.append(1)
        if len(taken) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss_of(model, batch)

    before = signal.getsignal(signal.SIGTERM)
    with Run(tmp_path) as run, pytest.raises(KeyboardInterrupt):
        recipe = train.Recipe(**RECIPE | dict(accumulate=1, save_every=100))
        train.train(model, Windows(TEXT, 12, 2, 0), loss, torch.numel, recipe, run=run, tokenizer=Tokenizer.bytes())
    assert [path.name for path in runs.steps(tmp_path)] == ["step-000005"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_latest_ones_and_the_best_are_kept(tmp_path):
    losses = iter([5.0, 1.0, 2.0, 3.0, 4.0])
    with Run(tmp_path, keep=2) as run:
        recipe = train.Recipe(steps=10, evaluate_every=2, patience=0)
        parts = make(), Windows(TEXT, 12, 2, 0), loss_of, torch.numel, recipe
        train.train(*parts, run=run, tokenizer=Tokenizer.bytes(), evaluate=lambda model: dict(loss=next(losses)))
    assert [path.name for path in runs.steps(tmp_path)] == ["step-000004", "step-000008", "step-000010"]
    assert os.readlink(tmp_path / "best") == "step-000004"
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 11))
    assert [line["evaluation"]["loss"] for line in lines if "evaluation" in line] == [5.0, 1.0, 2.0, 3.0, 4.0]


def test_a_folder_with_a_run_is_not_trampled_on(tmp_path):
    with Run(tmp_path / "run", dict(lr=1, steps=3)) as run:
        run.save(1, make(), Tokenizer.bytes(), {}, {})
        with pytest.raises(ValueError, match="another process is training in it"):
            Run(tmp_path / "run", dict(lr=1, steps=3), resume=True)
    with pytest.raises(ValueError, match=r"has a run in it \(step-000001\): --resume goes on"):
        Run(tmp_path / "run")
    with pytest.raises(ValueError, match="was begun with lr=1, it cannot be resumed with 2"):
        Run(tmp_path / "run", dict(lr=2, steps=3), resume=True)
    with Run(tmp_path / "run", dict(lr=1, steps=4), resume=True, free=("steps",)):
        assert len(runs.steps(tmp_path / "run")) == 1
    with Run(tmp_path / "run", dict(lr=2), fresh=True):
        assert not runs.steps(tmp_path / "run")
    with pytest.raises(ValueError, match="no run in it to resume"):
        Run(tmp_path / "other", resume=True)


def test_accumulation_is_one_big_batch():
    """Of sequences of different lengths: a token counts alike whichever batch it is in."""
    sequences = [TEXT[at : at + n] for at, n in ((0, 5), (7, 20), (3, 9), (40, 31))]

    def padded(indices):
        tokens = torch.zeros(len(indices), 31, dtype=torch.long)
        targets = torch.full_like(tokens, -100)
        for row, i in zip(range(len(indices)), indices):
            tokens[row, : len(sequences[i])] = sequences[i]
            targets[row, : len(sequences[i]) - 1] = sequences[i][1:]
        return tokens, targets

    def loss(model, batch):
        return model(batch[0], targets=batch[1])

    def weight(batch):
        return int((batch[1] >= 0).sum())

    models = [make(dropout=0.0), make(dropout=0.0), make(dropout=0.0).double()]
    recipe = train.Recipe(optimizer="sgd", lr=0.1, warmup=0, clip=1.0)
    steppers = [train.Stepper(model, recipe, loss, weight_of=weight) for model in models]
    losses = [steppers[0]([padded([0, 1]), padded([2, 3])])]
    losses += [stepper([padded([0, 1, 2, 3])]) for stepper in steppers[1:]]
    assert_as_accurate(torch.tensor(losses[0]).half(), torch.tensor(losses[1]).half(), torch.tensor(losses[2]).double())
    for ours, peer, truth in zip(*(model.parameters() for model in models), strict=True):
        # The sum is made in another order, which is as good but not the same.
        assert_as_accurate(ours.detach().half(), peer.detach().half(), truth.detach())


def test_learning_rates_by_group():
    model = make()
    groups = [dict(params=[model.embedding.weight], lr_scale=0.0), dict(params=list(model.decoder.parameters()))]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stepper = train.Stepper(model, train.Recipe(warmup=0, weight_decay=0.0), loss_of, groups=groups)
    stepper([TEXT[None, :20]])
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert "embedding.weight" not in changed and "decoder.norm.weight" in changed


def test_activation_memory_is_what_the_forward_pass_leaves():
    a, b = torch.randn(100, 100, requires_grad=True), torch.randn(100, 100)
    with meter.LiveBytes([a, b]) as memory:
        y = (a @ b).exp()  # keeps its result; the product is freed
        assert memory.live == 40_000 and memory.peak == 80_000
        del y
        assert memory.live == 0
    model = make()
    stepper = train.Stepper(model, train.Recipe(), loss_of, measure=True)
    stepper([TEXT[None, :20]])
    first = stepper.activations
    stepper([TEXT[None, :40]])
    assert first == stepper.activations > 20 * 16 * 4 * 10


def test_flops_of_a_known_model():
    model = Transformer(Config(vocab=100, d_model=8, heads=2, layers=3, d_ff=16, tie_embeddings=True))
    matrices = 3 * (4 * 8 * 8 + 2 * 8 * 16) + 100 * 8
    assert meter.training_flops(model, 10, 50) == 10 * (6 * matrices + 3 * 12 * 8 * 50 / 2)


def test_the_live_line(tmp_path, capsys):
    said = []
    recipe = train.Recipe(steps=4, evaluate_every=2, sample_every=2)
    trainer = train.Trainer(make(), Windows(TEXT, 12, 2, 0), loss_of, torch.numel, recipe, length=12)
    trainer.evaluate, trainer.sample = lambda model: dict(loss=2.5), lambda model: "a sample"
    step = trainer.step
    trainer.step = lambda advance: step(lambda text: said.append(text()))
    trainer.go()
    assert all(part in said[-1] for part in ("loss ", "valid 2.500", "tokens/s", "% of peak", "activations"))
    assert capsys.readouterr().err == "train, step 2: a sample\ntrain, step 4: a sample\n"


def test_tensorboard_logs(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe = train.Recipe(steps=4, evaluate_every=2)
    parts = make(), Windows(TEXT, 12, 2, 0), loss_of, torch.numel, recipe
    with Run(tmp_path) as run:
        history = train.train(
            *parts, run=run, tokenizer=Tokenizer.bytes(), tensorboard=True, evaluate=lambda model: dict(loss=2.5)
        )
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(history["loss"])
    assert [(event.step, event.value) for event in events.Scalars("valid/loss")] == [(2, 2.5), (4, 2.5)]


def test_epochs_resume_inside_an_epoch(tmp_path):
    """The order of a pass is looked up by number, not drawn as it goes."""
    rows = [TEXT[i : i + 9] for i in range(30)]
    epochs = Epochs([9] * 30, 4, 0, lambda indices: torch.stack([rows[i] for i in indices]))
    expected = [epochs[n] for n in range(20)]
    fresh = Epochs([9] * 30, 4, 0, lambda indices: torch.stack([rows[i] for i in indices]))
    assert torch.equal(fresh[13], expected[13]) and torch.equal(fresh[2], expected[2])
