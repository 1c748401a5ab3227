"""One step of AdamW on many parameters at once; `fastllm.optim.AdamW` is what calls it."""

from fastllm.dispatch import Op

# exp_avgs, exp_avg_sqs and max_exp_avg_sqs (empty without amsgrad) are in fp32, or fp64 for fp64 parameters.
adamw_step = Op(
    "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs,"
    " Tensor(d!)[] max_exp_avg_sqs, Tensor(e!)[] steps, float lr, float beta1, float beta2, float eps,"
    " float weight_decay, bool maximize) -> ()",
    "adamw",
    lambda *args: None,
)
