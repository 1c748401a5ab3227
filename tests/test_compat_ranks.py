"""flash-attn's cross_entropy_loss where each rank has a part of the classes."""

import pytest
import ranks
import torch
import torch.distributed as dist
from check import assert_as_accurate, run

from fastllm import compat, reference

OPTIONS = dict(label_smoothing=0.1, logit_scale=0.7, lse_square_scale=1e-3, ignore_index=-100)
N, V = 9, 28


def whole(logits, labels):
    """Losses of whole rows, from the definition."""
    options = dict(label_smoothing=0.1, z_loss=1e-3, reduction="none")
    return reference.cross_entropy(logits * 0.7, labels, **options)


def losses_of_a_part(rank, count, folder):
    random = torch.Generator().manual_seed(0)
    logits, grad = torch.randn(N, V, generator=random) * 3, torch.randn(N, generator=random)
    labels = torch.randint(V, (N,), generator=random).index_fill_(0, torch.tensor([2, 7]), -100)
    part = slice(rank * V // count, (rank + 1) * V // count)

    def ours(logits):
        return compat.cross_entropy_loss(logits, labels, process_group=dist.group.WORLD, **OPTIONS)

    (losses, z_losses), (dlogits,) = run(ours, [logits[:, part]], [grad, None])
    (peer,), (peer_grad,) = run(lambda x: whole(x, labels), [logits], [grad])
    (truth,), (truth_grad,) = run(lambda x: whole(x, labels), [logits], [grad], dtype=torch.float64)
    assert_as_accurate(losses, peer, truth, "losses")
    assert_as_accurate(dlogits, peer_grad[:, part], truth_grad[:, part], "gradient")
    alone, z_alone = compat.cross_entropy_loss(logits, labels, **OPTIONS)
    exact = 1e-3 * (logits.double() * 0.7).logsumexp(-1).square().masked_fill(labels == -100, 0.0)
    assert_as_accurate(z_losses, z_alone, exact, "z-losses")


@pytest.mark.parametrize("count", [2, 4])
def test_classes_over_ranks(count, tmp_path):
    ranks.run(losses_of_a_part, count, tmp_path)
