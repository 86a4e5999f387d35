"""The page of a report: one HTML file that needs nothing beside it, no network, no script, no font."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from sparsify.report._charts import CHART, Chart

__all__ = ["Picture", "Section", "Table", "render"]

STYLE = """
:root { color-scheme: light; --ink: #1b1f24; --faint: #5d6670; --line: #e1e5ea; --accent: #0b5cad; }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0; background: #fff; color: var(--ink); font: 17px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 46rem; margin: 0 auto; padding: 2.5rem 1.1rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .5rem; padding-top: 1.1rem;
     border-top: 1px solid var(--line); }
p { margin: .5rem 0; }
.lead { color: var(--faint); margin-bottom: 1.4rem; }
nav ol { margin: .4rem 0; padding-left: 1.4rem; columns: 2; column-gap: 2rem; font-size: .94rem; }
nav li { break-inside: avoid; padding: .08rem 0; }
a { color: var(--accent); text-decoration: none; }
a:hover, a:focus { text-decoration: underline; }
figure { margin: 1.1rem 0; }
.wide { overflow-x: auto; -webkit-overflow-scrolling: touch; }
img { display: block; width: 100%; height: auto; min-width: 30rem; }
figcaption { color: var(--faint); font-size: .88rem; line-height: 1.45; margin-top: .4rem; }
.missing { color: var(--faint); background: #f5f6f8; border-left: 3px solid #c5ccd5; padding: .6rem .9rem; }
.missing code { background: #e8ebef; }
code { font: .88em ui-monospace, "SFMono-Regular", Consolas, monospace; background: #f0f2f5; padding: .08em .3em;
       border-radius: 3px; overflow-wrap: anywhere; }
code span { white-space: nowrap; }
table { border-collapse: collapse; font-size: .84rem; font-variant-numeric: tabular-nums; line-height: 1.35; }
caption { text-align: left; font-weight: 600; padding: .9rem 0 .4rem; }
th, td { padding: .32rem .7rem .32rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, .text { text-align: left; }
footer { margin-top: 3rem; color: var(--faint); font-size: .85rem; }
@media (max-width: 34rem) { body { font-size: 16px; } main { padding-top: 1.4rem; } nav ol { columns: 1; } }
@media print { main { max-width: none; } h2 { break-after: avoid; } figure { break-inside: avoid; }
               img { min-width: 0; } }
"""


@dataclass(frozen=True)
class Picture:
    """A picture that is a file already, with the words for those who do not see it."""

    path: Path
    alt: str
    caption: str


@dataclass(frozen=True)
class Table:
    """Rows of text under a heading. The first column is flush left, and those numbered in ``text``."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text: tuple[int, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page. ``missing`` says why it has nothing to show, and how to get it; `backticks` mark commands."""

    anchor: str
    title: str
    lead: str = ""
    charts: Sequence[Chart | Picture] = ()
    tables: Sequence[Table] = ()
    missing: Sequence[str] = field(default=())


def render(title: str, lead: str, sections: Sequence[Section], foot: str) -> str:
    """The page as HTML text; charts are drawn as SVG into it."""
    contents = "\n".join(f'<li><a href="#{s.anchor}">{html.escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(_section(section) for section in sections)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{html.escape(title)}</h1>
<p class="lead">{_text(lead)}</p>
<nav aria-label="Contents"><ol>
{contents}
</ol></nav>
{body}
<footer><p>{_text(foot)}</p></footer>
</main>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f'<section id="{section.anchor}">', f"<h2>{html.escape(section.title)}</h2>"]
    if section.lead:
        parts.append(f"<p>{_text(section.lead)}</p>")
    parts += [_figure(chart) for chart in section.charts]
    parts += [_table(table) for table in section.tables]
    parts += [f'<p class="missing">{_text(why)}</p>' for why in section.missing]
    return "\n".join([*parts, "</section>"])


def _figure(chart: Chart | Picture) -> str:
    if isinstance(chart, Picture):
        source = _data_uri("image/jpeg", _jpeg(chart.path))
    else:
        source = _data_uri("image/svg+xml", _svg(chart))
    image = f'<img src="{source}" alt="{html.escape(chart.alt, quote=True)}">'
    return f'<figure><div class="wide">{image}</div><figcaption>{_text(chart.caption)}</figcaption></figure>'


def _jpeg(path: Path) -> bytes:
    """The picture small enough for a page."""
    from PIL import Image

    buffer = io.BytesIO()
    with Image.open(path) as picture:
        picture.thumbnail((1600, 1600))
        picture.convert("RGB").save(buffer, "JPEG", quality=85, optimize=True)
    return buffer.getvalue()


def _svg(chart: Chart) -> bytes:
    from matplotlib import rc_context

    buffer = io.BytesIO()
    with rc_context(CHART):
        chart.figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


def _data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _table(table: Table) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        marks = (' class="text"' if i in table.text else "" for i in range(len(row)))
        return "".join(f"<{tag}{m}>{html.escape(cell)}</{tag}>" for cell, m in zip(row, marks, strict=True))

    rows = "\n".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    head = f"<tr>{cells('th', table.head)}</tr>"
    return (
        f'<div class="wide"><table><caption>{html.escape(table.caption)}</caption>\n'
        f"<thead>{head}</thead>\n<tbody>{rows}</tbody></table></div>"
    )


def _text(text: str) -> str:
    """Escaped, with `code` marked as such; a line may end between its words, not at a hyphen within one."""
    parts = html.escape(text).split("`")
    return "".join(f"<code>{_unbroken(part)}</code>" if i % 2 else part for i, part in enumerate(parts))


def _unbroken(code: str) -> str:
    return " ".join(f"<span>{word}</span>" if word.startswith("--") else word for word in code.split(" "))
