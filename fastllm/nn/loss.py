"""Losses: cross-entropy on logits, and on the input of the layer that would make them."""

from torch import nn

from fastllm.ops.cross_entropy import cross_entropy
from fastllm.ops.linear_cross_entropy import linear_cross_entropy


class CrossEntropyLoss(nn.CrossEntropyLoss):
    """loss = -log softmax(input)[target], reduced; forward(input, target).

    Constructor, defaults and state dict are those of torch.nn.CrossEntropyLoss, and softcap, z_loss and
    return_token_accuracy are those of `fastllm.cross_entropy`, as are shapes, precision and errors.
    """

    def __init__(
        self,
        weight=None,
        size_average=None,
        ignore_index=-100,
        reduce=None,
        reduction="mean",
        label_smoothing=0.0,
        *,
        softcap=0.0,
        z_loss=0.0,
        return_token_accuracy=False,
    ):
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self.softcap, self.z_loss, self.return_token_accuracy = softcap, z_loss, return_token_accuracy

    def forward(self, input, target):
        return cross_entropy(
            input,
            target,
            self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            softcap=self.softcap,
            z_loss=self.z_loss,
            return_token_accuracy=self.return_token_accuracy,
        )


class LinearCrossEntropyLoss(nn.Module):
    """The loss of a head: `fastllm.linear_cross_entropy` with the weight (and bias) of `self.linear`.

    forward(input [..., in_features], target [...]). Constructor and state dict are those of torch's class of this name
    (2.13), without its out_features and options; softcap, z_loss and return_token_accuracy are those of
    `fastllm.cross_entropy`, as are the errors.
    """

    def __init__(
        self,
        in_features,
        num_classes,
        *,
        bias=False,
        device=None,
        dtype=None,
        reduction="mean",
        weight=None,
        ignore_index=None,
        label_smoothing=0.0,
        softcap=0.0,
        z_loss=0.0,
        return_token_accuracy=False,
    ):
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.options = dict(
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            softcap=softcap,
            z_loss=z_loss,
            return_token_accuracy=return_token_accuracy,
        )

    def extra_repr(self):
        return ", ".join(f"{name}={value}" for name, value in self.options.items())

    def forward(self, input, target):
        return linear_cross_entropy(
            input, self.linear.weight, target, linear_bias=self.linear.bias, weight=self.weight, **self.options
        )
