"""Several ranks take the steps of one process: losses, gradient norms, parameters, checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks as processes
import torch
from check import assert_as_accurate

pytest.importorskip("tokenizers")
pytest.importorskip("safetensors")

from fastllm.llm import distributed
from fastllm.llm.pretrain import run as run_pretrain
from fastllm.llm.runs import Run, read_checkpoint
from fastllm.llm.tokens import Tokenizer
from fastllm.llm.train import Recipe, train
from fastllm.model import Config, Transformer

ROOT = Path(__file__).resolve().parents[1]
LENGTH, STEPS = 16, 5
WAYS = {  # name -> (processes, settings, batches per step)
    "ddp": (2, dict(mode="ddp"), 1),
    "fsdp": (2, dict(mode="fsdp"), 2),
    "sequence": (2, dict(sequence_ranks=2), 1),
    "sequence, contiguous": (2, dict(sequence_ranks=2, sharding="contiguous"), 2),
    "ddp of 4": (4, dict(mode="ddp"), 1),
    "fsdp of 4": (4, dict(mode="fsdp"), 4),
    "ddp, sequence": (4, dict(mode="ddp", sequence_ranks=2), 3),
    "fsdp, sequence": (4, dict(mode="fsdp", sequence_ranks=2), 1),
}
SLOW = {"sequence, contiguous", "ddp of 4", "fsdp of 4"}  # the others have their parts


class Batches:
    """Tokens and targets; in every batch another number of targets counts, and in some rows few do."""

    def __getitem__(self, n):
        random = torch.Generator().manual_seed(n)
        tokens = torch.randint(40, (4, LENGTH + 1), generator=random)
        lengths = torch.randint(1, LENGTH, (4, 1), generator=random)
        return tokens[:, :-1], tokens[:, 1:].masked_fill(torch.arange(LENGTH) > lengths, -100)


def loss_of(model, batch):
    return model(batch[0], targets=batch[1])


def counted(batch):
    return int((batch[1] != -100).sum())


def one_run(ranks, folder, accumulate, dtype=torch.float32, optimizer="sgd", average=0.0, resume=False):
    torch.manual_seed(1 if resume else 0)  # what is loaded decides
    sizes = dict(vocab=40, d_model=16, heads=2, layers=2, d_ff=24, dropout=0.0, max_len=LENGTH, positions="learned")
    model = Transformer(Config(**sizes)).to(dtype)
    recipe = Recipe(
        steps=STEPS,
        optimizer=optimizer,
        lr=0.05,
        warmup=2,
        accumulate=accumulate,
        average=average,
        evaluate_every=2,
        patience=0,
    )
    held_out = Batches()[1000]
    with distributed.shared(ranks, lambda: Run(folder, resume=resume, keep=STEPS)) as run:
        return train(
            model,
            Batches(),
            loss_of,
            counted,
            recipe,
            weight_of=counted,
            evaluate=lambda model: dict(loss=float(loss_of(model, held_out))),
            run=run,
            tokenizer=Tokenizer.bytes(),
            ranks=ranks,
        )


def one_rank(folder, settings, options):
    with distributed.start(**settings) as ranks:
        history = one_run(ranks, folder, **options)
        if ranks.first:
            (folder / "history.json").write_text(json.dumps(history))


def outcome(folder):
    """What is compared of a run: losses, losses of evaluations, and all parameters behind the last step."""
    history = json.loads((folder / "history.json").read_text())
    _, _, state = read_checkpoint(folder / f"step-{STEPS:06d}")
    return dict(
        losses=torch.tensor(history["loss"], dtype=torch.float64),
        evaluations=torch.tensor([found["loss"] for found in history["evaluations"]], dtype=torch.float64),
        parameters=torch.cat([state[name].flatten() for name in sorted(state)]),
        tokens=history["tokens"],
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def alone(folder):
    """The outcomes of one process in fp32 and in fp64, for a number of batches per step."""
    known = {}

    def find(accumulate):
        if accumulate not in known:
            dtypes = dict(fp32=torch.float32, fp64=torch.float64)
            for name, dtype in dtypes.items():
                one_rank(folder / f"alone-{accumulate}-{name}", {}, dict(accumulate=accumulate, dtype=dtype))
            known[accumulate] = [outcome(folder / f"alone-{accumulate}-{name}") for name in dtypes]
        return known[accumulate]

    return find


def hold(found, peer, truth, what):
    """No further from fp64 than one process in fp32, by the project's rule; losses are written in full."""
    assert found["tokens"] == peer["tokens"]
    for key in ("losses", "evaluations", "parameters"):
        a, b = found[key].float(), peer[key].float()
        assert_as_accurate(a, b, truth[key].double(), f"{what}: {key}")


def launched(folder, name, **options):
    """The outcome of the run `name`, which is carried out where it has not been."""
    count, settings, accumulate = WAYS[name]
    if not (folder / name).exists():
        options = dict(accumulate=accumulate) | options
        processes.run_launched(one_rank, count, folder / name, settings, options)
    return outcome(folder / name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WAYS]
)
def test_steps_are_those_of_one_process(folder, alone, name):
    hold(launched(folder, name), *alone(WAYS[name][2]), name)


def interrupted(folder, name, copy):
    """A copy of a run that was killed before it saved its last step."""
    shutil.copytree(folder / name, folder / copy, symlinks=True)
    shutil.rmtree(folder / copy / f"step-{STEPS:06d}")
    return folder / copy


@pytest.mark.parametrize(
    "saved, count, settings",
    [("fsdp", 4, dict(mode="fsdp")), ("fsdp", 1, {}), ("ddp", 2, dict(mode="fsdp")), ("fsdp", 2, dict(mode="ddp"))],
)
def test_goes_on_with_other_ranks(folder, alone, saved, count, settings):
    launched(folder, saved)
    copy = interrupted(folder, saved, f"{saved} on {count}{settings.get('mode', '')}")
    accumulate = WAYS[saved][2]
    processes.run_launched(one_rank, count, copy, settings, dict(accumulate=accumulate, resume=True))
    hold(outcome(copy), *alone(accumulate), copy.name)


@pytest.mark.parametrize("mode", distributed.MODES)
def test_goes_on_bit_for_bit(folder, mode):
    whole, settings, options = (
        folder / f"adamw-{mode}",
        dict(mode=mode),
        dict(accumulate=1, optimizer="adamw", average=0.8),
    )
    processes.run_launched(one_rank, 2, whole, settings, options)
    parts = interrupted(folder, whole.name, f"{whole.name}-parts")
    processes.run_launched(one_rank, 2, parts, settings, options | dict(resume=True))
    for key, value in outcome(whole).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(outcome(parts)[key])), key


# --- the command, under launchers ---

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A folder for `fastllm pretrain`."""
    folder = tmp_path_factory.mktemp("text")
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("the cat sat on the mat; the dog lay on the log.\n" * 4)
    return folder


def pretrain(text, out, **options):
    """The arguments of a small `fastllm pretrain`, and more."""
    options = dict(tokenizer="bytes", steps=60, batch=4, context=16, patience=0, out=out) | options
    return ["pretrain", str(text), *(str(x) for name, value in options.items() for x in (f"--{name}", value))]


def start(command):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_rank_that_is_killed_stops_all(text, tmp_path):
    """Soon, with one message; and one process goes on with what two began."""
    process = start([*TORCHRUN, "2", "-m", "fastllm", *pretrain(text, tmp_path / "run"), "--parallel", "fsdp"])
    until = time.monotonic() + 120
    while not list(tmp_path.glob("run/step-*")):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.01)
    of_launcher = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(of_launcher[-1]), signal.SIGKILL)
    output, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert [line for line in errors.splitlines() if line.startswith("fastllm: error:")] == [
        line for line in errors.splitlines() if "of 2 stops:" in line and "--resume" in line
    ]
    assert errors.count("of 2 stops:") == 1 and "perplexity" not in output
    history = run_pretrain(text, tmp_path / "run", steps=60, batch=4, context=16, patience=0, resume=True)["history"]
    assert len(history["loss"]) == 60 and history["stopped"] == "all steps done"


def test_bad_input_is_told_once(text, tmp_path):
    errors = start([*TORCHRUN, "2", "-m", "fastllm", *pretrain(text, tmp_path / "run", batch=3)]).communicate()[1]
    told = [line for line in errors.splitlines() if line.startswith("fastllm: error:")]
    assert told == [
        "fastllm: error: distributed: a batch of 3 rows cannot be shared among 2 ranks equally: "
        "--batch, or else --accumulate, must be a multiple of 2"
    ]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_accelerate_launch(text, tmp_path):
    """Two processes of `accelerate launch`, which share each sequence, print what one prints. (It starts several on one
    machine only as for GPUs, where it hands on to torchrun; --cpu alone starts one.)"""
    pytest.importorskip("accelerate")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--module"]
    one = [sys.executable, "-m", "fastllm"]
    outputs = {}
    for name, command, more in (("one", one, []), ("two", [*launch, "fastllm"], ["--sequence-ranks", "2"])):
        process = start([*command, *pretrain(text, tmp_path / name, steps=3), *more])
        output, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors
        outputs[name] = output.partition("tokens/s")[0].rpartition("\n")[0]
    assert outputs["one"] == outputs["two"] and "perplexity" in outputs["one"]


def test_settings_that_do_not_fit():
    with pytest.raises(
        ValueError, match=r"sequence_ranks=2 must divide the number of processes, 1: start with torchrun"
    ):
        distributed.start(sequence_ranks=2).__enter__()
    with pytest.raises(ValueError, match="ddp, fsdp, got 'tp'"):
        distributed.start("tp").__enter__()
