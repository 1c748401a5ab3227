"""Which kernel every call took, how long it was at it, and the reason for each fallback."""

import time
from dataclasses import dataclass

from fastllm import dispatch
from fastllm.text import table


@dataclass
class Explanation:
    """The calls of one run, in order; prints as a table. `result` is what the explained function returned, `seconds`
    how long all of it took."""

    calls: list
    result: object
    seconds: float

    @property
    def elsewhere(self) -> float:
        """Seconds that went to what is no call of ours: PyTorch's own ops, and Python."""
        return max(0.0, self.seconds - sum(call.seconds for call in self.calls))

    def __str__(self):
        if not self.calls:
            return "no fastllm op was called"
        groups = {}
        for call in self.calls:
            key = call.op, "x".join(map(str, call.shape)), call.dtype, call.kernel, call.reason or "-"
            n, seconds = groups.get(key, (0, 0.0))
            groups[key] = n + 1, seconds + call.seconds
        rows = [
            (op, n, shape, dtype, kernel, *self._time(seconds), why)
            for (op, shape, dtype, kernel, why), (n, seconds) in groups.items()
        ]
        rows.append(("elsewhere", "-", "-", "-", "PyTorch", *self._time(self.elsewhere), "-"))
        return table(("op", "calls", "shape", "dtype", "kernel", "ms", "time", "why"), rows)

    def _time(self, seconds):
        return f"{1e3 * seconds:.2f}", f"{seconds / (self.seconds or 1.0):.0%}"


def explain(function, *args, **kwargs) -> Explanation:
    """Run function(*args, **kwargs) once and tell, per fastllm call, which kernel ran, its share of the time and, for a
    fallback, why.

    function: a model or any function; of a training step, `lambda: model(**batch).loss.backward()`, the backward passes
    are calls too, and so are those of `loss.backward` alone. The times are those of this one run; run a model before,
    so that they are not those of a first one. What torch.compile has compiled is not seen.

    >>> print(fastllm.explain(fastllm.attention, q, k, v, softcap=30.0))
    >>> print(fastllm.explain(model, input_ids))
    """
    calls = []
    with dispatch.recording(calls):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        dispatch.synchronize()
        seconds = time.perf_counter() - start
    return Explanation(calls, result, seconds)
