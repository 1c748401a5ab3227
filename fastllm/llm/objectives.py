"""What a model is pretrained on: the next token, the tokens that are masked, or the target of a source.

Each objective gives batches by number, the loss of one, and an evaluation; batches of texts are packed, so that nothing
is padding and no document sees another.
"""

import math
from dataclasses import dataclass, fields

import torch

from fastllm.llm.batches import Epochs, pad
from fastllm.llm.ranks import Ranks
from fastllm.llm.shards import Sequences, Stream, read_meta
from fastllm.llm.tokens import Tokenizer

ALONE = Ranks()
LIMIT = 1 << 16  # tokens of an evaluation while training


@dataclass(frozen=True)
class Inputs:
    """What `Transformer.forward` takes, by the same names; targets [B, T], -100 where nothing is to be predicted."""

    tokens: torch.Tensor
    targets: torch.Tensor
    source: torch.Tensor | None = None
    source_mask: torch.Tensor | None = None

    def on(self, device) -> dict:
        found = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: x.to(device) for name, x in found.items() if x is not None}


@dataclass(frozen=True)
class Packed(Inputs):
    cu_seqlens: torch.Tensor | None = None


class Objective:
    """Over a folder of token shards: objective[n] is batch n of training."""

    kind, masked_lm = "decoder", False

    def __init__(self, folder, context: int, batch: int, seed: int = 0, label_smoothing=0.0):
        self.folder, self.context, self.batch, self.seed = folder, context, batch, seed
        self.label_smoothing = label_smoothing
        self.tokenizer, self.meta = Tokenizer.load(folder), read_meta(folder)

    def loss_of(self, model, inputs: Inputs):
        inputs = self.arranged(inputs).on(next(model.parameters()).device)
        return model(**inputs, label_smoothing=self.label_smoothing if model.training else 0.0)

    def arranged(self, inputs: Inputs) -> Inputs:
        """As the model takes them."""
        return inputs

    @staticmethod
    def tokens_in(inputs: Inputs) -> int:
        """Those that are worked on, padding left out."""
        sources = 0 if inputs.source is None else inputs.source.numel()
        if inputs.source_mask is not None:
            sources = int(inputs.source_mask.sum())
        return sources + (inputs.tokens.numel() if inputs.source is None else int((inputs.targets >= 0).sum()))

    @staticmethod
    def weight_of(inputs: Inputs) -> int:
        return int((inputs.targets >= 0).sum())

    @torch.no_grad()
    def evaluate(self, model, split="valid", limit=LIMIT, ranks=ALONE) -> dict:
        """Mean loss over about `limit` targets (None: all), spread over the split; each of `ranks` takes its share of
        the batches, and all return the loss over all."""
        total, count = 0.0, 0
        for inputs, counts in ranks.in_step(ranks.share(self.passes(split, limit))):
            loss, weight = float(self.loss_of(model, inputs)), self.weight_of(inputs)
            if counts:
                total, count = total + loss * weight, count + weight
        total, count = map(sum, zip(*ranks.gather((total, count))))
        loss = total / count
        found = dict(loss=loss, perplexity=math.exp(min(loss, 700)), tokens=count)
        if self.kind == "decoder":
            tokens_per_character = self.meta["tokens"][split] / max(1, self.meta["characters"][split])
            found["bits_per_character"] = loss / math.log(2) * tokens_per_character
        return found


class NextToken(Objective):
    """The stream cut into rows of `context` tokens at another place in each pass, in random order.

    packed=False lets the documents of a row see each other, for what cannot pack (a sequence shared by several ranks).
    """

    packed = True

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.streams = {split: Stream(self.folder, split) for split in ("train", "valid", "test")}
        for split, stream in self.streams.items():
            least = self.context + 1 if split != "train" else 2 * self.context + 1
            if len(stream) < least:
                raise ValueError(
                    f"{self.folder}: the {split} split has {len(stream)} tokens, too few for context={self.context}"
                )
        # a row may begin up to context - 1 tokens later
        self.rows = (len(self.streams["train"]) - 1) // self.context - 1
        self._epoch = self._order = None

    def __getitem__(self, n: int) -> Inputs:
        stream, rows = self.streams["train"], []
        for position in range(n * self.batch, (n + 1) * self.batch):
            epoch, at = divmod(position, self.rows)
            if epoch != self._epoch:
                random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                self._shift = int(torch.randint(self.context, (), generator=random))
                self._order, self._epoch = torch.randperm(self.rows, generator=random), epoch
            begin = int(self._order[at]) * self.context + self._shift
            rows.append(stream[begin : begin + self.context + 1])
        return self.inputs(torch.stack(rows), n)

    def passes(self, split, limit):
        stream = self.streams[split]
        begins = range(0, len(stream) - self.context, self.context)
        if limit is not None:
            begins = begins[:: max(1, math.ceil(len(begins) * self.context / limit))]
        for at in range(0, len(begins), self.batch):
            part = [stream[begin : begin + self.context + 1] for begin in begins[at : at + self.batch]]
            yield self.inputs(torch.stack(part), at)

    def inputs(self, rows, n) -> Inputs:
        """Of rows [B, context + 1]."""
        return Inputs(rows[:, :-1], rows[:, 1:])

    def arranged(self, inputs) -> Inputs:
        """Packed: every row, and every eos in it, begins a sequence. So a text begins with eos, and eos is the target
        of its last token too."""
        tokens = inputs.tokens
        if not self.packed:
            return inputs
        begins = tokens == self.tokenizer.eos
        begins[:, 0] = True
        bounds = torch.cat([begins.flatten().nonzero()[:, 0], torch.tensor([tokens.numel()])])
        return Packed(tokens.reshape(1, -1), inputs.targets.reshape(1, -1), cu_seqlens=bounds)

    @torch.no_grad()
    def sample(self, model, prompt="", count=200, temperature=0.8, top_k=40):
        """What the model makes of a prompt; a new text without one."""
        ids = [self.tokenizer.eos, *self.tokenizer.encode(prompt)]
        device, random = next(model.parameters()).device, torch.Generator().manual_seed(self.seed)
        count = min(count, self.context - len(ids))
        if count < 1:
            raise ValueError(f"pretrain: the prompt has {len(ids)} tokens, the context is {self.context}")
        made = model.generate(
            torch.tensor([ids], device=device), count, temperature=temperature, top_k=top_k, generator=random
        )
        return self.tokenizer.decode(made[0].tolist())


class MaskedTokens(NextToken):
    """A share of the tokens is hidden: 8 of 10 by the mask, 1 by a random token, 1 stays (Devlin et al. 2018,
    arXiv:1810.04805). Which ones depends on the number of the batch alone."""

    kind, masked_lm, share = "encoder", True, 0.15

    def inputs(self, rows, n) -> Inputs:
        tokens = rows[:, :-1]
        random = torch.Generator().manual_seed((self.seed + 1) * 7_368_787 + n)
        chosen = (torch.rand(tokens.shape, generator=random) < self.share) & (tokens != self.tokenizer.eos)
        chosen[:, 0] |= ~chosen.any(1)  # every row has a target, whoever takes it
        targets = torch.where(chosen, tokens, -100)
        how = torch.rand(tokens.shape, generator=random)
        others = torch.randint(self.tokenizer.size, tokens.shape, generator=random)
        tokens = torch.where(chosen & (how < 0.8), self.tokenizer.mask, tokens)
        tokens = torch.where(chosen & (how >= 0.9), others, tokens)
        return Inputs(tokens, targets)

    @torch.no_grad()
    def sample(self, model, prompt="", count=64):
        """A text of the valid split with what the model would put for [the words that it does not see]."""
        row = self.streams["valid"][: min(count, self.context) + 1][None]
        inputs = self.inputs(row, 0)
        filled = model(inputs.tokens.to(next(model.parameters()).device)).argmax(-1)[0].tolist()
        words = [
            self.tokenizer.decode([guess if target >= 0 else token])
            for token, guess, target in zip(row[0].tolist(), filled, inputs.targets[0].tolist())
        ]
        return "".join(f"[{w}]" if t >= 0 else w for w, t in zip(words, inputs.targets[0].tolist()))


class SourceToTarget(Objective):
    """Pairs in batches of about one length; what is longer than `context` is cut."""

    kind = "encoder-decoder"

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.meta["kind"] != "pairs":
            raise ValueError(
                f"pretrain: an encoder-decoder needs pairs (columns source, target), {self.folder} has text"
            )
        self.sequences = {split: Sequences(self.folder, split) for split in ("train", "valid", "test")}
        lengths = self.sequences["train"].lengths
        self.epochs = Epochs((lengths[::2] + lengths[1::2]).tolist(), self.batch, self.seed, list, whole=True)

    def __getitem__(self, n: int) -> Inputs:
        return self.inputs("train", self.epochs[n])

    def passes(self, split, limit):
        sequences = self.sequences[split]
        order = sorted(range(len(sequences) // 2), key=lambda n: sequences.lengths[2 * n])
        if limit is not None:
            order = order[:: max(1, math.ceil(int(sequences.lengths[1::2].sum()) / limit))]
        for at in range(0, len(order), self.batch):
            yield self.inputs(split, order[at : at + self.batch])

    def inputs(self, split, indices) -> Inputs:
        sequences, bos = self.sequences[split], self.tokenizer.bos
        source, mask = pad([sequences[2 * n][: self.context] for n in indices], self.tokenizer.pad)
        wanted = [sequences[2 * n + 1][: self.context] for n in indices]
        tokens, _ = pad([[bos, *target[:-1]] for target in wanted], self.tokenizer.pad)
        return Inputs(tokens, pad(wanted, -100)[0], source, mask)

    @torch.no_grad()
    def sample(self, model, prompt="", count=100):
        """The likeliest target of the prompt, or of the first source of the valid split."""
        ids = [*self.tokenizer.encode(prompt), self.tokenizer.eos] if prompt else self.sequences["valid"][0]
        device = next(model.parameters()).device
        source = torch.tensor([ids[: self.context]], device=device)
        begin = torch.tensor([[self.tokenizer.bos]], device=device)
        made = model.generate(begin, min(count, self.context - 1), source=source, stop=self.tokenizer.eos)
        return f"{self.tokenizer.decode(ids)} -> {self.tokenizer.decode(made[0].tolist())}"


OBJECTIVES = {"language-model": NextToken, "masked-lm": MaskedTokens, "encoder-decoder": SourceToTarget}
