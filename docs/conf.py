"""The site of docs/, built by ``make docs``: Sphinx, with Markdown through MyST."""

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
