"""The page: everything on one HTML file that needs nothing else, for phones and for dark rooms."""

import io
import re
from importlib import resources

from cola.report.accuracy_print import LEGEND as SCORES_LEGEND
from cola.report.accuracy_print import TITLES
from cola.report.bench_table import LEGEND as COSTS_LEGEND
from cola.report.content import Content
from cola.report.curve_figures import NamedFigure
from cola.report.finding import Found
from cola.report.grid_state import count_grid, progress
from cola.report.style import INK, write_figure

_TEMPLATE = "page.html"


def render_page(content: Content, found: Found, title: str) -> str:
    """The page's text.

    Args:
        content: what is shown.
        found: what there was, finished and not.
        title: of the page.
    """
    # jinja2 takes as long to import as everything else here together.
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = (resources.files("cola.report") / _TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        title=title,
        content=content,
        found=found,
        table_titles=TITLES,
        progress=progress(content.states),
        grid=count_grid(content.states),
        scores_legend=SCORES_LEGEND,
        costs_legend=COSTS_LEGEND,
        drawings={
            figure.name: Markup(_inline(figure, f"f{index}"))  # our own SVG, not a user's text
            for index, figure in enumerate(content.figures)
        },
    )


def _inline(figure: NamedFigure, prefix: str) -> str:
    """The figure as an SVG element in the page's text colour, with names no other figure has."""
    file = io.BytesIO()
    write_figure(figure.figure, file, "svg")
    text = file.getvalue().decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = text.replace(INK, "currentColor")
    return text.replace("<svg", '<svg role="img" aria-hidden="true"', 1)
