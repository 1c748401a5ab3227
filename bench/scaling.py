"""What one training step sends and holds on each rank; docs/scaling.md has the table that this prints (Linux, gloo).

    torchrun --nproc-per-node 2 bench/scaling.py --parallel fsdp

Sent is what the process wrote to its sockets; held is the most memory that was resident in the steps, above what was
before the model was made. Both are of the rank that has most.
"""

import argparse
import ctypes
import os
import re
import warnings

import torch

from fastllm.llm.distributed import add_parallel_arguments, start
from fastllm.llm.train import Recipe, Stepper
from fastllm.model import Config, Transformer
from fastllm.ops.ring import SHARDINGS

STEPS = 2


def status(name: str) -> int:
    """Bytes, of a line of /proc/self/status."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"^{name}:\s+(\d+) kB", file.read(), re.MULTILINE)[1]) * 1024


def sent() -> int:
    """Bytes that this process has written so far, to sockets for nearly all."""
    with open("/proc/self/io") as file:
        return int(re.search(r"^wchar: (\d+)", file.read(), re.MULTILINE)[1])


def give_memory_back():
    """Let the C library return every block of 64 KiB and more at once, so that what is resident is what is used."""
    mmap_threshold = -3
    ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


def forget_peak():
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def measure(ranks, config, batch, length) -> dict:
    """Of one step, on this rank."""
    before = status("VmRSS")
    torch.manual_seed(0)
    model = Transformer(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    tokens = torch.randint(config.vocab, (batch, length + 1))
    stepper = Stepper(model, Recipe(), lambda model, x: model(x[:, :-1], targets=x[:, 1:]), ranks=ranks)
    mine = ranks.batches([tokens], 0, 1)
    stepper(mine)  # the first step makes the optimizer's state and the buffers
    forget_peak()
    wrote = sent()
    for _ in range(STEPS):
        stepper(mine)
    return dict(parameters=count, sent=(sent() - wrote) / STEPS, held=status("VmHWM") - before)


def largest(ranks, number) -> float:
    if ranks.ranks == 1:
        return number
    found = torch.tensor(number, dtype=torch.float64)
    torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
    return float(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_parallel_arguments(parser)
    parser.add_argument("--sharding", choices=SHARDINGS, default="zigzag")
    sizes = dict(batch=4, length=512, layers=8, d_model=384, heads=6, kv_heads=6, d_ff=1024, vocab=8192)
    for name, default in sizes.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, help=f"default {default}")
    args = parser.parse_args()
    give_memory_back()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("WORLD_SIZE", 1))))
    warnings.filterwarnings("ignore", module="torch")
    parts = {name: getattr(args, name) for name in sizes if name not in ("batch", "length")}
    config = Config(**parts, max_len=args.length, positions="rotary", norm="rmsnorm", activation="swiglu", dropout=0.0)
    with start(args.parallel, args.sequence_ranks, args.sharding) as ranks:
        found = measure(ranks, config, args.batch, args.length)
        found = {name: largest(ranks, value) for name, value in found.items()}
        what = (
            "alone" if ranks.ranks == 1 else f"{args.parallel}, {ranks.ranks} ranks, {args.sequence_ranks} a sequence"
        )
        print(
            f"{what}: {found['parameters'] / 1e6:.1f}M parameters, {args.batch} x {args.length} tokens, sent "
            f"{found['sent'] / 2**20:.1f} MiB a step, held {found['held'] / 2**20:.0f} MiB"
        )


if __name__ == "__main__":
    main()
