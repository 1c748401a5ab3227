"""Models whose linear layers are packed in 8 or 4 bits: made, described for a config.json, and made again from that."""

import copy

import torch
from torch import nn

import fastllm
import fastllm.nn
from fastllm.ops.weight_only import QuantizedWeight

GROUPS = (128, 64, 32)  # sizes that the kernels have; the largest that divides a row, not above what is asked for


def quantize_model(model, bits=8, group_size=None, *, head_bits=8):
    """A copy of `model` with every linear layer as a `fastllm.nn.QuantizedLinear`, for inference.

    group_size numbers of a row share a scale: None is a row for 8 bits and 64 for 4; where it does not divide a row, a
    smaller one, or the row. The head has `head_bits` at least, for it decides between tokens that are nearly as likely;
    an embedding that is tied to it is packed with it, another stays as it is. Raises ValueError for other bits.
    """
    if bits not in (8, 4) or head_bits not in (8, 4):
        raise ValueError(f"quantize: bits must be 8 or 4, got {bits} and head_bits={head_bits}")
    if group_size is not None and group_size not in GROUPS:
        raise ValueError(f"quantize: group must be one of {', '.join(map(str, GROUPS))}, got {group_size}")
    model = copy.deepcopy(model).eval()
    head, embedding = _head(model), _embedding(model)
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    found = [(name, module) for name, module in model.named_modules() if _is_linear(module)]
    if not found:
        raise ValueError(f"quantize: {type(model).__name__} has no linear layers")
    for name, module in found:
        weight = module.weight.detach()
        weight = weight.t().contiguous() if type(module).__name__ == "Conv1D" else weight  # GPT-2 keeps the transpose
        of_head = module is head
        packed = fastllm.quantize_weight(weight, max(bits, head_bits) if of_head else bits, _group(weight, group_size))
        _replace(model, name, fastllm.nn.QuantizedLinear(packed, module.bias))
        if of_head and tied:
            _pack_embedding(model, packed)
    return model


def packing(model) -> dict:
    """What is packed how, for config.json: {name of a layer: [bits, group_size, rows, columns]}, and "tied"."""
    layers = {
        name: [module.sizes[1], module.sizes[2], *module.sizes[0]]
        for name, module in model.named_modules()
        if isinstance(module, fastllm.nn.QuantizedLinear)
    }
    return dict(layers=layers, tied=isinstance(_embedding(model), fastllm.nn.QuantizedEmbedding))


def unfilled(model, packing: dict):
    """`model` with packed layers, as `packing` describes them, whose state is still to be loaded; in place."""
    head = _head(model)
    for name, (bits, group_size, rows, columns) in packing["layers"].items():
        module = model.get_submodule(name)
        panels, groups = -(-rows // 16), -(-columns // group_size)
        codes = torch.empty(panels, groups * group_size * bits // 32, 16, dtype=torch.int32)
        scales = torch.empty(panels, groups, 16, dtype=torch.float32 if bits == 8 else torch.bfloat16)
        packed = QuantizedWeight(codes, scales, None, (rows, columns), bits, group_size)
        _replace(model, name, fastllm.nn.QuantizedLinear(packed, module.bias))
        if module is head and packing["tied"]:
            _pack_embedding(model, packed)
    return model


def _is_linear(module):
    return type(module).__name__ == "Conv1D" or isinstance(module, nn.Linear)


def _group(weight, asked):
    if asked is None:
        return None
    K = weight.shape[1]
    return next((group for group in GROUPS if group <= asked and K % group == 0), K)


def _head(model):
    return model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else getattr(model, "head", None)


def _embedding(model):
    own = hasattr(model, "get_input_embeddings")
    return model.get_input_embeddings() if own else getattr(model, "embedding", None)


def _replace(model, name, module):
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)


def _pack_embedding(model, packed):
    old = _embedding(model)
    name = next(name for name, module in model.named_modules() if module is old)
    scale = getattr(old, "embed_scale", None)
    scale = 1.0 if scale is None else float(scale)
    norm = next(p for p in model.parameters() if p.ndim == 1)
    _replace(model, name, fastllm.nn.QuantizedEmbedding(packed, norm.dtype, scale))
