"""Sphinx configuration."""

from importlib.metadata import version as installed_version

project = "forebear"
author = "the forebear authors"
copyright = "the forebear authors"
release = version = installed_version("forebear")

extensions = ["myst_parser"]
myst_enable_extensions = ["dollarmath", "deflist"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

html_theme = "furo"
html_title = f"forebear {release}"
