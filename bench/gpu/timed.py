"""Steps that measure: ceilings, bars beside their rivals, other launches of a kernel, a training step."""

import functools
import itertools
import math
import shutil
import statistics
import subprocess

import torch
import torch.nn.functional as F

import fastllm
from fastllm import verify
from fastllm.bench import bars, measure, rivals, store, timing, tune
from fastllm.bench.gpu import checks
from fastllm.bench.gpu.machine import STICKY

OWN = {"ours in CUDA C++": "cuda", "ours for Hopper": "hopper"}  # rivals that are kernels of our own


def environment(stage):
    found = store.environment()
    if stage.machine.cuda and shutil.which("nvidia-smi"):
        query = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        asked = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found["nvidia-smi"] = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
    stage.log.add("environment", kind="environment", device=stage.machine.name, **found)


def seconds(stage, call) -> float:
    samples, _ = timing.interleave({"it": call}, 5, stage.options.block_s, stage.machine.wait)
    return min(samples["it"])  # a ceiling is what is possible


def ceilings(stage):
    """Copy, read, bf16 matrix products, and a graph of one kernel that does next to nothing."""
    device, sizes = stage.machine.device, bars.SIZES
    found = {"copy_gb_per_s": sizes.copy_bytes / seconds(stage, timing.copy_of(sizes.copy_bytes, device)) / 1e9}
    x = torch.ones(sizes.copy_bytes // 8, device=device)
    found["read_gb_per_s"] = sizes.copy_bytes / 2 / seconds(stage, x.sum) / 1e9
    del x
    for M, N, K in sizes.products:
        a, b = (torch.randn(shape, device=device).bfloat16() for shape in ((M, K), (K, N)))
        found[f"matrix_{M}x{N}x{K}_gflop_per_s"] = 2 * M * N * K / seconds(stage, lambda a=a, b=b: a @ b) / 1e9
    one = torch.ones(1, device=device)
    found["graph_us"] = seconds(stage, stage.machine.replayed(lambda: one.mul_(1.0))) * 1e6
    stage.log.add("ceilings", kind="ceilings", **found)


def ceiling(stage, what: str) -> float:
    found = {name: value for row in stage.log.of("ceilings") for name, value in row.items()}
    return max((value for name, value in found.items() if name.startswith(what)), default=math.nan)


def time_bar(stage, bar):
    """Correct first; then ours and every rival in turn. In the stage accept twice, and the worse run counts."""
    checked = checks.trouble(stage, bar.case.op, "triton") or wrong(stage, bar.case, bar.dtype)
    if checked:
        stage.log.add(f"bar {bar.name}", kind="bar", **about(bar), wrong=checked)
        return
    calls, missing = contenders(stage, bar)
    repeats = 2 if stage.options.stage == "accept" else 1
    rounds = [rounds_of(stage, calls) for _ in range(repeats)]
    ours = max(statistics.median(samples["ours"]) for samples in rounds)
    ratios = {
        name: min(timing.ratios(samples[name], samples["ours"]).median for samples in rounds)
        for name in calls
        if name not in ("ours", "ours again")
    }
    noise = max(timing.noise(samples["ours"], samples["ours again"]) for samples in rounds)
    reached = {
        "bandwidth": bar.case.bytes(bar.passes, bar.dtype) / ours / 1e9 / ceiling(stage, "copy"),
        "matrix": bar.case.flops[bar.passes] / ours / 1e9 / ceiling(stage, "matrix"),
        "sdpa": min((ratio for name, ratio in ratios.items() if name.startswith("sdpa")), default=math.nan),
    }
    missed = {
        name: round(reached.get(name, ratios.get(name, math.nan)), 3)
        for name, target in bar.targets.items()
        if not reached.get(name, ratios.get(name, math.nan)) >= target
    }
    stage.log.add(
        f"bar {bar.name}", kind="bar", **about(bar), wrong="", ms=ours * 1e3, noise=noise, **reached, ratio=ratios,
        targets=bar.targets, missed=missed, missing=missing, samples_s=rounds,
    )  # fmt: skip


def about(bar) -> dict:
    return dict(op=bar.case.op, case=bar.case.name, dtype=str(bar.dtype).removeprefix("torch."), **{"pass": bar.passes})


def wrong(stage, case, dtype) -> str:
    with fastllm.backend("triton"):
        rows = verify.check(case, dtype, stage.machine.device)
    return "; ".join(f"{row.result}: {row.accuracy.problem}" for row in rows if row.accuracy.problem)


def contenders(stage, bar):
    """Name -> call; and the rivals that cannot do this, with their reason."""
    copies = 1 if bar.graph else stage.machine.sets(bar.case.bytes(bar.passes, bar.dtype))
    inputs = [bar.case.inputs(bar.dtype, stage.machine.device, seed) for seed in range(copies)]

    def made(function):
        calls = [measure.contender(function, one, bar.passes) for one in inputs]
        calls[0]()
        stage.machine.wait()
        if bar.graph:
            return stage.machine.replayed(calls[0])
        turn = itertools.cycle(calls)
        return lambda: next(turn)()

    with fastllm.backend("triton"):
        found, missing = {"ours": made(bar.case.ours)}, {}
    for name, function in bars.rivals_of(bar).items():
        if name == "compile" and not stage.options.compile:
            continue
        if problem := checks.trouble(stage, bar.case.op, OWN.get(name)):
            missing[name] = problem
            continue
        try:
            found[name] = made(function())
        except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
            if STICKY.search(str(problem)):
                raise
            missing[name] = rivals.reason(problem)
    with fastllm.backend("triton"):
        found["ours again"] = made(bar.case.ours)
    return found, missing


def rounds_of(stage, contenders, rounds=5) -> dict:
    with fastllm.backend("triton"):
        samples, _ = timing.interleave(contenders, rounds, stage.options.block_s, stage.machine.wait)
    return samples


def tune_launches(stage, tunable, case, passes):
    """Every change of a launch against the launch that there is."""
    dtype, rows = torch.bfloat16, []
    with fastllm.backend("triton"):
        call = measure.contender(case.ours, case.inputs(dtype, stage.machine.device), passes)
    for change in tunable.changes:
        try:
            with fastllm.backend("triton"):
                check, compare = functools.partial(wrong, stage, case, dtype), functools.partial(rounds_of, stage)
                rows.append(tune.against(tunable, change, call, check, compare))
        except Exception as error:  # a launch may be impossible; the others are still worth having
            if STICKY.search(str(error)):
                raise
            rows.append(dict(change=change, problem=f"{type(error).__name__}: {error}"[:300]))
    name = f"{tunable.name} {case} {passes}"
    stage.log.add(f"tune {name}", kind="tune", kernel=name, best=tune.best(rows), rows=rows)


def time_training(stage):
    """One optimizer step of the reference transformer: kernels, plain PyTorch, and torch.compile of the latter."""
    from fastllm.llm.bytelevel import loss_of
    from fastllm.llm.train import Recipe, Stepper
    from fastllm.model import Config, Transformer

    sizes, device = bars.SIZES, stage.machine.device
    modern = dict(norm="rmsnorm", positions="rotary", activation="swiglu", dropout=0.0, scale_embedding=False)
    config = Config(**modern | sizes.model)
    tokens = torch.randint(config.vocab, (sizes.batch, config.max_len + 1), device=device)

    def with_sdpa(model):
        for module in model.modules():
            if isinstance(module, fastllm.nn.Attention):
                module.attend = lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return model

    made = {
        "ours": lambda: Transformer(config),
        "textbook": lambda: Transformer(config, accelerated=False),
        "sdpa": lambda: with_sdpa(Transformer(config, accelerated=False)),
    }
    if stage.options.compile:
        made["sdpa compiled"] = lambda: torch.compile(with_sdpa(Transformer(config, accelerated=False)))
    contenders, memory = {}, {}
    for name, model in made.items():
        torch.manual_seed(0)
        with torch.device(device):
            step = Stepper(model().to(sizes.dtype), Recipe(), loss_of)
        contenders[name] = lambda step=step: step([tokens])
        with fastllm.backend("triton"):
            contenders[name]()
            memory[name] = stage.machine.peak(contenders[name])
    samples = rounds_of(stage, contenders, rounds=3)
    ours = statistics.median(samples["ours"])
    ratio = {name: timing.ratios(samples[name], samples["ours"]).median for name in contenders if name != "ours"}
    parameters = sum(p.numel() for p in step.model.parameters())
    stage.log.add(
        "training step", kind="training", parameters=parameters, tokens=sizes.batch * config.max_len,
        ms=ours * 1e3, ratio=ratio, step_bytes=memory, samples_s=samples,
    )  # fmt: skip
