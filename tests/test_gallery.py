"""book/gallery.py: a thumbnail per figure, under its heading, linked to its page, and none that no page has any more."""
import base64
import importlib.util
import io
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

SPEC = importlib.util.spec_from_file_location("gallery", Path(__file__).parents[1] / "book/gallery.py")
gallery = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(gallery)


def picture(color, size=(900, 300)):
    file = io.BytesIO()
    Image.new("RGBA", size, color).save(file, "PNG")
    return new_output("display_data", data={"image/png": base64.b64encode(file.getvalue()).decode()})


def save(root, page, *cells):
    path = root / f"book/{page}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=list(cells)), path)


def test_every_visible_figure_is_shown_and_old_ones_go(tmp_path):
    (tmp_path / "book").mkdir()
    (tmp_path / "book/_toc.yml").write_text("root: intro\nparts:\n  - caption: Bound\n    chapters:\n      - file: notation\n      - file: _staged/1/a\n"
                                            "  - caption: Empty\n    chapters:\n      - file: _staged/2/b\n")
    save(tmp_path, "_staged/1/a", new_markdown_cell("# Page A\n> claim"), new_code_cell("x", outputs=[picture("red")]), new_markdown_cell("text\n\n## Second"),
         new_code_cell("y", outputs=[picture("blue"), new_output("stream", text="no figure")]), new_code_cell("z", outputs=[picture("green")], metadata={"tags": ["remove-cell"]}))
    save(tmp_path, "_staged/2/b", new_markdown_cell("# Page B"))
    assert gallery.write(tmp_path) == 2
    text = (tmp_path / "book/_generated/gallery.md").read_text()
    assert text.count("grid-item-card") == 2 and text.index("Page A\n:::") < text.index("Second\n:::") and ":link: ../_staged/1/a" in text
    assert "## Bound" in text and "Empty" not in text and "2 figures" in text
    pictures = sorted((tmp_path / "book/_generated/gallery").iterdir())
    image = Image.open(pictures[0])
    assert len(pictures) == 2 and image.size == (480, 320) and all(p.name in text for p in pictures)
    assert image.getpixel((1, 1)) == (255, 255, 255), "a wide figure is not stretched"

    save(tmp_path, "_staged/1/a", new_markdown_cell("# Page A"), new_code_cell("x", outputs=[picture("red")]))
    assert gallery.write(tmp_path) == 1 and len(list((tmp_path / "book/_generated/gallery").iterdir())) == 1


def test_every_card_says_which_figure_it_is(tmp_path):
    """The name of the page as in the side bar, a number for figures under one heading, and the text for one before the first heading."""
    (tmp_path / "book").mkdir()
    (tmp_path / "book/_toc.yml").write_text("root: intro\nparts:\n  - caption: Start\n    chapters:\n      - file: _staged/a\n        title: Quick start\n")
    found = new_output("display_data", data={"text/markdown": "**What was found.** One sentence that says what was found in this picture. Another."})
    save(tmp_path, "_staged/a", new_markdown_cell("# ibma\n> claim"), new_code_cell("x", outputs=[picture("red")]), new_code_cell("y", outputs=[found]),
         new_markdown_cell("## The figures"), new_code_cell("z", outputs=[picture("blue"), picture("green")]), new_markdown_cell("## Alone"), new_code_cell("z", outputs=[picture("white")]))
    gallery.write(tmp_path)
    text = (tmp_path / "book/_generated/gallery.md").read_text()
    assert text.count("{grid-item-card} Quick start\n") == 4 and "ibma\n:::" not in text
    assert "\nOne sentence that says what was found in this picture.\n:::" in text
    assert "\nThe figures, 1 of 2\n:::" in text and "\nThe figures, 2 of 2\n:::" in text and "\nAlone\n:::" in text


def test_a_caption_is_short_and_plain():
    assert gallery.sentence("*What to notice.* Six [tones](x.md), `two` runs; all in *boxes*. More.") == "Six tones, two runs; all in boxes."
    assert gallery.sentence("See.") == "" and gallery.sentence("The loss $a$ and $b$ of all these samples.") == ""
    assert gallery.sentence("**What was found, in two sentences.** " + "word " * 50) == "What was found"
    long = gallery.sentence("word, " * 50)
    assert len(long) <= gallery.CAPTION + 2 and long.endswith("word …")
