"""Tokenizers: what they encode, and that Hugging Face reads what they save."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("tokenizers")

from fastllm.llm.tokens import SPECIAL, Tokenizer

TEXTS = ["The cat, the dog", "a cat the end", "dog dog zebra"]
HARD = "na\u00efve \u2014 \U0001f600 \u0301\n\n\t <eos> <pad>\r\n"


def test_words_are_the_most_frequent_ones():
    words = Tokenizer.train_words(TEXTS, 7)
    assert words.size == 7 and [words.id(w) for w in ("dog", "the", "cat")] == [5, 6, None]
    assert words.encode("THE zebra, dog") == [6, words.unknown, words.unknown, 5]
    assert words.encode("<eos>") == [words.unknown] * 3  # in a text it ends nothing
    assert words.encode("<eos>", parse_special=True) == [words.eos]
    assert words.encode("") == []
    assert words.decode([6, 5]) == "the dog"
    with pytest.raises(ValueError, match="train_words: vocab must be at least 6, got 5"):
        Tokenizer.train_words(TEXTS, 5)


@pytest.mark.parametrize("tokenizer", [Tokenizer.bytes(), Tokenizer.train_bpe(TEXTS * 3, 270)], ids=["bytes", "bpe"])
def test_byte_level_tokenizers_round_trip_any_text(tokenizer, tmp_path):
    assert [tokenizer.pad, tokenizer.unknown, tokenizer.bos, tokenizer.eos, tokenizer.mask] == [0, 1, 2, 3, 4]
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    for text in ("", "The cat", HARD, "".join(map(chr, range(1, 0x800)))):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and min(ids, default=5) >= 5
        assert again.encode(text) == ids == tokenizer.encode_batch([text, "x"])[0]
    assert (again.pad, again.unknown, again.bos, again.eos, again.mask) == (0, 1, 2, 3, 4)


def test_bytes_and_merges():
    assert Tokenizer.bytes().encode(HARD) == [byte + 5 for byte in HARD.encode()]
    assert Tokenizer.bytes().size == 261
    bpe = Tokenizer.train_bpe(TEXTS * 3, 270)
    assert bpe.size == 270 and len(bpe.encode("the cat")) < 7
    with pytest.raises(ValueError, match="train_bpe: vocab must be at least 261"):
        Tokenizer.train_bpe(TEXTS, 260)


def test_further_special_tokens():
    for tokenizer in (
        Tokenizer.bytes(special=("<user>",)),
        Tokenizer.train_bpe(TEXTS, 300, special=("<user>",)),
        Tokenizer.train_words(TEXTS, 300, special=("<user>",)),
    ):
        assert tokenizer.id("<user>") == 5
        assert tokenizer.encode("<user>", parse_special=True) == [5] not in (tokenizer.encode("<user>"),)
        assert tokenizer.decode([5]) == "" != tokenizer.decode([5], skip_special_tokens=False)


def test_hugging_face_reads_it_and_is_read(tmp_path):
    transformers = pytest.importorskip("transformers")
    bpe = Tokenizer.train_bpe(TEXTS * 3, 270)
    bpe.save(tmp_path / "ours")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs("The cat, naïve")["input_ids"] == bpe.encode("The cat, naïve")
    assert (theirs.pad_token, theirs.bos_token, theirs.eos_token, theirs.mask_token) == tuple(
        SPECIAL[role] for role in ("pad", "bos", "eos", "mask")
    )
    theirs.add_special_tokens({"eos_token": "zebra"})
    theirs.save_pretrained(tmp_path / "theirs")
    again = Tokenizer.load(tmp_path / "theirs")
    assert again.decode([again.eos], skip_special_tokens=False) == "zebra"


def test_usual_names_are_found_without_a_config(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers.models import WordLevel

    vocab = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3}
    (tmp_path / "bert").mkdir(), (tmp_path / "gpt2").mkdir()
    Backend(WordLevel(vocab, unk_token="[UNK]")).save(str(tmp_path / "bert" / "tokenizer.json"))
    bert = Tokenizer.load(tmp_path / "bert")
    assert (bert.pad, bert.unknown, bert.bos, bert.eos, bert.mask) == (0, 3, 1, 2, None)
    Backend(WordLevel({"a": 0, "<|endoftext|>": 1}, unk_token="a")).save(str(tmp_path / "gpt2" / "tokenizer.json"))
    gpt2 = Tokenizer.load(tmp_path / "gpt2")
    assert (gpt2.pad, gpt2.bos, gpt2.eos) == (1, 1, 1)


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    with pytest.raises(ValueError, match="there is no .*tokenizer.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", ')
    with pytest.raises(ValueError, match="tokenizer.json is not a tokenizer"):
        Tokenizer.load(tmp_path)


def test_spacy_says_what_a_word_is(tmp_path, monkeypatch):
    pytest.importorskip("spacy")
    words = Tokenizer.train_words(["Don't go.", "Don't stay in the U.K.!"], 40, min_count=1, language="en")
    assert words.id("n't") is not None and words.id("u.k.") is not None
    assert len(words.encode("Don't stay")) == 3
    words.save(tmp_path)
    assert Tokenizer.load(tmp_path).encode("Don't stay") == words.encode("Don't stay")
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=False)
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    for text in ("Don't stay  in the U.K.!", "E\u0301t\u00e9, go. \U0001f600\n\tn't", ""):
        assert theirs(text, add_special_tokens=False)["input_ids"] == words.encode(text)
    with pytest.raises(ValueError, match="no language 'xq'"):
        Tokenizer.train_words(["a"], 40, language="xq")


def test_training_is_deterministic():
    """In another process with another hash seed."""
    script = (
        "from fastllm.llm.tokens import Tokenizer as T;"
        "print(T.train_bpe(['The cat, the dog', 'a cat the end'] * 3, 270).backend.to_str())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    ours = Tokenizer.train_bpe(["The cat, the dog", "a cat the end"] * 3, 270).backend.to_str()
    assert json.loads(done.stdout) == json.loads(ours)
