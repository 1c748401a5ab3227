"""Hugging Face transformers on fastllm's kernels.

After `import fastllm.hf`, attn_implementation="fastllm" works in from_pretrained and set_attn_implementation;
`fastllm.accelerate(model)` imports this file by itself for a model of transformers. The mask function that is
registered beside the attention function returns masks that know how they are made (causal, window, padding, packed
sequences), so that no mask of size T x S is in memory where the kernel needs none.
"""

import functools
import inspect
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel, TrainerCallback, masking_utils
from transformers.configuration_utils import PreTrainedConfig
from transformers.masking_utils import sdpa_mask
from transformers.utils import output_capturing

from fastllm import hf_loss, hf_rope, patch, swap  # noqa: F401, the first two register their matchers
from fastllm.ops.attention import attention
from fastllm.ops.varlen import attention_varlen

__all__ = ["Callback", "attention_forward", "attention_mask"]


# --- masks ---


@dataclass(frozen=True)
class Structure:
    """What a mask means: query i stands at key position i + q_offset and sees `left` back to `right` ahead of it,
    where padding [B, S] is True, and, with packed [B, T], keys of its own sequence number alone."""

    q_offset: int
    left: int = -1
    right: int = -1
    padding: torch.Tensor | None = None
    packed: torch.Tensor | None = None


class Mask(torch.Tensor):
    """A boolean mask [B, 1, T, S] (True = attend) that has its structure and no memory; whoever else uses it gets the
    mask itself, made then. Added to scores it is 0 where they stay and their dtype's least number elsewhere: so a model
    that was written for additive masks, or one that changes its attention in the middle of a pass, is right too."""

    @staticmethod
    def of(structure, make, shape, device):
        nothing = torch.ones((), dtype=torch.bool, device=device).expand(shape)
        mask = torch.Tensor._make_subclass(Mask, nothing)
        mask.structure, mask._make = structure, make
        return mask

    def dense(self):
        """The mask, a plain tensor."""
        return self._make()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__" or name in _OF_THE_SHAPE:
                return function(*args, **kwargs)
            if name in ("detach", "contiguous"):
                return args[0]
            if name in ("add", "__add__", "__radd__", "add_", "__iadd__"):
                scores = next(x for x in args[:2] if not isinstance(x, Mask))
                if isinstance(scores, torch.Tensor) and scores.is_floating_point():
                    args = [_additive(x, scores.dtype) for x in args]
            found = function(*_dense(args), **_dense(kwargs))
        if isinstance(found, torch.Tensor) and found.dtype == torch.bool and found.ndim == 4:
            dense = found
            found = torch.Tensor._make_subclass(Mask, dense)
            found.structure, found._make = None, lambda: dense
        return found


_OF_THE_SHAPE = {"size", "dim", "ndimension", "numel", "nelement", "__len__", "is_floating_point", "is_complex"}


def _dense(x):
    if isinstance(x, Mask):
        return x.dense()
    if isinstance(x, (tuple, list)):
        return type(x)(_dense(y) for y in x) if type(x) in (tuple, list) else x
    return {k: _dense(v) for k, v in x.items()} if type(x) is dict else x


def _additive(x, dtype):
    if not isinstance(x, Mask):
        return x
    visible = x.dense()
    return torch.zeros((), dtype=dtype, device=x.device).masked_fill(~visible, torch.finfo(dtype).min)


def attention_mask(
    batch_size,
    q_length,
    kv_length,
    q_offset=0,
    kv_offset=0,
    mask_function=masking_utils.causal_mask_function,
    attention_mask=None,
    use_vmap=False,
    device="cpu",
    **kwargs,
):
    """transformers' mask function for "fastllm": a `Mask` where the pattern is understood, else sdpa's dense mask.

    Dense, and with sdpa's short cuts, it stays for static caches, whose offsets are tensors, and under torch.compile.
    """
    shape = dict(batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset)
    given = dict(mask_function=mask_function, attention_mask=attention_mask, use_vmap=use_vmap, device=device)
    make = functools.partial(sdpa_mask, **shape, **given, **kwargs)
    tracing = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if tracing or use_vmap or not (isinstance(q_offset, int) and isinstance(kv_offset, int)):
        return make()
    found = _pattern(mask_function)
    if found is None:
        return make()
    if attention_mask is not None:
        padding = masking_utils.prepare_padding_mask(attention_mask, kv_length, kv_offset)
        padding = padding[:, kv_offset : kv_offset + kv_length].bool()
        found["padding"] = None if padding.all() else padding
    aligned = q_length == kv_length and q_offset == kv_offset
    if found.get("packed") is not None and (found.get("padding") is not None or not aligned):
        return make()
    make = functools.partial(make, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    return Mask.of(Structure(q_offset - kv_offset, **found), make, (batch_size, 1, q_length, kv_length), device)


def _pattern(mask_function):
    """left, right and packed of a mask function of transformers, or None where it is of another kind."""
    found, left_over = {}, [mask_function]
    for function in left_over:
        cells = zip(function.__code__.co_freevars, function.__closure__ or ()) if inspect.isfunction(function) else ()
        held = {name: cell.cell_contents for name, cell in cells}
        name = getattr(function, "__qualname__", "").replace(".<locals>.inner_mask", "")
        if getattr(function, "__module__", "") != masking_utils.__name__:
            return None
        if name == "and_masks.<locals>.and_mask":
            left_over += held["mask_functions"]
        elif name == "remap_positions_for_packed_sequence":  # only differences of positions count here
            left_over.append(held["mask_function"])
        elif name == "causal_mask_function":
            found["right"] = 0
        elif name == "sliding_window_overlay":
            found["left"] = held["sliding_window"] - 1
        elif name == "sliding_window_bidirectional_overlay":
            found["left"] = found["right"] = held["sliding_window"]
        elif name == "packed_sequence_mask_function":
            found["packed"] = held["packed_sequence_mask"]
        elif name != "bidirectional_mask_function":
            return None
    return found


# --- attention ---


def attention_forward(
    module,
    query,
    key,
    value,
    attention_mask,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    is_causal=None,
    s_aux=None,
    position_bias=None,
    cu_seq_lens_q=None,
    cu_seq_lens_k=None,
    cache=None,
    position_ids=None,
    **kwargs,
):
    """transformers' attention function for "fastllm": query [B, H, T, D], key and value [B, Hkv, S, D].

    Takes what any of transformers' own attention functions takes: softcap, s_aux and position_bias (with gradients), a
    boolean or additive mask [B, 1, T, S], or none, which means causal (top-left) where the module or is_causal says
    so; cu_seq_lens_*, a mask of packed sequences, or one row whose position_ids begin again, go to
    `fastllm.attention_varlen`. Returns (o [B, T, H, Dv], None).
    Where the caller wants probabilities (output_attentions), the model's own eager attention returns them with o.
    Raises ValueError for continuous batching's paged cache.
    """
    if cache is not None:
        raise ValueError("attn_implementation='fastllm' has no paged cache: generate_batch needs another attention")
    rows = getattr(module, "_fastllm", None)
    if rows and "attention" in rows and not torch.compiler.is_compiling():
        rows["attention"].calls += 1
    if eager := _eager_of(module, kwargs):
        told = dict(dropout=dropout, scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux)
        told = {name: x for name, x in (told | dict(position_bias=position_bias)).items() if x is not None}
        return eager(module, query, key, value, _added(attention_mask, query, key, module, is_causal), **told, **kwargs)
    if not query.dtype == key.dtype == value.dtype:  # rotary embeddings in fp32; autocast casts by itself
        query, key = query.to(value.dtype), key.to(value.dtype)
    T, S = query.shape[2], key.shape[2]
    options = dict(scale=scaling, softcap=softcap or 0.0, sink=s_aux, dropout_p=dropout)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    structure = attention_mask.structure if isinstance(attention_mask, Mask) else None
    if structure is not None and tuple(attention_mask.shape[2:]) != (T, S):
        structure = None
    packed = None if structure is None else structure.packed
    if packed is None and structure is not None and structure.padding is None and T == S:
        packed = _begins_again(position_ids, query)
    told = cu_seq_lens_q is not None and (attention_mask is None or structure is not None and structure.padding is None)
    if position_bias is None and (told or packed is not None):
        window = None if sliding_window is None else (sliding_window - 1, 0 if causal else sliding_window - 1)
        if structure is not None:
            window, causal = (structure.left, structure.right), False
        cu_q = cu_seq_lens_q if told else _bounds(packed)
        cu_k = cu_seq_lens_k if told and cu_seq_lens_k is not None else cu_q
        return _packed(query, key, value, cu_q, cu_k, causal, window, options), None
    window = mask = None
    bias = position_bias
    if structure is not None and packed is None:
        causal, window, q_offset = False, (structure.left, structure.right), structure.q_offset
        if structure.padding is not None:
            mask = structure.padding[:, None, None, :]
    elif attention_mask is None:
        causal, q_offset = causal and T > 1, 0
        if causal and S > T:  # a static cache on its first pass: what is behind is not written yet
            key, value = key[:, :, :T], value[:, :, :T]
            bias = bias if bias is None else bias[..., :T]
    else:
        causal, q_offset = False, None
        given = attention_mask.dense() if isinstance(attention_mask, Mask) else attention_mask
        if given.dtype == torch.bool:
            mask = given
        else:
            bias = given if bias is None else bias + given
    o = attention(query, key, value, causal=causal, window=window, q_offset=q_offset, mask=mask, bias=bias, **options)
    return o.transpose(1, 2).contiguous(), None


def _eager_of(module, kwargs):
    """The eager attention of the module's file, where the caller wants its probabilities; else None."""
    if not kwargs.get("output_attentions"):
        collected = None if torch.compiler.is_compiling() else output_capturing._active_collector.get()
        if not collected or not any("attentions" in name for name in collected):
            return None
    return inspect.unwrap(type(module).forward).__globals__.get("eager_attention_forward")


def _added(mask, query, key, module, causal):
    """`mask` as eager attention takes it: to add to scores."""
    T, S = query.shape[2], key.shape[2]
    if mask is None and T > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is None or isinstance(mask, Mask) or mask.dtype != torch.bool:
        return mask  # a Mask adds itself
    return torch.zeros((), dtype=query.dtype, device=mask.device).masked_fill(~mask, torch.finfo(query.dtype).min)


def _begins_again(position_ids, query):
    """The sequence number [1, T] of each position of one row in which positions fall, as flash-attn's batches have
    them; else None. transformers' masks tell sequences apart only where the model keeps no cache."""
    if position_ids is None or query.shape[2] < 2 or position_ids.shape != (1, query.shape[2]) or len(query) != 1:
        return None
    step = position_ids.diff()
    return nn.functional.pad((step != 1).cumsum(-1), (1, 0)) if (step < 0).any() else None


def _bounds(packed):
    """cu_seqlens of the sequences that packed [B, T] numbers; a row begins a new one."""
    begins = torch.ones_like(packed, dtype=torch.bool)
    begins[:, 1:] = packed[:, 1:] != packed[:, :-1]
    begins = begins.flatten().nonzero().flatten()
    return nn.functional.pad(begins, (0, 1), value=packed.numel()).int()


def _packed(query, key, value, cu_q, cu_k, causal, window, options):
    B, _, T, _ = query.shape
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    o = attention_varlen(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal, window=window, **options)
    return o.unflatten(0, (B, T))


AttentionInterface.register("fastllm", attention_forward)
AttentionMaskInterface.register("fastllm", attention_mask)


# --- accelerate(model): attention ---


def _view(config, views):
    """A view of `config` in a subclass of its class, of the same name, that asks for "fastllm" attention.

    It shares the config's attributes, so that either changes both, and another model with the same config keeps its own
    attention. A later set_attn_implementation holds. The configs inside `config` are seen as `views` (by id) has them.
    """
    theirs = type(config)
    was = config._attn_implementation

    def get(self):
        told = self._attn_implementation_internal
        return "fastllm" if told == was else told

    def inner(key):
        def see(self):
            found = vars(self)[key]
            return views.get(id(found), found)

        return property(see, lambda self, value: vars(self).__setitem__(key, value))

    def reduce(self, protocol):
        return swap.as_instance_of(theirs, cls, super(cls, self).__reduce_ex__(protocol))

    members = {key: inner(key) for key in theirs.sub_configs if key in vars(config)}
    members |= {"__module__": theirs.__module__, "__qualname__": theirs.__qualname__, "__reduce_ex__": reduce}
    members |= {
        "_attn_implementation": property(get, theirs._attn_implementation.fset),
        "_fastllm_original": staticmethod(lambda: config),
    }
    cls = type(theirs.__name__, (theirs,), members)
    view = object.__new__(cls)
    object.__setattr__(view, "__dict__", vars(config))
    return view


def _computes_attention(module):
    return "ALL_ATTENTION_FUNCTIONS" in swap.names_used(swap.forward_of(module))


def _take_attention(model, report, options):
    """Give the model's modules views of their configs, and its attention modules rows of the report."""
    if not options["attention"]:
        return
    views, refused = {}, set()
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if not isinstance(config, PreTrainedConfig) or id(config) in views or id(config) in refused:
            continue
        row = swap.Row(name, type(module).__name__, "attention")
        if isinstance(module, PreTrainedModel):
            try:
                if not module._can_set_attn_implementation():
                    raise ValueError("its attention does not go through transformers' AttentionInterface")
                module.get_correct_attn_implementation("fastllm")
            except (ValueError, ImportError) as why:
                refused.add(id(config))
                row.reason = str(why)
                report.rows.append(row)
                continue
        elif not _computes_attention(module):
            continue
        views[id(config)] = _view(config, views)
    for name, module in model.named_modules():
        if id(vars(module).get("config")) in views:
            module.config = views[id(module.config)]
            if _computes_attention(module):
                row = swap.Row(name, type(module).__name__, "attention", "attention")
                swap.attach(module, row)
                report.rows.append(row)


def _give_attention_back(model):
    for module in model.modules():
        original = getattr(type(vars(module).get("config")), "_fastllm_original", None)
        if original is not None:
            module.config = original()


patch.BEFORE.append(_take_attention)
patch.AFTER.append(_give_attention_back)


class Callback(TrainerCallback):
    """`accelerate(model, **options)` from when a transformers.Trainer, or one derived from it, is made until it has
    trained: a Trainer in bf16 or fp16 then takes the model's forward method into a wrapper of its own. A Trainer that
    only evaluates leaves it accelerated; fastllm.restore(model) undoes that.

    >>> Trainer(model, args, train_dataset=data, callbacks=[fastllm.hf.Callback()])
    """

    def __init__(self, **options):
        self.options, self.report = options, None

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if model is not None:
            self.report = patch.accelerate(model, **self.options)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not patch.is_accelerated(model):
            self.report = patch.accelerate(model, **self.options)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        patch.restore(model)
