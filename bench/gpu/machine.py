"""What a run on a GPU stands on: the device, and the file of JSON lines that its steps write to."""

import json
import math
import re
import time
from pathlib import Path

import torch

from fastllm.bench import memory

# Errors after which nothing runs in a CUDA context any more.
STICKY = re.compile(
    "CUDA error|an illegal (memory access|instruction)|misaligned address|device-side assert|unspecified launch failure"
)


class Machine:
    """The device, and what differs where there is none: on a CPU the kernels are interpreted, for the tests."""

    def __init__(self, device: str):
        self.device, self.cuda = device, device.startswith("cuda")

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "cpu"

    def wait(self):
        if self.cuda:
            torch.cuda.synchronize()

    def sets(self, moved: int) -> int:
        """How many sets of inputs do not fit in four times the L2 cache together."""
        cache = torch.cuda.get_device_properties(self.device).L2_cache_size if self.cuda else 1
        return min(8, math.ceil(4 * cache / max(moved, 1)))

    def peak(self, call) -> int:
        """Bytes that a call takes beyond what was there before; 0 on a CPU, where no figure is wanted."""
        if not self.cuda:
            call()
            return 0
        return memory.peak(call, self.device)

    def replayed(self, call):
        """`call` as one replay of a CUDA graph."""
        if not self.cuda:
            return call
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay


class Log:
    """The file of JSON lines: what is done, and what earlier steps found."""

    def __init__(self, path: Path):
        self.path = path
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def add(self, step: str, **found):
        self.rows.append({"step": step, "at": time.strftime("%H:%M:%S"), **found})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")

    def of(self, kind: str) -> list[dict]:
        return [row for row in self.rows if row.get("kind") == kind]

    def begun(self) -> set[str]:
        return {row["step"] for row in self.rows}
