"""Builds the book: `ci/book [--output FOLDER] [--pages FOLDER]`. Nothing is executed, nothing
downloaded, and a warning is an error."""

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(HERE), str(ROOT)]


def write_pages(folder):
    """Writes what Sphinx reads: notebooks, generated pages, pictures, settings and MathJax."""
    import nbformat
    from notebooks import all_notebooks, name_of, page_of, pictures_of
    from pages import first_page_contents, generated_pages, parts

    for path in all_notebooks():
        notebook = page_of(path)
        name = name_of(path)
        if name == "index":
            contents = first_page_contents(parts())
            notebook.cells.append(nbformat.v4.new_markdown_cell(contents, id="contents"))
        for picture in pictures_of(notebook):
            (folder / picture).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / picture, folder / picture)
        page = folder / f"{name}.ipynb"
        page.parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(notebook, page)
    for name, text in generated_pages().items():
        page = folder / f"{name}.md"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text + "\n", encoding="utf-8")
    static = folder / "_static" / "mathjax"
    static.mkdir(parents=True)
    for name in ("es5/tex-svg-full.js", "LICENSE"):
        shutil.copy(mathjax() / name, static)
    for name in ("book.css", "book.js"):
        shutil.copy(HERE / name, folder / "_static")
    (folder / "_templates").mkdir()
    shutil.copy(HERE / "edit-this-page.html", folder / "_templates")
    shutil.copy(HERE / "conf.py", folder)


def mathjax():
    """Where the wheel of MathJax has its files."""
    spec = importlib.util.find_spec("mathjax")
    return Path(spec.submodule_search_locations[0]) / "static" / "mathjax"


def run_sphinx(pages, output, doctrees):
    """Makes the site; exits with Sphinx's status if it warns or fails."""
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-q", "-W", "-j", "auto"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, "-d", doctrees, pages, output], env=environment)
    if done.returncode:
        sys.exit(done.returncode)


def clean(output):
    """Removes what no reader needs, and says that the site is not to be processed again."""
    for pattern in ("_static/**/*.map", "_static/*webpack-macros.html", ".buildinfo*"):
        for path in output.glob(pattern):
            path.unlink()
    (output / ".nojekyll").touch()


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="ci/book", description="Builds the book.")
    parser.add_argument("--output", type=Path, default=ROOT / "_book")
    parser.add_argument("--pages", type=Path, help="keep what Sphinx reads in this new folder")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        pages = args.pages or Path(scratch, "pages")
        pages.mkdir(parents=True)
        write_pages(pages)
        written = time.perf_counter()
        output = Path(scratch, "site")
        run_sphinx(pages, output, Path(scratch, "doctrees"))
        clean(output)
        shutil.rmtree(args.output, ignore_errors=True)
        shutil.move(output, args.output)
    files = [path for path in args.output.rglob("*") if path.is_file()]
    count = sum(path.suffix == ".html" for path in files)
    size = sum(path.stat().st_size for path in files) / 1e6
    seconds = time.perf_counter() - start
    print(
        f"{count} pages, {size:.0f} MB, in {seconds:.0f} s "
        f"({written - start:.0f} s of them before Sphinx): {args.output / 'index.html'}"
    )


if __name__ == "__main__":
    main()
