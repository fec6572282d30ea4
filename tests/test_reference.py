"""book/reference: the numbers of the papers as data, compared with the papers' own text where it is at hand, and with each other."""
import csv
import os
import re
from itertools import groupby
from pathlib import Path

import pytest

from ibma.data import DATASETS
from ibma.methods import METHODS

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "book/reference"
PAPERS = Path(os.environ.get("IBMA_PAPERS", ROOT.parent / "shared/papers"))
texts = pytest.mark.skipif(not PAPERS.is_dir(), reason="the papers' texts are not at hand (IBMA_PAPERS names their folder)")

MAIN = [1, 2, 3, 4, 5, 6, 7, 8, 9, 16]
TESTS = [10, 11, 12, 13, 14, 15]
OMIB = [f"omib_table{n}" for n in (3, 4, 5, 6, 7)] + ["omib_figure4"]
LONG = [f"table{n}" for n in MAIN] + ["poster_summary", "poster_ablations", *OMIB]
COLUMNS = ["method", "printed", "dataset", "metric", "setting", "value", "sd", "unit", "mark", "source"]
COLUMNS_TESTS = ["dataset", "printed", "metric", "setting", "baseline", "baseline_value", "baseline_sd", "method", "value", "sd", "p", "runs", "unit", "source"]
# Methods beside those of the package: `mib` is the best of three, variants carry a remark, the poster does not name its baselines
ALSO = {"mib", "best baseline", ""}
UNITS = {"percent", "fraction", "not printed", "minutes", "samples", "classes", "score", "correlation"}
DATASET_WORD = {"cremad": "CREMA-D", "meld": "MELD", "meld-sentiment": "MELD", "iemocap": "IEMOCAP", "mosi": "CMU-MOSI", "10x": "10x", "mimic-cxr": "MIMIC-CXR", "chexpert": "CheXpert"}
METRIC_WORD = {"accuracy": "Accuracy", "acc7": "Acc-7", "acc2": "Acc-2", "f1": "F1", "auc": "AUC", "mauc": "mAUC", "ib_loss": "IB Loss", "minutes_per_epoch": "Minutes/Epoch",
               "classes": "# Classes", "training_size": "Training size", "test_size": "Test size"}
SETTING_WORD = {"image": ("Visual", "Image"), "text": ("Text", "Textual"), "fused": ("Multimodal",), "mean": ("Mean",)}


NUMBER = re.compile(r"-?\d+(\.\d+)?(e-\d+)?( |$)")


def rows_of(name):
    with open(REFERENCE / f"{name}.csv", newline="") as file: return list(csv.DictReader(file))


def base(method): return method.split(" (")[0]


# ---- always ----------------------------------------------------------------------------------------------------------------

def test_every_table_is_there_and_nothing_else():
    expected = {*LONG, *(f"table{n}" for n in TESTS), "claims", "omib_table2", "omib_figure3", "tests", "pages"}   # the last two: see test_tables
    assert {path.stem for path in REFERENCE.glob("*")} == expected


@pytest.mark.parametrize("name", LONG)
def test_long_tables_have_one_number_per_row(name):
    rows = rows_of(name)
    assert list(rows[0]) == COLUMNS
    keys = [(r["method"], r["printed"], r["dataset"], r["metric"], r["setting"], r["value"] if name == "omib_figure4" else "") for r in rows]
    assert len(set(keys)) == len(keys)
    for row in rows:
        assert {*row["method"].split("|")} <= ALSO or base(row["method"]) in METHODS, row
        assert set(row["dataset"].split("|")) <= set(DATASETS), row
        assert float(row["value"]) == float(row["value"]) and row["unit"] in UNITS and row["mark"] in ("", "bold", "underline"), row
        assert row["sd"] == "" or float(row["sd"]) >= 0
        if row["unit"] == "percent": assert 0 <= float(row["value"]) <= 100
        if row["unit"] == "fraction": assert 0 <= float(row["value"]) <= 1
        assert row["source"] and row["metric"]


@pytest.mark.parametrize("n", TESTS)
def test_significance_tables_agree_with_the_main_tables(n):
    source = {10: 2, 11: 3, 12: 4, 13: 7, 14: 6, 15: 5}[n]
    main = {(r["method"], r["dataset"], r["metric"], r["setting"]): r for r in rows_of(f"table{source}")}
    assert list(rows_of(f"table{n}")[0]) == COLUMNS_TESTS
    for row in rows_of(f"table{n}"):
        where = row["dataset"], row["metric"], row["setting"]
        assert (main["ibma", *where]["value"], main["ibma", *where]["sd"]) == (row["value"], row["sd"])
        for method in row["baseline"].split("|"): assert main[method, *where]["value"] == row["baseline_value"]
        assert float(row["baseline_sd"]) > 0 and float(row["sd"]) > 0 and 0 < float(row["p"]) < 1 and row["runs"] == "10"
        others = {m: float(r["value"]) for (m, *rest), r in main.items() if tuple(rest) == where and m != "ibma"}
        best = {m for m, v in others.items() if v == max(others.values())}
        if row["printed"] == "10x-hBC-C":   # the one printed "best baseline" that is not the best: see the page on discrepancies
            assert best == {"mmib"} and max(others.values()) > float(row["baseline_value"])
        elif n != 15: assert best == set(row["baseline"].split("|")), row


def test_numbers_printed_twice_in_the_paper_are_the_same():
    seen = {}
    for n in MAIN:
        for r in rows_of(f"table{n}"):
            key = r["method"], r["dataset"], r["metric"], "" if r["setting"] == "fused" and r["metric"] == "mauc" else r["setting"]
            if n == 8 and r["setting"] != "0.5": continue
            if n == 8: key = (*key[:3], "")
            assert seen.setdefault(key, r["value"]) == r["value"], (n, r)


def test_claims_are_unique_and_carry_their_number():
    rows = rows_of("claims")
    assert len({r["id"] for r in rows}) == len(rows)
    for r in rows:
        assert r["source"] in ("paper", "poster", "omib")
        assert f"{r['value'].split('e')[0]}" in r["quote"], r


# ---- against the texts -----------------------------------------------------------------------------------------------------

def plain(cell):
    """A table's cell without marks, formulas' dress, citations and thousands' commas."""
    cell = re.sub(r"<math>.*?</math>|\\pm|±", " ", cell)
    cell = re.sub(r"<[^>]+>|\([^)]*\)|\$|,", "", cell)
    return re.sub(r"\s*(?:\\times|×)\s*10\s*\^?\{?(-\d+)\}?", r"e\1", cell).strip()


def printed_tables():
    """Number of a table -> (caption, column heads, [(label, numbers)]), from markdown: captions stand above their tables."""
    lines, found = (PAPERS / "ibma_paper.md").read_text().splitlines(), {}
    for at, line in enumerate(lines):
        caption = re.match(r"Table (\d+): (.*)", line)
        if not caption: continue
        first = next(i for i in range(at, len(lines)) if lines[i].startswith("|"))
        block = []
        while lines[first].startswith("|"):
            block.append([cell.strip() for cell in lines[first].strip()[1:-1].split("|")])
            first += 1
        rule = next(i for i, cells in enumerate(block) if set("".join(cells)) <= set("-"))
        heads = block[:rule]
        body = block[rule + 1:]
        if not any(NUMBER.match(plain(cell)) for cell in body[0]):   # a second line of heads
            heads, body = [*heads, body[0]], body[1:]
        filled = []
        for cells in heads:
            last, row = "", []
            for cell in cells:
                last = cell or last
                row.append(last)
            filled.append(row)
        table = []
        for cells in body:
            texts_in = [plain(c) for c in cells]
            label = [t for t in texts_in if t and not NUMBER.match(t)]
            start = texts_in.index(label[-1]) + 1
            table.append((label[-1], [number for t in texts_in[start:] for number in t.split()], len(texts_in) - start))
        width = table[0][2]
        columns = [" ".join(row[k] for row in filled) for k in range(len(filled[0]) - width, len(filled[0]))]
        found[int(caption[1])] = caption[2], columns, [row[:2] for row in table]
    return found


@texts
def test_all_sixteen_tables_were_found(): assert sorted(printed_tables()) == list(range(1, 17))


@texts
@pytest.mark.parametrize("n", MAIN)
def test_main_tables_hold_what_is_printed(n):
    caption, columns, table = printed_tables()[n]
    groups = [(label, list(rows)) for label, rows in groupby(rows_of(f"table{n}"), key=lambda r: r["printed"])]
    assert [(label, [x for r in rows for x in (r["value"], r["sd"]) if x]) for label, rows in groups] == table
    for label, rows in groups:
        assert len(rows) == len(columns)
        for row, column in zip(rows, columns, strict=True):
            if n == 8:
                assert column == row["setting"] or column == f"<b>{row['setting']}</b>"
                continue
            word = METRIC_WORD[row["metric"]]
            assert re.search(rf"\b{word}\b" if word[0].isalpha() else word, column if any(word in c for c in columns) else caption)
            assert any(DATASET_WORD[row["dataset"]] in place for place in (column, caption, label)) or n == 5
            if row["setting"]: assert any(re.search(rf"\b{w}\b", column) for w in SETTING_WORD.get(row["setting"], (row["setting"],))), (row, column)


@texts
def test_table_five_names_its_data_sets():   # one cell for three rows
    text = (PAPERS / "ibma_paper.md").read_text()
    part = text[text.index("Table 5:"):text.index("4.6 COMPARISON")]
    for dataset in ("mimic-cxr", "chexpert"):
        first = next(r for r in rows_of("table5") if r["dataset"] == dataset)
        line = next(x for x in part.splitlines() if x.startswith(f"| {DATASET_WORD[dataset]}"))
        assert first["value"] in line and first["printed"] in line


@texts
@pytest.mark.parametrize("n", TESTS)
def test_significance_tables_hold_what_is_printed(n):
    caption, columns, table = printed_tables()[n]
    rows = rows_of(f"table{n}")
    assert [(r["printed"], [r["baseline_value"], r["baseline_sd"], r["value"], r["sd"], r["p"]]) for r in rows] == table
    for row in rows: assert f"({METRIC_WORD[row['metric']]})" in columns[0] and f"({METRIC_WORD[row['metric']]})" in columns[1]


@texts
def test_marks_are_those_of_the_text():
    text = (PAPERS / "ibma_paper.md").read_text()
    for n in MAIN:
        part = text[text.index(f"Table {n}: "):]
        part = "\n".join(line for line in part[part.index("|"):].split("\n\n")[0].splitlines() if not line.startswith("| <b>Method"))
        names = "|".join(("IBMA", "IBB"))
        for mark, tag in (("bold", "b"), ("underline", "u")):
            found = [x for x in re.findall(rf"<{tag}>([^|]*?)</{tag}>", re.sub(r"<math>.*?</math>", " ", part)) if not re.match(names, x)]
            assert sorted(float(x.split()[0]) for x in found) == sorted(float(r["value"]) for r in rows_of(f"table{n}") if r["mark"] == mark), (n, mark)


@texts
def test_poster_summary_holds_what_is_printed():
    lines = [line.split("\t") for line in (PAPERS / "ibma_poster.md").read_text().splitlines() if line.count("\t") == 4][1:]
    assert len(lines) == 10
    groups = [(label, list(rows)) for label, rows in groupby(rows_of("poster_summary"), key=lambda r: r["printed"])]
    for (label, rows), (task, dataset, _metric, baseline, ours) in zip(groups, lines, strict=True):
        assert label == f"{task}, {dataset}"
        for method, cell in (("best baseline", baseline), ("ibma", ours)):
            assert [x for r in rows if r["method"] == method for x in (r["value"], r["sd"]) if x] == re.findall(r"[\d.]+", cell)


@texts
def test_poster_ablations_hold_what_is_printed():
    text = " ".join((PAPERS / "ibma_poster.md").read_text().split())
    rows = rows_of("poster_ablations")
    for dataset, name in (("mimic-cxr", "MIMIC-CXR"), ("chexpert", "CheXpert")):
        value = {r["method"]: r["value"] for r in rows if r["dataset"] == dataset}
        assert f"- {name}: {value['ibma']} → {value['ibma (no alignment)']}" in text
    for row in rows:
        if row["dataset"] == "cremad": assert re.search(rf"\b{row['printed']} : {re.escape(row['value'])}[,.]", text)
    assert len(rows) == 8


def omib_text(): return " ".join((PAPERS / "omib_paper.txt").read_text(errors="replace").split()).replace("Bi Gated", "BiGated").replace("10x-h ", "10x-h")


@texts
def test_omib_tables_hold_what_is_printed():
    text = omib_text()
    names = [r["printed"] for r in rows_of("omib_table3")]
    assert f"Methods non-MIB-based MIB-based OMIB {' '.join(names[:-1])} Acc {' '.join(r['value'] for r in rows_of('omib_table3'))} tion" in text
    four = groupby(rows_of("omib_table4"), key=lambda r: r["printed"])
    assert "Corr( ) " + " ".join(f"{name} {' '.join(r['value'] for r in rows)}" for name, rows in four) + " 6.2." in text
    five = rows_of("omib_table5")
    parts = []
    for (setting, metric), rows in groupby(five, key=lambda r: (r["setting"], r["metric"])):
        rows = list(rows)
        label = {"mean": "Mean"}.get(setting, f"10x-{setting}") + " " if metric == "auc" else ""
        parts.append(f"{label}{METRIC_WORD[metric]} {' '.join(r['value'] for r in rows)}")
    head = "Concat BiGated MISA deep IB MMIB-Cui MMIB-Zhang DMIB E-MIB L-MIB C-MIB "
    assert [r["printed"] for r in five[:11]] == "Concat,BiGated,MISA,deep IB,MMIB-Cui,MMIB-Zhang,DMIB,E-MIB,L-MIB,C-MIB,OMIB".split(",")
    assert head + " ".join(parts) + " (E-MIB)" in text
    six = rows_of("omib_table6")
    assert f"{' '.join(r['printed'] for r in six)} Acc {' '.join(r['value'] for r in six)} 6.6." in text.replace("w/o cross-attn w/o OMF", "w/o cross-attn w/o OMF")
    seven = []
    for label, rows in groupby(rows_of("omib_table7"), key=lambda r: r["printed"]):
        size, *share = [r["value"] for r in rows]
        number = f"{int(size):,}" if f"{label} {int(size):,}" in text else size
        seven.append(f"{label} {number}" + (f" ({share[0]}%)" if share else ""))
    assert "(Anomaly proportion) " + " ".join(seven) + " Task-relevant prediction head" in text
    sizes = ", ".join(r["value"].replace("e", " 10") for r in rows_of("omib_figure4")[:-1])
    assert f"with sizes: {sizes}, and {rows_of('omib_figure4')[-1]['value'].replace('e', ' 10')}" in text


@texts
def test_omib_table_two_and_figure_three_hold_what_is_printed():
    text = omib_text()
    part = text[text.index("Consistent& relevant 0"):text.index(" 6.1. Datasets")]
    cells = re.findall(r"\d\.\d+(?: / \d\.\d+)?", part)
    rows = rows_of("omib_table2")
    assert list(dict.fromkeys((r["features"] if r["features"] not in ("x1", "x2") else "x", r["dataset"], r["as_printed"]) for r in rows)) == [
        (features, dataset, cell) for (features, dataset), cell in zip(
            [(f, d) for f in ("consistent", "specific", "x", "optimal", "union", "OMIB") for d in ("sim-1", "sim-3")], cells, strict=True)]
    for r in rows: assert r["accuracy"] in r["as_printed"].split(" / ")
    assert "gradually increased from 10 6 to 10" in text


@texts
def test_claims_stand_in_the_texts():
    text = {"paper": " ".join((PAPERS / "ibma_paper.md").read_text().replace("**", "").split()), "poster": " ".join((PAPERS / "ibma_poster.md").read_text().split()), "omib": omib_text()}
    missing = [r["id"] for r in rows_of("claims") if r["quote"] not in text[r["source"]]]
    assert not missing
