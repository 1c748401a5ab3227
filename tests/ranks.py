"""Runs a function in several processes that form a gloo group, as the ranks of one machine."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# What a rank would otherwise spend most of its time on: PyTorch's optimizers import its compiler, the test files and
# metrics what is optional. What is not installed is left out.
PRELOADED = ["torch", "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "pytest"]
PRELOADED += ["sklearn.metrics", "sacrebleu", "rouge_score.rouge_scorer", "matplotlib", "jinja2", "rich.console"]
PRELOADED += ["fastllm", "fastllm.llm.finetune", "fastllm.llm.evaluate", "fastllm.llm.pretrain"]


def run(function, ranks, folder, *arguments):
    """function(rank, ranks, folder, *arguments) in each of `ranks` processes; an error in one is raised here."""
    _start(_rank, ranks, function, folder, arguments)


def run_launched(function, ranks, folder, *arguments):
    """function(folder, *arguments) in each of `ranks` processes, whose environment is what a launcher makes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _start(_launched, ranks, function, folder, arguments, port)


def _start(target, ranks, *arguments):
    mp.get_context("forkserver").set_forkserver_preload(PRELOADED)
    mp.start_processes(target, (ranks, *arguments), nprocs=ranks, start_method="forkserver")


def _rank(rank, ranks, function, folder, arguments):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, as in the other tests
    store = f"file://{folder}/store-{ranks}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=ranks)
    try:
        function(rank, ranks, folder, *arguments)
    finally:
        dist.destroy_process_group()


def _launched(rank, ranks, function, folder, arguments, port):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    os.environ.update(zip(names, map(str, (rank, rank, ranks, "127.0.0.1", port)), strict=True))
    function(folder, *arguments)
