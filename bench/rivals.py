"""Who else can do a case: `--rivals` chooses among these names.

A rival that cannot run fails when it is made or first called; it is then a missing column that says why. Packages
that are only rivals are imported when one is asked for.
"""

import contextlib
import importlib
import io
import logging
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.backends import cuda

from fastllm.bench.cases import Case


@dataclass(frozen=True)
class Rival:
    """`takes` says whether a case is this rival's business at all, `make` gives the function or fails."""

    name: str
    says: str
    make: Callable  # (case, dtype, device) -> function of the case's inputs
    takes: Callable = lambda case, device: True
    backward: bool = True
    slow_to_start: bool = False


def _is_sdpa(case) -> bool:
    """Whether PyTorch's side of the case is scaled_dot_product_attention."""
    return case.op.startswith("attention") and "lse" not in case.outputs


def _is_plain(case) -> bool:
    return case.op == "attention" and not {"window", "mask", "bias", "dropout", "lse"} & set(case.name.split())


SWITCHES = {  # of PyTorch's attention backends, on every device; sdpa_kernel() costs several microseconds a call
    "flash": (cuda.enable_flash_sdp, cuda.flash_sdp_enabled),
    "efficient": (cuda.enable_mem_efficient_sdp, cuda.mem_efficient_sdp_enabled),
    "math": (cuda.enable_math_sdp, cuda.math_sdp_enabled),
    "cudnn": (cuda.enable_cudnn_sdp, cuda.cudnn_sdp_enabled),
}


def forced(function, backend: str):
    """PyTorch's attention on one of its backends; fails where that backend cannot do the call."""
    others = [(switch, enabled()) for name, (switch, enabled) in SWITCHES.items() if name != backend]

    def call(*inputs):
        for switch, _ in others:
            switch(False)
        try:
            return function(*inputs)
        finally:
            for switch, before in others:
                switch(before)

    return call


def sdpa(backend, devices, says):
    return Rival(
        f"sdpa-{backend}",
        f"scaled_dot_product_attention, {says}",
        lambda case, dtype, device: forced(case.torch, backend),
        lambda case, device: _is_sdpa(case) and device.partition(":")[0] in devices,
    )


def compiled(case, mode=None):
    # Imported by name: flex_attention asks for it, and PyTorch imports it only with a first compilation.
    config = importlib.import_module("torch._functorch.config")
    config.donated_buffer = False  # a backward pass is taken again and again
    torch.compiler.reset()  # cases share their code, and PyTorch gives up on code that it compiled eight times
    return torch.compile(case.compiled or case.torch, mode=mode, fullgraph=True, dynamic=False)


def onnx(case, dtype, device):
    """The exported graph of PyTorch's side, on as many threads as PyTorch has, which do not spin between calls."""
    if device != "cpu":
        raise NotImplementedError("measured on a CPU only")
    onnxruntime = importlib.import_module("onnxruntime")
    importlib.import_module("onnxscript")  # the exporter needs it
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3  # errors; it warns of graphs that it cannot make smaller
    model = exported(case.torch, case.inputs(dtype))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_inputs()]

    def call(*inputs):
        feed = {name: x.detach().numpy() for name, x in zip(names, inputs, strict=True)}
        outputs = tuple(map(torch.from_numpy, session.run(None, feed)))
        return outputs if len(outputs) > 1 else outputs[0]

    return call


def exported(function, inputs) -> bytes:
    """The ONNX graph of a function of tensors."""

    class Module(torch.nn.Module):
        def forward(self, *given):
            return function(*given)

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(Module().eval(), tuple(inputs), dynamo=True, verbose=False)
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
    return program.model_proto.SerializeToString()


def flash_attention(module: str, case: Case):
    """flash-attn's function of `module` on q, k, v [B, H, T, D]."""
    function = importlib.import_module(module).flash_attn_func
    causal = "causal" in case.name.split()

    def call(q, k, v):
        o = function(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
        return (o[0] if isinstance(o, tuple) else o).transpose(1, 2)

    return call


def xformers(case: Case):
    """xformers' attention on q, k, v [B, H, T, D], as many key heads as query heads."""
    ops = importlib.import_module("xformers.ops")
    mask = ops.LowerTriangularMask() if "causal" in case.name.split() else None

    def call(q, k, v):
        if q.shape[1] != k.shape[1]:
            raise NotImplementedError("another number of key heads")
        return ops.memory_efficient_attention(*(x.transpose(1, 2) for x in (q, k, v)), attn_bias=mask).transpose(1, 2)

    return call


def _is_function(case, device) -> bool:
    """Whether PyTorch's side can be traced: an optimiser's step works in place, on what it keeps."""
    return not hasattr(case.torch, "steady")


LIGER = {  # op -> file, class, what it is given after the inputs
    "rms_norm": ("rms_norm", "LigerRMSNormFunction", (1e-6,)),
    "layer_norm": ("layer_norm", "LigerLayerNormFunction", (1e-5,)),
    "swiglu": ("swiglu", "LigerSiLUMulFunction", ()),
    "geglu": ("geglu", "LigerGELUMulFunction", ()),
    "softmax": ("softmax", "LigerSoftmaxFunction", ()),
}


def liger(case: Case):
    """Liger's function of the same name."""
    file, name, options = LIGER[case.op]
    function = getattr(importlib.import_module(f"liger_kernel.ops.{file}"), name)
    return lambda *inputs: function.apply(*inputs, *options)


def _liger_takes(case, device) -> bool:
    words = set(case.name.split())
    return case.op in LIGER and not {"residual", "causal", "scale"} & words and (case.op != "geglu" or "tanh" in words)


LISTED = [
    Rival("torch", "PyTorch's own kernel, eager", lambda case, dtype, device: case.torch),
    Rival("naive", "the same in plain PyTorch operations", lambda case, dtype, device: case.naive),
    sdpa("flash", ("cpu", "cuda"), "its flash kernel"),
    sdpa("math", ("cpu", "cuda"), "its plain operations"),
    sdpa("efficient", ("cuda",), "its memory-efficient kernel"),
    sdpa("cudnn", ("cuda",), "cuDNN's kernel"),
    Rival(
        "compile",
        "torch.compile; attention as flex_attention",
        lambda case, dtype, device: compiled(case),
        _is_function,
        slow_to_start=True,
    ),
    Rival(
        "onnxruntime",
        "the exported graph on ONNX Runtime, forward",
        onnx,
        _is_function,
        backward=False,
        slow_to_start=True,
    ),
    *(
        Rival(
            name,
            says,
            lambda case, dtype, device, module=module: flash_attention(module, case),
            lambda case, device: _is_plain(case),
        )
        for name, module, says in (
            ("flash-attn-2", "flash_attn", "flash-attn's flash_attn_func"),
            ("flash-attn-3", "flash_attn_interface", "flash-attn 3's flash_attn_func"),
        )
    ),
    Rival(
        "xformers",
        "xformers' memory_efficient_attention",
        lambda case, dtype, device: xformers(case),
        lambda case, device: _is_plain(case),
    ),
    Rival("liger", "Liger's Triton kernels", lambda case, dtype, device: liger(case), _liger_takes),
]
RIVALS = {rival.name: rival for rival in LISTED}
GROUPS = ("quick", "all")  # words that `--rivals` takes beside names: those that start at once, and every one


def chosen(words, device) -> list[Rival]:
    """The rivals that `--rivals` names; packages for GPUs are in "quick" where there is one."""
    wide = "all" in words
    narrow = "quick" in words

    def wanted(rival):
        at_once = not rival.slow_to_start and (
            device != "cpu" or rival.name in ("torch", "naive") or "sdpa" in rival.name
        )
        return rival.name in words or wide or (narrow and at_once)

    return [rival for rival in LISTED if wanted(rival)]


def reason(problem: Exception) -> str:
    """One line of an exception, for a missing column; of the one that torch.compile met on its way, where it says."""
    said = str(problem).strip()
    met = re.search(r"raised exception (\w+)\(['\"](.*)['\"]\)", said)
    kind, line = (met[1], met[2]) if met else (type(problem).__name__, said.partition("\n")[0])
    return f"{kind}: {line[:200]}"


def found(rivals, case, dtype, device) -> tuple[dict, dict]:
    """Name -> function of the rivals of this case, and name -> reason of those that cannot be had."""
    functions, missing = {}, {}
    for rival in rivals:
        if not rival.takes(case, device):
            continue
        try:
            functions[rival.name] = rival.make(case, dtype, device)
        except Exception as problem:  # a rival may fail in any way; it is then a missing column that says why
            missing[rival.name] = reason(problem)
    return functions, missing
