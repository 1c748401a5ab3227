"""Which kernel every call took, and the reason for each fallback."""

from dataclasses import dataclass

from fastllm import dispatch


@dataclass
class Explanation:
    """The calls of one run, in order; prints as a table. `result` is what the explained function returned."""

    calls: list
    result: object

    def __str__(self):
        if not self.calls:
            return "no fastllm op was called"
        counts = {}
        for call in self.calls:
            counts[call] = counts.get(call, 0) + 1
        rows = [("op", "calls", "shape", "dtype", "kernel", "why")]
        for call, n in counts.items():
            shape = "x".join(map(str, call.shape))
            rows.append((call.op, str(n), shape, call.dtype, call.kernel, call.reason or "-"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths)).rstrip() for row in rows)


def explain(function, *args, **kwargs) -> Explanation:
    """Run function(*args, **kwargs) once and tell, per fastllm call, which kernel ran and, for a fallback, why.

    >>> print(fastllm.explain(fastllm.attention, q, k, v, softcap=30.0))
    """
    calls = []
    with dispatch.recording(calls):
        result = function(*args, **kwargs)
    return Explanation(calls, result)
