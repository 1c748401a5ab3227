"""One op on one backend, in a process of its own: `python -m fastllm.bench.gpu.look OP BACKEND DEVICE`.

Small and awkward sizes, forward and backward, against fp64. Prints what it found as a line of JSON, and then, which
asks more of the driver, the names of the kernels that ran as another.
"""

import contextlib
import json
import sys

import torch

import fastllm
from fastllm import verify
from fastllm.bench import bars, cases

BACKENDS = {"triton": lambda: fastllm.backend("triton"), "cuda": lambda: fastllm.backend("cuda"), "hopper": bars.hopper}
# Head sizes and numbers of tiles that Hopper's kernels take: one and several, whole and cut, even and odd.
MORE = {
    "attention": [
        cases.attention(2, 4, 300, 64, Hkv=2, causal=True),
        cases.attention(1, 2, 128, 64),
        cases.attention(1, 4, 400, 128, Hkv=1),
        cases.attention(1, 2, 257, 128, causal=True),
    ]
}


def chosen(op, backend) -> list:
    small = [] if backend == "hopper" else [case for case in cases.VERIFY if case.op == op]
    return small + MORE.get(op, [])


def found(op, backend, device) -> dict:
    """How many results there are, which are bad, and how many the backend has no kernel for."""
    with BACKENDS[backend]():
        rows = verify.run(device=device, cases=chosen(op, backend))
    lacking = [row for row in rows if (row.accuracy.problem or "").startswith("Unsupported")]
    bad = [row for row in rows if row.accuracy.problem and row not in lacking]
    bad = [f"{row.case} {row.dtype} {row.result}: {row.accuracy.problem}"[:300] for row in bad]
    return dict(results=len(rows) - len(lacking), bad=bad, lacking=len(lacking))


def kernels(op, backend, device) -> list[str]:
    """The names of what ran on the GPU, in one call of the last case in bf16."""
    case = chosen(op, backend)[-1]
    inputs = case.inputs(torch.bfloat16, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        with BACKENDS[backend](), torch.no_grad():
            case.ours(*inputs)
        torch.cuda.synchronize()
    return sorted({event.key[:100] for event in profile.key_averages() if "cuda" in str(event.device_type).lower()})


def main(op, backend, device) -> int:
    print(json.dumps(found(op, backend, device)), flush=True)
    if device.startswith("cuda"):
        with contextlib.suppress(Exception):  # without them we know a little less
            print(json.dumps({"kernels": kernels(op, backend, device)}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
