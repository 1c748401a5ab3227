"""Runs a function in several processes that form a gloo group, as the ranks of one machine."""

from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run(function, ranks, folder, *arguments):
    """function(rank, ranks, folder, *arguments) in each of `ranks` processes; an error in one is raised here."""
    mp.get_context("forkserver").set_forkserver_preload(["torch", "torch.distributed", "fastllm"])
    mp.start_processes(_rank, (ranks, function, folder, arguments), nprocs=ranks, start_method="forkserver")


def _rank(rank, ranks, function, folder, arguments):
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN, as in the other tests
    store = f"file://{folder}/store-{ranks}"
    dist.init_process_group("gloo", store, timeout=timedelta(seconds=60), rank=rank, world_size=ranks)
    try:
        function(rank, ranks, folder, *arguments)
    finally:
        dist.destroy_process_group()
