"""fastllm's layers in the form that Hugging Face's package `kernels` takes, from memory or from a folder.

    from kernels import Mode, kernelize, use_kernel_mapping
    with use_kernel_mapping(fastllm.hub.mapping(), inherit_mapping=False):
        kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device="cpu")

That route reaches the layers that transformers has marked, of which RMSNorm is one of ours; `fastllm.accelerate`
reaches the rest, and needs no `kernels`. A version of transformers marks nothing beside a `kernels` that it does not
accept; kernelize then changes nothing and says nothing, so `mapping` warns.
"""

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

import fastllm
from fastllm.ops.norm import rms_norm


class RMSNorm(nn.Module):
    """The forward of the marked RMS norms: y = x / rms(x) * weight, in the wider dtype of the two."""

    has_backward = True
    can_torch_compile = True

    def forward(self, hidden_states):
        x = hidden_states.to(torch.promote_types(hidden_states.dtype, self.weight.dtype))
        return rms_norm(x, self.weight, eps=self.variance_epsilon)


LAYERS = {"RMSNorm": RMSNorm}
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Repository:
    """A repository in this process: what `kernels` asks of one is this attribute and this method."""

    layer_name: str

    def load(self):
        """The class whose forward a module gets."""
        return LAYERS[self.layer_name]


def mapping() -> dict:
    """What use_kernel_mapping and register_kernel_mapping take: every layer here, on every device, in every mode."""
    from kernels import Mode, __version__

    transformers = sys.modules.get("transformers")
    if transformers is not None and not transformers.utils.is_kernels_available():
        warnings.warn(
            f"transformers {transformers.__version__} does not accept kernels {__version__}: no layer is marked, and "
            "kernelize leaves the model as it is. fastllm.accelerate(model) needs no kernels.",
            stacklevel=2,
        )
    both = Mode.TRAINING | Mode.TORCH_COMPILE  # what can do both serves every other mode
    return {name: {device: {both: Repository(name)} for device in DEVICES} for name in LAYERS}


def write_repository(folder) -> Path:
    """Write the layout that LocalLayerRepository(folder, layer_name=...) loads, and that a Hub repository has.

    The layers in it are those of the installed fastllm. Returns the folder.
    """
    folder = Path(folder)
    for device in DEVICES:
        variant = folder / "build" / f"torch-{device}"
        variant.mkdir(parents=True, exist_ok=True)
        (variant / "__init__.py").write_text("from . import layers\n")
        (variant / "layers.py").write_text(f"from fastllm.hub import {', '.join(LAYERS)}  # noqa: F401\n")
        version = int(fastllm.__version__.partition(".")[0])
        about = {"name": "fastllm", "id": f"fastllm_{device}_{version}", "version": version, "license": "Apache-2.0"}
        about |= {"python-depends": [], "backend": {"type": device}}
        (variant / "metadata.json").write_text(json.dumps(about, indent=1) + "\n")
    return folder
