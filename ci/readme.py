"""Renders README.md from nbs/index.ipynb: prose, code and what it displayed. Pictures are linked
files; a comment `<!-- include FILE -->` becomes the content of that file."""

import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent


def text_of(output):
    """The text of one output of a cell; a picture's is in its file, which the prose links."""
    if output.output_type == "stream":
        return output.text
    data = output.get("data", {})
    return data.get("text/markdown") or ("" if "image/png" in data else data.get("text/plain", ""))


def code_parts(cell):
    """The source of a code cell and the texts that it displayed; nothing of a hidden cell."""
    lines = cell.source.strip().splitlines()
    directives = [line for line in lines if line.startswith("#|")]
    if any(word in line for line in directives for word in ("hide", "default_exp")):
        return []
    source = "\n".join(line for line in lines if line not in directives).strip()
    parts = [f"```python\n{source}\n```"]
    for output in cell.outputs:
        text = "".join(text_of(output)).strip()
        is_markdown = "text/markdown" in output.get("data", {})
        if text:
            parts.append(text if is_markdown else f"```\n{text}\n```")
    return parts


def render(notebook):
    """Markdown of a notebook. Directives go; so do cells that start with #| hide."""
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(cell.source.strip())
        else:
            parts += code_parts(cell)
    text = "\n\n".join(part for part in parts if part) + "\n"
    # in the notebook, notebooks are beside it and pictures beside nbs/; both are below the README
    text = re.sub(r"\]\((?=[\w/]+\.ipynb)", "](nbs/", text).replace("](../", "](")
    return re.sub(r"<!-- include (\S+) -->", lambda match: included(ROOT / match[1]), text)


def included(path):
    """A file's content; its links to files above its own folder start at the README's."""
    text = path.read_text(encoding="utf-8").strip()
    return re.sub(r"\]\((?:\.\./)+", "](", text)


def main(target=ROOT / "README.md"):
    Path(target).write_text(
        render(nbformat.read(ROOT / "nbs" / "index.ipynb", 4)), encoding="utf-8"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
