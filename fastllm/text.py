"""What the commands share: tables (rich where it is installed and somebody looks), progress, lists of names."""

import argparse
import re
import sys
import time


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


def progress(items, what, name=str, file=None, seconds=None):
    """Yield the items, with a line that says which one is under way where somebody looks.

    `seconds` guesses how long an item takes: the line then says how long it will be, corrected by what the items so
    far took, and where nobody looks (a log) there is such a line every minute.
    """
    items, file = list(items), file or sys.stderr
    guesses = [seconds(item) for item in items] if seconds else []
    start = said = time.monotonic()
    if seconds and items:
        print(f"{what}: {len(items)} steps, about {duration(sum(guesses))}", file=file, flush=True)
    for n, item in enumerate(items):
        left = ""
        if seconds:
            passed, done = time.monotonic() - start, sum(guesses[:n])
            left = f", {duration(sum(guesses[n:]) * (passed / done if n > 2 and done else 1.0))} left"
        line = f"{what} {n + 1}/{len(items)}{left}: {name(item)}"
        if file.isatty():
            print(f"\r\033[K{line}", end="", file=file, flush=True)
        elif seconds and time.monotonic() - said > 60:
            said = time.monotonic()
            print(line, file=file, flush=True)
        yield item
    if file.isatty():
        print("\r\033[K", end="", file=file, flush=True)


def duration(seconds: float) -> str:
    """For people: 45 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


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
