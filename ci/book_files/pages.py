"""The pages of the book that are no notebook: parts, methods, the paper's results, symbols, API."""

import importlib
import inspect
import pkgutil
import re
from pathlib import PurePosixPath
from typing import NamedTuple

import nbformat
from fastcore.docments import docments
from notebooks import (
    EQUATION,
    NOTEBOOKS,
    ROOT,
    all_notebooks,
    anchor_of,
    name_of,
    repository_link,
    title_and_sentence,
)
from papers import paper_of

import dbmtl
from dbmtl.registry import method_facts, method_names, recipe

# the parts that a folder's name does not tell; notebooks beside the folders have parts of their own
TITLES = {
    "01_core": "Core",
    "15_paper": "Paper",
    "16_studies": "Studies",
    "17_site": "Site",
}
SENTENCES = {
    "01_core": "Task gradients, averages, solvers, and the balancer that puts them together.",
    "02_loss_balancing": "Methods that weigh or transform the losses.",
    "03_gradient_balancing": "Methods that weigh or change the tasks' gradients.",
    "the_method": "The paper's method, every method by its name, and what a step of each does.",
    "07_data": "Data sets, and generated ones that stand in for them.",
    "08_models": "The networks.",
    "09_benchmarks": "Data, network and metrics together, with their scales.",
    "10_experiments": "Training, records and the improvement over single-task networks.",
    "11_report": "From records to tables, figures and verdicts.",
    "commands": "What is run from the command line.",
    "15_paper": "Tables 1 to 6, Figures 1 to 10, and the ledger of the paper's claims.",
    "16_studies": "Questions of our own.",
    "17_site": "Methods at a glance, using them, running the experiments, and cards of the data.",
    "18_recipes": "The library together with other tools.",
}
LOOSE = {  # notebooks beside the folders: {name: part}
    "04_dbmtl": "the_method",
    "05_registry": "the_method",
    "06_profile": "the_method",
}
LOOSE_TITLES = {"the_method": "The method", "commands": "Commands"}


class Entry(NamedTuple):
    """A notebook as a list of contents shows it."""

    name: str  # path below nbs/ without the suffix
    title: str
    sentence: str  # its `>` line


class Part(NamedTuple):
    """A part of the book."""

    page: str  # of the landing page
    title: str
    sentence: str
    entries: list[Entry]


def markdown_table(header, rows):
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def toctree(pages, caption=None):
    """A hidden table of contents of these pages, for the sidebar."""
    lines = ["```{toctree}", ":hidden:", ":maxdepth: 1"]
    if caption:
        lines.append(f":caption: {caption}")
    return "\n".join([*lines, "", *pages, "```"])


# ------------------------------------------------------------------------------------- parts


def entries():
    """Every notebook but the first page."""
    listed = []
    for path in all_notebooks():
        if name_of(path) != "index":
            title, sentence = title_and_sentence(nbformat.read(path, 4))
            listed.append(Entry(name_of(path), title, sentence))
    return listed


def parts():
    """The parts in the order of their notebooks."""
    found = {}
    for entry in entries():
        folder = entry.name.rpartition("/")[0]
        key = folder or LOOSE.get(entry.name, "commands")
        found.setdefault(key, []).append(entry)
    return [part_of(key, listed) for key, listed in found.items()]


def part_of(key, listed):
    """A part from its folder's name."""
    if key in LOOSE_TITLES:
        return Part(key, LOOSE_TITLES[key], SENTENCES[key], listed)
    words = re.sub(r"^\d+_", "", key).replace("_", " ")
    title = TITLES.get(key, words.capitalize())
    return Part(f"{key}/index", title, SENTENCES.get(key, ""), listed)


def part_page(part):
    """The landing page of a part: a line for each notebook."""
    lines = [f"# {part.title}", "", part.sentence, ""]
    for entry in part.entries:
        lines.append(f"- [{entry.title}](/{entry.name}.ipynb): {entry.sentence}")
    return "\n".join([*lines, "", toctree(f"/{entry.name}" for entry in part.entries)])


# ----------------------------------------------------------------------------------- methods


def slug(name):
    """The name of a method's page."""
    return name.lower().replace("+", "-")


def notebook_of(module):
    """The notebook that a module is exported from, as a path below nbs/ without the suffix."""
    text = (ROOT / module_file(module)).read_text(encoding="utf-8")
    found = re.search(r"File to edit: (?:\.\./)+nbs/(.+)\.ipynb", text)
    return found[1] if found else None


def module_file(module):
    """The file of a module, from the top of the project."""
    path = PurePosixPath(*module.split("."))
    if (ROOT / path).is_dir():
        return (path / "__init__.py").as_posix()
    return path.with_suffix(".py").as_posix()


def tests_of(module):
    """The test files that bear a module's name."""
    stem = module.rpartition(".")[2]
    return sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob(f"test_{stem}.py")
    )


def classes_of(name):
    """The classes that make up a method; the neutral ones only where there is no other."""
    made = recipe(name, num_tasks=2)
    classes = [type(part) for part in (made.transform, made.aggregator, made.ema) if part]
    own = [part for part in classes if part.__name__ not in ("Identity", "Sum")]
    if name == "DB-MTL":
        own.insert(0, dbmtl.DBMTL)
    return own or classes


def code_link(path):
    """A file of the project, linked in the repository."""
    return f"[`{path}`]({repository_link(path)})"


def where_rows(name):
    """Rows of a table: a method's paper, notebooks, source and tests."""
    classes = classes_of(name)
    modules = list(dict.fromkeys(part.__module__ for part in classes))
    notebooks = [f"[{notebook_of(module)}](/{notebook_of(module)}.ipynb)" for module in modules]
    tests = [code_link(path) for module in modules for path in tests_of(module)]
    rows = [
        ["notebook", ", ".join(notebooks)],
        ["API", ", ".join(object_link(part) for part in classes)],
        ["source", ", ".join(code_link(module_file(module)) for module in modules)],
        ["tests", ", ".join(tests) or code_link("tests/methods")],
    ]
    paper = paper_of(name)
    if paper:
        rows.insert(0, ["paper", f"<{paper}>"])
    return rows


def equation_lines(name):
    """The first displayed equation of each notebook of a method, below a link to it."""
    classes = [part for part in classes_of(name) if part is not dbmtl.Identity]
    lines = []
    for notebook in dict.fromkeys(notebook_of(part.__module__) for part in classes):
        cells = nbformat.read(NOTEBOOKS / f"{notebook}.ipynb", 4).cells
        title, _ = title_and_sentence(nbformat.from_dict({"cells": cells}))
        prose = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
        if equation := EQUATION.search(prose):
            lines += [f"From [{title}](/{notebook}.ipynb):", ""]
            lines += ["$$", equation["body"].strip(), "$$", ""]
    return lines


def method_page(name):
    """All that is known about a method, from its facts."""
    facts = method_facts(name)
    lines = [f"# {name}", "", f"{facts['venue'][0].upper()}{facts['venue'][1:]}.", ""]
    lines += equation_lines(name)
    lines += ["In plain text:", "", "```text", facts["equation"], "```", ""]
    axes = {"loss": "losses", "gradient": "gradients", "both": "losses and gradients"}
    rows = [
        ["balances", axes[facts["axis"]]],
        ["backward passes through the trunk", f"`{facts['passes']}`"],
        ["touches", facts["touches"]],
        ["kept between steps", facts["state"]],
        ["also needs", facts["needs"] or "nothing"],
    ]
    lines += [markdown_table(["a step", ""], rows), ""]
    lines += ["## In use", "", "```python", "from dbmtl import make_balancer", ""]
    lines += [f'balancer = make_balancer("{name}", shared=trunk, num_tasks=2)', "```", ""]
    lines += ["## Where it is", "", markdown_table(["", ""], where_rows(name)), ""]
    lines += ["## Defaults", ""]
    if facts["hyper"]:
        header = ["keyword", "default", "whose", "original paper", "elsewhere"]
        values = [
            [f"`{row['name']}`", f"`{row['default']!r}`"]
            + [row["source"], row["original"], row["elsewhere"]]
            for row in facts["hyper"]
        ]
        lines += [markdown_table(header, values), ""]
    else:
        lines += ["It has no hyperparameters.", ""]
    lines += ["## Differences between implementations", ""]
    lines += [f"- {note}" for note in facts["differences"]] or ["None is known."]
    lines += [
        "",
        "All methods side by side: [every method at a glance](/17_site/01_methods.ipynb).",
    ]
    return "\n".join(lines)


def methods_page():
    """The list of all methods."""
    rows = []
    for name in method_names():
        facts = method_facts(name)
        rows.append([f"[{name}](/methods/{slug(name)}.md)", facts["axis"], facts["venue"]])
    lines = ["# Methods", "", "A page for each name that `make_balancer` knows.", ""]
    lines += [markdown_table(["method", "balances", "source"], rows), ""]
    return "\n".join([*lines, toctree(f"/methods/{slug(name)}" for name in method_names())])


# ------------------------------------------------------------------------- the paper's results


def heading_link(heading):
    """(name of the notebook, its anchor) of the one section whose heading starts like this."""
    for path in all_notebooks():
        if "/" not in name_of(path) or not name_of(path).startswith(("11", "15", "16", "17")):
            for cell in nbformat.read(path, 4).cells:
                found = re.search(rf"^## ({re.escape(heading)}\b.*)$", cell.source, re.MULTILINE)
                if cell.cell_type == "markdown" and found:
                    words = re.sub(r"[^\w\s-]", "", found[1].lower())
                    return name_of(path), words.replace(" ", "-")
    raise ValueError(f"no notebook has a section {heading}")


def results_page():
    """An entry for each table, figure, proposition and algorithm of the paper."""
    lines = [
        "# The paper's results",
        "",
        "*Dual-Balancing for Multi-Task Learning*, "
        "[arXiv 2308.12029](https://arxiv.org/abs/2308.12029). Each result, and the notebook that "
        "derives or draws it. What became of every claim of the paper: "
        "[the ledger](/15_paper/17_claims.ipynb).",
        "",
    ]
    sentences = {
        "Proposition 3.1": "The logarithm of a loss is the minimum over a learned scale.",
        "Equation 2": "The common length of the tasks' gradients.",
        "Algorithm 1": "The method line by line, and the class that does it.",
    }
    for heading, sentence in sentences.items():
        name, anchor = heading_link(heading)
        lines += [f"({anchor_of(heading)})=", f"## {heading}", "", sentence, ""]
        title, _ = title_and_sentence(nbformat.read(NOTEBOOKS / f"{name}.ipynb", 4))
        lines += [f"Derived in [{title}](/{name}.ipynb#{anchor}).", ""]
    for entry in entries():
        found = re.match(r"(?:Table|Figure) \d+", entry.title)
        if entry.name.startswith("15_paper/") and found:
            lines += [f"({anchor_of(found[0])})=", f"## {entry.title}", "", entry.sentence, ""]
            lines += [f"[Our runs beside what is printed](/{entry.name}.ipynb)", ""]
    return "\n".join(lines)


# ------------------------------------------------------------------------------------ symbols


def symbols_of(path):
    """The rows of a notebook's tables of symbols: {column: text}."""
    rows = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type != "markdown":
            continue
        header = None
        for line in cell.source.splitlines():
            columns = [text.strip() for text in line.strip().strip("|").split("|")]
            if not line.startswith("|"):
                header = None
            elif columns[0] == "symbol":
                header = columns
            elif header and columns[0] and not set(line) <= set("|-: "):
                rows.append(dict(zip(header, columns, strict=False)))
    return rows


def glossary_page():
    """Every symbol of the notebooks, part after part, with where it is used."""
    lines = ["# Symbols", "", "Gathered from the tables at the head of the notebooks.", ""]
    for part in parts():
        meanings = {}
        for entry in part.entries:
            for row in symbols_of(NOTEBOOKS / f"{entry.name}.ipynb"):
                name = row.get("name") or row.get("in code") or ""
                key = (row["symbol"], row.get("meaning", ""), row.get("shape", ""), name)
                link = f"[{entry.title}](/{entry.name}.ipynb)"
                meanings.setdefault(key, []).append(link)
        if meanings:
            rows = [[*key, ", ".join(links)] for key, links in sorted(meanings.items())]
            lines += [f"## {part.title}", ""]
            header = ["symbol", "meaning", "shape", "in code", "notebook"]
            lines += [markdown_table(header, rows), ""]
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------- API


def modules():
    """The names of all modules that are exported from notebooks."""
    found = pkgutil.walk_packages(dbmtl.__path__, "dbmtl.")
    names = [info.name for info in found if not info.ispkg]
    return sorted(name for name in names if notebook_of(name))


def object_link(item):
    """A link to the description of a class or function."""
    return f"{{py:obj}}`{item.__name__} <{item.__module__}.{item.__qualname__}>`"


def short(annotation):
    """An annotation as one reads it, without the modules' names."""
    if isinstance(annotation, str):
        return annotation
    text = inspect.formatannotation(annotation)
    return re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", text)


def default_of(parameter):
    """The text of a default; long or nameless values are shortened."""
    text = repr(parameter.default)
    if callable(parameter.default) and hasattr(parameter.default, "__name__"):
        text = parameter.default.__name__
    return text if len(text) <= 40 and "<" not in text else "..."


def signature_of(item):
    """The parameters of a function or class; None where Python knows none."""
    try:
        return inspect.signature(item)
    except (TypeError, ValueError):
        return None


def call_text(signature):
    """How it is called: names and defaults."""
    names = []
    has_star = False
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.VAR_POSITIONAL:
            has_star = True
            names.append(f"*{parameter.name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            names.append(f"**{parameter.name}")
        else:
            if parameter.kind is parameter.KEYWORD_ONLY and not has_star:
                has_star = True
                names.append("*")
            has_default = parameter.default is not parameter.empty
            names.append(
                f"{parameter.name}={default_of(parameter)}" if has_default else parameter.name
            )
    return f"({', '.join(names)})"


def comments_of(item):
    """{parameter: its comment} as nbdev reads them; "return" for what is given back."""
    comments = docments(item, returns=True, eval_str=False)
    return {name: text for name, text in comments.items() if text}


def parameter_lines(item, signature):
    """A line for each parameter, and for the result; none where the docstring has them."""
    if "Arguments:\n" in (item.__doc__ or ""):
        return []
    comments = comments_of(item)
    lines = []
    for parameter in signature.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        words = f"- `{parameter.name}`"
        if parameter.annotation is not parameter.empty:
            words += f" (`{short(parameter.annotation)}`)"
        if parameter.name in comments:
            words += f": {plain(comments[parameter.name])}"
        lines.append(words)
    returned = signature.return_annotation
    if returned is not signature.empty and not inspect.isclass(item):
        words = f"- returns `{short(returned)}`"
        if "return" in comments:
            words += f": {plain(comments['return'])}"
        lines.append(words)
    return lines


def plain(text):
    """Words of a docstring or comment, safe as Markdown outside of code."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\.ipynb\)", r"\1", text)  # the page links its notebook
    parts = re.split(r"(`[^`\n]+`|\$[^$\n]+\$)", text)
    safe = []
    for part in parts:
        stays = part.startswith(("`", "$")) and len(part) > 1  # code and mathematics
        safe.append(part if stays else re.sub(r"([*_<>\[\]$|\\])", r"\\\1", part))
    return "".join(safe)


def argument_lines(paragraph):
    """The section `Arguments:` of a docstring, a line for each."""
    lines = []
    for line in inspect.cleandoc(paragraph.partition("\n")[2]).splitlines():
        found = re.match(r"(\w+): (.*)", line)
        if found:
            lines.append(f"- `{found[1]}`: {plain(found[2])}")
        else:
            lines[-1] += f" {plain(line.strip())}"
    return "\n".join(lines)


def docstring_of(item):
    """The docstring as Markdown; examples stay as they are."""
    paragraphs = []
    for paragraph in inspect.cleandoc(item.__doc__ or "").split("\n\n"):
        lines = paragraph.splitlines()
        if paragraph.startswith("Arguments:\n"):
            paragraphs.append(argument_lines(paragraph))
        elif paragraph.startswith(">>>"):
            paragraphs.append(f"```pycon\n{paragraph}\n```")
        elif any(line.startswith(" ") for line in lines):
            paragraphs.append(f"```text\n{paragraph}\n```")
        else:
            paragraphs.append(plain(paragraph))
    return "\n\n".join(paragraphs)


def directive(kind, title, body, depth):
    """A description of Sphinx's Python domain."""
    fence = "`" * (8 - depth)
    return f"{fence}{{py:{kind}}} {title}\n\n{body}\n{fence}\n"


def source_link(item):
    """A link to the first line of a class or function."""
    line = inspect.getsourcelines(item)[1]
    address = repository_link(module_file(item.__module__))
    return f"[source]({address}#L{line})"


def with_source(item):
    """The docstring, and behind its first paragraph a link to the code."""
    first, *others = docstring_of(item).split("\n\n", 1)
    if first.startswith("```"):
        return "\n\n".join([source_link(item), first, *others])
    return "\n\n".join([f"{first} ({source_link(item)})".strip(), *others])


def comment_on(name, text):
    """The comment beside a module's constant, or the lines of comment above it."""
    found = re.search(
        rf"(?P<above>(?:^# .+\n)*)^{name}\b[^#\n]*=[^#\n]*(?:  # (?P<beside>.+))?$",
        text,
        re.MULTILINE,
    )
    if not found:
        return ""
    if found["beside"]:
        return found["beside"]
    lines = [line.removeprefix("# ") for line in found["above"].splitlines()]
    return " ".join(line for line in lines if not line.startswith("%%"))


def constant(name, value, text):
    """The directive of a module's constant: its value, where that is short, and its comment."""
    shown = repr(value)
    is_short = len(shown) <= 100 and " at 0x" not in shown and "`" not in shown
    words = [f"`{shown}`"] if is_short else []
    if comment := comment_on(name, text):
        words.append(plain(comment))
    return directive("data", name, ": ".join(words), 0)


def described(item, kind, title, depth=0):
    """The directive of one class, function or method."""
    signature = signature_of(item)
    body = [with_source(item), ""]
    call = ""
    if signature is not None:
        call = call_text(signature)
        body += [*parameter_lines(item, signature), ""]
    if kind == "class":
        for name, method in vars(item).items():
            is_function = inspect.isfunction(method)
            if is_function and not name.startswith("_") and method.__module__ == item.__module__:
                body.append(described(method, "method", name, depth + 1))
    return directive(kind, title + call, "\n".join(body), depth)


def module_page(name):
    """The API of one module."""
    module = importlib.import_module(name)
    summary = inspect.cleandoc(module.__doc__ or "").split("\n\n")[0]
    notebook = notebook_of(name)
    lines = [f"# {name}", "", plain(summary), ""]
    lines += [f"Made and tested in [{notebook}](/{notebook}.ipynb); source"]
    lines += [f"{code_link(module_file(name))}.", "", f"```{{py:module}} {name}", "```", ""]
    text = inspect.getsource(module)
    for public in module.__all__:
        item = inspect.unwrap(getattr(module, public))  # a cached function is one
        if getattr(item, "__module__", name) != name:
            continue
        if inspect.isclass(item):
            lines.append(described(item, "class", public))
        elif inspect.isfunction(item):
            lines.append(described(item, "function", public))
        else:
            lines.append(constant(public, item, text))
    return "\n".join(lines)


def group_of(item):
    """The heading under which a public name stands."""
    if not inspect.isclass(item):
        return "By name, and measures"
    if issubclass(item, dbmtl.Transform):
        return "Loss transforms"
    if issubclass(item, dbmtl.Aggregator):
        return "Gradient aggregators"
    return "Balancer and average"


def api_page(names):
    """The public names in groups, then all modules."""
    groups = {"Balancer and average": [], "By name, and measures": []}
    for public in dbmtl.__all__:
        item = getattr(dbmtl, public)
        first_line = plain(inspect.cleandoc(item.__doc__ or "").splitlines()[0])
        groups.setdefault(group_of(item), []).append([object_link(item), first_line])
    lines = ["# API", "", "What `from dbmtl import ...` offers, and every module below.", ""]
    for title, rows in groups.items():
        lines += [f"## {title}", "", markdown_table(["name", ""], rows), ""]
    lines += ["## Modules", ""]
    beside, packages = by_package(names)
    listed = [*beside, *packages]
    lines += [f"- [{name}](/api/{name}.md)" for name in listed]
    return "\n".join([*lines, "", api_toctree(listed)])


def by_package(names):
    """The modules beside the packages, and {package: its modules}."""
    beside = []
    packages = {}
    for name in names:
        package = name.rpartition(".")[0]
        if package == "dbmtl":
            beside.append(name)
        else:
            packages.setdefault(package, []).append(name)
    return beside, packages


def api_toctree(names):
    """Pages of the API for the sidebar, by their last name."""
    return toctree(f"{name.rpartition('.')[2]} </api/{name}>" for name in names)


def package_page(package, names):
    """The modules of a package, each with its first line."""
    lines = [f"# {package}", ""]
    for name in names:
        summary = inspect.cleandoc(importlib.import_module(name).__doc__ or "")
        lines.append(f"- [{name}](/api/{name}.md): {plain(summary.splitlines()[0])}")
    return "\n".join([*lines, "", api_toctree(names)])


# ----------------------------------------------------------------------------------- together


def first_page_contents(all_parts):
    """The cell that gives the first page the table of contents of the whole book."""
    reference = ["/paper_results", "/methods/index", "/glossary", "/api/index"]
    trees = [toctree((f"/{part.page}" for part in all_parts), "The book")]
    trees.append(toctree(reference, "Reference"))
    return "\n\n".join(trees)


def generated_pages():
    """{page: Markdown} of everything that is no notebook."""
    pages = {part.page: part_page(part) for part in parts()}
    pages["methods/index"] = methods_page()
    for name in method_names():
        pages[f"methods/{slug(name)}"] = method_page(name)
    pages["paper_results"] = results_page()
    pages["glossary"] = glossary_page()
    names = modules()
    pages["api/index"] = api_page(names)
    for name in names:
        pages[f"api/{name}"] = module_page(name)
    for package, own in by_package(names)[1].items():
        pages[f"api/{package}"] = package_page(package, own)
    return pages
