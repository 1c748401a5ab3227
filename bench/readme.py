"""`make readme`: what the README says in tables is taken from the code and from report/demo.json, never typed."""

import json
import re
from pathlib import Path

from fastllm import info

ROOT = Path(__file__).resolve().parents[1]


def fill(text: str, name: str, block: str) -> str:
    """`text` with `block` between the markers <!-- name --> and <!-- /name -->."""
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    filled, n = re.subn(pattern, lambda m: f"{m[1]}{block.rstrip()}\n{m[2]}", text, flags=re.DOTALL)
    if n != 1:
        raise ValueError(f"expected one pair of markers <!-- {name} --> ... <!-- /{name} -->, found {n}")
    return filled


def demo_block(demo: dict) -> str:
    """Markdown of the tables of report/demo.json: {"machine": ..., "tables": [{"title", "header", "rows"}, ...]}."""
    out = [f"Printed by `make demo` on: {demo['machine']}."]
    for table in demo["tables"]:
        lines = [table["header"], ["---"] * len(table["header"]), *table["rows"]]
        out += ["", f"**{table['title']}**", "", *("| " + " | ".join(map(str, line)) + " |" for line in lines)]
    return "\n".join(out)


def main():
    readme, demo = ROOT / "README.md", ROOT / "report" / "demo.json"
    text = fill(readme.read_text(), "matrix", info.matrix())
    if demo.exists():
        text = fill(text, "demo", demo_block(json.loads(demo.read_text())))
    readme.write_text(text)


if __name__ == "__main__":
    main()
