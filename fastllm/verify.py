"""`fastllm verify`: every op on this machine against fp64 truth, beside PyTorch's own error in the same dtype.

This file is the home of the project's one tolerance; tests/check.py asserts what `accuracy` finds.
"""

import math
import time
from dataclasses import dataclass, field

import torch

NORM_SLACK = 1.1
MAX_SLACK = 2.0
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Accuracy:
    """How far a result and PyTorch's own are from the truth; `problem` says how the rule is broken, or is None."""

    norm: float = 0.0  # of the error, over the norm of the truth
    peer_norm: float = 0.0
    largest: float = 0.0  # error, over the largest value of the truth
    peer_largest: float = 0.0
    share: float = 0.0  # of what the rule allows that is used up; above 1 it is broken
    problem: str | None = None


def accuracy(got, peer, truth) -> Accuracy:
    """`got` may be hardly further from `truth` (fp64) than `peer`, PyTorch's own kernel in the same dtype.

    The norm of the error may be 1.1 times the peer's, the largest error twice the peer's; to both comes one rounding
    step of the dtype (eps times the norm, or the largest value, of the truth), so that a peer that happens to be exact
    does not ask for equality bit by bit. Infinities must stand where the truth has them; NaN never passes.
    """
    if got.shape != truth.shape:
        return Accuracy(problem=f"shape {list(got.shape)}, expected {list(truth.shape)}")
    if got.dtype != peer.dtype:
        return Accuracy(problem=f"dtype {got.dtype}, expected {peer.dtype}")
    if n := int(got.isnan().sum()):
        return Accuracy(problem=f"{n} of {got.numel()} elements are NaN")
    eps = torch.finfo(got.dtype).eps
    got, peer, truth = (x.detach().double() for x in (got, peer, truth))
    finite = truth.isfinite()
    if not torch.equal(got[~finite], truth[~finite]):
        return Accuracy(problem="infinities are not where they should be")
    got, peer, truth = got[finite], peer[finite], truth[finite]
    if not truth.numel():
        return Accuracy()
    problems, relative, shares = [], [], []
    norm, largest = torch.Tensor.norm, lambda x: x.abs().max()
    for what, size, slack in (("norm of the error", norm, NORM_SLACK), ("largest error", largest, MAX_SLACK)):
        whole, error, peers = float(size(truth)), float(size(got - truth)), float(size(peer - truth))
        allowed = slack * peers + eps * whole
        if not error <= allowed:
            problems.append(f"{what} {error:.3e}, allowed {allowed:.3e}")
        relative += [error / (whole or 1.0), peers / (whole or 1.0)]
        shares.append(error / allowed if allowed else 0.0 if error == 0 else math.inf)
    return Accuracy(*relative, max(shares), "; ".join(problems) or None)


def forward_backward(function, inputs, grads=None, dtype=None):
    """Outputs of `function(*inputs)` and the gradients of every floating input, as two lists.

    `dtype` converts the floating inputs first. `grads` are the upstream gradients, one per output (None: no backward
    pass); an output whose gradient is None takes no part in it.
    """
    leaves = []
    for x in inputs:
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            x = x.detach().to(dtype or x.dtype).requires_grad_(grads is not None)
        leaves.append(x)
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
    if grads is None:
        return outputs, []
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, grads, strict=True) if g is not None]
    wanted = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    found = torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
    return outputs, [torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)]


@dataclass(frozen=True)
class Row:
    """One result of one case: an output, or the gradient of an input."""

    op: str
    case: str
    dtype: str
    result: str
    kernel: str
    fallback: str  # why no kernel ran; there is nothing to verify in plain PyTorch
    accuracy: Accuracy

    @property
    def verdict(self) -> str:
        if self.fallback:
            return "plain PyTorch"
        return f"FAIL: {self.accuracy.problem}" if self.accuracy.problem else "pass"


@dataclass
class Examination:
    """One case in one dtype: its rows, and what it takes to hold other functions to the same truth."""

    rows: list[Row]
    case: object
    inputs: list = field(default_factory=list)
    grads: list | None = None
    truth: list = field(default_factory=list)
    slow: str = ""  # why nothing was examined

    def part(self) -> list:
        """The inputs that the truth is of."""
        return [self.case.part(x) for x in self.inputs]

    def error_of(self, function, backward=True) -> float:
        """The largest norm of an error over the norm of the truth, of the outputs and gradients of `function`."""
        outputs, grads = forward_backward(function, self.inputs, self.grads if backward else None)
        return self.error_in([self.case.part(x) for x in outputs + grads])

    def error_in(self, results) -> float:
        """The same of results on `part()`, outputs first; there may be fewer than the truth has."""
        return max(
            float((x.detach().double() - y).norm() / (y.norm() or 1.0))
            for x, y in zip(results, self.truth, strict=False)
        )


def check(case, dtype, device="cpu", seed=0) -> list[Row]:
    """Run one case of bench/cases in `dtype`, backward too where it has that, and hold the rule for every result."""
    return examine(case, dtype, device, seed).rows


def examine(case, dtype, device="cpu", seed=0, patience_s=math.inf) -> Examination:
    """`check`, with the truth kept.

    Kernels run on the whole input; the fp64 truth and PyTorch's own answer are taken on `case.part` of it. A call that
    takes longer than `patience_s` forward is not examined; see `peers` for PyTorch's.
    """
    from fastllm import dispatch

    inputs = case.inputs(dtype, device, seed)
    about, calls = (case.op, case.name, str(dtype).removeprefix("torch.")), []
    try:
        with dispatch.recording(calls), torch.no_grad():
            start = time.perf_counter()
            shapes = [y.shape for y in _as_list(case.ours(*inputs))]
            seconds = time.perf_counter() - start
        if seconds > patience_s:
            row = Row(*about, "call", calls[-1].kernel, calls[-1].reason, Accuracy())
            return Examination([row], case, slow=f"a call takes {seconds:.0f} s")
        random = torch.Generator(device).manual_seed(seed + 1)
        grads = [torch.randn(shape, generator=random, device=device).to(dtype) for shape in shapes]
        grads = grads if "backward" in case.flops else None
        got = forward_backward(case.ours, inputs, grads)
    except Exception as error:  # whatever it is, it is this case's result, and the others are still worth having
        kernel = calls[-1].kernel if calls else "none"
        return Examination(
            [Row(*about, "call", kernel, "", Accuracy(problem=f"{type(error).__name__}: {error}"))], case
        )
    part, part_grads = [case.part(x) for x in inputs], grads and [case.part(g) for g in grads]
    peer = peers(case, part, part_grads, got, patience_s)
    truth = forward_backward(case.naive, part, part_grads, torch.float64)
    names = [*case.outputs, *(f"d{name}" for name in case.shapes if grads)]
    kernel = calls[-1].kernel if calls else "none"
    fallback = calls[-1].reason if calls else ""
    rows = [
        Row(*about, name, kernel, fallback, accuracy(case.part(a), b, c))
        for name, a, b, c in zip(names, got[0] + got[1], peer[0] + peer[1], truth[0] + truth[1], strict=True)
    ]
    return Examination(rows, case, inputs, grads, [x.detach() for x in truth[0] + truth[1]])


def peers(case, part, grads, got, patience_s=math.inf):
    """What the rule holds `got` against: PyTorch's outputs and gradients on a part of the input, in its dtype.

    Where a 16-bit call takes an eighth of the patience (some CPUs have no 16-bit products, and gradients are slower
    still), PyTorch's in fp32, rounded once: hardly anything is closer to the truth, so the rule is no laxer.
    """
    function = case.peer or case.torch
    wide = False
    if patience_s < math.inf and part[0].dtype in (torch.bfloat16, torch.float16):
        start = time.perf_counter()
        with torch.no_grad():
            function(*part)
        wide = time.perf_counter() - start > patience_s / 8
    if not wide:
        return forward_backward(function, part, grads)
    found = forward_backward(function, part, grads, torch.float32)
    return tuple([x.to(y.dtype) for x, y in zip(*pair, strict=True)] for pair in zip(found, got, strict=True))


def run(ops=None, dtypes=DTYPES, device="cpu", cases=None) -> list[Row]:
    """The rows of `fastllm verify`; ops=None takes every op. What no kernel wrote shows as NaN."""
    from fastllm.bench.cases import VERIFY
    from fastllm.text import progress

    chosen = [case for case in (VERIFY if cases is None else cases) if not ops or case.op in ops]
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        rows = []
        for case, dtype in progress([(c, d) for c in chosen for d in dtypes], "verify", lambda at: f"{at[0]} {at[1]}"):
            rows += check(case, getattr(torch, dtype), device)
        return rows
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def worst(rows: list[Row]) -> list[Row]:
    """Of the cases of each op, dtype and result, the one closest to breaking the rule; and all that break it."""
    chosen = {}
    for row in rows:
        key = row.op, row.dtype, row.result
        if key not in chosen or row.accuracy.share > chosen[key].accuracy.share:
            chosen[key] = row
    return [row for row in rows if row.accuracy.problem or row is chosen[row.op, row.dtype, row.result]]


ERRORS = ("error", "PyTorch's", "largest", "PyTorch's", "of allowed")
HEADER = ("op", "case", "dtype", "result", *ERRORS, "kernel", "verdict")


def cells(row: Row) -> tuple[str, ...]:
    found = row.accuracy
    errors = (f"{e:.1e}" for e in (found.norm, found.peer_norm, found.largest, found.peer_largest))
    return row.op, row.case, row.dtype, row.result, *errors, f"{found.share:.0%}", row.kernel, row.verdict


def summary(rows: list[Row]) -> str:
    failed = [row for row in rows if row.verdict.startswith("FAIL")]
    skipped = [row for row in rows if row.fallback]
    passed = len(rows) - len(failed) - len(skipped)
    text = f"{passed} results pass, {len(failed)} fail"
    if skipped:
        reasons = sorted({row.fallback for row in skipped})
        text += f"; {len(skipped)} ran on plain PyTorch, which is not ours to verify: {'; '.join(reasons)}"
    return (
        f"{text}\nrule: norm of the error at most {NORM_SLACK} times PyTorch's in the same dtype, largest error at"
        f" most {MAX_SLACK:g} times, plus one rounding step; errors are relative to the fp64 truth"
    )


def add_arguments(subparsers):
    from fastllm.text import some_of

    parser = subparsers.add_parser("verify", help="check every op on this machine against fp64 and beside PyTorch")
    parser.add_argument("ops", nargs="*", metavar="op", help="attention, layer_norm, ... (default: every op)")
    parser.add_argument("--dtype", type=some_of(DTYPES), default=DTYPES, help=f"default {','.join(DTYPES)}")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--full", action="store_true", help="the bench's sizes too, those of real models; minutes")
    parser.add_argument("--all", action="store_true", help="show every case, not only the worst of each op and result")
    parser.set_defaults(run=main)


def main(args) -> int:
    from fastllm.bench.cases import BENCH, VERIFY
    from fastllm.text import show

    known = sorted({case.op for case in VERIFY})
    if unknown := sorted(set(args.ops) - set(known)):
        raise ValueError(f"verify: unknown op {', '.join(unknown)}; there are {', '.join(known)}")
    rows = run(args.ops, args.dtype, args.device, VERIFY + BENCH if args.full else VERIFY)
    show(HEADER, [cells(row) for row in (rows if args.all else worst(rows))])
    print(summary(rows))
    return int(any(row.verdict.startswith("FAIL") for row in rows))


def _as_list(outputs):
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
