"""The loss that transformers' language models ask for, and a head that is one kernel with it in training."""

import contextlib
import functools
import threading

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss

from fastllm.matchers import MATCHERS
from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.linear_cross_entropy import linear_cross_entropy
from fastllm.swap import Row, forward_of, names_used, swap


def _mean(loss, logits, labels, num_items_in_batch, ignore_index):
    """The mean of `loss` over the labels that count, or its sum over num_items_in_batch; in fp32 at least."""
    reduction = "mean" if num_items_in_batch is None else "sum"
    # transformers copies logits to fp32; under autocast the ops return fp32, in which they compute anyway.
    low = logits.dtype in (torch.bfloat16, torch.float16)
    with torch.autocast(logits.device.type, logits.dtype) if low else contextlib.nullcontext():
        found = loss(logits, labels, ignore_index=ignore_index, reduction=reduction)
    if num_items_in_batch is None:
        return found
    items = num_items_in_batch.to(found.device) if torch.is_tensor(num_items_in_batch) else num_items_in_batch
    return found / items


def _shifted(labels, shift_labels, ignore_index):
    """The label of each position: the token after it."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    return shift_labels.reshape(-1)


def causal_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
    """transformers' ForCausalLMLoss on `fastllm.cross_entropy`: no copy of the logits in fp32."""
    labels = _shifted(labels, shift_labels, ignore_index).to(logits.device)
    return _mean(cross_entropy, logits.view(-1, vocab_size), labels, num_items_in_batch, ignore_index)


def masked_lm_loss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, **kwargs):
    """transformers' ForMaskedLMLoss on `fastllm.cross_entropy`."""
    labels = labels.reshape(-1).to(logits.device)
    return _mean(cross_entropy, logits.view(-1, vocab_size), labels, num_items_in_batch, ignore_index)


_chosen = PreTrainedModel.loss_function.fget  # what transformers, or its user, chose for a model
_losses = {ForCausalLMLoss: causal_lm_loss, ForMaskedLMLoss: masked_lm_loss}
_pass = threading.local()  # .fused: the Fused of the forward pass that this thread is in


class Fused:
    """One forward pass whose head hands on hidden states, so that head and loss are one."""

    def __init__(self, head):
        self.head, self.hidden, self.done, self.made = head, None, False, None

    def logits(self):
        """What the head makes of its input, for who reads them all the same; made once, with gradients."""
        if self.made is None:
            if self.versions != self._versions():
                raise RuntimeError(
                    "logits: the head's weight has changed since the forward pass, which left them out; read .logits"
                    " before optimizer.step(), or call the model with skip_logits=False"
                )
            grad, inference, (device, dtype) = self.modes
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad),
                torch.autocast(device, dtype or torch.bfloat16, enabled=dtype is not None),
            ):
                self.made = self.head(self.hidden)
        return self.made

    def _versions(self):
        return [t._version for t in (self.head.weight, self.head.bias) if t is not None and not t.is_inference()]

    def __reduce_ex__(self, protocol):
        return type(None), ()  # a copy of the loss it hangs on is a number

    def loss(self, logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None, **kwargs):
        if logits is not self.hidden:
            raise _Changed
        self.done = True
        device = logits.device.type
        autocast = device, torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), autocast
        self.versions = self._versions()
        labels = _shifted(labels, shift_labels, ignore_index).to(logits.device)
        hidden = logits.reshape(-1, logits.shape[-1])
        loss = functools.partial(self._loss, self.head.weight, self.head.bias)
        return _mean(loss, hidden, labels, num_items_in_batch, ignore_index)

    @staticmethod
    def _loss(weight, bias, hidden, labels, **options):
        return linear_cross_entropy(hidden, weight, labels, linear_bias=bias, **options)


class _Changed(Exception):
    """The model does something to its logits between head and loss."""


def _head_forward(self, plain, input):
    fused = None if torch.compiler.is_compiling() else getattr(_pass, "fused", None)
    if fused is None or fused.head is not self:
        return plain(self, input)
    if "linear" in self._fastllm:
        self._fastllm["linear"].calls += 1
    fused.hidden = input
    return input


def _loss_function(self):
    """The model's property: the kernel's loss where transformers would choose one of those that have a kernel."""
    rows = getattr(self, "_fastllm", None) or {}
    theirs = _chosen(self)
    ours = _losses.get(theirs)
    if ours is None or "loss" not in rows:
        return theirs
    if torch.compiler.is_compiling():
        return ours
    rows["loss"].calls += 1
    fused = getattr(_pass, "fused", None)
    return ours if fused is None else fused.loss


FUSED = "linear_cross_entropy in training, else cross_entropy"


def _model_forward(self, plain, *args, skip_logits=None, **kwargs):
    """skip_logits, as Liger has it: False keeps the logits in training, True leaves them out in eval() too. Left out,
    they are made where somebody reads them, a loss of the user's own or a metric."""
    if torch.compiler.is_compiling() or not _can_fuse(self, kwargs, skip_logits):
        return plain(self, *args, **kwargs)
    fused = _pass.fused = Fused(self.get_output_embeddings())
    try:
        found = plain(self, *args, **kwargs)
    except _Changed:
        self._fastllm["loss"].runs = "cross_entropy: the model changes its logits before the loss"
    finally:
        _pass.fused = None
    if not fused.done:
        return plain(self, *args, **kwargs)
    found.loss._fastllm_head = fused
    return _without_logits(type(found))(**{name: value for name, value in found.items() if name != "logits"})


@functools.cache
def _without_logits(output_type):
    """The subclass of a ModelOutput whose logits are no item of it, and are made where somebody reads them. The loss
    leads to them: it stays the same object where another library makes the output anew."""

    def logits(self):
        given = vars(self).get("logits")
        fused = getattr(vars(self).get("loss"), "_fastllm_head", None)
        return fused.logits() if given is None and fused is not None else given

    def item(self, key):
        return self.logits if key == "logits" else output_type.__getitem__(self, key)

    def reduce(self):
        return output_type, tuple(vars(self).get(name) for name in self.__dataclass_fields__)

    members = {"__module__": output_type.__module__, "__qualname__": output_type.__qualname__, "__reduce__": reduce}
    members["logits"] = property(logits, lambda self, value: vars(self).__setitem__("logits", value))
    return type(output_type.__name__, (output_type,), members | {"__getitem__": item})


def _can_fuse(model, kwargs, skip_logits):
    wanted = model.training and torch.is_grad_enabled() if skip_logits is None else skip_logits
    if not wanted or model._fastllm["loss"].runs != FUSED or kwargs.get("labels") is None:
        return False
    if _chosen(model) is not ForCausalLMLoss:  # the user has set another since
        return False
    head = model.get_output_embeddings()
    hooks = head._forward_hooks or head._forward_pre_hooks  # which would see hidden states, or gather its weight
    return not hooks and not kwargs.get("logits_to_keep") and kwargs.get("return_dict", model.config.return_dict)


_model_forward.counts = _head_forward.counts = "what they do, not how often they are called"


def match_loss(module, row):
    """A language model that asks self.loss_function for its loss, and its head."""
    if not isinstance(module, PreTrainedModel) or "loss_function" not in names_used(type(module).forward):
        return
    theirs = module.loss_function
    if theirs not in _losses:
        return
    head = module.get_output_embeddings()
    fused = theirs is ForCausalLMLoss and isinstance(head, nn.Linear) and forward_of(head) is nn.Linear.forward
    row.runs = FUSED if fused else "cross_entropy"
    swap(module, row, _model_forward, (("loss_function", _property),))
    if fused:
        if "linear" in (getattr(head, "_fastllm", None) or {}):
            head._fastllm["linear"].runs = "linear, where it is not one with the loss"
        swap(head, Row(row.name, type(head).__name__, "loss", "hands its input on"), _head_forward)


_property = property(_loss_function, PreTrainedModel.loss_function.fset)
MATCHERS["loss"].append(match_loss)
