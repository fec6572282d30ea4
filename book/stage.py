"""Turn the notebooks into the pages of the book, and one of them into the README.

    python book/stage.py                 execute the notebooks that changed and write book/_staged/
    python book/stage.py --readme        write README.md from nbs/index.ipynb
    python book/stage.py --check-readme  fail, with a diff, where README.md is out of step
    python book/stage.py --check-toc     fail where the notebooks and the table of contents disagree

Jupyter Book knows nothing of nbdev's directives (`#| hide`, `#| export`), so they become cell tags that it knows. Execution
happens here and nowhere else in the book: a failing cell, a warning on stderr or a machine's path in an output stops the build.
Notebooks of 6_reproduction are the exception: papermill runs those, and this script takes what it has run.
"""
import argparse
import ast
import difflib
import hashlib
import importlib.metadata
import json
import os
import posixpath
import re
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

CELL_TIMEOUT = 300  # seconds
WORKERS = 2

# nbdev's directives as tags of MyST-NB. Those without a tag only lose their line: the code stays.
TAG_OF = {
    "hide": "remove-cell", "default_exp": "remove-cell", "include: false": "remove-cell",
    "hide_input": "remove-input", "echo: false": "remove-input",
    "hide_output": "remove-output", "output: false": "remove-output",
    "code-fold: true": "hide-input",
}
EXPORTS = {"export", "exporti", "exports"}
NOT_RUN = {"slow", "cuda", "eval: false"}  # as in nbdev_test, which skips the first two by settings.ini
NOT_RUN_CAPTION = "*Shown only: this cell does not run when the book is built.*"

DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*?)\s*$")
LINK = re.compile(r"\]\((?![a-z]+:|[#/])([^)\s]+)\)")
ANSI = re.compile(r"\x1b\[[0-9;]*m")


class StageError(Exception):
    """A page that must not be published; the message names the notebook and, where there is one, the cell."""


# ---- table of contents -----------------------------------------------------------------------------------------------------

def toc_files(root: Path) -> list[str]:
    """Pages of the table of contents in reading order: `intro`, `_staged/1_bound/01_information`, ..."""
    def walk(node: object) -> Iterator[str]:
        if isinstance(node, dict):
            yield from (node[key] for key in ("root", "file") if key in node)
        for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
            yield from walk(child)
    return list(walk(yaml.safe_load((root / "book/_toc.yml").read_text())))


def toc_notebooks(root: Path) -> list[str]:
    """Pages that are notebooks, as paths under nbs/ without suffix."""
    return [file.removeprefix("_staged/") for file in toc_files(root) if file.startswith("_staged/")]


def check_toc(root: Path) -> None:
    """Every notebook under nbs/ is in the table of contents once, and the other way round; names in `_` or `.` are private."""
    relative = [path.relative_to(root / "nbs") for path in (root / "nbs").rglob("*.ipynb")]
    present = {p.with_suffix("").as_posix() for p in relative if not any(part[0] in "_." for part in p.parts)}
    listed = toc_notebooks(root)
    problems = [f"nbs/{p}.ipynb is not in book/_toc.yml" for p in sorted(present - set(listed))]
    problems += [f"book/_toc.yml lists _staged/{p}, but there is no nbs/{p}.ipynb" for p in listed if p not in present]
    problems += [f"book/_toc.yml lists _staged/{p} twice" for p in sorted({p for p in listed if listed.count(p) > 1})]
    if problems:
        raise StageError("\n".join(problems))


# ---- translation -----------------------------------------------------------------------------------------------------------

def split_directives(source: str) -> tuple[list[tuple[str, str]], str]:
    """The leading `#|` lines as (name, value) pairs, and the code below them."""
    lines, found = source.splitlines(), []
    while lines and (not lines[0].strip() or DIRECTIVE.match(lines[0])):
        if match := DIRECTIVE.match(lines.pop(0)):
            found.append(match.groups())
    return found, "\n".join(lines).rstrip()


def spelled(name: str, value: str) -> str:
    """The directive as the tables above spell it: only a truth value belongs to its meaning."""
    return f"{name}: {value.lower()}" if value.lower() in ("true", "false") else name


def runs(cell: NotebookNode) -> bool:
    return not any(spelled(*directive) in NOT_RUN for directive in split_directives(cell.source)[0])


def module_of(nb: NotebookNode) -> str:
    """Name after `#| default_exp`, or nothing."""
    found = [d for cell in nb.cells if cell.cell_type == "code" for d in split_directives(cell.source)[0]]
    return next((value for name, value in found if name == "default_exp"), "")


def only_imports(code: str) -> bool:
    try:
        return all(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(code).body)
    except SyntaxError:  # a magic or a shell line
        return False


def translate_code(cell: NotebookNode, where: str, module: str) -> NotebookNode:
    """The cell with tags in place of directives; exported code is also tagged with the module it goes to."""
    found, code = split_directives(cell.source)
    tags = list(cell.metadata.get("tags", []))
    for name, value in found:
        if name in EXPORTS:
            tags += ["exported", "module-" + (value or module).replace(".", "-")] + ["hide-input"] * only_imports(code)
        elif tag := TAG_OF.get(spelled(name, value)):
            tags.append(tag)
        elif spelled(name, value) not in NOT_RUN and not value.lower() == "true":
            raise StageError(f"{where}: directive '#| {name} {value}' is unknown to book/stage.py; extend its tables or drop it")
    if "injected-parameters" in tags:
        tags.append("hide-input")
    outputs = [clean_output(output, where) for output in cell.outputs] if runs(cell) else []
    tags = [tag for tag in dict.fromkeys(tags) if tag != "skip-execution"]
    return new_code_cell(code, id=cell.id, outputs=outputs, metadata={"tags": tags} if tags else {})


def clean_output(output: NotebookNode, where: str) -> NotebookNode:
    """The output without counters; an error, or anything on stderr, is refused."""
    if output.output_type == "error":
        raise StageError(f"{where}: error in the output\n{traceback_tail(output)}")
    if output.get("name") == "stderr":
        raise StageError(f"{where}: text on stderr is not published, remove its cause:\n{output.text.strip()[-800:]}")
    output = nbformat.from_dict(output)  # a copy
    if "execution_count" in output:
        output.execution_count = None
    for kind, text in output.get("data", {}).items():
        if kind.startswith("text/") and text.lstrip().startswith("---"):  # the rule above show_doc's text breaks docutils
            output.data[kind] = text.lstrip().lstrip("-").lstrip()
    return output


def traceback_tail(error: NotebookNode, lines: int = 15) -> str:
    return "\n".join(ANSI.sub("", "\n".join(error.traceback)).splitlines()[-lines:]) or f"{error.ename}: {error.evalue}"


def translate(nb: NotebookNode, page: str) -> NotebookNode:
    """The notebook as the book shows it: directives as tags, no empty cells, no traces of the run."""
    module, cells = module_of(nb), []
    for number, cell in enumerate(nb.cells, 1):
        if cell.cell_type == "markdown":
            cells.append(new_markdown_cell(cell.source, id=cell.id))
        elif cell.cell_type == "code" and cell.source.strip():
            cells.append(translate_code(cell, f"nbs/{page}.ipynb, cell {number}", module))
            if not runs(cell):
                cells.append(new_markdown_cell(NOT_RUN_CAPTION, id=f"caption-{number}"))
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def modules_of(nb: NotebookNode) -> dict[str, str]:
    """Tag -> module of all exported cells: the one that the cell's directive names (`#| export encoders`), else that of the page."""
    found = [d for cell in nb.cells if cell.cell_type == "code" for d in split_directives(cell.source)[0]]
    names = {value or module_of(nb) for name, value in found if name in EXPORTS} - {""}
    return {"module-" + name.replace(".", "-"): name for name in sorted(names)}


def for_book(nb: NotebookNode, page: str) -> NotebookNode:
    """The translated page, its links fitted to book/_staged/, with the labels that name the module of exported cells."""
    modules, nb, heading = modules_of(nb), translate(nb, page), ""
    for cell in nb.cells:
        if cell.cell_type == "markdown":
            headings = re.findall(r"^#+ (.+)$", cell.source, flags=re.M)
            heading = re.sub(r"\{[a-z:]+\}|[`*$\\]", "", headings[-1]).strip() if headings else heading
            cell.source = LINK.sub(lambda m: m[0].replace("../book/", "../", 1), cell.source)
        elif cell.cell_type == "code" and heading:  # for readers who hear the page: otherwise the name of the picture's file
            cell.metadata["mystnb"] = {"image": {"alt": f"Figure: {heading}"}} | cell.metadata.get("mystnb", {})
    if modules:  # a style sheet cannot know the names, so the page carries them; see _static/ibma.css
        rules = " ".join(f'.tag_{tag} {{ --module: "ibma.{name}"; }}' for tag, name in modules.items())
        nb.cells.append(new_markdown_cell(f"<style>{rules}</style>", id="module-labels"))
    return nb


# ---- execution -------------------------------------------------------------------------------------------------------------

def surroundings(root: Path) -> str:
    """Hash of all that an execution depends on besides its notebook: the package, committed numbers, installed versions."""
    patterns = ("ibma/**/*.py", "results/**/*", "book/reference/**/*")
    files = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    listing = [(path.relative_to(root).as_posix(), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
    installed = sorted(f"{d.name}=={d.version}" for d in importlib.metadata.distributions())
    return hashlib.sha256(json.dumps([listing, sys.version, installed]).encode()).hexdigest()


def execute(root: Path, page: str, around: str) -> tuple[NotebookNode, bool]:
    """The notebook with fresh outputs, and whether it had to run. The cache is keyed by code, so prose may change freely."""
    nb = nbformat.read(root / f"nbs/{page}.ipynb", as_version=4)
    code = [cell for cell in nb.cells if cell.cell_type == "code"]
    key = hashlib.sha256(json.dumps([around, [cell.source for cell in code]]).encode()).hexdigest()
    cache = root / f".runs/stage_cache/{page}.json"
    if cache.exists() and (stored := json.loads(cache.read_text()))["key"] == key:
        for cell, outputs in zip(code, stored["outputs"], strict=True):
            cell.outputs = nbformat.from_dict(outputs)
        return nb, False
    for cell in code:
        cell.outputs = []
        if not runs(cell):
            cell.metadata["tags"] = [*cell.metadata.get("tags", []), "skip-execution"]
    # the inline backend draws figures only where no other one is asked for; at retina resolution they stay sharp on any screen
    env = {name: value for name, value in os.environ.items() if name != "MPLBACKEND"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(root), env.get("PYTHONPATH")]))
    begun = [0]  # indices of cells that were started: the last one is where a failure happened
    client = NotebookClient(nb, timeout=CELL_TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(root / "nbs")}},
                            extra_arguments=["--InlineBackend.figure_formats=retina", "--IPKernelApp.log_level=40"],
                            on_cell_start=lambda cell, cell_index: begun.append(cell_index))
    try:
        client.execute(env=env)
    except (CellControlSignal, DeadKernelError) as error:  # also time limits and failing cells
        errors = [o for o in nb.cells[begun[-1]].get("outputs", []) if o.output_type == "error"]
        reason = traceback_tail(errors[0]) if errors else str(error).strip()
        raise StageError(f"nbs/{page}.ipynb, cell {begun[-1] + 1} failed ({type(error).__name__}):\n{reason}") from None
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text(json.dumps({"key": key, "outputs": [cell.outputs for cell in code]}))
    return nb, True


def reproduced(root: Path, page: str, profile: str) -> NotebookNode:
    """The notebook as papermill ran it under the profile; refused when missing, or run from other sources than today's."""
    path = root / f".runs/{profile}/notebooks/{Path(page).name}.ipynb"
    shown = path.relative_to(root).as_posix()
    if not path.exists():
        raise StageError(f"nbs/{page}.ipynb has not been run: {shown} is missing. Run `make reproduce` first (profile {profile}).")
    nb = nbformat.read(path, as_version=4)

    def sources(nb: NotebookNode) -> list[str]:
        return [cell.source.strip() for cell in nb.cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    if sources(nb) != sources(nbformat.read(root / f"nbs/{page}.ipynb", as_version=4)):
        raise StageError(f"nbs/{page}.ipynb has changed since {shown} was run from it. Run `make reproduce` again (profile {profile}).")
    return nb


# ---- products --------------------------------------------------------------------------------------------------------------

def stage_page(root: Path, page: str, profile: str, around: str) -> str:
    """Write one page of book/_staged/ and say where its outputs come from."""
    if page.startswith("6_reproduction/"):
        nb, source = reproduced(root, page, profile), f"took {profile} run of"
    else:
        nb, fresh = execute(root, page, around)
        source = "executed" if fresh else "cached"
    text = nbformat.writes(for_book(nb, page)) + "\n"
    if str(root) in text:
        raise StageError(f"nbs/{page}.ipynb: an output or a text names a directory of this machine ({root})")
    path = root / f"book/_staged/{page}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:  # an untouched file spares Sphinx the work
        path.write_text(text)
    return f"{source} {page}"


def stage(root: Path, profile: str) -> None:
    """Write book/_staged/: every notebook of the table of contents, executed and translated; nothing else stays there."""
    pages, staged, problems = toc_notebooks(root), root / "book/_staged", []
    missing = [page for page in pages if not (root / f"nbs/{page}.ipynb").exists()]
    if missing:
        raise StageError("\n".join(f"book/_toc.yml lists _staged/{p}, but there is no nbs/{p}.ipynb" for p in missing))
    around = surroundings(root)
    with ThreadPoolExecutor(WORKERS) as pool:
        for job in as_completed([pool.submit(stage_page, root, page, profile, around) for page in pages]):
            try:
                print(job.result(), flush=True)
            except StageError as error:
                problems.append(str(error))
    for path in sorted(staged.rglob("*"), reverse=True):  # files before the folders that hold them
        if path.is_file() and path.relative_to(staged).with_suffix("").as_posix() not in pages:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()
    if problems:
        raise StageError("\n\n".join(problems))


def readme(root: Path) -> str:
    """Text of README.md: the visible cells of nbs/index.ipynb with the outputs stored there, text only."""
    def link(match: re.Match) -> str:  # as seen from nbs/ -> as seen from the repository's root
        target = posixpath.normpath(posixpath.join("nbs", match[1]))
        return f"]({target})" if (root / target.split("#")[0]).exists() else match[0]

    parts = ["<!-- Generated from nbs/index.ipynb by `python book/stage.py --readme`: edit the notebook, not this file. -->"]
    for cell in translate(nbformat.read(root / "nbs/index.ipynb", as_version=4), "index").cells:
        tags = cell.metadata.get("tags", [])
        if cell.cell_type == "markdown":
            if match := re.search(r"^:::+.*$|\{[\w:]+\}`[^`]*`", cell.source, flags=re.M):
                raise StageError(f"nbs/index.ipynb: '{match[0]}' is markup of the book only; the README needs plain Markdown")
            parts += [LINK.sub(link, cell.source).strip()] if cell.source != NOT_RUN_CAPTION else []
        elif "remove-cell" not in tags:
            parts += [f"```python\n{cell.source}\n```"] if "remove-input" not in tags else []
            parts += filter(None, map(output_text, cell.outputs)) if "remove-output" not in tags else []
    return "\n\n".join(parts) + "\n"


def output_text(output: NotebookNode) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if any(kind.startswith("image/") for kind in data):
        return ""
    text = data.get("text/plain", "").strip("\n")
    return data["text/markdown"].strip() if "text/markdown" in data else f"```text\n{text}\n```" if text.strip() else ""


def check_readme(root: Path) -> None:
    """Fail with a diff where README.md is not what nbs/index.ipynb gives."""
    path = root / "README.md"
    have = path.read_text().splitlines() if path.exists() else []
    diff = list(difflib.unified_diff(have, readme(root).splitlines(), "README.md", "nbs/index.ipynb", lineterm=""))
    if diff:
        raise StageError("\n".join(["README.md is out of step, run `python book/stage.py --readme`", *diff]))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true", help="write README.md and stop")
    parser.add_argument("--check-readme", action="store_true", help="compare README.md with nbs/index.ipynb and stop")
    parser.add_argument("--check-toc", action="store_true", help="compare nbs/ with book/_toc.yml and stop")
    parser.add_argument("--profile", default=os.environ.get("IBMA_PROFILE", "smoke"),
                        help="whose runs the pages of 6_reproduction show (default: $IBMA_PROFILE, else smoke)")
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="the repository (default: this file's)")
    args = parser.parse_args(argv)
    root = args.root.resolve()
    try:
        if args.check_toc:
            check_toc(root)
        if args.readme:
            (root / "README.md").write_text(readme(root))
        if args.check_readme:
            check_readme(root)
        if not (args.check_toc or args.readme or args.check_readme):
            stage(root, args.profile)
    except StageError as error:
        print(f"book/stage.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
