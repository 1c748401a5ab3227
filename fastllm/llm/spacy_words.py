"""A tokenizer of transformers whose words are those of spaCy: tokenizer.json cannot say what these are.

`fastllm.llm.tokens` puts a copy of this file beside such a tokenizer.json, where AutoTokenizer.from_pretrained(folder,
trust_remote_code=True) finds it, and without that says that it is needed. It needs spacy and transformers, and nothing
of fastllm.
"""

from pathlib import Path

import spacy
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import PreTokenizer
from transformers import PreTrainedTokenizerFast


class Words:
    """Splits first, for spaCy knows "U.K." and not "u.k.", and then makes lower case of each word."""

    def __init__(self, language):
        self.tokenizer = spacy.blank(language).tokenizer

    def pre_tokenize(self, text):
        text.split(self.split)
        text.normalize(self.normalize)

    def split(self, number, text):
        found = (token for token in self.tokenizer(str(text)) if not token.is_space)
        return [text[token.idx : token.idx + len(token)] for token in found]

    def normalize(self, word):
        word.nfc()
        word.lowercase()


class SpacyWords(PreTrainedTokenizerFast):
    """name_or_path is the folder with tokenizer.json, which is read as it stands: transformers would make a BPE of its
    list of words."""

    def __init__(self, *args, spacy_language, name_or_path, **options):
        backend = Tokenizer.from_file(str(Path(name_or_path) / "tokenizer.json"))
        options = {name: value for name, value in options.items() if name not in ("vocab", "merges", "tokenizer_file")}
        options |= dict(tokenizer_object=backend, spacy_language=spacy_language, name_or_path=name_or_path)
        super().__init__(*args, **options)
        self.backend_tokenizer.normalizer = None  # what is made of words is behind the split
        self.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Words(spacy_language))
