"""Write the page "Figures" from the staged pages: a thumbnail of every figure, under the heading where it stands, linked to its page.

    python book/gallery.py               write book/_generated/gallery.md from book/_staged/
"""
import base64
import hashlib
import io
import re
import sys
from collections import Counter
from pathlib import Path

import nbformat
import yaml

WIDTH = 480  # pixels of a thumbnail
CAPTION = 90  # characters of a caption that is taken from the text
HEADING = re.compile(r"^#{1,6} +(.+?)\s*$", flags=re.M)
START = """# Figures

> Every figure of the book, in reading order; each opens the page whose code made it.

{count} figures. They are taken from the executed notebooks when the book is built, so none can be older than its page.
"""


def parts_of(root: Path) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """Parts of the table of contents with those of their pages that are notebooks, and the names that the side bar gives these."""
    toc = yaml.safe_load((root / "book/_toc.yml").read_text())
    return [(part["caption"], [(c["file"], c.get("title")) for c in part["chapters"] if c["file"].startswith("_staged/")]) for part in toc["parts"]]


def sentence(text: str) -> str:
    """A caption from a text: its first sentence without markup; of a long one the bold words before it, or its start; nothing where it is too short or has formulas."""
    lead, text = re.match(r"(?:(\*{1,2})([^*]+)[.:]\1\s+)?(.*)", " ".join(text.split("\n\n")[0].split())).group(2, 3)   # "*What to notice.* Six tones, ..."
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)|\{[\w:]+\}`[^`]*`|[*`]|^>\s*", lambda m: m[1] or "", re.split(r"(?<=[.!?])\s", text)[0])
    if len(text) < 15 or re.search(r"[$|<{]|:::", text):
        return ""
    if len(text) > CAPTION and lead and "notice" not in lead.lower():
        return lead.split(",")[0]
    return text if len(text) <= CAPTION else text[:CAPTION].rsplit(" ", 1)[0].rstrip(",;:") + " …"


def figures_of(notebook: Path) -> tuple[str, list[tuple[str, bytes]]]:
    """Title of a page, and its figures, each with a caption: the heading above it, with a number where several share it; before the first heading what is said next."""
    title, heading, found, waits = "", "", [], False
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type == "markdown":
            headings = HEADING.findall(cell.source)
            if waits and not cell.source.lstrip().startswith("#"):
                found[-1][0], waits = sentence(cell.source) or found[-1][0], False
            if headings:
                title, heading, waits = title or headings[0], headings[-1], False
        elif cell.cell_type == "code" and not {"remove-cell", "remove-output"} & set(cell.metadata.get("tags", [])):
            for data in (o.get("data", {}) for o in cell.outputs):
                if "image/png" in data:
                    found.append([heading, base64.b64decode(data["image/png"])])
                    waits = heading == title
                elif waits and "text/markdown" in data:
                    found[-1][0], waits = sentence(data["text/markdown"]) or found[-1][0], False
    count, number = Counter(heading for heading, _ in found), Counter()
    for figure in found:
        number[figure[0]] += 1
        if count[figure[0]] > 1:
            figure[0] = f"{figure[0]}, {number[figure[0]]} of {count[figure[0]]}"
    return title or notebook.stem, [tuple(figure) for figure in found]


def thumbnail(png: bytes) -> bytes:
    """The picture on white, no wider than WIDTH and no higher than two thirds of it."""
    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGBA")
    image.thumbnail((WIDTH, WIDTH * 2 // 3))
    page = Image.new("RGB", (WIDTH, WIDTH * 2 // 3), "white")
    page.paste(image, ((WIDTH - image.width) // 2, (page.height - image.height) // 2), image)
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


def card(page: str, title: str, heading: str, picture: str) -> str:
    return f":::{{grid-item-card}} {title}\n:img-top: gallery/{picture}\n:link: ../{page}\n:link-type: doc\n{heading}\n:::\n"


def write(root: Path) -> int:
    """Write the page and its pictures, remove pictures that no page has any more, and return the number of figures."""
    folder = root / "book/_generated"
    (folder / "gallery").mkdir(parents=True, exist_ok=True)
    sections, kept = [], set()
    for caption, pages in parts_of(root):
        cards = []
        for page, shown in pages:
            title, figures = figures_of(root / f"book/{page}.ipynb")
            for heading, png in figures:
                name = f"{Path(page).name}-{hashlib.sha256(png).hexdigest()[:8]}.png"
                kept.add(name)
                if not (folder / "gallery" / name).exists():
                    (folder / "gallery" / name).write_bytes(thumbnail(png))
                cards.append(card(page, shown or title, heading, name))
        if cards:
            sections.append(f"## {caption}\n\n::::{{grid}} 1 2 3 3\n:gutter: 2\n\n" + "\n".join(cards) + "::::\n")
    for path in (folder / "gallery").glob("*.png"):
        if path.name not in kept:
            path.unlink()
    text = START.format(count=len(kept)) + "\n" + "\n".join(sections)
    page = folder / "gallery.md"
    if not page.exists() or page.read_text() != text:
        page.write_text(text)
    return len(kept)


if __name__ == "__main__":
    print(f"{write(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]))} figures")
