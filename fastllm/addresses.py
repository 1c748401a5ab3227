"""What C++ is told of tensors that Python owns: their addresses, and who keeps them alive."""

import torch

from fastllm.ops.weight_only import NARROW, QuantizedWeight


class Addresses:
    """Descriptions of norms and linear layers (fastllm.decoder's) as C++ reads them. What it has addresses of is kept
    for as long as this is."""

    def __init__(self):
        self._kept = []

    def of(self, x):
        if x is None:
            return None
        assert x.is_contiguous()
        self._kept.append(x)
        return x.data_ptr()

    def norm(self, norm):
        if norm is None:
            return None
        return {
            "width": norm.weight.numel(),
            "weight": self.of(norm.weight),
            "bias": self.of(norm.bias),
            "eps": norm.eps,
            "centred": norm.centred,
            "offset": norm.offset,
        }

    def linear(self, linear):
        w = linear.weight
        rows, columns = w.shape
        made = {"rows": rows, "columns": columns, "bias": self.of(linear.bias)}
        if isinstance(w, QuantizedWeight):
            scales, offsets = self.of(w.scales), self.of(w.offsets)
            made |= {"bits": w.bits, "group": w.group_size, "scales": scales, "offsets": offsets}
            return made | {"weight": self.of(w.codes), "stored": 0}
        return made | {"bits": 0, "weight": self.of(w.contiguous()), "stored": NARROW.index(w.dtype)}


def threads_that_wait() -> int:
    """How many threads may wait for each other: they must all run at once, and OpenMP's do."""
    return torch.get_num_threads() if "OpenMP" in torch.__config__.parallel_info() else 1
