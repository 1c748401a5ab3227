"""Figures of the HTML reports: matplotlib's SVG, whose colours are those of the page, light or dark."""

import io
from importlib import import_module

# Placeholders that the SVG text is searched for: the page's style sheet, or `themed`, gives them their colours.
INK, MUTED, GRID, CARD = "#010203", "#010204", "#010205", "#010209"
NAIVE, OURS, GOOD, BAD = "#010206", "#010207", "#01020a", "#01020b"
SERIES = tuple(f"#01030{n}" for n in range(8))  # of what has no colour of its own
NAMES = {INK: "ink", MUTED: "muted", GRID: "line", CARD: "card", NAIVE: "naive", OURS: "ours", GOOD: "good", BAD: "bad"}
NAMES |= {colour: f"series-{n}" for n, colour in enumerate(SERIES)}

LIGHT = dict(page="#f6f7f9", card="#ffffff", ink="#1b2330", muted="#5c6675", line="#dfe3e9", naive="#9aa7b8")
LIGHT |= dict(ours="#0b6e99", good="#19703c", bad="#b3261e")
DARK = dict(page="#12161c", card="#1a2029", ink="#e6eaf0", muted="#9aa5b4", line="#2e3743", naive="#6d7b8f")
DARK |= dict(ours="#4fb8e6", good="#6fcf97", bad="#ff8a80")
# Okabe and Ito's colours, which most colour-blind readers tell apart; lighter ones on dark paper.
_LIGHT = ("#c2410c", "#7c3aed", "#0f766e", "#b45309", "#be185d", "#4d7c0f", "#1d4ed8", "#57534e")
_DARK = ("#fb923c", "#b79cff", "#4fd1c5", "#fbbf24", "#f472b6", "#a3e635", "#7da7ff", "#c4bcb3")
LIGHT |= {f"series-{n}": colour for n, colour in enumerate(_LIGHT)}
DARK |= {f"series-{n}": colour for n, colour in enumerate(_DARK)}

STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}
LEGEND = dict(  # above the axes
    frameon=False,
    labelcolor=INK,
    loc="lower left",
    bbox_to_anchor=(0.0, 1.0),
    borderaxespad=0.3,
    handletextpad=0.4,
    columnspacing=1.2,
)


def figure(width, height, rows=1, columns=1, **more):
    """An empty figure and its axes; sizes in inches of 72 CSS pixels."""
    import_module("matplotlib").use("svg")
    plt = import_module("matplotlib.pyplot")
    with plt.rc_context(STYLE):
        made, axes = plt.subplots(rows, columns, figsize=(width, height), layout="constrained", **more)
    made.patch.set_alpha(0)
    return made, axes


def svg(made, name) -> str:
    """The figure as inline SVG whose colours are the page's."""
    plt = import_module("matplotlib.pyplot")
    buffer = io.StringIO()
    # One salt per figure: element names are hashes, and two figures in one page must not share them.
    with plt.rc_context(STYLE | {"svg.hashsalt": name}):
        made.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(made)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for colour, variable in NAMES.items():
        text = text.replace(colour, f"var(--{variable})")
    return text


def variables(theme: dict) -> str:
    """The colours as CSS."""
    return " ".join(f"--{name}: {colour};" for name, colour in theme.items())


def themed(drawn: str, theme: dict) -> str:
    """An SVG file that stands alone, in the colours of one theme, on its card."""
    for name, colour in theme.items():
        drawn = drawn.replace(f"var(--{name})", colour)
    start = drawn.index(">") + 1
    return f'{drawn[:start]}<rect width="100%" height="100%" rx="6" fill="{theme["card"]}"/>{drawn[start:]}'
