"""Text to token numbers and back: byte-level BPE, words, bytes, or what a Hugging Face folder brings."""

import json
from pathlib import Path

from fastllm.llm import require
from fastllm.llm.files import atomic

SPECIAL = dict(pad="<pad>", unknown="<unk>", bos="<bos>", eos="<eos>", mask="<mask>")  # numbers 0 to 4
# What tokenizer_config.json calls them, and what they are where it is silent.
ROLES = {
    "pad": (("pad_token",), ("<pad>", "[PAD]")),
    "unknown": (("unk_token",), ("<unk>", "[UNK]")),
    "bos": (("bos_token", "cls_token"), ("<bos>", "<s>", "[CLS]", "<|begin_of_text|>", "<|endoftext|>")),
    "eos": (("eos_token", "sep_token"), ("<eos>", "</s>", "[SEP]", "<|end_of_text|>", "<|endoftext|>")),
    "mask": (("mask_token",), ("<mask>", "[MASK]")),
}


SPACY_WORDS = Path(__file__).with_name("spacy_words.py")  # a program for transformers; nothing here imports it


class Tokenizer:
    """A `tokenizers.Tokenizer` (as `backend`) that knows its special tokens and never reads one out of a user's text.

    pad, unknown, bos, eos and mask are token numbers, None where there is no such token; pad is eos where there is no
    padding. A special token that is spelt out in a text stays text, unless it is encoded with parse_special=True; so
    `decode(encode(text)) == text` for every text with byte-level BPE, and a text cannot end itself.
    """

    def __init__(self, backend, special: dict[str, str], language: str | None = None, chat_template=None):
        self.backend, self.special, self.language = backend, special, language
        self.chat_template = chat_template  # as tokenizer_config.json has it
        self._split = spacy_words(language) if language else None
        for role in ROLES:
            setattr(self, role, backend.token_to_id(special[role]) if role in special else None)
        self.pad = self.eos if self.pad is None else self.pad

    @property
    def size(self) -> int:
        """How many token numbers there are: the rows that an embedding needs."""
        return max(self.backend.get_vocab().values(), default=-1) + 1

    def id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def encode(self, text: str, *, add_special_tokens=True, parse_special=False) -> list[int]:
        """Token numbers. add_special_tokens adds what a Hugging Face tokenizer puts around a text; ours add nothing."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens, parse_special=parse_special)[0]

    def encode_batch(self, texts, *, add_special_tokens=True, parse_special=False) -> list[list[int]]:
        texts = list(texts) if self._split is None else [self._split(text) for text in texts]
        self.backend.encode_special_tokens = not parse_special
        found = self.backend.encode_batch_fast(
            texts, is_pretokenized=self._split is not None, add_special_tokens=add_special_tokens
        )
        return [one.ids for one in found]

    def decode(self, ids, *, skip_special_tokens=True) -> str:
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def save(self, folder):
        """Write tokenizer.json, and tokenizer_config.json with the special tokens: transformers' AutoTokenizer reads
        them, for words that spaCy splits with trust_remote_code=True, by a file of code that is written too."""
        folder = Path(folder)
        with atomic(folder / "tokenizer.json") as file:
            file.write(self.backend.to_str(pretty=True))
        config = {ROLES[role][0][0]: token for role, token in self.special.items()}
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        if self.language:
            config |= dict(spacy_language=self.language, tokenizer_class="SpacyWords")
            config["auto_map"] = {"AutoTokenizer": [None, f"{SPACY_WORDS.stem}.SpacyWords"]}
            with atomic(folder / SPACY_WORDS.name) as file:
                file.write(SPACY_WORDS.read_text("utf-8"))
        if self.chat_template:
            config["chat_template"] = self.chat_template
        with atomic(folder / "tokenizer_config.json") as file:
            json.dump(config, file, indent=1)

    @classmethod
    def load(cls, folder):
        """From a folder with tokenizer.json, of ours or of Hugging Face. Raises ValueError where it cannot be read."""
        path = Path(folder) / "tokenizer.json"
        try:
            backend = require("tokenizers").Tokenizer.from_str(path.read_text("utf-8"))
        except FileNotFoundError:
            raise ValueError(f"Tokenizer.load: there is no {path}") from None
        except Exception as error:  # tokenizers raises Exception itself
            raise ValueError(f"Tokenizer.load: {path} is not a tokenizer: {error}") from None
        backend.no_truncation(), backend.no_padding()
        config_path = path.with_name("tokenizer_config.json")
        config = json.loads(config_path.read_text("utf-8")) if config_path.exists() else {}
        template = path.with_name("chat_template.jinja")
        template = template.read_text("utf-8") if template.exists() else config.get("chat_template")
        return cls(backend, special_tokens(backend, config), config.get("spacy_language"), template)

    @classmethod
    def of_hugging_face(cls, tokenizer):
        """From a fast tokenizer of transformers."""
        special = {role: getattr(tokenizer, keys[-1], None) for role, (keys, _) in ROLES.items()}
        special |= {role: getattr(tokenizer, keys[0]) or special[role] for role, (keys, _) in ROLES.items()}
        special = {role: str(token) for role, token in special.items() if token}
        return cls(tokenizer.backend_tokenizer, special, chat_template=getattr(tokenizer, "chat_template", None))

    @classmethod
    def train_bpe(cls, texts, vocab=8192, *, min_count=2, special=()):
        """Byte-level BPE (GPT-2's) of at most `vocab` tokens, with 256 bytes among them: nothing is unknown to it."""
        least = len(SPECIAL) + len(special) + 256
        if vocab < least:
            raise ValueError(f"Tokenizer.train_bpe: vocab must be at least {least} (the bytes), got {vocab}")
        tokenizers = require("tokenizers")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab,
            min_frequency=min_count,
            special_tokens=[*SPECIAL.values(), *special],
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, SPECIAL)

    @classmethod
    def train_words(cls, texts, vocab=20000, *, min_count=2, special=(), language=None):
        """The most frequent lower-case words and punctuation marks, `vocab` entries in all, ties in alphabetical order.

        With a language ("en", "fr", ...) spaCy's tokenizer for it says what a word is.
        """
        least = len(SPECIAL) + len(special) + 1
        if vocab < least:
            raise ValueError(f"Tokenizer.train_words: vocab must be at least {least}, got {vocab}")
        tokenizers = require("tokenizers")
        backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token=SPECIAL["unknown"]))
        backend.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.NFC(), tokenizers.normalizers.Lowercase()]
        )
        if language:
            split = spacy_words(language)
            texts = (" ".join(split(text)) for text in texts)
            backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
        else:
            word = tokenizers.Regex(r"\w+|[^\w\s]")
            backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(word, "removed", invert=True)
        trainer = tokenizers.trainers.WordLevelTrainer(
            vocab_size=vocab,
            min_frequency=min_count,
            special_tokens=[*SPECIAL.values(), *special],
            show_progress=False,
        )
        backend.train_from_iterator(texts, trainer)
        return cls(backend, SPECIAL, language)

    @classmethod
    def bytes(cls, *, special=()):
        """UTF-8 bytes: byte-level BPE without merges. Byte b is the number b + 5 (+ the further special tokens)."""
        tokenizers = require("tokenizers")
        names = [*SPECIAL.values(), *special, *byte_alphabet()]
        vocab = {name: number for number, name in enumerate(names)}
        backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[]))
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        backend.add_special_tokens([*SPECIAL.values(), *special])
        return cls(backend, SPECIAL)


def common(a, b) -> int:
    """How many tokens a and b begin with alike."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def byte_alphabet() -> list[str]:
    """The character that stands for each byte in byte-level BPE: itself where it is printable, else one past 255."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def special_tokens(backend, config: dict) -> dict[str, str]:
    """Role -> token, as tokenizer_config.json has it (a string, or an object with "content"), else by usual names."""
    found = {}
    for role, (keys, usual) in ROLES.items():
        named = [config[key] for key in keys if config.get(key)]
        named = [token["content"] if isinstance(token, dict) else token for token in named]
        if token := next((token for token in [*named, *usual] if backend.token_to_id(token) is not None), None):
            found[role] = token
    return found


def spacy_words(language: str):
    """A function that splits a text into spaCy's words of a language; white space is no word."""
    spacy = require("spacy", extra=None)
    try:
        split = spacy.blank(language).tokenizer
    except ImportError:
        raise ValueError(f"Tokenizer: spaCy knows no language {language!r}") from None
    return lambda text: [token.text for token in split(text) if not token.is_space]
