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
    assert reference.markdown("a_b *c* `d_e|f` <g>") == r"a\_b \*c\* `d_e|f` \<g\>"
    assert reference.prose("one\n  two\n\nthree") == "one two\n\nthree"


def test_unchanged_pages_are_left_alone(tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    monkeypatch.setattr(reference, "pages", lambda root: {"api_x": "text\n"})
    reference.write(tmp_path)
    path = tmp_path / "book/_generated/api_x.md"
    before = path.stat().st_mtime_ns
    reference.write(tmp_path)
    assert path.stat().st_mtime_ns == before and path.read_text() == "text\n"
