"""A stand-in for the package flash_attn, on request."""

import importlib.machinery
import importlib.util
import sys
import types

from fastllm.compat import flash_attn, flash_attn_ops

ATTENTION = [
    flash_attn.flash_attn_func,
    flash_attn.flash_attn_kvpacked_func,
    flash_attn.flash_attn_qkvpacked_func,
    flash_attn.flash_attn_varlen_func,
    flash_attn.flash_attn_varlen_kvpacked_func,
    flash_attn.flash_attn_varlen_qkvpacked_func,
    flash_attn.flash_attn_with_kvcache,
]
# The modules that code written for flash-attn imports from, and what it finds there.
MODULES = {
    "flash_attn": ATTENTION,
    "flash_attn.flash_attn_interface": ATTENTION,
    "flash_attn.bert_padding": [flash_attn.pad_input, flash_attn.unpad_input],
    "flash_attn.layers": [],
    "flash_attn.layers.rotary": [flash_attn_ops.apply_rotary_emb],
    "flash_attn.ops": [],
    "flash_attn.ops.triton": [],
    "flash_attn.ops.triton.cross_entropy": [flash_attn_ops.cross_entropy_loss],
    "flash_attn.ops.triton.layer_norm": [flash_attn_ops.layer_norm_fn, flash_attn_ops.rms_norm_fn],
}


def install_flash_attn():
    """Put a stand-in for the package flash_attn into sys.modules, so that code that imports it runs on fastllm.

    Process-wide; `uninstall_flash_attn` takes it out again. Raises RuntimeError where the real package is installed:
    its callers would silently change. Twice is once.
    """
    if isinstance(sys.modules.get("flash_attn"), _StandIn):
        return
    if "flash_attn" in sys.modules or importlib.util.find_spec("flash_attn"):
        raise RuntimeError("install_flash_attn: the real flash_attn is installed here, and would be hidden")
    for name, functions in MODULES.items():
        module = sys.modules[name] = _StandIn(name, "fastllm.compat under flash-attn's names")
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []
        module.__version__ = "2.8.3"  # whose signatures these are; callers compare it
        vars(module).update({function.__name__: function for function in functions})
        parent, _, last = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], last, module)


def uninstall_flash_attn():
    """Take the stand-in out of sys.modules; what was imported from it goes on working."""
    for name in MODULES:
        if isinstance(sys.modules.get(name), _StandIn):
            del sys.modules[name]


class _StandIn(types.ModuleType):
    """A module that `install_flash_attn` made."""
