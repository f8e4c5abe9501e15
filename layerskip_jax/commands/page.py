"""The HTML page of ``layerskip report``: one file, in the light or dark mode of its reader."""

import html
from collections.abc import Iterable, Mapping, Sequence

from layerskip_jax.evaluation.pictures import PAGE

STYLE = """
:root { color-scheme: light dark; LIGHT }
@media (prefers-color-scheme: dark) { :root { DARK } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--text); background: var(--background); margin: 0; }
main { max-width: 70rem; margin: 0 auto; padding: 1.5rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin: .5rem 0 .3rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--panel); }
p { max-width: 48rem; margin: .5rem 0; } .lead { font-size: 1.1rem; }
.note, .legend, dt { color: var(--muted); }
img { display: block; width: 100%; height: auto; }
code, pre, .tokens { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .82rem; }
pre { background: var(--panel); padding: .8rem 1rem; border-radius: .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(18rem, 1fr)); gap: .7rem; margin: 1.2rem 0; }
dl > div { background: var(--panel); border-radius: .4rem; padding: .7rem .9rem; }
dt { font-size: .82rem; } dd { margin: 0; font-size: .82rem; color: var(--muted); }
dd strong { display: block; font-size: 1.35rem; color: var(--text); font-weight: 600; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.data th, .data td { padding: .3rem 1.2rem .3rem 0; text-align: right; border-bottom: 1px solid var(--panel); }
.data th:first-child, .data td:first-child { text-align: left; }
.scroll { overflow-x: auto; margin: 1rem 0; }
:focus-visible { outline: 2px solid var(--accent); }
.tokens { font-size: .75rem; }
.tokens td { padding: .12rem .3rem; border: 1px solid var(--background); white-space: pre; color: var(--muted); }
.tokens th { font-weight: 600; padding: .12rem .3rem; text-align: left; }
.legend span { padding: .05rem .4rem; font: .82rem ui-monospace, monospace; }
.command span { display: inline-block; } .sample { line-height: 1.7; } .sample .prompt { color: var(--muted); }
.sample .drafted { color: var(--accent); text-decoration: underline; text-underline-offset: .25em; }
summary { cursor: pointer; padding: .4rem 0; }
""".replace("LIGHT", "".join(f"--{name}: {color}; " for name, color in PAGE["light"].items())).replace(
    "DARK", "".join(f"--{name}: {color}; " for name, color in PAGE["dark"].items())
)


def tiles(values: Mapping[str, tuple[str, str]]) -> str:
    """Return the summary as HTML: ``{name: (value, remark)}``."""
    cells = (
        f"<div><dt>{html.escape(name)}</dt><dd><strong>{html.escape(value)}</strong>{html.escape(remark)}</dd></div>"
        for name, (value, remark) in values.items()
    )
    return f"<dl>{''.join(cells)}</dl>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of texts as HTML."""
    columns = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in head)
    lines = ("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<table class="data"><thead><tr>{columns}</tr></thead><tbody>{"".join(lines)}</tbody></table>'


def command(parts: Iterable[str]) -> str:
    """Return a command as HTML, which breaks lines only between its ``parts``."""
    return '<pre class="command">' + " ".join(f"<span>{html.escape(part)}</span>" for part in parts) + "</pre>"


def details_html(title: str, text: str) -> str:
    """Return HTML that shows ``text`` after a click on ``title``."""
    return f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>"


def page(title: str, lead: str, sections: Mapping[str, str]) -> str:
    """Return the page; the keys of ``sections`` are headings, their values HTML. The heading "" is left out."""
    title = html.escape(title)
    body = "\n".join((f"<h2>{html.escape(name)}</h2>\n" if name else "") + part for name, part in sections.items())
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n"
        f'<body><main><h1>{title}</h1>\n<p class="lead">{html.escape(lead)}</p>\n{body}\n</main></body></html>\n'
    )
