"""The long description of a release: README.md, its links and pictures as addresses."""

import re
import tomllib
from pathlib import Path

from setuptools import setup

PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]


def absolute(match):
    """A picture is shown from its raw file, anything else from its page in the repository."""
    picture, text, path = match.groups()
    kind = "raw" if picture else "blob"
    return f"{picture}[{text}]({PROJECT['urls']['Repository']}/{kind}/main/{path})"


setup(
    long_description=re.sub(
        r"(!?)\[([^][]*)\]\((?!https?://|#)([^)]+)\)",
        absolute,
        Path("README.md").read_text(encoding="utf-8"),
    ),
    long_description_content_type="text/markdown",
)
