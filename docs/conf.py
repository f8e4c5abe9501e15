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
default_role = "py:obj"  # `name` in a docstring links to its documentation, if there is any
highlight_language = "none"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_mock_imports = ["lm_eval", "rouge_score"]


def adapt_toctree(app: Sphinx, page: str, source: list[str]) -> None:
    """Make the index's table of contents match the pages that exist: drop missing ones, append unlisted ones."""
    if page == "index":
        before, rest = source[0].split("```{toctree}\n")
        table, after = rest.split("```\n", 1)
        pages = {file.stem for file in Path(app.srcdir).glob("*.md")} - {"index"}
        lines = [line for line in table.splitlines() if not line.isidentifier() or line in pages]
        table = "\n".join([*lines, *sorted(pages - set(lines))])
        source[0] = f"{before}```{{toctree}}\n{table}\n```\n{after}"


def setup(app: Sphinx) -> None:
    app.connect("source-read", adapt_toctree)
