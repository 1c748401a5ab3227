"""What `fastllm bench model` asks of a model: to encode sentences, read a prompt, add a token, take a training step."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from fastllm.bench import generation, subjects
from fastllm.optim import AdamW


@dataclass
class Work:
    """A task at one size. call(model) gives the call that is timed; it returns the tensors that are checked.

    extra: further contenders, name -> a function without arguments that gives their call, or fails with the reason.
    """

    task: str
    size: str
    amount: float  # of `unit` in a call
    unit: str
    call: Callable
    extra: dict[str, Callable] = field(default_factory=dict)


def pooled(hidden, kept):
    """The mean over real tokens, of length 1: what a sentence encoder is used for."""
    kept = kept[..., None].to(hidden.dtype)
    return F.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)


def encode(subject, batch, count, models, wanted):
    """`count` sentences in batches of `batch`, in the order they come in, padded to the longest of each batch."""
    chosen = subjects.sentences(count, subject.tokenizer)
    lots = [
        dict(subject.tokenizer(chosen[at : at + batch], padding=True, return_tensors="pt"))
        for at in range(0, count, batch)
    ]

    def call(model):
        return lambda: torch.cat([pooled(model(**lot).last_hidden_state, lot["attention_mask"]) for lot in lots])

    def packed():
        """The caller leaves the padding out: one row of tokens, and where each sentence begins."""
        rows = []
        for lot in lots:
            kept = lot["attention_mask"].bool()
            bounds = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
            place = torch.arange(kept.shape[1]).expand(kept.shape)[kept][None]
            given = {name: x[kept][None] for name, x in lot.items() if name != "attention_mask"}
            given |= dict(position_ids=place, cu_seq_lens_q=bounds, cu_seq_lens_k=bounds)
            rows.append((given, torch.repeat_interleave(torch.arange(len(kept)), kept.sum(1)), kept.sum(1)[:, None]))

        def run():
            made = []
            for given, sentence, lengths in rows:
                hidden = models["fastllm"](**given).last_hidden_state[0]
                sums = hidden.new_zeros(len(lengths), hidden.shape[1]).index_add_(0, sentence, hidden)
                made.append(F.normalize(sums / lengths, dim=-1))
            return torch.cat(made)

        return run

    tokens, padded = (sum(int(f(lot["attention_mask"])) for lot in lots) for f in (torch.sum, torch.numel))
    size = f"{count} sentences by {batch}, {tokens} tokens" + f", {padded} padded" * (padded > tokens)
    extra = {"fastllm, packed": packed} if padded > tokens else {}
    if "onnxruntime" in wanted:
        extra["onnxruntime"] = lambda: onnxruntime_call(subject, lots)
    return Work("encode", size, count, "sentences/s", call, extra)


_sessions = {}  # by model: an export takes longer than all the timing


def onnxruntime_call(subject, lots):
    """The same by onnxruntime's CPU provider, on a graph that PyTorch's exporter writes."""
    import onnxruntime

    names = list(lots[0])

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = subjects.shared(subject.model)
            self.model.set_attn_implementation("eager")

        def forward(self, *inputs):
            given = dict(zip(names, inputs, strict=True))
            given["attention_mask"] = (1 - given["attention_mask"][:, None, None, :]) * torch.finfo(torch.float32).min
            return self.model(**given).last_hidden_state

    if id(subject) not in _sessions:
        example = subject.tokenizer(["one sentence", "and another"], padding=True, return_tensors="pt")
        sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            path = str(Path(folder) / "encoder.onnx")
            shapes = (tuple(sizes for _ in names),)
            torch.onnx.export(
                Encoder().eval(),
                tuple(example[name] for name in names),
                path,
                input_names=names,
                dynamo=True,
                dynamic_shapes=shapes,
                verbose=False,
            )
            _sessions[id(subject)] = onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    session = _sessions[id(subject)]

    def run():
        made = []
        for lot in lots:
            (hidden,) = session.run(None, {name: x.numpy() for name, x in lot.items()})
            made.append(pooled(torch.from_numpy(hidden), lot["attention_mask"]))
        return torch.cat(made)

    return run


def prompt_of(subject, length, batch=1):
    random = torch.Generator().manual_seed(1)
    return torch.randint(subject.vocabulary, (batch, length), generator=random)


def prefill(subject, length):
    """The logits behind a prompt, and keys and values for what is to come."""
    prompt = prompt_of(subject, length)

    def call(model):
        if subject.is_reference:
            return lambda: model(prompt)[:, -1]
        return lambda: model(prompt, use_cache=True, logits_to_keep=1).logits[:, -1]

    return Work("prefill", f"1x{length}", length, "tokens/s", call)


def decode(subject, length, models):
    """One token more, behind `length` in the cache."""
    prompt = prompt_of(subject, length)

    def call(model):
        return generation.hugging_face_step(getattr(model, "_orig_mod", model), prompt, model is models.get("compile"))

    return Work(
        "decode",
        f"1 token behind {length}",
        1,
        "tokens/s",
        call,
        {"fastllm.generate": lambda: generation.our_step(models["fastllm"], prompt, "model")[0]},
    )


def train(subject, batch, length, dtype, models):
    """A training step: loss, gradients, AdamW, PyTorch's fused one or ours. Its rate is 0, so that the weights stay
    what they are for everyone."""
    tokens = prompt_of(subject, length + 1, batch)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    optimizers = {}

    def call(model):
        parameters = [p for p in model.parameters() if p.requires_grad]
        ours = model is models["fastllm"]
        which = id(parameters[0]), ours  # contenders share their parameters, so they share the optimiser's memory
        if which not in optimizers:
            options = dict(lr=0.0, weight_decay=0.0)
            made = AdamW(parameters, **options) if ours else torch.optim.AdamW(parameters, **options, fused=True)
            optimizers[which] = made
        optimizer = optimizers[which]
        low = parameters[0].dtype == torch.float32 and dtype != torch.float32

        def step():
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype, enabled=low):
                if subject.is_reference:
                    loss = model(inputs, targets=targets)
                else:
                    loss = model(inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
            loss.backward()
            optimizer.step()
            return loss.detach()

        def checked():
            loss = step()
            return torch.cat([x.flatten().to(parameters[0].dtype) for x in (loss, *(p.grad for p in parameters))])

        step.checked = checked  # loss and gradients, which a timed step need not gather
        return step

    return Work("train", f"{batch}x{length}", batch * length, "tokens/s", call)
