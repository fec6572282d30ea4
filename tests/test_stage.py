"""book/stage.py on tiny notebooks: translation of directives, execution and cache, runs of papermill, README, table of contents."""
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

SPEC = importlib.util.spec_from_file_location("stage", Path(__file__).parents[1] / "book/stage.py")
stage = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(stage)


def code(source, *outputs, tags=None):
    return new_code_cell(source, outputs=list(outputs), metadata={"tags": tags} if tags else {})


def text(value, kind="text/plain"):
    return new_output("execute_result", data={kind: value}, execution_count=7)


def notebook(*cells):
    return new_notebook(cells=[new_markdown_cell("# Title\n> Claim."), *cells])


def save(root, page, *cells, under="nbs"):
    path = root / under / f"{page}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook(*cells), path)
    return path


def write_toc(root, *pages):
    (root / "book").mkdir(exist_ok=True)
    chapters = "".join(f"      - file: {page}\n" for page in pages)
    (root / "book/_toc.yml").write_text(f"format: jb-book\nroot: intro\nparts:\n  - caption: A\n    chapters:\n{chapters}")


def staged(root, page):
    return nbformat.read(root / f"book/_staged/{page}.ipynb", as_version=4)


def run(root, *options):
    return stage.main(["--root", str(root), *options])


# ---- translation -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("source, tags, kept", [
    ("#| hide\nx = 1", ["remove-cell"], "x = 1"),
    ("#| default_exp ibb\nx", ["remove-cell"], "x"),
    ("#| echo: false\nx = 1", ["remove-input"], "x = 1"),
    ("#| output: false\nx", ["remove-output"], "x"),
    ("#|code-fold: true\nx", ["hide-input"], "x"),
    ("# | echo:false\n\nx", ["remove-input"], "x"),
    ("#| echo: true\nx", [], "x"),
    ("#| export\ndef f(): ...", ["exported", "module-own"], "def f(): ..."),
    ("#| exporti\n\n#| echo: false\nf = 1", ["exported", "module-own", "remove-input"], "f = 1"),
    ("#| export ibb\nf = 1", ["exported", "module-ibb"], "f = 1"),
    ("#| export\nimport os\nfrom sys import (\n  path)", ["exported", "module-own", "hide-input"], "import os\nfrom sys import (\n  path)"),
    ("#| export\nimport os\nx = 1", ["exported", "module-own"], "import os\nx = 1"),
    ("import os", [], "import os"),
    ("x = 1\n#| hide", [], "x = 1\n#| hide"),  # nbdev, too, reads directives at the top only
])
def test_directives_become_tags(source, tags, kept):
    cell = stage.translate_code(code(source), "here", "own")
    assert cell.metadata.get("tags", []) == tags
    assert cell.source == kept


def test_unknown_directive_is_refused_by_name_and_place():
    with pytest.raises(stage.StageError, match=r"nbs/a/b.ipynb, cell 2.*#\| fig-cap Entropy"):
        stage.translate(notebook(code("#| fig-cap: Entropy\nx")), "a/b")


def test_parameters_stay_visible_and_injected_ones_are_folded():
    cells = stage.translate(notebook(code("n = 1", tags=["parameters"]), code("n = 2", tags=["injected-parameters"])), "p").cells
    assert cells[1].metadata.tags == ["parameters"]
    assert cells[2].metadata.tags == ["injected-parameters", "hide-input"]


@pytest.mark.parametrize("directive", ["#| eval: false", "#| slow", "#| cuda"])
def test_cells_that_do_not_run_keep_code_lose_output_and_say_so(directive):
    cells = stage.translate(notebook(code(f"{directive}\ntrain()", text("stale"))), "p").cells
    assert (cells[1].source, cells[1].outputs) == ("train()", [])
    assert cells[2].source == stage.NOT_RUN_CAPTION


def test_traces_of_the_run_are_removed():
    cell = code("1", text("1"))
    cell.execution_count = 7
    cell.metadata.update(papermill={"duration": 3.2}, execution={"iopub.status.idle": "2020-01-01"}, collapsed=True)
    nb = notebook(cell, code("  \n"))
    nb.metadata.papermill = {"start_time": "2020-01-01"}
    result = stage.translate(nb, "p")
    dumped = nbformat.writes(result)
    assert len(result.cells) == 2  # the empty cell is gone
    assert not re.search(r"papermill|iopub|2020|collapsed|: 7", dumped)
    nbformat.validate(result)


def test_rule_of_show_doc_is_stripped_and_the_input_left_alone():
    output = text("---\n\n### f\n", "text/markdown")
    assert stage.translate(notebook(code("f", output)), "p").cells[1].outputs[0].data["text/markdown"] == "### f\n"
    assert output.data["text/markdown"].startswith("---")


def test_stderr_and_errors_are_refused_with_notebook_and_cell():
    stderr = new_output("stream", name="stderr", text="FutureWarning: old\n")
    with pytest.raises(stage.StageError, match=r"nbs/a/b.ipynb, cell 3: text on stderr(.|\n)*FutureWarning"):
        stage.translate(notebook(code("1"), code("2", stderr)), "a/b")
    error = new_output("error", ename="ValueError", evalue="bad", traceback=["\x1b[31mValueError\x1b[0m: bad"])
    with pytest.raises(stage.StageError, match=r"cell 2: error in the output\nValueError: bad"):
        stage.translate(notebook(code("1", error)), "a/b")


def test_book_pages_relink_prose_and_carry_the_names_of_modules():
    nb = notebook(code("#| default_exp data.core"), code("#| export\nx = 1"), code("#| export ibb\ny = 1"))
    nb.cells[0].source += "\n[notation](../../book/notation.md#units), [next](02_next.ipynb), [site](https://example.org/../book/)"
    page = stage.for_book(nb, "p")
    assert "[notation](../../notation.md#units), [next](02_next.ipynb), [site](https://example.org/../book/)" in page.cells[0].source
    assert page.cells[-1].source == ('<style>.tag_module-data-core { --module: "ibma.data.core"; } '
                                     '.tag_module-ibb { --module: "ibma.ibb"; }</style>')
    figures = stage.for_book(notebook(code("x = 1"), new_markdown_cell("# Page\n\n## What $C$ does to {doc}`b`\n\nText."), code("y = 1")), "p").cells
    assert [c.metadata.get("mystnb") for c in figures if c.cell_type == "code"] == [{"image": {"alt": f"Figure: {heading}"}} for heading in ("Title", "What C does to b")]
    borrowed = stage.for_book(notebook(code("#| export data.core\nx = 1")), "p")  # a page without a module of its own
    assert borrowed.cells[-1].source == '<style>.tag_module-data-core { --module: "ibma.data.core"; }</style>'
    assert stage.for_book(notebook(code("x = 1")), "p").cells[-1].source == "x = 1"


# ---- execution -------------------------------------------------------------------------------------------------------------

@pytest.fixture
def tree(tmp_path):
    """A repository with one page; its notebook leaves a line in nbs/ran.txt each time it runs."""
    (tmp_path / "ibma").mkdir()
    (tmp_path / "ibma/__init__.py").write_text("answer = 41\n")
    write_toc(tmp_path, "notation", "_staged/1_part/01_page")
    save(tmp_path, "1_part/01_page", code("import os\nimport ibma"), code("#| slow\nundefined_name"),
         code("with open('ran.txt', 'a') as file:\n    file.write('x')\n"
              "(ibma.answer, os.path.basename(os.getcwd()), os.environ['OMP_NUM_THREADS'], os.environ.get('MPLBACKEND'))"))
    return tmp_path


def test_execution_cache_and_cleaning(tree, capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")  # it would silence the inline backend, and the figures with it
    orphan = tree / "book/_staged/9_old/01_gone.ipynb"
    orphan.parent.mkdir(parents=True)
    orphan.write_text("{}")

    def count():
        return len((tree / "nbs/ran.txt").read_text())
    assert run(tree) == 0
    assert capsys.readouterr().out == "executed 1_part/01_page\n"
    outputs = [cell.outputs for cell in staged(tree, "1_part/01_page").cells if cell.cell_type == "code"]
    assert outputs[:2] == [[], []]
    assert outputs[2][0].data["text/plain"].startswith("(41, 'nbs', '1', 'module://matplotlib_inline")
    assert not orphan.parent.exists()

    path = tree / "nbs/1_part/01_page.ipynb"  # prose may change without a run ...
    path.write_text(path.read_text().replace("Claim.", "Another claim."))
    assert run(tree) == 0
    assert capsys.readouterr().out == "cached 1_part/01_page\n"
    page = staged(tree, "1_part/01_page")
    assert "Another claim." in page.cells[0].source and page.cells[-1].outputs == outputs[2] and count() == 1

    (tree / "ibma/__init__.py").write_text("answer = 42\n")  # ... the package may not
    assert run(tree) == 0
    assert capsys.readouterr().out == "executed 1_part/01_page\n"
    assert staged(tree, "1_part/01_page").cells[-1].outputs[0].data["text/plain"].startswith("(42,") and count() == 2


def test_surroundings_see_results_and_reference_numbers(tree):
    seen = {stage.surroundings(tree)}
    for path, content in [("results/t/run.json", "1"), ("results/t/run.json", "2"), ("book/reference/t.csv", "1"), ("results/u.csv", "1")]:
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(content)
        seen.add(stage.surroundings(tree))
    assert len(seen) == 5


def test_failing_cell_and_machine_path_stop_the_build(tree, capsys):
    write_toc(tree, "_staged/1_part/01_page", "_staged/1_part/02_fails", "_staged/1_part/03_path")
    save(tree, "1_part/02_fails", code("x = 0"), code("1 / x"))
    save(tree, "1_part/03_path", code(f"print('{tree}')"))
    assert run(tree) == 1
    captured = capsys.readouterr()
    assert "executed 1_part/01_page" in captured.out  # the others are still written, all failures are told
    assert re.search(r"nbs/1_part/02_fails.ipynb, cell 3 failed(.|\n)*1 / x(.|\n)*ZeroDivisionError", captured.err)
    assert "nbs/1_part/03_path.ipynb: an output or a text names a directory of this machine" in captured.err
    assert not (tree / "book/_staged/1_part/02_fails.ipynb").exists()
    assert not (tree / ".runs/stage_cache/1_part/02_fails.json").exists()


def test_missing_notebook_is_named(tree, capsys):
    write_toc(tree, "_staged/1_part/02_nowhere")
    assert run(tree) == 1
    assert "there is no nbs/1_part/02_nowhere.ipynb" in capsys.readouterr().err


# ---- runs of papermill -----------------------------------------------------------------------------------------------------

def test_pages_of_papermill_are_taken_not_run(tmp_path, capsys):
    write_toc(tmp_path, "_staged/6_reproduction/01_table")
    parameters, body = code("seed: int = 0", tags=["parameters"]), "raise SystemExit  # would fail if it ran"
    save(tmp_path, "6_reproduction/01_table", parameters, code(body))
    assert run(tmp_path) == 1
    assert ".runs/smoke/notebooks/01_table.ipynb is missing. Run `make reproduce`" in capsys.readouterr().err

    injected = code("# Parameters\nseed = 3", tags=["injected-parameters"])
    save(tmp_path, "01_table", parameters, injected, code(body, text("0.9")), under=".runs/cpu/notebooks")
    assert run(tmp_path, "--profile", "cpu") == 0
    assert capsys.readouterr().out == "took cpu run of 6_reproduction/01_table\n"
    cells = staged(tmp_path, "6_reproduction/01_table").cells
    assert cells[2].source.endswith("seed = 3") and cells[3].outputs[0].data["text/plain"] == "0.9"

    save(tmp_path, "6_reproduction/01_table", parameters, code(body + "!"))
    assert run(tmp_path, "--profile", "cpu") == 1
    assert "has changed since .runs/cpu/notebooks/01_table.ipynb" in capsys.readouterr().err


# ---- README ----------------------------------------------------------------------------------------------------------------

def test_readme_is_generated_deterministic_and_checked(tmp_path, capsys):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/notation.md").write_text("# Notation")
    path = save(tmp_path, "index", code("#| hide\nsecret()", text("hidden")), code("#| echo: false\n3", text("no input")),
                code("#| output: false\nquiet()", text("no output")), code("#| eval: false\npip_install()"),
                code("draw()", new_output("display_data", data={"image/png": "aGk=", "text/plain": "<Figure>"})),
                code("import ibma\nibma.go()", new_output("stream", name="stdout", text="0.93\n"), text("**bold**", "text/markdown")))
    path.write_text(path.read_text().replace("Claim.", "Claim. [n](../book/notation.md), [x](other.ipynb), [w](https://a.b/c)"))
    assert run(tmp_path, "--readme") == 0
    written = (tmp_path / "README.md").read_text()
    assert written.splitlines()[0] == ("<!-- Generated from nbs/index.ipynb by `python book/stage.py --readme`: "
                                       "edit the notebook, not this file. -->")
    assert "[n](book/notation.md), [x](other.ipynb), [w](https://a.b/c)" in written
    assert "```python\nimport ibma\nibma.go()\n```\n\n```text\n0.93\n```\n\n**bold**\n" in written
    assert "```text\nno input\n```" in written and "```python\npip_install()\n```" in written
    assert not re.search(r"secret|hidden|no output|Figure|#\||run when the book", written)
    assert run(tmp_path, "--readme") == 0 and (tmp_path / "README.md").read_text() == written

    assert run(tmp_path, "--check-readme") == 0
    (tmp_path / "README.md").write_text(written.replace("0.93", "0.99"))
    assert run(tmp_path, "--check-readme") == 1
    error = capsys.readouterr().err
    assert "-0.99" in error and "+0.93" in error


@pytest.mark.parametrize("markup", [":::{note}\nx\n:::", "See {cite:p}`wang2026ibma`."])
def test_readme_refuses_markup_of_the_book(tmp_path, markup, capsys):
    path = save(tmp_path, "index")
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].source += "\n\n" + markup
    nbformat.write(nb, path)
    assert run(tmp_path, "--readme") == 1
    assert "plain Markdown" in capsys.readouterr().err


# ---- table of contents -----------------------------------------------------------------------------------------------------

def test_check_toc_both_ways(tmp_path, capsys):
    write_toc(tmp_path, "notation", "_staged/1_part/01_page", "_staged/1_part/02_gone", "_staged/1_part/01_page")
    for page in ["1_part/01_page", "1_part/03_new", "1_part/_draft", "_proc/01_copy", ".ipynb_checkpoints/01_page-checkpoint"]:
        save(tmp_path, page)
    assert run(tmp_path, "--check-toc") == 1
    assert capsys.readouterr().err.splitlines() == [
        "book/stage.py: nbs/1_part/03_new.ipynb is not in book/_toc.yml",
        "book/_toc.yml lists _staged/1_part/02_gone, but there is no nbs/1_part/02_gone.ipynb",
        "book/_toc.yml lists _staged/1_part/01_page twice",
    ]
    write_toc(tmp_path, "_staged/1_part/01_page", "_staged/1_part/03_new")
    assert run(tmp_path, "--check-toc") == 0


def test_toc_is_read_in_order_through_parts_and_sections(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/_toc.yml").write_text(json.dumps({"format": "jb-book", "root": "intro", "parts": [
        {"caption": "A", "chapters": [{"file": "a", "title": "T", "sections": [{"file": "_staged/b"}]}]},
        {"caption": "B", "chapters": [{"file": "c"}]}]}))  # JSON is YAML
    assert stage.toc_files(tmp_path) == ["intro", "a", "_staged/b", "c"]
    assert stage.toc_notebooks(tmp_path) == ["b"]
