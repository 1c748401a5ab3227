"""Token numbers on the disk: written as a stream, read through memory maps, so that no corpus is too large.

data/NAME/bpe-8192/     beside data/NAME/train.txt or train.tsv
    tokenizer.json
    train-00000.npy     uint16, or uint32 for more than 65,536 tokens
    train-00000-ends.npy  of pairs: where each sequence ends
    meta.json
"""

import csv
import json
from pathlib import Path

import torch

from fastllm.llm import require
from fastllm.llm.corpus import read_documents
from fastllm.llm.files import atomic, atomic_folder
from fastllm.llm.sources import SPLITS
from fastllm.llm.tokens import Tokenizer

TOKENIZERS = ("bpe", "words", "bytes")
SHARD = 1 << 24  # tokens
PIECE = 1 << 16  # characters that are encoded at once
LEARN_FROM = 1 << 28  # characters of the train split that a tokenizer is trained on, at most


def tokenized(data, tokenizer="bpe", vocab=8192, language=None) -> Path:
    """The folder with the shards of a data set, made where it is not there or of another text.

    tokenizer is "bpe" or "words", trained on the train split with at most `vocab` tokens, or "bytes". Texts become one
    stream with an eos behind each document; pairs become sequences, source and target in turn, each with its eos.
    """
    learnt(tokenizer, (), vocab, language)  # what is wrong with them is said before anything is read
    data = Path(data)
    pairs, fingerprint = is_pairs(data), fingerprint_of(data)
    name = tokenizer if tokenizer == "bytes" else f"{tokenizer}-{vocab}"
    folder = data / (name + (f"-{language}" if language else ""))
    if (folder / "meta.json").exists() and read_meta(folder)["fingerprint"] == fingerprint:
        return folder
    texts = pair_texts if pairs else pieces
    made = learnt(tokenizer, first(LEARN_FROM, texts(data, "train")), vocab, language)
    with atomic_folder(folder) as temporary:
        made.save(temporary)
        meta = dict(fingerprint=fingerprint, kind="pairs" if pairs else "text", tokens={}, characters={})
        for split in SPLITS:
            meta["tokens"][split], meta["characters"][split] = write(temporary, split, made, texts(data, split), pairs)
        with atomic(temporary / "meta.json") as file:
            json.dump(meta, file, indent=1)
    return folder


def learnt(tokenizer, texts, vocab, language=None) -> Tokenizer:
    """A tokenizer that is trained on texts. Raises ValueError for options that do not fit, whatever the texts are."""
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"shards: tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    if language and tokenizer != "words":
        raise ValueError(f"shards: spaCy says what words are: it is for --tokenizer words, not {tokenizer}")
    if tokenizer == "bytes":
        return Tokenizer.bytes()
    if tokenizer == "bpe":
        return Tokenizer.train_bpe(texts, vocab)
    return Tokenizer.train_words(texts, vocab, language=language)


def is_pairs(data: Path) -> bool:
    """Whether a data set holds pairs, not texts. Raises ValueError where it is neither."""
    if (data / "train.txt").exists():
        return False
    if not data.is_dir():
        what = "is a file" if data.exists() else "is not there"
        raise ValueError(f"{data} {what}: a folder that `fastllm data` made is needed")
    if not (data / "train.tsv").exists():
        raise ValueError(f"{data} has neither train.txt nor train.tsv: `fastllm data` makes such a folder")
    with open(data / "train.tsv", encoding="utf-8") as file:
        header = file.readline().strip().split("\t")
    if header != ["source", "target"]:
        raise ValueError(
            f"{data}/train.tsv has the columns {', '.join(header)}; a text, or source and target, is needed"
        )
    return True


def fingerprint_of(data: Path) -> str:
    """That `fastllm data` left, or where it did not, the sizes and times of the files."""
    meta = data / "meta.json"
    if meta.exists():
        return read_meta(data)["fingerprint"]
    files = sorted(data.glob("*.t[xs][tv]"))
    return json.dumps([(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files])


def read_meta(folder) -> dict:
    try:
        return json.loads((Path(folder) / "meta.json").read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{folder}/meta.json cannot be read: {error}") from None


def pieces(data, split):
    """The text of a split in pieces of whole lines, and None behind every document."""
    for document in read_documents(Path(data) / f"{split}.txt"):
        lines, size = [], 0
        for line in document.splitlines(keepends=True):
            lines.append(line)
            size += len(line)
            if size >= PIECE:
                yield "".join(lines)
                lines, size = [], 0
        if lines:
            yield "".join(lines)
        yield None


def pair_texts(data, split):
    """Source and target in turn."""
    with open(Path(data) / f"{split}.tsv", encoding="utf-8", newline="") as file:
        reader = csv.reader(file, delimiter="\t")
        next(reader)
        for row in reader:
            yield from row


def first(count, texts):
    for text in texts:
        if text is not None:
            yield text
            count -= len(text)
            if count <= 0:
                return


def write(folder, split, tokenizer, texts, pairs: bool) -> tuple[int, int]:
    """Write the shards of a split; returns how many tokens and characters there are."""
    numpy = require("numpy")
    dtype = numpy.uint16 if tokenizer.size <= 1 << 16 else numpy.uint32
    tokens, ends, total, characters, shard = [], [], 0, 0, 0

    def flush():
        nonlocal shard
        numpy.save(folder / f"{split}-{shard:05d}.npy", numpy.concatenate([numpy.empty(0, dtype), *tokens]))
        if pairs:
            numpy.save(folder / f"{split}-{shard:05d}-ends.npy", numpy.array(ends, numpy.int64))
        shard += 1

    size = 0
    for batch in batched(texts, 256):
        encoded = iter(tokenizer.encode_batch(text for text in batch if text is not None))
        for text in batch:
            ids = [] if text is None else next(encoded)
            if pairs or text is None:
                ids = [*ids, tokenizer.eos]
            tokens.append(numpy.array(ids, dtype))
            size, total, characters = size + len(ids), total + len(ids), characters + len(text or "")
            ends.append(size)
            if size >= SHARD and len(ends) % 2 == 0:  # a pair stays in one shard
                flush()
                tokens, ends, size = [], [], 0
    if size or not shard:
        flush()
    return total, characters


def batched(items, count):
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


class Stream:
    """The tokens of a split as one sequence: len(stream), and stream[a:b] as int64."""

    def __init__(self, folder, split):
        self.shards = memory_maps(folder, f"{split}-[0-9]*[0-9].npy")
        self.starts = [0]
        for shard in self.shards:
            self.starts.append(self.starts[-1] + len(shard))

    def __len__(self):
        return self.starts[-1]

    def __getitem__(self, span: slice) -> torch.Tensor:
        begin, end, _ = span.indices(len(self))
        numpy, parts = require("numpy"), []
        for shard, start in zip(self.shards, self.starts):
            if start < end and begin < start + len(shard):
                parts.append(shard[max(0, begin - start) : end - start])
        return torch.from_numpy(numpy.concatenate(parts or [numpy.empty(0)]).astype(numpy.int64))


class Sequences:
    """The sequences of a split of pairs: sequences[2 n] is source n and sequences[2 n + 1] its target, lists of int."""

    def __init__(self, folder, split):
        numpy = require("numpy")
        self.shards = memory_maps(folder, f"{split}-[0-9]*[0-9].npy")
        self.ends = memory_maps(folder, f"{split}-*-ends.npy")
        self.firsts = numpy.cumsum([0, *(len(ends) for ends in self.ends)])
        self.lengths = numpy.concatenate([numpy.diff(ends, prepend=0) for ends in self.ends])

    def __len__(self):
        return int(self.firsts[-1])

    def __getitem__(self, n: int) -> list[int]:
        shard = int(require("numpy").searchsorted(self.firsts, n, side="right")) - 1
        at = n - self.firsts[shard]
        end = int(self.ends[shard][at])
        return self.shards[shard][end - int(self.lengths[n]) : end].tolist()


def memory_maps(folder, pattern):
    numpy = require("numpy")
    try:
        return [numpy.load(path, mmap_mode="r") for path in sorted(Path(folder).glob(pattern))]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: a shard is damaged, remove the folder to make it anew: {error}") from None
