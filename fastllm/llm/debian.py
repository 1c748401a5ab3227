"""Pairs of texts from Debian's package descriptions: their translations, and each with its one-line synopsis.

The descriptions are free as their packages are. apt-get fetches the lists into a temporary folder; the machine's own
are not touched.
"""

import re
import tempfile
from collections import Counter
from pathlib import Path

from fastllm.llm.sources import SPLITS, Corpus, Unavailable, one_line, run_client, split_of, without_repeats


def fetch_descriptions(languages: list[str]) -> dict[str, str]:
    """Language -> the text of its Translation file."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "partial").mkdir()
        options = [f"Dir::State::lists={folder}", f"Acquire::Languages={','.join(languages)}", "Acquire::Retries=1"]
        command = ["apt-get", "-q", "update", *(word for option in options for word in ("-o", option))]
        run_client(command, "Debian's package descriptions", folder)
        return {language: read_list(folder, language) for language in languages}


def read_list(folder, language: str) -> str:
    # main's list and not that of an update or another component: the largest one
    found = sorted(Path(folder).glob(f"*_i18n_Translation-{language}*"), key=lambda path: path.stat().st_size)
    if not found:
        raise Unavailable(f"the package lists of this machine's apt have no descriptions in {language!r}")
    return run_client(["/usr/lib/apt/apt-helper", "cat-file", str(found[-1])], found[-1].name, folder)


def parse_descriptions(text: str, language: str) -> dict[str, tuple[str, str, list[str]]]:
    """Description-md5 -> (package, synopsis, paragraphs of the long description). What is incomplete is left out."""
    found = {}
    for stanza in text.split("\n\n"):
        fields = dict(re.findall(rf"^(Package|Description-md5|Description-{language}): *(.*)$", stanza, re.MULTILINE))
        body = stanza.partition(f"\nDescription-{language}:")[2].partition("\n")[2]
        lines = [line[1:] for line in body.splitlines() if line.startswith(" ")]
        paragraphs = [one_line(part) for part in re.split(r"^\.$", "\n".join(lines), flags=re.MULTILINE)]
        paragraphs = [paragraph for paragraph in paragraphs if paragraph]
        if len(fields) == 3 and fields[f"Description-{language}"].strip() and paragraphs:
            synopsis = one_line(fields[f"Description-{language}"])
            found[fields["Description-md5"]] = fields["Package"], synopsis, paragraphs
    return found


def family(package: str) -> str:
    """A package's name without version numbers: gcc-12-doc and gcc-13-doc are described in the same words."""
    return re.sub(r"[\d.]+", "", package)


def split_pairs(pairs, counts: Counter, origin: str) -> Corpus:
    """(source, target, package) triples to splits by family of packages; a source is kept where it is met first."""
    pairs, counts["duplicates"] = without_repeats(pairs)
    splits = {split: [] for split in SPLITS}
    for source, target, package in pairs:
        splits[split_of(family(package))].append((source, target))
    return Corpus(splits, f"{origin}, split by family of packages", dict(counts))


def translations(language: str) -> Corpus:
    """Synopses and paragraphs, English to another language."""
    lists = fetch_descriptions(["en", language])
    pairs, counts = align(*(parse_descriptions(lists[name], name) for name in ("en", language)))
    return split_pairs(pairs, counts, f"Debian's package descriptions, English and {language} (DDTP)")


def align(english: dict, other: dict):
    """Pairs of synopses and of paragraphs, of descriptions with as many paragraphs, and counts of what is left out."""
    pairs, counts = [], Counter({"other number of paragraphs": 0, "not translated": 0})
    for key in sorted(english.keys() & other.keys()):
        (package, synopsis, paragraphs), (_, translated, in_other) = english[key], other[key]
        counts["descriptions"] += 1
        if len(paragraphs) != len(in_other):
            counts["other number of paragraphs"] += 1
            continue
        for source, target in zip([synopsis, *paragraphs], [translated, *in_other], strict=True):
            if source == target:
                counts["not translated"] += 1
            else:
                pairs.append((source, target, package))
    return pairs, counts


def synopses() -> Corpus:
    """Long description to synopsis."""
    english = parse_descriptions(fetch_descriptions(["en"])["en"], "en")
    pairs = [(" ".join(paragraphs), synopsis, package) for package, synopsis, paragraphs in english.values()]
    return split_pairs(pairs, Counter(descriptions=len(pairs)), "Debian's package descriptions and their synopses")
