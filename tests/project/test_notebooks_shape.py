"""The shape of the notebooks: one function a rule, and for each rule notebooks that break it."""

import ast
import copy
import json
import re
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
DIRECTIVES = {"default_exp", "export", "exporti", "exports", "hide", "code-fold"}
LEAKS = {
    "path": (
        r"(?<![\w.:/])/(?:home|root|Users|tmp|work|usr|opt|var|mnt|private|content)/\w"
        r"|\b[A-Z]:\\\w"
    ),
    "date": r"\b20\d\d-[01]\d-[0-3]\d\b",
    "clock": r"\b\d\d:\d\d:\d\d\b|\d:\d\d<|\b(?:wall|CPU) times?\b",
    "timing": r"\bit/s\b|\bs/it\b|\d ?(?:ms|µs|μs|ns)\b",
    "address": r"\b0x[0-9a-fA-F]{6,}\b",
    "progress bar": r"\d%\|",
}
# the folders of dbmtl/ and the modules beside them: each imports from those before it alone
LAYERS = [
    "core",
    "loss_balancing",
    "gradient_balancing",
    "dbmtl",
    "registry",
    "profile",
    "data",
    "models",
    "benchmarks",
    "experiments",
    "report",
    "run",
    "prepare",
    "replay",
]
RESULTS = ("15_paper/", "16_studies/", "17_site/", "18_recipes/")  # folders without modules
EARLY = ("02_", "03_", "04_dbmtl")  # whose notebooks show their class early
SHORT = ("15_paper/", "16_studies/")  # pages of results: data, call, figure, finding
MOST_LINES = 60  # of code on such a page, imports included


# --------------------------------------------------------------- what the rules ask of a notebook


class Cell:
    """A cell and what it holds."""

    def __init__(self, raw):
        self.raw = raw
        self.kind = raw["cell_type"]
        self.source = "".join(raw["source"])
        self.tags = raw["metadata"].get("tags", [])
        self.directives = []  # [(word, argument)] of the lines `#| word argument`
        if self.kind == "code":
            self.directives = re.findall(r"^#\| *([\w-]+):? *(.*?) *$", self.source, flags=re.M)
        words = [word for word, _ in self.directives]
        self.exported = any(word.startswith("export") for word in words)
        self.hidden = "hide" in words
        self.shown = self.kind == "code" and not self.exported and not self.hidden

    @cached_property
    def tree(self):
        """The parsed source; empty where it does not parse, which is another rule's business."""
        try:
            return ast.parse(self.source)
        except SyntaxError:
            return ast.Module([], [])

    @property
    def definitions(self):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        return [node for node in self.tree.body if isinstance(node, kinds)]

    @property
    def public(self):
        """The public names that the cell defines."""
        return [node.name for node in self.definitions if not node.name.startswith("_")]

    @property
    def imports(self):
        """For each statement of the cell: is it an import?"""
        return [isinstance(node, ast.Import | ast.ImportFrom) for node in self.tree.body]

    @property
    def only_imports(self):
        return bool(self.imports) and all(self.imports)

    @property
    def names(self):
        """Every name and attribute that the cell mentions."""
        nodes = list(ast.walk(self.tree))
        plain = {node.id for node in nodes if isinstance(node, ast.Name)}
        return plain | {node.attr for node in nodes if isinstance(node, ast.Attribute)}

    @property
    def asserts(self):
        """An assert statement, or a call of something named assert_..., test_... or expect_..."""
        if any(re.match(r"(assert|test|expect)_", name) for name in self.names):
            return True
        return any(isinstance(node, ast.Assert) for node in ast.walk(self.tree))


class Page:
    """A notebook. Its name is the path below nbs/ without the suffix."""

    def __init__(self, name, raw):
        self.name = name
        self.raw = raw
        self.cells = [Cell(cell) for cell in raw["cells"]]
        self.code = [cell for cell in self.cells if cell.kind == "code"]
        self.markdown = [cell for cell in self.cells if cell.kind == "markdown"]
        self.is_index = name == "index"
        self.module = None  # what it exports, as a name below `dbmtl`
        for cell in self.code:
            for word, argument in cell.directives:
                if word == "default_exp":
                    self.module = argument

    @classmethod
    def read(cls, path):
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        return cls(name, json.loads(path.read_text(encoding="utf-8")))

    @property
    def prose(self):
        return "\n".join(cell.source for cell in self.markdown)


class House(NamedTuple):
    """Where each module comes from, and what it imports, as names below `dbmtl`."""

    notebooks: dict  # module -> name of the notebook that exports it
    imports: dict  # module that is there -> the modules of dbmtl that it imports

    @classmethod
    def read(cls, pages, package):
        """The notebooks `pages` and the modules in the folder `package`."""
        imports = {}
        for path in sorted(package.rglob("*.py")):
            module = ".".join(path.relative_to(package).with_suffix("").parts)
            if not module.endswith(".__init__"):  # nbdev makes those of the folders
                imports[module] = modules_imported(path, package)
        return cls({page.module: page.name for page in pages if page.module}, imports)

    def loaded_by(self, module):
        """The modules that importing a module loads, itself included."""
        loaded = set()
        waiting = [module]
        while waiting:
            current = waiting.pop()
            if current not in loaded:
                loaded.add(current)
                waiting += self.imports.get(current, ())
        return loaded


def modules_imported(path, package):
    """The modules of the package that a file of it imports, by relative or absolute name."""
    folder = path.relative_to(package).parent.parts
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            parts = node.module.split(".")
            if node.level:
                modules.add(".".join([*folder[: len(folder) - node.level + 1], *parts]))
            elif node.module.startswith("dbmtl."):
                modules.add(".".join(parts[1:]))
    return modules


def count_words(text):
    """Words of prose: tables, displayed equations and symbols do not count."""
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|```.*?```", " ", text, flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))
    return len(re.findall(r"[A-Za-z][\w'-]*", text))


def texts_displayed(cell):
    """Every text that the outputs of a cell hold; pictures as bytes are not text."""
    for output in cell.raw.get("outputs", []):
        yield "".join(output.get("text", ""))
        for mime, data in output.get("data", {}).items():
            if mime.startswith("image/") and mime != "image/svg+xml":
                continue
            yield json.dumps(data) if isinstance(data, dict) else "".join(data)


# -------------------------------------------------------------------------------------- the rules

RULES = {}


def rule(function):
    """A rule takes a page and the house, and yields a line for whatever breaks it."""
    RULES[function.__name__] = function
    return function


@rule
def every_cell_parses(page, house):
    """No magics, no shell lines, no syntax errors."""
    for cell in page.code:
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield f"{error.msg}: {error.text}"


@rule
def imports_go_downward(page, house):
    """`from dbmtl.x import y`, in exported cells from notebooks that come before this one.

    What a cell shows may use any module that does not load this notebook's own: the process
    would hold every class of it twice.
    """
    may_import_all = page.is_index or page.module == "__init__"
    for cell in page.code:
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    whole_package = alias.name == "dbmtl" and not may_import_all
                    if whole_package or alias.name.startswith("dbmtl.") or "nbdev" in alias.name:
                        yield f"import {alias.name}"
            if isinstance(node, ast.ImportFrom):
                text = ast.unparse(node)
                if node.level or any(alias.name == "*" for alias in node.names):
                    yield f"relative or star import: {text}"
                elif node.module == "dbmtl" and not may_import_all:
                    yield f"{text}: name the module that defines it"
                elif node.module.startswith("dbmtl."):
                    module = node.module.removeprefix("dbmtl.")
                    yield from (f"{text}: {why}" for why in objections(module, cell, page, house))


def objections(module, cell, page, house):
    """Why a cell of a page may not import a module."""
    if module not in house.notebooks:
        yield f"no notebook exports {module}"
    elif page.module and page.module in house.loaded_by(module):
        yield f"{module} loads {page.module}"
    elif cell.exported and house.notebooks[module] >= page.name:
        yield f"{module} is not below {page.name}"


@rule
def imports_have_cells_of_their_own(page, house):
    if page.is_index:  # the README's example stands alone
        return
    for cell in page.code:
        if any(cell.imports) and not all(cell.imports):
            yield cell.source.splitlines()[0]


@rule
def first_cells(page, house):
    """#| default_exp name; # Title and > one sentence; 60 to 150 words; exported imports."""
    cells = page.cells
    if page.module:
        if cells[0].source.strip() != f"#| default_exp {page.module}":
            yield "the first cell is not `#| default_exp name`"
        cells = cells[1:]
    title, introduction = cells[:2]
    if title.kind != "markdown" or not re.match(r"# \S[^\n]*\n+> \S", title.source):
        yield "no cell `# Title` with `> one sentence`"
    titles = re.findall(r"^# ", page.prose, flags=re.M)
    if len(titles) != 1:
        yield f"{len(titles)} first-level headings"
    number = count_words(introduction.source) if introduction.kind == "markdown" else 0
    if not page.is_index and not 60 <= number <= 150:
        yield f"the introduction has {number} words"
    exported = [cell for cell in page.code if cell.exported]
    if any(cell.only_imports for cell in exported) and not exported[0].only_imports:
        yield "the first exported cell is not the imports"


@rule
def no_name_is_defined_twice(page, house):
    names = [name for cell in page.code for name in cell.public]
    yield from sorted({name for name in names if names.count(name) > 1})


@rule
def exports_are_demonstrated(page, house):
    """Within three code cells of its definition a public name is used in view, and something is
    asserted in view."""
    for position, cell in enumerate(page.code):
        if not cell.exported or cell.hidden:
            continue
        following = [other for other in page.code[position + 1 : position + 4] if other.shown]
        asserted = any(other.asserts for other in following)
        for name in cell.public:
            if not asserted or not any(name in other.names for other in following):
                yield name


@rule
def classes_are_in_use_early(page, house):
    """A class that bears the notebook's name is used in view within the first third, or within
    the first twelve cells of a short notebook."""
    if not page.module or not page.name.startswith(EARLY):
        return
    bare_name = page.module.rpartition(".")[2].replace("_", "")
    public = [name for cell in page.code if cell.exported for name in cell.public]
    early = page.cells[: max(12, len(page.cells) // 3)]
    for name in public:
        if name.lower() == bare_name and not any(c.shown and name in c.names for c in early):
            yield f"{name} is not in use within the first {len(early)} cells"


@rule
def prose_between_code(page, house):
    """At most three code cells in a row, cells of imports aside."""
    in_a_row = 0
    for cell in page.cells:
        if cell.kind == "markdown":
            in_a_row = 0
        elif not cell.only_imports:
            in_a_row += 1
            if in_a_row == 4:
                yield f"four code cells in a row, the last: {cell.source.splitlines()[0]}"


@rule
def little_is_hidden(page, house):
    hidden = [cell for cell in page.code if cell.hidden]
    if len(hidden) > max(1, 0.1 * len(page.code)):
        yield f"{len(hidden)} of {len(page.code)} code cells"


@rule
def directives_lead_their_cell(page, house):
    """A directive below any other line is silently not one."""
    for cell in page.code:
        end_of_head = re.match(r"(?:#\|[^\n]*(?:\n|$))*", cell.source).end()
        head = cell.source[:end_of_head]
        body = cell.source[end_of_head:]
        yield from re.findall(r"^\s*#\s*\|.*", body, flags=re.M)
        yield from (word for word, _ in cell.directives if word not in DIRECTIVES)
        yield from re.findall(r"^#\|\W*$", head, flags=re.M)


@rule
def comments_are_not_captions(page, house):
    """No numbered comments, no banners, no sentences that are printed."""
    for cell in page.code:
        yield from re.findall(r"^\s*#\s*(?:\d+[.)]\s|[-=#*]{3,}).*", cell.source, flags=re.M)
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                if any(isinstance(argument, ast.JoinedStr) for argument in node.args):
                    yield ast.unparse(node)


@rule
def parameters(page, house):
    """One cell tagged parameters where a notebook exports nothing, at most one elsewhere, of
    lines `name = literal  # comment`."""
    tagged = [cell for cell in page.cells if "parameters" in cell.tags]
    needs_one = not page.module and not page.is_index
    if len(tagged) > 1 or (needs_one and not tagged):
        yield f"{len(tagged)} cells tagged parameters"
    for cell in tagged:
        for line in cell.source.splitlines():
            if line.strip() and not is_parameter(line):
                yield f"not `name = literal  # comment`: {line}"
    for cell in page.cells:
        yield from (f"tag {tag}" for tag in cell.tags if tag != "parameters")


def is_parameter(line):
    """Is the line `name = literal  # comment`?"""
    try:
        (statement,) = ast.parse(line).body
        ast.literal_eval(statement.value)
    except (SyntaxError, ValueError, AttributeError):
        return False
    return isinstance(statement, ast.Assign) and bool(re.search(r"  # \S", line))


@rule
def tables_and_figures_export_nothing(page, house):
    if page.name.startswith(RESULTS) and page.module not in (None, "__init__"):
        yield "notebooks of results export nothing"
    if any(cell.exported for cell in page.code) and not page.module:
        yield "exports without default_exp"


@rule
def pages_are_short(page, house):
    """What is longer than data, call, figure and finding belongs into a notebook of 11_report."""
    count = len(lines_of_code(page))
    if page.name.startswith(SHORT) and count > MOST_LINES:
        yield f"{count} lines of code, more than {MOST_LINES}"


def lines_of_code(page):
    """Every line of the code cells that is neither blank nor a comment."""
    lines = [line.strip() for cell in page.code for line in cell.source.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@rule
def metadata(page, house):
    """The same kernel everywhere, nbformat 4.5, an own id a cell, no execution counts."""
    if page.raw["metadata"] != KERNEL:
        yield f"metadata {page.raw['metadata']}"
    version = f"{page.raw['nbformat']}.{page.raw['nbformat_minor']}"
    if version != "4.5":
        yield f"nbformat {version}"
    ids = [cell.raw.get("id", "") for cell in page.cells]
    for name in sorted(set(ids)):
        if ids.count(name) > 1 or not re.fullmatch(r"[\w-]{1,64}", name):
            yield f"id {name!r}"
    for cell in page.code:
        for part in [cell.raw, *cell.raw["outputs"]]:
            if part.get("execution_count") is not None:
                yield f"execution count {part['execution_count']}"
        yield from (f"metadata {key}" for key in cell.raw["metadata"] if key != "tags")


@rule
def no_conflict_is_left(page, house):
    for cell in page.cells:
        yield from re.findall(r"^[`*]*(?:<{7}|>{7}).*", cell.source, flags=re.M)


@rule
def outputs_are_stable(page, house):
    """No errors, warnings, widgets, paths, dates, timings or addresses."""
    for cell in page.code:
        for output in cell.raw["outputs"]:
            if output["output_type"] == "error":
                yield f"error {output['ename']}"
            if output.get("name") == "stderr":
                yield "a message on stderr"
            yield from (mime for mime in output.get("data", {}) if "widget" in mime)
        for text in texts_displayed(cell):
            for kind, pattern in LEAKS.items():
                if leak := re.search(pattern, text):
                    yield f"{kind}: {leak[0]}"


@rule
def no_picture_is_shown_twice(page, house):
    """A figure that is displayed and left open is drawn again at the end of its cell."""
    for cell in page.code:
        pictures = [output.get("data", {}).get("image/png") for output in cell.raw["outputs"]]
        pictures = [picture for picture in pictures if picture]
        if len(pictures) > len({"".join(picture) for picture in pictures}):
            yield cell.source.splitlines()[-1]


@rule
def ends_in_a_summary(page, house):
    sections = re.findall(r"^## (.*)", page.prose, flags=re.M)
    if page.module not in (None, "__init__") and [s.strip() for s in sections[-1:]] != ["Summary"]:
        yield "the last section is not `## Summary`"


# ----------------------------------------------------------------------------- rules of the house


def modules_without_a_notebook(house):
    """nbdev_export leaves the module of a notebook that went away."""
    return sorted(set(house.imports) - set(house.notebooks) - {"_modidx"})


def layer_of(module):
    return LAYERS.index(module.split(".")[0])


def upward_imports(house):
    """Imports of a module in a layer above."""
    upward = []
    for module, imported in house.imports.items():
        if module not in ("__init__", "_modidx"):
            higher = [other for other in imported if layer_of(other) > layer_of(module)]
            upward += [f"{module} imports {other}" for other in sorted(higher)]
    return upward


def names_unlike_their_modules(pages):
    """Notebooks that are not called as their module is, with two digits before each part."""
    wrong = []
    for page in pages:
        if not re.fullmatch(r"(?:\d\d_[a-z0-9_]+/)?\d\d_[a-z0-9_]+|index", page.name):
            wrong.append(page.name)
        elif page.module not in (None, "__init__"):
            bare_name = "/".join(part[3:] for part in page.name.split("/"))
            if bare_name != page.module.replace(".", "/"):
                wrong.append(page.name)
    return wrong


def shared_numbers(pages):
    """Numbers that two notebooks of one folder have."""
    places = []
    for page in pages:
        folder, _, file = page.name.rpartition("/")
        places.append(f"{folder}/{file[:2]}".lstrip("/"))
    return sorted({place for place in places if places.count(place) > 1})


# ---------------------------------------------------------------------------- the project's pages

PAGES = [
    Page.read(path)
    for path in sorted(ROOT.glob("nbs/**/*.ipynb"))
    if ".ipynb_checkpoints" not in path.parts
]
HOUSE = House.read(PAGES, ROOT / "dbmtl")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_notebook_keeps_the_rules(page):
    breaks = {name: list(rule(page, HOUSE)) for name, rule in RULES.items()}
    assert {name: lines for name, lines in breaks.items() if lines} == {}


def dead_links(page):
    """Targets of links in prose that do not exist, seen from the notebook's folder."""
    folder = (ROOT / "nbs" / page.name).parent
    prose = "\n".join(cell.source for cell in page.cells if cell.kind == "markdown")
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", prose)
    return [target for target in targets if not (folder / target).exists()]


def test_links_in_notebooks_lead_somewhere():
    assert {page.name: dead_links(page) for page in PAGES if dead_links(page)} == {}


def test_modules_are_those_that_the_notebooks_export():
    exported = [page.module for page in PAGES if page.module]
    assert len(exported) == len(set(exported)), "two notebooks export one module"
    assert modules_without_a_notebook(HOUSE) == []
    assert set(exported) <= set(HOUSE.imports)


def test_arrows_between_folders_run_one_way():
    assert upward_imports(HOUSE) == []


def test_folders_of_notebooks_are_numbered_by_layer():
    layers = []
    for page in PAGES:
        layer = page.name.split("/")[0][3:]
        if page.module not in (None, "__init__") and layer not in layers:
            layers.append(layer)
    assert layers == LAYERS


def test_names_of_notebooks_mirror_the_modules():
    assert names_unlike_their_modules(PAGES) == []


def test_no_two_notebooks_of_a_folder_have_one_number():
    assert shared_numbers(PAGES) == []


# ------------------------------------------------------------------ each rule can fail, and does


def cell(source, kind="code", tags=(), text=None):
    raw = {
        "cell_type": kind,
        "id": f"c{abs(hash((source, kind))):x}"[:16],
        "source": source,
        "metadata": {},
    }
    if tags:
        raw["metadata"]["tags"] = list(tags)
    if kind == "code":
        raw |= {"execution_count": None, "outputs": []}
        if text:
            output = {"output_type": "execute_result", "data": {"text/plain": text}, "metadata": {}}
            raw["outputs"] = [output | {"execution_count": None}]
    return raw


def page(name="05_good", change=lambda cells: None):
    """A short notebook that keeps every rule, after `change` has changed the list of its cells."""
    cells = [
        cell("#| default_exp good"),
        cell("# Title\n> One sentence", "markdown"),
        cell(" ".join(["word"] * 80), "markdown"),
        cell("#| export\nimport torch\nfrom dbmtl.low import thing"),
        cell("## One", "markdown"),
        cell('#| export\ndef one(x):\n    "One."\n    return x'),
        cell("assert one(2) == 2\none(2)", text="2"),
        *[cell(f"Sentence {number}.", "markdown") for number in range(20)],
        cell("## Summary\nDone.", "markdown"),
    ]
    change(cells)
    raw = {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}
    return Page(name, copy.deepcopy(raw))


def put(*new, at=7):
    return lambda cells: cells.__setitem__(slice(at, at), new)


def replace(at, **keys):
    return lambda cells: cells[at].update(keys)


PARAMETERS = cell("scale = 'smoke'  # how much\nseeds = [0]  # which", tags=["parameters"])
STDERR = [{"output_type": "stream", "name": "stderr", "text": "a warning"}]
ERROR = [{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
PICTURE = {"output_type": "display_data", "data": {"image/png": "iVBOR"}, "metadata": {}}
UNSTABLE = [
    "/" + "home/me/file",
    "'/" + "root/x.csv'",
    "2026-01-31",
    "12:30:59",
    "100%|###| 3/3 [00:01<00:00, 2.1it/s]",
    "<Thing at 0x7f00aa11>",
    "1.4 ms",
]
LATE_CLASS = cell("#| export\nclass Good:\n    pass")
BAD = {
    "every_cell_parses": [
        page(change=put(cell("%matplotlib inline"))),
        page(change=put(cell("!pip list"))),
    ],
    "imports_go_downward": [
        page(change=put(cell("from dbmtl.good import one"))),
        page(change=put(cell("from dbmtl.above import thing"))),
        page(change=put(cell("#| export\nfrom dbmtl.high import thing"))),
        page(change=put(cell("#| export\ndef f():\n    from dbmtl.high import thing"))),
        page(change=put(cell("from dbmtl.unknown import thing"))),
        page(change=put(cell("from dbmtl.low import *"))),
        page(change=put(cell("from .low import thing"))),
        page(change=put(cell("import dbmtl.low"))),
        page(change=put(cell("import dbmtl"))),
        page(change=put(cell("from dbmtl import DBMTL"))),
    ],
    "imports_have_cells_of_their_own": [page(change=put(cell("import math\nmath.pi")))],
    "first_cells": [
        page(change=lambda cells: cells.insert(1, cells.pop(0))),
        page(change=replace(1, source="# Title")),
        page(change=replace(2, source="too short")),
        page(change=put(cell("# Another title", "markdown"))),
        page(change=put(cell("#| export\nx = 1"), at=3)),
    ],
    "no_name_is_defined_twice": [page(change=put(cell("def one(x):\n    return x")))],
    "exports_are_demonstrated": [
        page(change=lambda cells: cells.pop(6)),
        page(change=replace(6, source="one(2)")),
        page(change=replace(6, source="#| hide\nassert one(2) == 2")),
        page(change=put(*[cell(f"{i}") for i in range(3)], at=6)),
    ],
    "classes_are_in_use_early": [
        page(change=put(LATE_CLASS, cell("Good()"), at=20)),
        page(change=put(LATE_CLASS, cell("#| hide\nGood()"))),
    ],
    "prose_between_code": [page(change=put(*[cell(f"{i}") for i in range(3)]))],
    "little_is_hidden": [page(change=put(cell("#| hide\n1"), cell("#| hide\n2")))],
    "directives_lead_their_cell": [
        page(change=put(cell("# why\n#| export\nx = 1"))),
        page(change=put(cell("x = 1\n#| hide"))),
        page(change=put(cell("#| eval: false\nx = 1"))),
        page(change=put(cell("# | export\nx = 1"))),
    ],
    "comments_are_not_captions": [
        page(change=put(cell("# 1. first\nx = 1"))),
        page(change=put(cell("x = 1\n# -----"))),
        page(change=put(cell("print(f'{1} is one')"))),
    ],
    "parameters": [
        page("15_paper/01_good", lambda cells: cells.pop(0)),
        page("45_good", put(PARAMETERS, cell("n = 1  # many", tags=["parameters"]))),
        page("45_good", put(cell("n = 2 * 3  # many", tags=["parameters"]))),
        page("45_good", put(cell("n = 2", tags=["parameters"]))),
        page("45_good", put(cell("n = 2; k = 3  # many", tags=["parameters"]))),
        page("45_good", put(cell("1", tags=["hide-input"]))),
    ],
    "tables_and_figures_export_nothing": [
        page("15_paper/01_good"),
        page(change=lambda cells: cells.pop(0)),
    ],
    "pages_are_short": [
        page("15_paper/01_good", put(cell("x = 1\n" * MOST_LINES))),
        page("16_studies/01_good", put(cell("x = (\n" + "1,\n" * MOST_LINES + ")"))),
        page("15_paper/01_good", put(cell("import math\n" * MOST_LINES))),
    ],
    "metadata": [
        page(change=replace(6, id="")),
        page(change=lambda cells: cells.append(cells[-1])),
        page(change=replace(6, execution_count=3)),
        page(change=replace(6, metadata={"collapsed": True})),
    ],
    "no_conflict_is_left": [page(change=put(cell("`<<<<<<< HEAD`", "markdown")))],
    "outputs_are_stable": [
        page(change=replace(6, outputs=STDERR)),
        page(change=replace(6, outputs=ERROR)),
        *[page(change=put(cell("x", text=text))) for text in UNSTABLE],
    ],
    "no_picture_is_shown_twice": [page(change=replace(6, outputs=[PICTURE, PICTURE]))],
    "ends_in_a_summary": [page(change=lambda cells: cells.pop())],
}
SMALL_HOUSE = House(
    notebooks={
        "low": "01_low",
        "good": "05_good",
        "high": "07_high",
        "above": "08_above",
        "__init__": "90_names",
    },
    imports={"good": {"low"}, "above": {"high", "good"}},
)


def broken(name, bad):
    return list(RULES[name](bad, SMALL_HOUSE))


@pytest.fixture
def early(monkeypatch):
    """The small notebook's folder is one of those that show their class early."""
    monkeypatch.setitem(globals(), "EARLY", ("05_",))


@pytest.mark.parametrize("name", RULES)
def test_rule_passes_a_good_notebook(name, early):
    assert broken(name, page()) == []


@pytest.mark.parametrize("name", RULES)
def test_rule_catches_its_bad_notebooks(name, early):
    assert [number for number, bad in enumerate(BAD[name]) if not broken(name, bad)] == []


def test_blank_lines_and_comments_are_no_lines_of_code():
    good = page("15_paper/01_good")
    rest = MOST_LINES - len(lines_of_code(good))
    full = page("15_paper/01_good", put(cell("x = 1\n\n# why\n" * rest)))
    assert len(lines_of_code(full)) == MOST_LINES
    assert broken("pages_are_short", full) == []
    assert broken("pages_are_short", page("11_report/01_good", put(cell("x = 1\n" * 99)))) == []


def test_parameters_rule_passes_a_good_experiment():
    assert broken("parameters", page("45_good", put(PARAMETERS))) == []


def test_a_class_that_is_used_at_once_is_early_enough(early):
    assert broken("classes_are_in_use_early", page(change=put(LATE_CLASS, cell("Good()")))) == []


@pytest.fixture
def package(tmp_path):
    """A folder of modules: core.ema, report.style that imports it, and the files of nbdev."""
    files = {
        "__init__.py": "from importlib import import_module\n",
        "_modidx.py": "d = {}\n",
        "core/__init__.py": "",
        "core/ema.py": "import torch\n",
        "report/__init__.py": "",
        "report/style.py": "from ..core.ema import EMA\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


NOTEBOOKS = {
    "01_core/05_ema": "core.ema",
    "11_report/01_style": "report.style",
    "17_site/04_public_names": "__init__",
}


def pages_of(modules):
    """Pages of these names that export these modules: {name: module}."""
    pages = []
    for name, module in modules.items():
        pages.append(page(name, replace(0, source=f"#| default_exp {module}")))
    return pages


def test_a_good_package_has_nothing_stale_and_nothing_upward(package):
    house = House.read(pages_of(NOTEBOOKS), package)
    assert house.imports["report.style"] == {"core.ema"}
    assert modules_without_a_notebook(house) == []
    assert upward_imports(house) == []


def test_a_module_without_a_notebook_is_found(package):
    (package / "core" / "average.py").write_text("")
    house = House.read(pages_of(NOTEBOOKS), package)
    assert modules_without_a_notebook(house) == ["core.average"]


@pytest.mark.parametrize(
    "line",
    [
        "from ..report.style import colour",
        "from dbmtl.report.style import (\n    colour,\n)",
        "def later():\n    from ..report.style import colour",
    ],
)
def test_an_upward_arrow_is_found(line, package):
    (package / "core" / "ema.py").write_text(line)
    house = House.read(pages_of(NOTEBOOKS), package)
    assert upward_imports(house) == ["core.ema imports report.style"]


@pytest.mark.parametrize(
    "name, module",
    [
        ("01_core/05_average", "core.ema"),
        ("01_core/05_ema", "ema"),
        ("01_core/ema", "core.ema"),
        ("02_loss/more/01_log", "loss.more.log"),
    ],
)
def test_a_name_unlike_its_module_is_found(name, module):
    assert names_unlike_their_modules(pages_of(NOTEBOOKS)) == []
    assert names_unlike_their_modules(pages_of({name: module})) == [name]


def test_a_number_that_two_notebooks_share_is_found():
    names = {"01_core/05_ema": "core.ema", "01_core/05_files": "core.files", "05_x": "x"}
    assert shared_numbers(pages_of(NOTEBOOKS)) == []
    assert shared_numbers(pages_of(names)) == ["01_core/05"]
