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


def complete_the_table(app: Sphinx, page: str, source: list[str]) -> None:
    """Leave pages out of the index's table that are not written yet, and add those that it does not name."""
    if page == "index":
        before, rest = source[0].split("```{toctree}\n")
        table, after = rest.split("```\n", 1)
        there = {file.stem for file in Path(app.srcdir).glob("*.md")} - {"index"}
        listed = [line for line in table.splitlines() if not line.isidentifier() or line in there]
        table = "\n".join([*listed, *sorted(there - set(listed))])
        source[0] = f"{before}```{{toctree}}\n{table}\n```\n{after}"


def setup(app: Sphinx) -> None:
    app.connect("source-read", complete_the_table)
