"""From a notebook of nbs/ to a page of the book: what a reader sees and no more."""

import ast
import os
import re
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

import nbformat

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ROOT / "nbs"
REPOSITORY = "https://github.com/dbmtl/dbmtl"  # as in settings.ini
HIDDEN = {"hide", "default_exp", "exporti"}  # directives of a cell that is not shown
FOLDED = "#| code-fold: true"  # first line of a cell that the reader opens: a solution
LONG_IMPORTS = 12  # lines; a longer cell of imports alone is opened by the reader, too

LINK = re.compile(r"(?P<before>!?\[[^\]]*\]\()(?P<target>[^)\s]+)\)")
INCLUDE = re.compile(r"<!-- include (\S+) -->")
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
EQUATION = re.compile(r"^\$\$(?P<body>.+?)\$\$[ \t]*$", re.DOTALL | re.MULTILINE)
# what is left as it is when the paper's results are linked: code, mathematics, links, headings
UNTOUCHED = re.compile(
    r"^```.*?^```$|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]+\$|!?\[[^\]]*\]\([^)]*\)|^#.*$",
    re.DOTALL | re.MULTILINE,
)
RESULT = re.compile(
    r"\b(?P<kind>Table|Figure|Proposition|Algorithm|Equation|Eq\.) (?P<number>\d+(?:\.\d+)?)\b"
)
RESULTS = {
    "Table": {"1", "2", "3", "4", "5", "6"},
    "Figure": {"1", "2", "3", "4", "5", "6", "7", "8", "9", "10"},
    "Proposition": {"3.1"},
    "Algorithm": {"1"},
    "Equation": {"2"},
}
# a notebook whose text means another paper's result of that name
OF_ANOTHER_PAPER = {("03_gradient_balancing/05_pcgrad", "Algorithm 1")}


def all_notebooks():
    """The paths of all notebooks below nbs/, in reading order."""
    paths = NOTEBOOKS.rglob("*.ipynb")
    return sorted(path for path in paths if ".ipynb_checkpoints" not in path.parts)


def name_of(path):
    """A notebook's path below nbs/ without the suffix, which is also the name of its page."""
    return path.relative_to(NOTEBOOKS).with_suffix("").as_posix()


def title_and_sentence(notebook):
    """The heading of a notebook and the `>` line below it."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            title = re.search(r"^# (.+)$", cell.source, re.MULTILINE)
            sentence = re.search(r"^> (.+)$", cell.source, re.MULTILINE)
            return title[1], sentence[1] if sentence else ""
    raise ValueError("a notebook without a heading")


# ------------------------------------------------------------------------------------- links


def anchor_of(result):
    """The target of a result of the paper, such as `table-1`."""
    return result.lower().replace("eq. ", "equation ").replace(" ", "-").replace(".", "-")


def repository_link(path):
    """Where a file or folder of the project lies in its repository."""
    kind = "tree" if (ROOT / path).is_dir() else "blob"
    return f"{REPOSITORY}/{kind}/main/{path}"


def book_link(target, folder):
    """A link of a notebook in `folder`, as the book needs it.

    Notebooks and pictures are pages and files of the book; every other file of the project is
    linked in the repository.
    """
    if re.match(r"[a-z]+:", target):
        return target
    path, _, anchor = target.partition("#")
    if not path:
        return "#" + anchor.lower()
    file = Path(os.path.normpath(folder / unquote(path)))
    if file.suffix == ".ipynb" and file.is_relative_to(NOTEBOOKS):
        page = "/" + file.relative_to(NOTEBOOKS).as_posix()  # from the top of the copy
        return f"{page}#{anchor.lower()}" if anchor else page
    if file.suffix in {".png", ".svg"}:
        return "/" + file.relative_to(ROOT).as_posix()  # from the top of the copy
    if not file.exists():
        raise FileNotFoundError(f"{folder.relative_to(ROOT)}: the link {target} leads nowhere")
    return repository_link(file.relative_to(ROOT).as_posix())


def link_results(text, name):
    """Text with the names of the paper's results as links to their entries."""
    linked = set()  # once a cell is enough

    def link(match):
        result = match[0]
        kind = "Equation" if match["kind"] == "Eq." else match["kind"]
        known = match["number"] in RESULTS[kind]
        if not known or result in linked or (name, result) in OF_ANOTHER_PAPER:
            return result
        linked.add(result)
        return f"[{result}](#{anchor_of(result)})"

    parts = []
    end = 0
    for untouched in UNTOUCHED.finditer(text):
        parts.append(RESULT.sub(link, text[end : untouched.start()]))
        parts.append(untouched[0])
        end = untouched.end()
    parts.append(RESULT.sub(link, text[end:]))
    return "".join(parts)


# ------------------------------------------------------------------------------------- cells


def included(match):
    """The content of an included file; its links to files above its folder start at the top."""
    text = (ROOT / match[1]).read_text(encoding="utf-8").strip()
    return re.sub(r"\]\((?:\.\./)+", "](../", text)


def relinked(text, folder):
    """Markdown with its links, those in code aside, as the book needs them."""

    def link(match):
        return f"{match['before']}{book_link(match['target'], folder)})"

    parts = []
    end = 0
    for code in FENCED.finditer(text):
        parts.append(LINK.sub(link, text[end : code.start()]))
        parts.append(code[0])
        end = code.end()
    parts.append(LINK.sub(link, text[end:]))
    return "".join(parts)


class Equations:
    """Counts the displayed equations of a page and labels them, so that Sphinx numbers them."""

    def __init__(self, name):
        self.name = name
        self.count = 0

    def label(self, match):
        self.count += 1
        label = f"eq-{self.name.replace('/', '-')}-{self.count}"
        return f"\n$${match['body'].strip()}$$ ({label})\n"


def prose(source, name, folder, equations):
    """A markdown cell for the book."""
    source = INCLUDE.sub(included, source)
    source = relinked(source, folder)
    source = link_results(source, name)
    return EQUATION.sub(equations.label, source)


def without_directives(source):
    """A code cell's source without its `#|` lines; None where it is not shown."""
    kept = []
    for line in source.splitlines():
        if line.startswith("#|"):
            words = line[2:].split()
            if words and words[0] in HIDDEN:
                return None
        else:
            kept.append(line)
    return "\n".join(kept).strip("\n")


def imports_alone(source):
    """Whether a cell imports and does nothing else."""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    return all(isinstance(statement, ast.Import | ast.ImportFrom) for statement in statements)


def fold(cell, source):
    """Fold a solution with its output, and a long cell of imports."""
    tags = cell.metadata.get("tags", [])
    if cell.source.startswith(FOLDED):
        cell.metadata["tags"] = [*tags, "hide-cell"]
    elif source.count("\n") >= LONG_IMPORTS and imports_alone(source):
        cell.metadata["tags"] = [*tags, "hide-input"]
        prompts = {"code_prompt_show": "Show the imports", "code_prompt_hide": "Hide the imports"}
        cell.metadata["mystnb"] = prompts


def page_of(path):
    """The notebook of the book for one of nbs/: directives and hidden cells are gone."""
    notebook = nbformat.read(path, 4)
    name = name_of(path)
    equations = Equations(name)
    cells = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = prose(cell.source, name, path.parent, equations)
        else:
            source = without_directives(cell.source)
            if not source:
                continue
            fold(cell, source)
            cell.source = source
            for output in cell.outputs:
                data = output.get("data", {})
                if "text/markdown" in data:
                    data["text/markdown"] = relinked(data["text/markdown"], path.parent)
        cells.append(cell)
    notebook.cells = cells
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    notebook.metadata["language_info"] = {"name": "python", "pygments_lexer": "ipython3"}
    return notebook


def pictures_of(notebook):
    """The pictures that a page links, as paths from the top of the project."""
    pictures = set()
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for match in re.finditer(r"!\[[^\]]*\]\(/([^)]+)\)", cell.source):
                pictures.add(PurePosixPath(match[1]))
    return pictures
