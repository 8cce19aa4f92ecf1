"""The shape of the notebooks: one function a rule, and for each rule a notebook that breaks it."""

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

    def __init__(self, name, raw):
        self.name, self.raw = name, raw  # the name is the path below nbs/, without the suffix
        self.cells = [Cell(cell) for cell in raw["cells"]]
        self.code = [cell for cell in self.cells if cell.kind == "code"]
        self.is_index = name == "index"
        self.module = next(
            (arg for cell in self.code for word, arg in cell.directives if word == "default_exp"),
            None,
        )

    @classmethod
    def read(cls, path):
        name = path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
        return cls(name, json.loads(path.read_text(encoding="utf-8")))


class House(NamedTuple):
    """Where each module comes from, and what it imports."""

    notebooks: dict  # module -> name of the notebook that exports it
    imports: dict  # module -> the modules that it imports

    def reach(self, module):
        """The modules that importing a module loads, itself included."""
        reached, waiting = set(), [module]
        while waiting:
            current = waiting.pop()
            if current not in reached:
                reached.add(current)
                waiting += self.imports.get(current, ())
        return reached


class Cell:
    def __init__(self, raw):
        self.raw, self.kind, self.source = raw, raw["cell_type"], "".join(raw["source"])
        self.tags = raw["metadata"].get("tags", [])
        self.directives = (
            re.findall(r"^#\| *(\w+) *(.*?) *$", self.source, flags=re.M)
            if self.kind == "code"
            else []
        )
        words = {word for word, _ in self.directives}
        self.exported, self.hidden = (
            any(word.startswith("export") for word in words),
            "hide" in words,
        )

    @cached_property
    def tree(self):
        try:
            return ast.parse(self.source)
        except SyntaxError:
            return ast.Module([], [])

    @property
    def definitions(self):
        return [
            n
            for n in self.tree.body
            if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]

    @property
    def public(self):
        return [node.name for node in self.definitions if not node.name.startswith("_")]

    @property
    def only_imports(self):
        return bool(self.tree.body) and all(
            isinstance(node, ast.Import | ast.ImportFrom) for node in self.tree.body
        )

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
        if (
            isinstance(part, ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(part, clean=False) is not None
        ):
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
                yield (
                    data
                    if isinstance(data, str)
                    else "".join(data)
                    if isinstance(data, list)
                    else json.dumps(data)
                )


RULES = {}


def rule(function):
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
    """`from dbmtl.x import y`, in exported cells from notebooks that come before this one. What a cell shows may use any
    module that does not load this notebook's own: the process would hold every class of it twice."""
    may_import_all = page.is_index or page.module == "__init__"
    for cell, node in ((cell, node) for cell in page.code for node in ast.walk(cell.tree)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            forbidden = [name for name in names if name.startswith("dbmtl.") or "nbdev" in name]
            yield from (f"import {name}" for name in forbidden)
            if "dbmtl" in names and not may_import_all:
                yield "import dbmtl"
        if isinstance(node, ast.ImportFrom):
            if node.level or any(alias.name == "*" for alias in node.names):
                yield f"relative or star import: {ast.unparse(node)}"
            elif node.module == "dbmtl":
                if not may_import_all:
                    yield f"{ast.unparse(node)}: name the module that defines it"
            elif node.module.startswith("dbmtl."):
                module = node.module.removeprefix("dbmtl.")
                if module not in house.notebooks:
                    yield f"{ast.unparse(node)}: no notebook exports {module}"
                elif page.module and page.module in house.reach(module):
                    yield f"{ast.unparse(node)}: {module} loads {page.module}"
                elif cell.exported and house.notebooks[module] >= page.name:
                    yield f"{ast.unparse(node)}: {module} is not below {page.name}"


@rule
def imports_have_cells_of_their_own(page, house):
    for cell in [] if page.is_index else page.code:  # the README's example stands alone
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in cell.tree.body}
        if kinds == {True, False}:
            yield cell.source.splitlines()[0]


@rule
def first_cells(page, house):
    """#| default_exp name; # Title and > one sentence; 60 to 150 words; exported imports."""
    cells = page.cells
    if page.module:
        if cells[0].source.strip() != f"#| default_exp {page.module}":
            yield "the first cell is not `#| default_exp name`"
        cells = cells[1:]
    if not re.match(r"# \S[^\n]*\n+> \S", cells[0].source) or cells[0].kind != "markdown":
        yield "no cell `# Title` with `> one sentence`"
    heads = re.findall(
        r"^# ", "\n".join(cell.source for cell in page.cells if cell.kind == "markdown"), flags=re.M
    )
    if len(heads) != 1:
        yield f"{len(heads)} first-level headings"
    if not page.is_index and not (
        cells[1].kind == "markdown" and 60 <= words(cells[1].source) <= 150
    ):
        yield f"the introduction has {words(cells[1].source)} words"
    exported = [cell for cell in page.code if cell.exported]
    if any(cell.only_imports for cell in exported) and not exported[0].only_imports:
        yield "the first exported cell is not the imports"


@rule
def no_name_is_defined_twice(page, house):
    seen = [node.name for cell in page.code for node in cell.definitions]
    yield from sorted({name for name in seen if seen.count(name) > 1 and not name.startswith("_")})


@rule
def exports_are_demonstrated(page, house):
    """Within three code cells of its definition a public name is used in view, and something is asserted in view."""
    for position, cell in enumerate(page.code):
        if cell.exported and not cell.hidden:
            after = [
                c for c in page.code[position + 1 : position + 4] if not c.exported and not c.hidden
            ]
            for name in cell.public:
                if not any(name in c.names for c in after) or not any(c.asserts for c in after):
                    yield name


@rule
def prose_between_code(page, house):
    """At most three code cells in a row, cells of imports aside."""
    row = 0
    for cell in page.cells:
        row = 0 if cell.kind == "markdown" else row + (not cell.only_imports)
        if row == 4:
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
        head = re.match(r"(?:#\|[^\n]*(?:\n|$))*", cell.source).end()
        yield from re.findall(r"^\s*#\s*\|.*", cell.source[head:], flags=re.M)
        yield from (word for word, _ in cell.directives if word not in DIRECTIVES)
        yield from re.findall(r"^#\|\W*$", cell.source[:head], flags=re.M)


@rule
def comments_are_not_captions(page, house):
    """No numbered comments, no banners, no sentences that are printed."""
    for cell in page.code:
        yield from re.findall(r"^\s*#\s*(?:\d+[.)]\s|[-=#*]{3,}).*", cell.source, flags=re.M)
        for node in ast.walk(cell.tree):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print":
                if any(isinstance(arg, ast.JoinedStr) for arg in node.args):
                    yield ast.unparse(node)


@rule
def parameters(page, house):
    """One cell tagged parameters where a notebook exports nothing, at most one elsewhere, of lines
    `name = literal  # comment`."""
    tagged = [cell for cell in page.cells if "parameters" in cell.tags]
    if len(tagged) > 1 or (not tagged and not page.module and not page.is_index):
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
def tables_and_figures_export_nothing(page, house):
    of_results = page.name.startswith(("15_paper/", "16_studies/", "17_site/"))
    if of_results and page.module not in (None, "__init__"):
        yield "notebooks of results export nothing"
    if any(cell.exported for cell in page.code) and not page.module:
        yield "exports without default_exp"


@rule
def metadata(page, house):
    """The same kernel everywhere, nbformat 4.5, an own id a cell, no execution counts."""
    if page.raw["metadata"] != KERNEL or (page.raw["nbformat"], page.raw["nbformat_minor"]) != (
        4,
        5,
    ):
        yield f"metadata {page.raw['metadata']}, nbformat {page.raw['nbformat']}.{page.raw['nbformat_minor']}"
    ids = [cell.raw.get("id", "") for cell in page.cells]
    yield from {
        f"id {name!r}"
        for name in ids
        if ids.count(name) > 1 or not re.fullmatch(r"[\w-]{1,64}", name)
    }
    for cell in page.code:
        counts = [
            cell.raw["execution_count"],
            *(out.get("execution_count") for out in cell.raw["outputs"]),
        ]
        yield from (f"execution count {count}" for count in counts if count is not None)
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
            if output["output_type"] == "error" or output.get("name") == "stderr":
                yield f"{output['output_type']} {output.get('name', output.get('ename'))}"
            yield from (mime for mime in output.get("data", {}) if "widget" in mime)
        for text in texts(cell):
            yield from (
                f"{kind}: {found[0]}"
                for kind, regex in LEAKS.items()
                if (found := re.search(regex, text))
            )


@rule
def ends_in_a_summary(page, house):
    heads = re.findall(
        r"^## (.*)", "\n".join(c.source for c in page.cells if c.kind == "markdown"), flags=re.M
    )
    if page.module and page.module != "__init__" and (not heads or heads[-1].strip() != "Summary"):
        yield "the last section is not `## Summary`"


# ------------------------------------------------------------------------------------------------ the project's pages

PAGES = [Page.read(path) for path in sorted(ROOT.glob("nbs/**/*.ipynb"))]


def imports_of(path):
    """The modules of dbmtl that an exported file imports, as names below `dbmtl`."""
    package = path.relative_to(ROOT / "dbmtl").parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            yield ".".join([*base, *(node.module or "").split(".")]).strip(".")


MODULE_FILES = {
    path.relative_to(ROOT / "dbmtl").with_suffix("").as_posix().replace("/", "."): path
    for path in sorted(ROOT.glob("dbmtl/**/*.py"))
    if path.parent == ROOT / "dbmtl" or path.name != "__init__.py"
}
HOUSE = House(
    {page.module: page.name for page in PAGES if page.module},
    {module: set(imports_of(path)) for module, path in MODULE_FILES.items()},
)
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
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
@pytest.mark.parametrize("name", RULES)
def test_notebook_keeps_the_rule(name, page):
    assert list(RULES[name](page, HOUSE)) == []


def test_modules_are_those_that_the_notebooks_export():
    exported = [page.module for page in PAGES if page.module]
    assert sorted(exported) == sorted(set(exported)), "two notebooks export one module"
    assert set(MODULE_FILES) - {"_modidx"} == set(exported)


def test_arrows_between_folders_run_one_way():
    upward = [
        f"{module} imports {other}"
        for module, others in HOUSE.imports.items()
        for other in others
        if module not in ("__init__", "_modidx")
        and LAYERS.index(other.split(".")[0]) > LAYERS.index(module.split(".")[0])
    ]
    assert upward == []


def test_folders_and_names_of_notebooks_mirror_the_modules():
    for page in PAGES:
        assert re.fullmatch(r"(?:\d\d_[a-z0-9_]+/)?\d\d_[a-z0-9_]+|index", page.name), page.name
        if page.module not in (None, "__init__"):
            plain = "/".join(part[3:] for part in page.name.split("/"))
            assert plain == page.module.replace(".", "/"), page.name


def test_no_two_notebooks_of_a_folder_have_one_number():
    places = [
        page.name.rpartition("/")[0] + "/" + page.name.rpartition("/")[2][:2] for page in PAGES
    ]
    assert len(set(places)) == len(places)


# -------------------------------------------------------------------------------------- each rule can fail, and does


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
    """A short notebook that keeps every rule, after `change` has had its way with the list of cells."""
    cells = [
        cell("#| default_exp good"),
        cell("# Title\n> One sentence", "markdown"),
        cell(" ".join(["word"] * 80), "markdown"),
        cell("#| export\nimport torch\nfrom dbmtl.low import thing"),
        cell("## One", "markdown"),
        cell('#| export\ndef one(x):\n    "One."\n    return x'),
        cell("assert one(2) == 2\none(2)", text="2"),
    ]
    cells += [cell(f"Sentence {i}.", "markdown") for i in range(20)] + [
        cell("## Summary\nDone.", "markdown")
    ]
    cells = copy.deepcopy(cells)
    change(cells)
    return Page(
        name,
        {"cells": cells, "metadata": KERNEL, "nbformat": 4, "nbformat_minor": 5},
    )


def put(*new, at=7):
    return lambda cells: cells.__setitem__(slice(at, at), new)


def replace(at, **keys):
    return lambda cells: cells[at].update(keys)


PARAMETERS = cell("scale = 'smoke'  # how much\nseeds = [0]  # which", tags=["parameters"])
STDERR = [{"output_type": "stream", "name": "stderr", "text": "a warning"}]
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
    ],
    "tables_and_figures_export_nothing": [
        page("15_paper/01_good"),
        page(change=lambda cells: cells.pop(0)),
    ],
    "metadata": [
        page(change=replace(6, id="")),
        page(change=lambda cells: cells.append(copy.deepcopy(cells[-1]))),
        page(change=replace(6, execution_count=3)),
        page(change=replace(6, metadata={"collapsed": True})),
    ],
    "no_conflict_is_left": [page(change=put(cell("`<<<<<<< HEAD`", "markdown")))],
    "outputs_are_stable": [
        page(change=replace(6, outputs=STDERR)),
        page(
            change=replace(
                6, outputs=[{"output_type": "error", "ename": "E", "evalue": "", "traceback": []}]
            )
        ),
        *(
            page(change=put(cell("x", text=text)))
            for text in (
                "/" + "home/me/file",
                "'/" + "root/x.csv'",
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


SMALL_HOUSE = House(
    {"low": "01_low", "good": "05_good", "high": "07_high", "above": "08_above", "__init__": "90"},
    {"good": {"low"}, "above": {"high", "good"}},
)


def found(name, bad):
    return list(RULES[name](bad, SMALL_HOUSE))


@pytest.mark.parametrize("name", RULES)
def test_rule_passes_a_good_notebook(name):
    assert found(name, page()) == []


@pytest.mark.parametrize("name", RULES)
def test_rule_catches_its_bad_notebooks(name):
    assert [number for number, bad in enumerate(BAD[name]) if not found(name, bad)] == []


def test_parameters_rule_passes_a_good_experiment():
    assert found("parameters", page("45_good", put(PARAMETERS))) == []
