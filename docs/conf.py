"""The site of docs/, built by ``make docs``: Sphinx, with Markdown through MyST."""

from pathlib import Path

from sphinx.application import Sphinx

from layerskip_jax import __version__

project = "layerskip_jax"
author = "The layerskip_jax authors"
release = version = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
exclude_patterns = ["*.ipynb"]
html_theme = "furo"
html_title = f"layerskip_jax {release}"
default_role = "py:obj"  # `name` in a docstring links to what it names, where that is documented
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_mock_imports = ["lm_eval", "rouge_score"]


def only_pages_that_exist(app: Sphinx, page: str, source: list[str]) -> None:
    """Leave pages out of the index's table that are not written yet."""
    if page == "index":
        table, end = "```{toctree}", "```\n"
        before, entries = source[0].split(table)
        entries, after = entries.split(end, 1)
        folder = Path(app.srcdir)
        kept = [line for line in entries.splitlines() if not line.isidentifier() or (folder / f"{line}.md").exists()]
        source[0] = before + table + "\n".join(kept) + "\n" + end + after


def setup(app: Sphinx) -> None:
    app.connect("source-read", only_pages_that_exist)
