"""The reference in the book: complete, taken from the source, with links that lead somewhere."""
import inspect
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
import api_reference as reference  # noqa: E402

from ibma import runs, training  # noqa: E402
from ibma.objective import IBBLoss  # noqa: E402


@pytest.fixture(scope="module")
def pages():
    return reference.pages(ROOT)


def section(text, name):
    return re.split(r"\n###? ", text.split("\n### " + name.replace("_", "\\_") + "\n", 1)[1])[0]


def test_every_module_is_on_one_page_with_every_public_name(pages):
    for module in reference.modules_of():
        page = pages[reference.part_of(module)]
        names = reference.public_names(module)
        if module == "ibma.cli" or not names:
            continue
        assert sum(f"\n## {module}\n" in text for text in pages.values()) == 1, module
        body = page.split(f"\n## {module}\n", 1)[1].split("\n## ", 1)[0]
        headings = re.findall(r"^### (.*)$", body, flags=re.M)
        assert headings == [name.replace("_", "\\_") for name in names], module


def test_a_module_that_no_page_lists_is_an_error(monkeypatch):
    monkeypatch.setattr(reference, "notebook_of", lambda module, line=None: None)
    with pytest.raises(KeyError, match=r"add it to PARTS"):
        reference.part_of("ibma.something")


def test_signatures_are_those_of_the_package(pages):
    """Every parameter that Python knows stands in the printed signature, and the comments with them."""
    text = section(pages["api_model"], "fit")
    assert all(name in text for name in inspect.signature(training.fit).parameters) and inspect.cleandoc(training.fit.__doc__).split(".")[0] in text
    text = section(pages["api_bound"], "IBBLoss")
    assert all(re.search(rf"\b{name}\b.*=|\b{name}\b:", text) for name in inspect.signature(IBBLoss).parameters)
    assert "# width D of all representations" in text and "def refresh(self) -> None:" in text and "def observe(self, z, fused, targets, mask=None) -> None:" in text and "_prepare" not in text
    text = section(pages["api_model"], "TrainingConfig")
    assert all(f"{name}:" in text for name in inspect.signature(training.TrainingConfig).parameters)
    text = section(pages["api_runs"], "run_grid")
    assert all(name in text for name in inspect.signature(runs.run_grid).parameters)


def test_a_body_never_gets_into_a_signature(pages):
    for page, text in pages.items():
        for code in re.findall(r"```python\n(.*?)```", text, flags=re.S):
            assert "    return " not in code and "raise " not in code.split("#")[0], (page, code)


def test_links_lead_to_pages_of_the_book(pages):
    listed = reference.toc_notebooks(ROOT)
    for text in pages.values():
        found = set(re.findall(r"\{doc\}`\.\./_staged/([^`]+)`", text))
        assert found and found <= listed
    assert "Defined on {doc}`../_staged/1_bound/01_information`" in section(pages["api_bound"], "entropy")


def test_every_command_and_option_is_there(pages):
    import typer

    from ibma import cli
    text = pages["api_runs"]
    for name, command in typer.main.get_command(cli.app).commands.items():
        if hasattr(command, "commands"):
            assert all(f"### ibma {name} {child}\n" in text for child in command.commands)
            continue
        body = text.split(f"### ibma {name}\n", 1)[1].split("\n### ", 1)[0]
        assert f"ibma {name}" in body.split("```sh\n", 1)[1]
        for parameter in command.params:
            if parameter.param_type_name == "option" and parameter.name != "help":
                assert f"`{parameter.opts[0]}`" in body, (name, parameter.opts)


def test_text_is_escaped_and_code_is_not():
    assert reference.markdown("a_b (n, *c) `d_e|f` <g> 2 * 3 * 4") == r"a\_b (n, \*c) `d_e|f` \<g\> 2 \* 3 \* 4"
    assert reference.prose("one\n  two\n\nthree") == "one two\n\nthree"
    assert reference.markdown("its *ideal* value, *not in nats*; `a` -> `b`") == "its *ideal* value, *not in nats*; `a` to `b`"


def test_options_and_settings_in_prose_are_code(pages):
    """Elsewhere Markdown makes a dash of -- and curls the quotes."""
    assert reference.markdown("goes on with --resume (see `--row`), not a - b or 1--2") == "goes on with `--resume` (see `--row`), not a - b or 1--2"
    assert reference.markdown("for --option NAME=VALUE; encoders.image.depth=2.") == "for `--option NAME=VALUE`; `encoders.image.depth=2`."
    assert reference.markdown("with on_fault='raise', eta=\"auto\" or y = 1") == "with `on_fault='raise'`, `eta=\"auto\"` or y = 1"
    assert reference.markdown("such as load(\"sim-1\", n=2000).") == "such as `load(\"sim-1\", n=2000)`."
    for page, text in pages.items():
        prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.S)
        assert not re.search(r"(?<!\w)--[a-z]|[a-z_]=[\"']", prose), page


def test_used_on_means_imported_and_used():
    used = reference.used_in
    assert used(["from ibma.tables import published, cost as price", "published()\nprice"]) == {("ibma.tables", "published"), ("ibma.tables", "cost")}
    assert used(["import ibma.training\nfrom ibma import metrics as m", "ibma.training.fit(m.brier_score)"]) == {("ibma.training", "fit"), ("ibma.metrics", "brier_score")}
    assert used(["from ibma.data import MultimodalData\nMultimodalData"]) == {("ibma.data.core", "MultimodalData")}, "found where it is defined"
    assert used(["frame.assign(x=1)", "'find'  # serve", "published = 1\npublished", "from ibma.tables import cost"]) == set()
    assert used(["#| export\nfrom ibma.tables import cost, room\ncost", "#| hide\ncost()", "#| eval: false\nroom()"]) == {("ibma.tables", "room")}
    assert used(["from ibma.tables import cost\ncost = 1", "cost"]) == set(), "bound again"
    assert used(["from ibma.tables import cost, room\ndef f(cost):\n    room = 1\n    return cost + room", "[cost for cost in range(3)]\nlambda room: room"]) == set()
    assert used(["%matplotlib inline\nfrom ibma.tables import cost", "def f():\n    return cost()", "not Python at all"]) == {("ibma.tables", "cost")}


def test_a_page_is_not_named_for_a_word(pages):
    """`assign` of pandas, `find` of a string and SMALL of another reader made such links."""
    assert "_staged/1_bound" not in section(pages["api_evaluation"], "assign")
    assert all("sed on" not in re.sub(r"Defined on [^;.]*", "", text) for text in re.split(r"\n### ", pages["api_data"]) if text.startswith("SMALL\n"))
    assert "used on {doc}`../_staged/7_guides/" in section(pages["api_model"], "MultimodalClassifier") or "used on {doc}`../_staged/index`" in section(pages["api_model"], "MultimodalClassifier")


def test_classes_show_their_options_and_a_public_base(pages):
    """IBMA's own `__init__` only hands everything on; its pieces are private."""
    text = section(pages["api_methods"], "IBMA")
    assert text.lstrip().startswith("```python\nclass IBMA(Method):") and "eta: float" in text and "*args" not in text.split("```")[1]
    assert "class IBBLoss(Module):" in pages["api_bound"] and "class OMIB(OwnFusion):" in pages["api_methods"]
    assert re.search(r"class MultimodalClassifier\(.*BaseEstimator\):", pages["api_model"])


def test_constants_say_what_is_in_them(pages):
    for page, text in pages.items():
        for code in re.findall(r"```python\n([A-Z_]+\b.*?)\n```", text, flags=re.S):
            assert " = " in code and not code.endswith(("{ ...", "( ...", "[ ...")), (page, code)
    assert '"ibma": IBMA' in section(pages["api_methods"], "METHODS") and '"meld"' in section(pages["api_data"], "DATASETS")
    assert 'float("nan")' in section(pages["api_data"], "UNCERTAIN")


def test_a_name_of_two_modules_is_printed_once(pages):
    assert pages["api_data"].count("class MultimodalData(") == 1
    for target in re.findall(r"\{ref\}`[^<`]*<([^>]*)>`", pages["api_data"]):
        assert f"\n({target})=\n" in pages["api_data"]


def test_parameters_that_a_docstring_goes_through_are_a_list(pages):
    assert reference.prose("a: one; b: two. See c: three.\nd: four", ("a", "b", "c", "d")).count("\n- ") == 0, "too few"
    assert reference.prose("Text.\n\na: one; b: two. More.\nc: three.\n\nd: four", tuple("abcd")) == "Text.\n\n- `a`: one\n- `b`: two. More.\n- `c`: three.\n- `d`: four"
    text = section(pages["api_runs"], "run_grid")
    assert all(f"\n- `{name}`: " in text for name in ("store", "table", "configs", "on_error", "time_limit", "adopt"))


def test_unchanged_pages_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    monkeypatch.setattr(reference, "pages", lambda root: {"api_x": "text\n"})
    reference.write(tmp_path)
    path = tmp_path / "book/_generated/api_x.md"
    before = path.stat().st_mtime_ns
    reference.write(tmp_path)
    assert path.stat().st_mtime_ns == before and path.read_text() == "text\n"
