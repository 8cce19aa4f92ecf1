"""The shape of the notebooks: one function a rule, and for each rule a notebook that breaks it."""

import ast
import copy
import json
import re
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
DIRECTIVES = {"default_exp", "export", "exporti", "exports", "hide"}
LEAKS = {
    "path": r"(?<![\w.:/])/(?:home|root|Users|tmp|work|usr|opt|var|mnt|private|content)/\w|\b[A-Z]:\\\w",
    "date": r"\b20\d\d-[01]\d-[0-3]\d\b",
    "clock": r"\b\d\d:\d\d:\d\d\b|\d:\d\d<|\b(?:wall|CPU) times?\b",
    "timing": r"\bit/s\b|\bs/it\b|\d ?(?:ms|µs|μs|ns)\b",
    "address": r"\b0x[0-9a-fA-F]{6,}\b",
    "progress bar": r"\d%\|",
}


class Page:
    """A notebook and what the rules ask of it."""

    def __init__(self, name, raw, size=0):
        self.name, self.raw, self.size = name, raw, size
        self.cells = [Cell(cell) for cell in raw["cells"]]
        self.code = [cell for cell in self.cells if cell.kind == "code"]
        self.number = int(name[:2]) if name[:2].isdigit() else None
        self.module = next((arg for cell in self.code for word, arg in cell.directives if word == "default_exp"), None)

    @property
    def pictures(self):
        """The bytes that each picture takes in the file."""
        outputs = [output for cell in self.code for output in cell.raw.get("outputs", [])]
        return [len(data) for output in outputs for mime, data in output.get("data", {}).items() if mime == "image/png"]

    @classmethod
    def read(cls, path):
        return cls(path.stem, json.loads(path.read_text(encoding="utf-8")), path.stat().st_size)

    def within(self, low, high):
        return self.number is not None and low <= self.number <= high


class Cell:
    def __init__(self, raw):
        self.raw, self.kind, self.source = raw, raw["cell_type"], "".join(raw["source"])
        self.tags = raw["metadata"].get("tags", [])
        self.directives = re.findall(r"^#\| *(\w+) *(.*?) *$", self.source, flags=re.M) if self.kind == "code" else []
        words = {word for word, _ in self.directives}
        self.exported, self.hidden = any(word.startswith("export") for word in words), "hide" in words

    @cached_property
    def tree(self):
        try:
            return ast.parse(self.source)
        except SyntaxError:
            return ast.Module([], [])

    @property
    def definitions(self):
        return [n for n in self.tree.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)]

    @property
    def public(self):
        return [node.name for node in self.definitions if not node.name.startswith("_")]

    @property
    def only_imports(self):
        return bool(self.tree.body) and all(isinstance(node, ast.Import | ast.ImportFrom) for node in self.tree.body)

    @property
    def names(self):
        nodes = [node for node in ast.walk(self.tree) if isinstance(node, ast.Name | ast.Attribute)]
        return {node.id if isinstance(node, ast.Name) else node.attr for node in nodes}

    @property
    def asserts(self):
        """An assert statement, or a call of something named assert_..., test_... or expect_..."""
        calls = any(re.match(r"(assert|test|expect)_", name) for name in self.names)
        return calls or any(isinstance(node, ast.Assert) for node in ast.walk(self.tree))


def length(node):
    """Lines of a definition without its docstrings, decorators included."""
    first = min([node.lineno, *(item.lineno for item in node.decorator_list)])
    lines = node.end_lineno - first + 1
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(part, clean=False) is not None:
            lines -= part.body[0].end_lineno - part.body[0].lineno + 1
    return lines


def words(text):
    """How many words of prose a cell has: tables, displayed equations and symbols do not count."""
    text = re.sub(r"\$\$.*?\$\$|\$[^$]*\$|```.*?```", " ", text, flags=re.S)
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("|"))
    return len(re.findall(r"[A-Za-z][\w'-]*", text))


def texts(cell):
    """Every text that the outputs of a cell hold; pictures as bytes are not text."""
    for output in cell.raw.get("outputs", []):
        yield "".join(output.get("text", ""))
        for mime, data in output.get("data", {}).items():
            if not mime.startswith("image/") or mime == "image/svg+xml":
                yield data if isinstance(data, str) else "".join(data) if isinstance(data, list) else json.dumps(data)


RULES = {}


def rule(function):
    RULES[function.__name__] = function
    return function


@rule
def every_cell_parses(page, numbers):
    """No magics, no shell lines, no syntax errors."""
    for cell in page.code:
        try:
            ast.parse(cell.source)
        except SyntaxError as error:
            yield f"{error.msg}: {error.text}"


@rule
def imports_go_downward(page, numbers):
    """dbmtl is imported by `from dbmtl.x import y` and from lower numbers; `from dbmtl import y` is for the index."""
    own = float("inf") if page.number is None else page.number
    for node in (node for cell in page.code for node in ast.walk(cell.tree)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            yield from (f"import {name}" for name in names if name.startswith("dbmtl.") or "nbdev" in name)
            if "dbmtl" in names and own <= 90:
                yield "import dbmtl"
        if isinstance(node, ast.ImportFrom):
            if node.level or any(alias.name == "*" for alias in node.names):
                yield f"relative or star import: {ast.unparse(node)}"
            elif node.module.split(".")[0] == "dbmtl":
                module = node.module.partition(".")[2] or "__init__"
                if numbers.get(module, float("inf")) >= own:
                    yield f"{ast.unparse(node)}: {module} is not below {page.name}"


@rule
def imports_have_cells_of_their_own(page, numbers):
    for cell in page.code if page.number is not None else []:  # the README's example stands alone
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in cell.tree.body}
        if kinds == {True, False}:
            yield cell.source.splitlines()[0]


@rule
def first_cells(page, numbers):
    """#| default_exp name; # Title and > one sentence; 60 to 150 words; exported imports."""
    cells = page.cells
    if page.within(0, 59) or page.within(90, 99):
        if cells[0].source.strip() != f"#| default_exp {page.module}":
            yield "the first cell is not `#| default_exp name`"
        cells = cells[1:]
    if not re.match(r"# \S[^\n]*\n+> \S", cells[0].source) or cells[0].kind != "markdown":
        yield "no cell `# Title` with `> one sentence`"
    heads = re.findall(r"^# ", "\n".join(cell.source for cell in page.cells if cell.kind == "markdown"), flags=re.M)
    if len(heads) != 1:
        yield f"{len(heads)} first-level headings"
    if page.number is not None and not (cells[1].kind == "markdown" and 60 <= words(cells[1].source) <= 150):
        yield f"the introduction has {words(cells[1].source)} words"
    exported = [cell for cell in page.code if cell.exported]
    if any(cell.only_imports for cell in exported) and not exported[0].only_imports:
        yield "the first exported cell is not the imports"


@rule
def size(page, numbers):
    """20 to 70 cells (experiments and the list of names may be shorter), under 60 KB; an
    experiment's pictures count for themselves, 60 KB each."""
    if page.number is not None:
        if not (20 if page.within(0, 59) else 1) <= len(page.cells) <= 70:
            yield f"{len(page.cells)} cells"
        pictures = [] if page.within(0, 59) else page.pictures
        if page.size - sum(pictures) >= 60_000 or max(pictures, default=0) >= 60_000:
            yield f"{page.size} bytes, pictures {pictures}"


@rule
def exported_cells_are_small(page, numbers):
    """One public definition a cell; a function has at most 40 lines without its docstring, a class 60."""
    for cell in page.code:
        if cell.exported:
            if len(cell.public) > 1:
                yield f"one cell defines {', '.join(cell.public)}"
            for node in cell.definitions:
                if length(node) > (60 if isinstance(node, ast.ClassDef) else 40):
                    yield f"{node.name} has {length(node)} lines"


@rule
def no_name_is_defined_twice(page, numbers):
    seen = [node.name for cell in page.code for node in cell.definitions]
    yield from sorted({name for name in seen if seen.count(name) > 1 and not name.startswith("_")})


@rule
def exports_are_demonstrated(page, numbers):
    """Within three code cells of its definition a public name is used in view, and something is asserted in view."""
    for position, cell in enumerate(page.code):
        if cell.exported and not cell.hidden:
            after = [c for c in page.code[position + 1 : position + 4] if not c.exported and not c.hidden]
            for name in cell.public:
                if not any(name in c.names for c in after) or not any(c.asserts for c in after):
                    yield name


@rule
def prose_between_code(page, numbers):
    """At most three code cells in a row, cells of imports aside."""
    row = 0
    for cell in page.cells:
        row = 0 if cell.kind == "markdown" else row + (not cell.only_imports)
        if row == 4:
            yield f"four code cells in a row, the last: {cell.source.splitlines()[0]}"


@rule
def little_is_hidden(page, numbers):
    hidden = [cell for cell in page.code if cell.hidden]
    if len(hidden) > max(1, 0.1 * len(page.code)):
        yield f"{len(hidden)} of {len(page.code)} code cells"


@rule
def directives_lead_their_cell(page, numbers):
    """A directive below any other line is silently not one."""
    for cell in page.code:
        head = re.match(r"(?:#\|[^\n]*(?:\n|$))*", cell.source).end()
        yield from re.findall(r"^\s*#\s*\|.*", cell.source[head:], flags=re.M)
        yield from (word for word, _ in cell.directives if word not in DIRECTIVES)
        yield from re.findall(r"^#\|\W*$", cell.source[:head], flags=re.M)


@rule
def comments_are_not_captions(page, numbers):
    """No numbered comments, no banners, no sentences that are printed."""
    for cell in page.code:
        yield from re.findall(r"^\s*#\s*(?:\d+[.)]\s|[-=#*]{3,}).*", cell.source, flags=re.M)
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                if any(isinstance(arg, ast.JoinedStr) for arg in node.args):
                    yield ast.unparse(node)


@rule
def parameters(page, numbers):
    """40 to 89: one cell tagged parameters, of `name = literal  # comment` lines. Nowhere else."""
    tagged = [cell for cell in page.cells if "parameters" in cell.tags]
    if len(tagged) != page.within(40, 89):
        yield f"{len(tagged)} cells tagged parameters"
    for line in (line for cell in tagged for line in cell.source.splitlines() if line.strip()):
        try:
            node = ast.parse(line).body[0]
            ast.literal_eval(node.value)
            correct = isinstance(node, ast.Assign) and re.search(r"  # \S", line)
        except (SyntaxError, ValueError, AttributeError, IndexError):
            correct = False
        if not correct:
            yield f"not `name = literal  # comment`: {line}"
    yield from (f"tag {tag}" for cell in page.cells for tag in cell.tags if tag != "parameters")


@rule
def tables_and_figures_export_nothing(page, numbers):
    if page.within(60, 89) and (page.module or any(cell.exported for cell in page.code)):
        yield "60 to 89 export nothing"
    if any(cell.exported for cell in page.code) and not page.module:
        yield "exports without default_exp"


@rule
def metadata(page, numbers):
    """The same kernel everywhere, nbformat 4.5, an own id a cell, no execution counts."""
    if page.raw["metadata"] != KERNEL or (page.raw["nbformat"], page.raw["nbformat_minor"]) != (4, 5):
        yield f"metadata {page.raw['metadata']}, nbformat {page.raw['nbformat']}.{page.raw['nbformat_minor']}"
    ids = [cell.raw.get("id", "") for cell in page.cells]
    yield from {f"id {name!r}" for name in ids if ids.count(name) > 1 or not re.fullmatch(r"[\w-]{1,64}", name)}
    for cell in page.code:
        counts = [cell.raw["execution_count"], *(out.get("execution_count") for out in cell.raw["outputs"])]
        yield from (f"execution count {count}" for count in counts if count is not None)
        yield from (f"metadata {key}" for key in cell.raw["metadata"] if key != "tags")


@rule
def no_conflict_is_left(page, numbers):
    for cell in page.cells:
        yield from re.findall(r"^[`*]*(?:<{7}|>{7}).*", cell.source, flags=re.M)


@rule
def outputs_are_stable(page, numbers):
    """No errors, warnings, widgets, paths, dates, timings or addresses."""
    for cell in page.code:
        for output in cell.raw["outputs"]:
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"{output['output_type']} {output.get('name', output.get('ename'))}"
            yield from (mime for mime in output.get("data", {}) if "widget" in mime)
        for text in texts(cell):
            yield from (f"{kind}: {found[0]}" for kind, regex in LEAKS.items() if (found := re.search(regex, text)))


@rule
def ends_in_a_summary(page, numbers):
    heads = re.findall(r"^## (.*)", "\n".join(c.source for c in page.cells if c.kind == "markdown"), flags=re.M)
    if page.within(0, 59) and (not heads or heads[-1].strip() != "Summary"):
        yield "the last section is not `## Summary`"


# ------------------------------------------------------------------------------------------------ the project's pages

PAGES = [Page.read(path) for path in sorted(ROOT.glob("nbs/*.ipynb"))]
NUMBERS = {page.module: page.number for page in PAGES if page.module and page.number is not None}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("name", RULES)
def test_notebook_keeps_the_rule(name, page):
    assert list(RULES[name](page, NUMBERS)) == []


def test_modules_are_those_that_the_notebooks_export():
    exported = [page.module for page in PAGES if page.module]
    assert sorted(exported) == sorted(set(exported)), "two notebooks export one module"
    assert {path.stem for path in ROOT.glob("dbmtl/*.py")} - {"_modidx"} == set(exported)


def test_numbers_and_names_of_notebooks():
    assert [page.name for page in PAGES if not re.fullmatch(r"\d\d_[a-z0-9_]+|index", page.name)] == []
    assert len({page.number for page in PAGES}) == len(PAGES), "two notebooks of one number"
    assert [page.name for page in PAGES if page.module not in (None, "__init__", page.name[3:])] == []


# -------------------------------------------------------------------------------------- each rule can fail, and does


def cell(source, kind="code", tags=(), text=None):
    raw = {"cell_type": kind, "id": f"c{abs(hash((source, kind))):x}"[:16], "source": source, "metadata": {}}
    if tags:
        raw["metadata"]["tags"] = list(tags)
    if kind == "code":
        raw |= {"execution_count": None, "outputs": []}
        if text:
            output = {"output_type": "execute_result", "data": {"text/plain": text}, "metadata": {}}
            raw["outputs"] = [output | {"execution_count": None}]
    return raw


def page(name="05_good", change=lambda cells: None, size=9_000):
    """A short notebook that keeps every rule, after `change` has had its way with the list of cells."""
    cells = [
        cell("#| default_exp good"),
        cell("# Title\n> One sentence", "markdown"),
        cell(" ".join(["word"] * 80), "markdown"),
        cell("#| export\nimport torch\nfrom dbmtl.low import thing"),
        cell("## One", "markdown"),
        cell("#| export\ndef one(x):\n    \"One.\"\n    return x"),
        cell("assert one(2) == 2\none(2)", text="2"),
    ]
    cells += [cell(f"Sentence {i}.", "markdown") for i in range(20)] + [cell("## Summary\nDone.", "markdown")]
    cells = copy.deepcopy(cells)
    change(cells)
    return Page(name, {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5}, size)


def put(*new, at=7):
    return lambda cells: cells.__setitem__(slice(at, at), new)


def replace(at, **keys):
    return lambda cells: cells[at].update(keys)


LONG = "#| export\ndef long(x):\n" + "    x += 1\n" * 40
PARAMETERS = cell("scale = 'smoke'  # how much\nseeds = [0]  # which", tags=["parameters"])
STDERR = [{"output_type": "stream", "name": "stderr", "text": "a warning"}]
BAD = {
    "every_cell_parses": [page(change=put(cell("%matplotlib inline"))), page(change=put(cell("!pip list")))],
    "imports_go_downward": [
        page(change=put(cell("from dbmtl.good import one"))),
        page(change=put(cell("from dbmtl.high import thing"))),
        page(change=put(cell("def f():\n    from dbmtl.high import thing"))),
        page(change=put(cell("from dbmtl.unknown import thing"))),
        page(change=put(cell("from dbmtl.low import *"))),
        page(change=put(cell("from .low import thing"))),
        page(change=put(cell("import dbmtl.low"))),
        page(change=put(cell("from dbmtl import DBMTL"))),
    ],
    "imports_have_cells_of_their_own": [page(change=put(cell("import math\nmath.pi")))],
    "first_cells": [
        page(change=lambda cells: cells.pop(0)),
        page(change=replace(1, source="# Title")),
        page(change=replace(2, source="too short")),
        page(change=put(cell("# Another title", "markdown"))),
        page(change=put(cell("#| export\nx = 1"), at=3)),
    ],
    "size": [
        page(size=60_000),
        page("60_good", size=60_000),
        page(change=lambda cells: cells.__delitem__(slice(10, 20))),
    ],
    "exported_cells_are_small": [
        page(change=put(cell(LONG))),
        page(change=put(cell("#| export\ndef two(): pass\ndef three(): pass"))),
    ],
    "no_name_is_defined_twice": [page(change=put(cell("def one(x):\n    return x")))],
    "exports_are_demonstrated": [
        page(change=lambda cells: cells.pop(6)),
        page(change=replace(6, source="one(2)")),
        page(change=replace(6, source="#| hide\nassert one(2) == 2")),
        page(change=put(*[cell(f"{i}") for i in range(3)], at=6)),
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
        page(change=put(PARAMETERS)),
        page("45_good"),
        page("45_good", put(PARAMETERS, cell("n = 1  # many", tags=["parameters"]))),
        page("45_good", put(cell("n = 2 * 3  # many", tags=["parameters"]))),
        page("45_good", put(cell("n = 2", tags=["parameters"]))),
    ],
    "tables_and_figures_export_nothing": [page("65_good"), page(change=lambda cells: cells.pop(0))],
    "metadata": [
        page(change=replace(6, id="")),
        page(change=lambda cells: cells.append(copy.deepcopy(cells[-1]))),
        page(change=replace(6, execution_count=3)),
        page(change=replace(6, metadata={"collapsed": True})),
    ],
    "no_conflict_is_left": [page(change=put(cell("`<<<<<<< HEAD`", "markdown")))],
    "outputs_are_stable": [
        page(change=replace(6, outputs=STDERR)),
        page(change=replace(6, outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}])),
        *(
            page(change=put(cell("x", text=text)))
            for text in (
                "/ho" "me/me/file",
                "'/ro" "ot/x.csv'",
                "2026-01-31",
                "12:30:59",
                "100%|###| 3/3 [00:01<00:00, 2.1it/s]",
                "<Thing at 0x7f00aa11>",
                "1.4 ms",
            )
        ),
    ],
    "ends_in_a_summary": [page(change=lambda cells: cells.pop())],
}


def found(name, bad):
    return list(RULES[name](bad, {"low": 1, "high": 7, "good": 5, "__init__": 90}))


@pytest.mark.parametrize("name", RULES)
def test_rule_passes_a_good_notebook(name):
    assert found(name, page()) == []


@pytest.mark.parametrize("name", RULES)
def test_rule_catches_its_bad_notebooks(name):
    assert [number for number, bad in enumerate(BAD[name]) if not found(name, bad)] == []


def test_parameters_rule_passes_a_good_experiment():
    assert found("parameters", page("45_good", put(PARAMETERS))) == []
