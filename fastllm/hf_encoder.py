"""The layers of an encoder without padding: real tokens are packed once before them, and padded once after; and, where
they are those of BERT, all of them in one call."""

import inspect
import threading
import weakref

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.configuration_utils import PreTrainedConfig

from fastllm import encoder, hf, patch, trial
from fastllm.compat import pad_input, unpad_input
from fastllm.matchers import MATCHERS
from fastllm.swap import Row, Unsupported, forward_of, names_used, swap

# Each token by itself: what a packed row may go through beside attention.
TOKEN_BY_TOKEN = (nn.Linear, nn.LayerNorm, nn.RMSNorm, nn.Dropout, nn.Identity)
ACTIVATIONS = ("torch.nn.modules.activation", "transformers.activations")
# What a module's code says where it looks at other tokens, or at how many there are.
SHAPES = {"shape", "size", "view", "reshape", "permute", "transpose", "flatten", "unflatten", "arange", "roll", "pad"}
SHAPES |= {"cumsum", "sum", "mean", "max", "softmax", "matmul", "bmm", "einsum", "conv1d", "position_bias"}


def match_encoder(module, row):
    """A module that takes hidden states and a mask through a list of layers, and does nothing else."""
    if _is_stack(module):
        swap(module, row, _without_padding)


def _is_stack(module):
    children = list(module.children())
    if len(children) != 1 or type(children[0]) is not nn.ModuleList or not len(children[0]) or _owns_tensors(module):
        return False
    first, second, *_ = (*forward_of(module).__code__.co_varnames[1:3], "", "")
    config = getattr(children[0][0], "config", None) or getattr(module, "config", None)
    if (first, second) != ("hidden_states", "attention_mask") or getattr(config, "is_decoder", False):
        return False
    if isinstance(config, PreTrainedConfig) and getattr(config, "chunk_size_feed_forward", 0):
        raise Unsupported("chunk_size_feed_forward cuts the positions of a batch")
    return not names_used(forward_of(module)) & SHAPES and all(map(_token_by_token, children[0]))


def _owns_tensors(module):
    return any(x is not None for x in (*module._parameters.values(), *module._buffers.values()))


def _token_by_token(layer):
    """Whether, apart from one attention through transformers' interface, a layer sees every token by itself."""
    attentions = 0
    for module in layer.modules():
        if isinstance(module, TOKEN_BY_TOKEN) or type(module).__module__ in ACTIVATIONS:
            continue
        if _owns_tensors(module):
            return False
        if hf._computes_attention(module):
            attentions += 1
            continue
        own = (
            f for name, f in vars(type(module)).items() if callable(f) and name != "__init__" and hasattr(f, "__code__")
        )
        if any(names_used(f) & SHAPES for f in (forward_of(module), *own)):
            return False
    return attentions == 1


def _asks_more(kwargs, *known):
    """Whether the caller wants more than the last hidden states."""
    return any(
        value is not None and value is not False
        for name, value in kwargs.items()
        if name not in ("return_dict", "num_items_in_batch", *known)
    )


def _padding_of(mask, hidden_states):
    """(whether a mask has padding at most, and that behind its sequences; where there is none, or None for all)."""
    structure = mask.structure if isinstance(mask, hf.Mask) else None
    if structure is None:
        return mask is None, None
    if structure.padding is not None and getattr(_pass, "reads_padding", False):
        return False, None
    kept = structure.padding
    if structure.packed is not None or (kept is not None and kept.shape != hidden_states.shape[:2]):
        return False, None
    # With padding in front a model may take its first position for a token.
    return kept is None or not (kept[:, 1:] > kept[:, :-1]).any(), kept


def _without_padding(self, plain, hidden_states, attention_mask=None, *args, **kwargs):
    """Rows of real tokens alone, where there is padding behind them; what stands for padding is 0 at the end.

    Whoever wants more than the last hidden states, or looks inside, gets the batch as it is.
    """
    fits, kept = _padding_of(attention_mask, hidden_states)
    if not fits or kept is None or args or _asks_more(kwargs) or torch.compiler.is_compiling() or _is_watched(self):
        return plain(self, hidden_states, attention_mask, *args, **kwargs)
    structure = attention_mask.structure
    tokens, indices, bounds, _, _ = unpad_input(hidden_states, kept)
    number = (indices // kept.shape[1])[None]
    packed = hf.Structure(0, structure.left, structure.right, packed=number)

    def dense():
        place = indices % kept.shape[1]
        away = place[None, :] - place[:, None]
        seen = number.T == number
        if structure.left >= 0:
            seen &= away >= -structure.left
        if structure.right >= 0:
            seen &= away <= structure.right
        return seen[None, None]

    mask = hf.Mask.of(packed, dense, (1, 1, len(tokens), len(tokens)), tokens.device)
    found = plain(self, tokens[None], mask, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds, **kwargs)
    last = found if isinstance(found, torch.Tensor) else found[0]
    padded = pad_input(last[0], indices, *kept.shape)
    if isinstance(found, torch.Tensor):
        return padded
    if isinstance(found, tuple):
        return padded, *found[1:]
    return type(found)(**{**found, next(iter(found)): padded})


_without_padding.runs = "its layers without padding"


def _is_watched(module):
    """Whether a hook inside would see packed rows; those of the module itself see padded ones."""
    inside = (m for m in module.modules() if m is not module)
    return any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in inside)


# --- losses that read padding ---

_pass = threading.local()  # .reads_padding: whether this thread is in a forward pass whose loss does


def match_reader(module, row):
    """A model with such layers whose loss may read what stands for padding: that of spans does, and one of labels that
    are not ignored there."""
    if not isinstance(module, PreTrainedModel):
        return
    names = inspect.signature(forward_of(module)).parameters
    if "attention_mask" not in names or not names.keys() & {"labels", "start_positions"}:
        return
    try:
        found = any(_is_stack(m) for m in module.modules())
    except Unsupported:
        return
    if found:
        swap(module, Row(row.name, row.module, "padding", "padding too, where its loss reads that"), _for_its_loss)


def _for_its_loss(self, plain, *args, **kwargs):
    before = getattr(_pass, "reads_padding", False)
    if torch.compiler.is_compiling() or before:
        return plain(self, *args, **kwargs)
    given = inspect.signature(plain).bind_partial(self, *args).arguments | kwargs if args else kwargs
    _pass.reads_padding = _reads_padding(given)
    try:
        return plain(self, *args, **kwargs)
    finally:
        _pass.reads_padding = before


def _reads_padding(given):
    labels, mask = given.get("labels"), given.get("attention_mask")
    if given.get("start_positions") is not None:
        return True
    if labels is None or mask is None or labels.shape != mask.shape:
        return False
    return bool(((labels != -100) & (mask == 0)).any())


# --- all layers in one call ---

_encoders = weakref.WeakKeyDictionary()  # module -> (Encoder, the module without its layers)


def match_layers(module, row):
    """An encoder that match_encoder has found, whose layers are those of fastllm.encoder."""
    if _row(module, "attention").runs != _without_padding.runs:
        return
    ((name, layers),) = module.named_children()
    config = next(m.config for m in layers[0].modules() if hf._computes_attention(m))
    if any(isinstance(m, nn.LayerNorm) and not _row(m, "norms").runs for m in layers.modules()):
        return
    shell, x = trial.bare(module, {name: nn.ModuleList()}), trial.numbers(1, 2, 3)
    try:
        heads = config.num_attention_heads
        made = encoder.Encoder(layers, heads, encoder.recognise(layers, heads))
        found = forward_of(module)(shell, x, None)
    except (Unsupported, AttributeError):
        return  # its modules are accelerated each by itself
    if found is x or found[0] is x:
        swap(module, row, _in_one_call)
        _encoders[module] = made, shell


def _row(module, kind):
    return (vars(module).get("_fastllm") or {}).get(kind) or Row("", "", kind)


def _in_one_call(self, plain, hidden_states, attention_mask=None, *args, **kwargs):
    """In evaluation without gradients one call takes real tokens through all layers; else the modules do."""
    last = None
    if self in _encoders and not (args or torch.compiler.is_compiling() or self.training or not hidden_states.is_cpu):
        made, shell = _encoders[self]
        last = _encoded(made, hidden_states, attention_mask, kwargs)
    if last is None:
        return plain(self, hidden_states, attention_mask, *args, **kwargs)
    return plain(shell, last, None, **kwargs)  # no layers are left to run: what the module makes of their result


_in_one_call.runs = "its layers in one call"


def _encoded(made, hidden_states, attention_mask, kwargs):
    fits, kept = _padding_of(attention_mask, hidden_states)
    structure = getattr(attention_mask, "structure", None)
    if not fits or _asks_more(kwargs, "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "position_ids"):
        return None
    if structure is not None and (structure.left >= 0 or structure.right >= 0):
        return None
    B, T, width = hidden_states.shape
    given = kwargs.get("cu_seq_lens_q")
    if given is not None:
        if given is not kwargs.get("cu_seq_lens_k") or B != 1 or kept is not None or given[-1] != T:
            return None
        bounds = given.tolist()
    elif kept is not None:
        tokens, indices, bounds, _, _ = unpad_input(hidden_states, kept)
        last = made(tokens, bounds.tolist())
        return None if last is None else pad_input(last, indices, B, T)
    else:
        bounds = list(range(0, B * T + 1, T))
    last = made(hidden_states.reshape(B * T, width), bounds)
    return None if last is None else last.view(B, T, width)


def _forget(model):
    for module in model.modules():
        _encoders.pop(module, None)


MATCHERS["attention"] += [match_encoder, match_reader]
MATCHERS["linear"].append(match_layers)
patch.AFTER.append(_forget)
