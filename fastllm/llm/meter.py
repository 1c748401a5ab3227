"""What a run says about itself while it goes: a progress line, activation memory, share of the machine's peak."""

import collections
import contextlib
import sys
import time
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastllm


class Rate:
    """How fast something went of late: the last `count` times that it was added to."""

    def __init__(self, count=256):
        self._added = collections.deque(maxlen=count)

    def add(self, things: int, seconds: float):
        self._added.append((things, seconds))

    @property
    def per_s(self) -> float:
        """0 where nothing was added."""
        things, seconds = (sum(column) for column in zip((0, 0.0), *list(self._added), strict=True))
        return things / seconds if seconds else 0.0


class LiveBytes(TorchDispatchMode):
    """Counts, while it is entered, the memory of tensors that PyTorch makes: `live` now, and the most so far, `peak`.

    What was there before does not count, nor does what a kernel allocates and frees inside of one call. After a forward
    pass `live` is what is kept for the backward pass, whoever keeps it.
    """

    def __init__(self, known=()):
        super().__init__()
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided:
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self._known.discard(key)
        self.live -= size


def matrix_peak(dtype=torch.float32, device="cpu", size=1024, seconds=0.2) -> float:
    """FLOP/s of the fastest of some products of two [size, size] matrices, by PyTorch and by `fastllm.linear`."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, began = float("inf"), time.perf_counter()
    with torch.no_grad():
        while time.perf_counter() - began < seconds:
            for product in (torch.nn.functional.linear, fastllm.linear):
                before = time.perf_counter()
                product(a, b)
                if a.is_cuda:
                    torch.cuda.synchronize(a.device)
                best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def training_flops(model, tokens: int, length: int) -> float:
    """Of one forward and backward pass over `tokens` tokens in sequences of `length`, as PaLM's model FLOPs count them.

    6 for each element of a matrix that multiplies a token (an embedding does not), and 12 d_model length for the scores
    and the weighted values of each layer, half of it where attention is causal. Recomputation does not count.
    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    matrices = (m.weight for m in model.modules() if not isinstance(m, torch.nn.Embedding) and hasattr(m, "weight"))
    each = sum(weight.numel() for weight in matrices if weight is not None and weight.ndim == 2)
    attention = 0
    for module in model.modules():
        if isinstance(module, fastllm.nn.Attention):
            seen = min(length, 1 + sum(side for side in module.window or (length,) if side > 0))
            attention += 12 * module.heads * module.head_dim * seen / (2 if module.causal and not module.window else 1)
    return tokens * (6 * each + attention)


@contextlib.contextmanager
def progress(total: int, what: str, done: int = 0):
    """Gives advance(text): a rich progress bar where somebody looks and rich is installed, else a line now and then.

    text() makes what is said; it is called only when something is.
    """
    try:
        from rich import progress as bars
    except ImportError:
        bars = None
    if bars is not None and sys.stderr.isatty():
        from rich.console import Console

        columns = ("{task.description}", bars.BarColumn(), bars.MofNCompleteColumn(), bars.TimeRemainingColumn())
        with bars.Progress(*columns, "{task.fields[text]}", console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done, text="")
            yield lambda text: bar.update(task, advance=1, text=text())
        return
    state = dict(done=done, said=time.monotonic())

    def advance(text):
        state["done"] += 1
        if time.monotonic() - state["said"] > 20:
            state["said"] = time.monotonic()
            print(f"{what} {state['done']}/{total}: {text()}", file=sys.stderr, flush=True)

    yield advance
