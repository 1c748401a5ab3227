"""What a training step takes, sends and holds on each of several processes: `fastllm bench scaling ddp-ranks ...`.

    torchrun --nproc-per-node 2 -m fastllm.bench.ranks --parallel fsdp

Sent is what the process wrote to its sockets; held is the most memory that was resident in the steps, above what was
before the model was made (Linux, gloo). Both are of the rank that has most. The times are those of whole steps, ours
and naive PyTorch's in turn, in the same processes. The batch is that of all processes together.
"""

import argparse
import ctypes
import dataclasses
import json
import math
import os
import re
import subprocess
import sys
import time
import warnings

import torch

from fastllm.bench import memory, timing
from fastllm.llm.distributed import add_parallel_arguments, start
from fastllm.llm.train import Recipe, Stepper
from fastllm.model import Config, Transformer
from fastllm.ops.ring import SHARDINGS

STEPS = 2  # that are watched for what they send and hold
SIZES = dict(batch=8, length=256, layers=4, d_model=384, heads=6, kv_heads=6, d_ff=1024, vocab=8192)
START = "result: "  # of the line that a launched measurement prints
SAME = 1e-4  # of the loss: sums in another order differ by 1e-7, a row that is lost or counted twice by 1e-2


def sent() -> int:
    """Bytes that this process has written so far, to sockets for nearly all."""
    with open("/proc/self/io") as file:
        return int(re.search(r"^wchar: (\d+)", file.read(), re.MULTILINE)[1])


def why_not() -> str | None:
    """Why this cannot be measured here, or None."""
    if not torch.distributed.is_available():
        return "this PyTorch has no torch.distributed"
    try:
        sent()
    except OSError as problem:
        return f"this system does not say what a process sends ({problem})"
    return memory.why_not()


def give_memory_back():
    """Let the C library return every block of 64 KiB and more at once, so that what is resident is what is used."""
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


class Failed(RuntimeError):
    """Processes that did not come to a result, or came to a wrong one."""


class Contender:
    """A model with its optimizer, and what a step of it costs on this rank."""

    def __init__(self, ranks, config, tokens, accelerated: bool):
        before = memory.resident("VmRSS")
        torch.manual_seed(0)
        model = Transformer(config, accelerated=accelerated)
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self.stepper = Stepper(model, Recipe(), lambda model, x: model(x[:, :-1], targets=x[:, 1:]), ranks=ranks)
        self.mine = ranks.batches([tokens], 0, 1)
        self.loss = self.stepper(self.mine)  # the first step makes the optimizer's state and the buffers
        memory.forget_peak()
        wrote = sent()
        for _ in range(STEPS):
            self.stepper(self.mine)
        self.sent, self.held = (sent() - wrote) / STEPS, memory.resident("VmHWM") - before

    def seconds(self) -> float:
        began = time.perf_counter()
        self.stepper(self.mine)
        return time.perf_counter() - began


def largest(ranks, number) -> float:
    if ranks.ranks == 1:
        return number
    found = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


def measure(ranks, config, batch, length, rounds, naive: bool) -> dict:
    """Contender -> what it costs, of the rank where it costs most."""
    torch.manual_seed(0)
    tokens = torch.randint(config.vocab, (batch, length + 1))
    wanted = {"ours": True, "naive": False} if naive else {"ours": True}
    small = dataclasses.replace(config, layers=1, d_model=64, heads=1, kv_heads=1, d_ff=64)
    for accelerated in wanted.values():  # what PyTorch imports at a first step, 100 MB, is nobody's
        Contender(ranks, small, tokens, accelerated)
    contenders = {name: Contender(ranks, config, tokens, accelerated) for name, accelerated in wanted.items()}
    samples = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            samples[name].append(largest(ranks, contender.seconds()))
    return {
        name: dict(
            parameters=contender.parameters,
            loss=contender.loss,
            sent=largest(ranks, contender.sent),
            held=largest(ranks, contender.held),
            samples_s=samples[name],
        )
        for name, contender in contenders.items()
    }


def launched(count: int, arguments: list[str]) -> dict:
    """What `measure` found in `count` fresh processes of this machine, started by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads(count)), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [*command, "-m", "fastllm.bench.ranks", "--json", *arguments], capture_output=True, text=True, env=environment
    )
    found = [line for line in done.stdout.splitlines() if line.startswith(START)]
    if done.returncode or len(found) != 1:
        last = (done.stderr.strip().splitlines() or ["it printed nothing"])[-1]
        raise Failed(f"{count} processes ended with status {done.returncode}: {last}")
    return json.loads(found[0].removeprefix(START))


def threads(count: int) -> int:
    return max(1, timing.cores() // count)


def point(curve, count, dtype, passes, options, earlier) -> dict:
    """The point of a curve over the number of processes, as `growth.point` makes those of the others.

    Raises Failed where it cannot be measured, and where the step is not the one of fewer processes: what is wrong is
    not timed.
    """
    if why := why_not():
        raise Failed(why)
    arguments = [*curve.case(count), "--rounds", str(options.rounds), *["--naive"] * ("naive" in curve.rivals)]
    found = launched(count, arguments)
    for name, one in found.items():
        first = earlier[0]["loss"][name] if earlier else one["loss"]
        if not abs(one["loss"] - first) <= SAME * abs(first):
            raise Failed(f"WRONG, so not timed: {name} has loss {one['loss']} on {count} processes, {first} on one")
    of = lambda what: {name: one[what] for name, one in found.items()}  # noqa: E731
    samples = of("samples_s")
    return {
        "x": count,
        "ms": {name: vars(timing.Spread.of([1e3 * s for s in one])) for name, one in samples.items()},
        "memory_bytes": of("held"),
        "sent_bytes": of("sent"),
        "loss": of("loss"),
        "left_out": {},
        "samples_s": samples,
    }


def say(what: str, found: dict, batch: int, length: int):
    for name, one in found.items():
        ms = sorted(one["samples_s"])[len(one["samples_s"]) // 2] * 1e3 if one["samples_s"] else math.nan
        print(
            f"{what}, {name}: {one['parameters'] / 1e6:.1f}M parameters, {batch} x {length} tokens, sent "
            f"{one['sent'] / 2**20:.1f} MiB a step, held {one['held'] / 2**20:.0f} MiB, {ms:.0f} ms a step"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_parallel_arguments(parser)
    parser.add_argument("--sharding", choices=SHARDINGS, default="zigzag")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are timed, default 5")
    parser.add_argument("--naive", action="store_true", help="naive PyTorch's model too")
    parser.add_argument("--json", action="store_true", help="print one line for a program")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    give_memory_back()
    torch.set_num_threads(threads(int(os.environ.get("WORLD_SIZE", 1))))
    warnings.filterwarnings("ignore", module="torch")
    parts = {name: getattr(args, name) for name in SIZES if name not in ("batch", "length")}
    config = Config(**parts, max_len=args.length, positions="rotary", norm="rmsnorm", activation="swiglu", dropout=0.0)
    with start(args.parallel, args.sequence_ranks, args.sharding) as ranks:
        found = measure(ranks, config, args.batch, args.length, args.rounds, args.naive)
        alone = ranks.ranks == 1
        what = "alone" if alone else f"{args.parallel}, {ranks.ranks} ranks, {args.sequence_ranks} a sequence"
        if args.json:
            print(f"{START}{json.dumps(found)}")
        else:
            say(what, found, args.batch, args.length)


if __name__ == "__main__":
    main()
