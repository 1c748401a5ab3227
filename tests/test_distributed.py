"""Several ranks take the steps of one process: losses, gradient norms, parameters, and states saved and loaded."""

import pytest
import ranks as processes
import torch
from check import assert_as_accurate

from fastllm.llm import distributed
from fastllm.model import Config, Transformer

BATCH, LENGTH, STEPS = 4, 16, 4
WAYS = {  # name -> (processes, settings)
    "ddp": (2, dict(mode="ddp")),
    "fsdp": (2, dict(mode="fsdp")),
    "sequence": (2, dict(sequence_ranks=2)),
    "sequence, contiguous": (2, dict(sequence_ranks=2, sharding="contiguous")),
    "ddp of 4": (4, dict(mode="ddp")),
    "fsdp of 4": (4, dict(mode="fsdp")),
    "ddp, sequence": (4, dict(mode="ddp", sequence_ranks=2)),
    "fsdp, sequence": (4, dict(mode="fsdp", sequence_ranks=2)),
}


def model_and_optimizer(ranks, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = dict(vocab=40, d_model=16, heads=2, layers=2, d_ff=24, dropout=0.0, max_len=LENGTH, positions="rotary")
    model = Transformer(Config(**sizes)).to(dtype)
    return model, ranks.spread(model), torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)


def batches():
    """Of tokens and targets; in every batch another number of targets counts, and in some rows few do."""
    random = torch.Generator().manual_seed(1)
    while True:
        tokens = torch.randint(40, (BATCH, LENGTH + 1), generator=random)
        targets = tokens[:, 1:].clone()
        lengths = torch.randint(1, LENGTH, (BATCH, 1), generator=random)
        yield tokens[:, :-1], targets.masked_fill(torch.arange(LENGTH) > lengths, -100)


def train(ranks, model, call, optimizer, stream, steps, halves=False):
    """(losses, norms) of some steps, of batches in one piece or in halves whose gradients add up."""
    losses, norms = [], []
    for _, (tokens, targets) in zip(range(steps), stream, strict=False):
        pieces = [slice(0, 2), slice(2, 4)] if halves else [slice(0, 4)]
        shares = [ranks.share(tokens[rows], targets[rows]) for rows in pieces]
        counts = [int((y != -100).sum()) for _, y in shares]
        (total,) = ranks.sums(sum(counts))
        optimizer.zero_grad()
        loss = 0.0
        for n, ((x, y), count) in enumerate(zip(shares, counts, strict=True)):
            with ranks.accumulating(call, n + 1 < len(shares)):
                part = call(x, targets=y) if count else 0 * call(x).sum()  # a mean over nothing is NaN
                (part * ranks.weight(count, total)).backward()
            loss += float(part.detach()) * count
        norms.append(ranks.clip(model.parameters(), 1.0))
        optimizer.step()
        losses.append(ranks.sums(loss)[0] / total)
    return losses, norms


def one_way(folder, name, settings):
    with distributed.start(**settings) as ranks:
        model, call, optimizer = model_and_optimizer(ranks)
        stream = batches()
        losses, norms = train(ranks, model, call, optimizer, stream, STEPS, halves=name == "fsdp")
        with ranks.folder(folder / f"{name}-state") as state:
            distributed.save_state(state, model, optimizer)
        parameters = {key: x.clone() for key, x in distributed.full_state(model, ranks).items()}
        found = dict(losses=losses, norms=norms, parameters=parameters)
        found["later"] = train(ranks, model, call, optimizer, stream, 2)
        if ranks.first:
            torch.save(found, folder / f"{name}.pt")


@pytest.fixture(scope="module")
def alone():
    """The same by one process, in fp32 and in fp64: for each dtype (losses, norms, parameters, later)."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        model, call, optimizer = model_and_optimizer(distributed.Ranks(), dtype)
        stream = batches()
        losses, norms = train(distributed.Ranks(), model, call, optimizer, stream, STEPS)
        parameters = {name: x.clone() for name, x in model.state_dict().items()}
        later = train(distributed.Ranks(), model, call, optimizer, stream, 2)
        found[dtype] = dict(losses=losses, norms=norms, parameters=parameters, later=later)
    return found


def hold(found, alone, what):
    """No further from fp64 than one process in fp32, by the project's rule."""
    as_tensor = lambda x, dtype: torch.tensor(x, dtype=torch.float64).to(dtype)  # noqa: E731
    peer, truth = alone[torch.float32], alone[torch.float64]
    for key in ("losses", "norms", "later"):
        numbers = [
            as_tensor(x[key], d) for x, d in ((found, torch.float32), (peer, torch.float32), (truth, torch.float64))
        ]
        assert_as_accurate(*numbers, f"{what}: {key}")
    flat = lambda state: torch.cat([state[name].flatten() for name in truth["parameters"]])  # noqa: E731
    assert_as_accurate(*(flat(x["parameters"]) for x in (found, peer, truth)), f"{what}: parameters")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


SLOW = {"sequence, contiguous", "ddp of 4", "fsdp of 4"}  # the others have their parts


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in WAYS]
)
def test_steps_are_those_of_one_process(folder, alone, name):
    count, settings = WAYS[name]
    processes.run_launched(one_way, count, folder, name, settings)
    hold(torch.load(folder / f"{name}.pt"), alone, name)


def go_on(folder, name, settings):
    """Two steps from the state of `name`, in another way."""
    with distributed.start(**settings) as ranks:
        torch.manual_seed(7)  # what is loaded decides
        model, call, optimizer = model_and_optimizer(ranks)
        for parameter in model.parameters():
            torch.nn.init.ones_(parameter)
        distributed.load_state(folder / f"{name}-state", model, optimizer)
        stream = batches()
        for _ in range(STEPS):
            next(stream)
        later = train(ranks, model, call, optimizer, stream, 2)
        if ranks.first:
            torch.save(later, folder / "later.pt")


@pytest.mark.parametrize(
    "saved, count, settings", [("fsdp", 4, dict(mode="fsdp")), ("fsdp", 1, {}), ("ddp", 2, dict(mode="fsdp"))]
)
def test_goes_on_with_another_number_of_ranks(folder, alone, saved, count, settings):
    if not (folder / f"{saved}-state").exists():
        processes.run_launched(one_way, WAYS[saved][0], folder, saved, WAYS[saved][1])
    processes.run_launched(go_on, count, folder, saved, settings)
    found = torch.load(folder / f"{saved}.pt")
    hold(found | dict(later=torch.load(folder / "later.pt")), alone, f"{saved} on {count}")
