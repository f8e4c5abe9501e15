"""The site of docs/, built by ``make docs``: Sphinx, with Markdown through MyST."""

import dataclasses
from collections.abc import Iterator

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from layerskip_jax import __version__
from layerskip_jax.command_line import shown_value
from layerskip_jax.config import Config

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


def settings_lines() -> Iterator[str]:
    """Yield reStructuredText: a definition of every field of `Config`, by group."""
    for group in dataclasses.fields(Config):
        yield from (f".. rubric:: {group.name}", "", (type(group.default).__doc__ or "").strip(), "")
        for field in dataclasses.fields(group.default):
            value = getattr(group.default, field.name)
            shown = shown_value(value)
            yield from (f"``{group.name}.{field.name}``, default ``{shown}``", f"    {field.metadata['doc']}", "")


class Settings(SphinxDirective):
    """``.. settings::`` lists every setting, from the texts of ``layerskip train --help``."""

    def run(self) -> list[nodes.Node]:
        section = nodes.section()
        self.state.nested_parse(StringList(list(settings_lines()), "settings"), self.content_offset, section)
        return section.children


def setup(app: Sphinx) -> None:
    app.add_directive("settings", Settings)
