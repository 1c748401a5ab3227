"""What the commands share: tables (rich where it is installed and somebody looks), progress, lists of names."""

import argparse
import re
import sys


def table(header, rows) -> str:
    """The rows under their header in aligned columns; what looks like a number stands on the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    right = [all(_is_number(row[i]) for row in cells[1:]) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = (cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, right, strict=True))
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def show(header, rows, title="", file=None):
    """Print a table. A pipe or a file gets plain text, so that it can be searched and is never cut to a width."""
    file = file or sys.stdout
    if file.isatty():
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            pass
        else:
            pretty = Table(*header, title=title or None, title_justify="left")
            for row in rows:
                pretty.add_row(*(str(cell).replace("[", r"\[") for cell in row), style=_style(row))
            Console(file=file).print(pretty)
            return
    print(*filter(None, [title, table(header, rows)]), sep="\n", file=file)


def progress(items, what, name=str, file=None):
    """Yield the items, with a line that says which one is under way where somebody looks."""
    items, file = list(items), file or sys.stderr
    for n, item in enumerate(items):
        if file.isatty():
            print(f"\r\033[K{what} {n + 1}/{len(items)}: {name(item)}", end="", file=file, flush=True)
        yield item
    if file.isatty():
        print("\r\033[K", end="", file=file, flush=True)


def some_of(choices):
    """For argparse: a comma-separated list of some of the choices (nargs="+" would swallow what comes next)."""

    def parse(given: str) -> list[str]:
        names = given.split(",")
        if unknown := [name for name in names if name not in choices]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(choices)} (commas between them)")
        return names

    return parse


def _is_number(cell: str) -> bool:
    return re.fullmatch(r"-?|[-+]?[\d.,]+(e[-+]?\d+)?[%x]?", cell) is not None


def _style(row):
    return "bold red" if any(str(cell).startswith(("FAIL", "WRONG")) for cell in row) else None
