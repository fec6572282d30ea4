"""ibma.tables, and the lists in book/reference that decide which runs answer which claim."""
import csv
import json
import math
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ibma.significance import Comparison
from ibma.tables import (
    LABELS,
    against,
    answers,
    as_printed,
    comparisons,
    cost,
    overlap,
    planned,
    published,
    result_file,
    rivals,
    room,
    runs_of,
    same_order,
    scores,
    show_intervals,
    verdict_on,
)
from ibma.verdicts import VERDICTS

ROOT = Path(__file__).parents[1]
REFERENCE, RESULTS = ROOT / "book/reference", ROOT / "results"
HEAD = "claim,page,results,data,where,arms,a,b,metric,kind,scale,unit,share,why".split(",")


def rows_of(name):
    with open(REFERENCE / f"{name}.csv", newline="") as file: return list(csv.DictReader(file))


def source(page):
    "All cells of a notebook as one text."
    return "\n".join("".join(cell["source"]) for cell in json.loads((ROOT / f"nbs/{page}.ipynb").read_text())["cells"])


# ---- functions -------------------------------------------------------------------------------------------------------------

def made(gain=0.03, kind="open", seed=0, splits=6):
    "Runs of three arms on one set, paired by split."
    rng = np.random.default_rng(seed)
    level = rng.normal(0.7, 0.05, splits)
    return pd.DataFrame([{"dataset": "x", "arm": arm, "split": s, "accuracy": level[s] + add + 0.005 * rng.normal(), "seconds": 2.0 + add, "n_test": 20, "n_train": 80, "data_kind": kind, "status": "finished"}
                         for arm, add in (("ibma", gain), ("omib", 0.0), ("concat", -0.01), ("ce", 0.5), ("ibma, tight", 0.9)) for s in range(splits)])


def write(folder, frame, rows, claims="claim,paper,Section 1,by 3 points,3,percent\n"):
    frame.to_csv(folder / "runs.csv", index=False)
    with open(folder / "tests.csv", "w", newline="") as file:
        out = csv.DictWriter(file, HEAD, restval="", lineterminator="\n")
        out.writeheader()
        out.writerows([{"claim": "claim", "page": "p", "results": "runs", "data": "x", "a": "ibma", "b": "omib", "metric": "accuracy", "kind": "beats", "scale": "100", "unit": "points"} | row for row in rows])
    (folder / "claims.csv").write_text("id,source,place,quote,value,unit\n" + claims)
    return folder


def test_against_is_the_corrected_interval():
    frame = made()
    wide = frame.pivot(index="split", columns="arm", values="accuracy")
    d = 100 * (wide["ibma"] - wide["omib"])
    half = stats.t.ppf(0.995, len(d) - 1) * d.std() * math.sqrt(1 / len(d) + 20 / 80)
    found = against(frame, "x", "ibma", "omib", "accuracy", level=0.99)
    assert (found.difference, found.low, found.high) == pytest.approx((d.mean(), d.mean() - half, d.mean() + half))
    assert against(frame.assign(data_kind="stand-in"), "x", "ibma", "omib", "accuracy", level=0.99).high < found.high - 0.1   # drawn anew: nothing overlaps
    assert against(frame, "x", "ibma", "omib", "accuracy", share=0.0).high == pytest.approx(against(frame.assign(data_kind="simulated"), "x", "ibma", "omib", "accuracy").high)
    assert against(frame, "y", "ibma", "omib", "accuracy") is None and against(frame, "x", "ibma", "omib", "f1") is None


def test_a_hole_leaves_the_pair_out():
    frame = made()
    holed = frame.drop(frame[(frame["arm"] == "omib") & (frame["split"] == 2)].index)
    assert against(holed, "x", "ibma", "omib", "accuracy").pairs == 5


def test_overlap_of_what_is_drawn_is_none():
    assert overlap(made()) == pytest.approx(0.25) and overlap(made(kind="simulated")) == 0 and overlap(made().drop(columns="n_test")) == 0


def test_rivals_are_named_or_all_but_controls_and_own_forms():
    assert rivals(made(), "ibma", "*") == ["omib", "concat"] and rivals(made(), "ibma", "ce|omib") == ["ce", "omib"]


@pytest.mark.parametrize("kind, a, b, word", [("beats", "ibma", "omib", "direction only"), ("beats", "omib", "ibma", "not reproduced"), ("lower", "omib", "ibma", "direction only"), ("beats", "ibma", "*", "direction only")])
def test_who_wins(tmp_path, kind, a, b, word):
    write(tmp_path, made(), [{"kind": kind, "a": a, "b": b}])
    assert verdict_on("claim", tmp_path, tmp_path).word == word


def test_the_published_number_counts_on_the_papers_data_only(tmp_path):
    for kind, word in (("open", "direction only"), ("stand-in", "direction only"), ("paper", "reproduced")):
        write(tmp_path, made(kind=kind), [{}])
        assert verdict_on("claim", tmp_path, tmp_path).word == word
    write(tmp_path, made(kind="paper"), [{}], "claim,paper,Section 1,by 9 points,9,percent\n")
    assert verdict_on("claim", tmp_path, tmp_path).word == "direction only"
    write(tmp_path, made(gain=0.0), [{}], "claim,paper,Section 1,by 9 points,9,percent\n")
    assert "9" not in verdict_on("claim", tmp_path, tmp_path).reason.split("[")[0] and "published" not in verdict_on("claim", tmp_path, tmp_path).reason


def test_several_rivals_hold_together(tmp_path):
    write(tmp_path, made(), [{"b": "*"}])
    row, claimed, margin = planned("claim", tmp_path)[0]
    found = {b: seen for _, b, seen, _ in answers(row, claimed, tmp_path, margin)}
    assert found["omib"].low == pytest.approx(against(made(), "x", "ibma", "omib", "accuracy", level=0.975).low)
    differences = [seen.difference for _, _, seen, _ in answers(row, claimed, tmp_path, margin)]
    assert differences == sorted(differences)


def test_costs_and_margins(tmp_path):
    twice = made().assign(seconds=lambda rows: rows["arm"].map({"ibma": 2.0, "omib": 1.0}).fillna(5.0) * (1 + 0.01 * rows["split"]))
    assert cost(twice, "x", "ibma", "omib", "seconds", 250, False).difference == pytest.approx(50)
    assert cost(twice, "x", "ibma", "omib", "seconds", 5, True).difference == pytest.approx(-95)
    for limit, word in (("110", "direction only"), ("90", "not reproduced")):
        write(tmp_path, twice, [{"kind": "at most % more", "metric": "seconds", "scale": ""}], f"claim,paper,Section 1,{limit},{limit},percent\n")
        assert verdict_on("claim", tmp_path, tmp_path).word == word
    for margin, word in (("6", "direction only"), ("2", "not reproduced")):
        write(tmp_path, made(), [{"kind": "within other"}], f"other,paper,Section 1,{margin},{margin},percent\n")
        assert verdict_on("claim", tmp_path, tmp_path).word == word


@pytest.mark.parametrize("d, low, high", [(0.5, -1, 2), (-0.5, -2, 1), (1.5, 1, 2), (-1.5, -2, -1), (4, 3, 5)])
def test_room_is_the_margin_minus_the_worst(d, low, high):
    found, inside = room(Comparison(difference=d, low=low, high=high, pairs=3), 3), np.linspace(low, high, 1001)
    assert (found.low, found.high) == pytest.approx((3 - abs(inside).max(), 3 - abs(inside).min()), abs=2e-3)
    assert found.low <= found.difference <= found.high


def test_other_columns_of_arms(tmp_path):
    wide = pd.DataFrame({"data": "x", "seed": range(4), "ibma": [2.0, 2.1, 2.2, 2.3], "omib": [1.0, 1.1, 1.2, 1.1], "data_kind": "open", "status": "finished"})
    write(tmp_path, wide, [{"arms": "columns", "metric": "seconds", "scale": "1"}])
    row = planned("claim", tmp_path)[0][0]
    assert against(runs_of(row, tmp_path), "x", "ibma", "omib", "seconds", 1).difference == pytest.approx(1.05)
    numbers = made().assign(arm=lambda rows: rows["arm"].map({"ibma": 0.5, "omib": 0.1, "concat": 0.9}), form="f").rename(columns={"arm": "eta"}).dropna(subset="eta")
    write(tmp_path, pd.concat([numbers, numbers.assign(form="g", accuracy=0.0)]), [{"arms": "eta", "a": "0.5", "b": "0.1|0.9", "where": "form == 'f'"}])
    assert verdict_on("claim", tmp_path, tmp_path).word == "direction only"


def test_what_is_not_there_is_said(tmp_path):
    write(tmp_path, made(), [{"results": "later", "data": "far"}])
    assert verdict_on("claim", tmp_path, tmp_path) is None
    write(tmp_path, made(), [{}, {"results": "later", "data": "far"}])
    assert verdict_on("claim", tmp_path, tmp_path).reason.endswith("No results yet: far.")
    write(tmp_path, made(), [{"results": "", "data": "", "why": "Needs an agreement."}])
    assert verdict_on("claim", tmp_path, tmp_path).word == VERDICTS[0] and verdict_on("claim", tmp_path, tmp_path).reason == "Needs an agreement."
    assert len(comparisons(["claim"], tmp_path, tmp_path)) == 1
    with pytest.raises(KeyError, match="no comparison is planned"):
        verdict_on("another", tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match="there are claims, runs, tests"):
        published("table2", tmp_path)


def test_an_edited_file_is_read_anew(tmp_path):
    write(tmp_path, made(), [{}])
    before = verdict_on("claim", tmp_path, tmp_path)
    write(tmp_path, made(gain=-0.2), [{}])
    assert before.word == "direction only" and verdict_on("claim", tmp_path, tmp_path).word == "not reproduced"


def test_failed_runs_do_not_count(tmp_path):
    frame = made()
    frame.loc[0, "status"] = "failed"
    write(tmp_path, frame, [{}])
    assert len(result_file("runs", tmp_path)) == len(frame) - 1


def test_scores_and_order():
    table = scores(made(), [("x", "accuracy"), ("nowhere", "accuracy")])
    assert list(table.index) == [LABELS[a] for a in LABELS if a in ("ce", "concat", "omib", "ibma", "ibma, tight")] and list(table) == ["x accuracy"]
    values = 100 * made().query("arm == 'omib'")["accuracy"]
    assert table.loc["OMIB", "x accuracy"] == f"{values.mean():.1f} ± {values.std():.1f}"
    frame = pd.concat([made(), made().query("arm == 'omib'").assign(arm="e_mib", accuracy=0.1), made().query("arm == 'omib'").assign(arm="l_mib", accuracy=0.99)])
    printed = pd.Series({"mib": 9.0, "ibma": 5.0, "omib": 3.0, "concat": 1.0})
    assert same_order(printed, frame, "x", "accuracy").tau == pytest.approx(1) and same_order(-printed, frame, "x", "accuracy").tau == pytest.approx(-1)
    assert scores(None, [("x", "accuracy")]).empty


def test_printed_tables_keep_their_digits_and_order():
    for name in ("table2", "table3", "table7"):
        rows, table = rows_of(name), as_printed(name, REFERENCE)
        assert list(table.index) == list(dict.fromkeys(r["printed"] for r in rows))
        for r in rows:
            column = " ".join(x for x in (r["dataset"], r["setting"], r["metric"]) if x)
            assert table.loc[r["printed"], column] == r["value"] + (f" ± {r['sd']}" if r["sd"] else "")


def test_the_picture_has_a_line_per_comparison(tmp_path):
    import matplotlib
    matplotlib.use("Agg")
    write(tmp_path, made(), [{"b": "*"}])
    ax = show_intervals(comparisons(["claim"], tmp_path, tmp_path))
    assert [label.get_text().split()[-1] for label in ax.get_yticklabels()] == ["OMIB", "Concat"]   # the most adverse first


# ---- the lists -------------------------------------------------------------------------------------------------------------

TESTS, PAGES = rows_of("tests"), rows_of("pages")


def test_every_claim_has_its_comparisons_and_every_comparison_its_claim():
    assert list(TESTS[0]) == HEAD
    planned_claims, in_pages = {r["claim"] for r in TESTS}, {t for r in PAGES for t in r["tests"].split("|") if t}
    assert {r["id"] for r in rows_of("claims")} <= planned_claims
    assert in_pages <= planned_claims
    assert planned_claims <= in_pages | {r["id"] for r in rows_of("claims")}


def test_comparisons_are_complete():
    ids = {r["id"] for r in rows_of("claims")}
    for r in TESTS:
        assert (ROOT / f"nbs/6_reproduction/{r['page']}.ipynb").is_file(), r
        if not r["results"]:
            assert r["why"].endswith(".") and not r["a"], r
            continue
        assert r["a"] and r["b"] and r["metric"] and r["unit"] and not r["why"], r
        assert r["kind"] in ("beats", "lower", "at most %", "at most % more") or (r["kind"].startswith("within ") and r["kind"][7:] in ids), r
        assert not r["kind"].startswith("at most") or r["claim"] in ids, r


@pytest.mark.parametrize("row", [pytest.param(r, id=f"{r['claim']}-{r['data']}-{r['metric']}") for r in TESTS if r["results"] and (RESULTS / f"{r['results']}.csv").is_file()])
def test_a_comparison_finds_its_runs(row):
    "A misspelt arm, metric or set would otherwise look like results that are still to come."
    frame = result_file(row["results"], RESULTS)
    data = next(c for c in ("dataset", "data", "case") if c in frame)
    if row["data"] not in set(frame[data]): pytest.skip(f"{row['data']} is not in results/{row['results']}.csv yet")
    found = answers(row, 1.0, RESULTS, 1.0)
    assert found
    if row["b"] != "*": assert {b for _, b, *_ in found} == set(row["b"].split("|"))


def test_every_printed_table_is_on_a_page():
    assert {p.stem for p in REFERENCE.glob("*.csv")} == {r["reference"] for r in PAGES if r["reference"]} | {"tests", "pages"}
    for r in PAGES:
        assert r["tests"] or r["why"], r
        assert (ROOT / f"nbs/{r['page']}.ipynb").is_file(), r
        if r["reference"]: assert re.search(rf"[\"'/]{r['reference']}(\.csv)?[\"'`]", source(r["page"])), f"{r['page']} does not read {r['reference']}"


def test_the_list_has_every_table_and_figure_of_the_paper():
    named = {r["artefact"] for r in PAGES}
    assert {f"Table {n}" for n in range(1, 17)} | {f"Figure {n}" for n in range(1, 4)} <= named and len(named) == len(PAGES)
    toc = (ROOT / "book/_toc.yml").read_text()
    for r in PAGES: assert f"_staged/{r['page']}\n" in toc, r


# ---- the pages: nothing on them is older than the results -------------------------------------------------------------------

READ = ["00_what_this_book_shows", "11_table2", "12_table3", "14_significance", "19_poster", "31_every_table"]   # pages that run nothing


def shown(page, root):
    "What a page shows when it is executed in a folder."
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(ROOT / f"nbs/6_reproduction/{page}.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(root)}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "stream" and o.name == "stderr"]
    return re.sub(r'id="T_[^"]*"|#?T_[0-9a-f]{5}\w*', "", "\n".join(str(o.get("data", {}).get("text/markdown") or o.get("data", {}).get("text/html", "")) for o in outputs))


@pytest.mark.slow
@pytest.mark.parametrize("page", READ)
def test_a_page_changes_with_the_results(page, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])))
    (tmp_path / "book").mkdir()
    shutil.copytree(REFERENCE, tmp_path / "book/reference")
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    (tmp_path / "results").mkdir()
    made_up = pd.concat([made(gain=0.0, seed=k).assign(dataset=data, **{"f1/weighted": 0.5, "f1/macro": 0.5}) for k, data in enumerate(("av-digits", "mosi-features", "wesad", "mfeat"))])
    made_up.to_csv(tmp_path / "results/benchmark.csv", index=False)
    before = shown(page, tmp_path)
    assert shown(page, tmp_path) == before   # the same results give the same page
    made_up.loc[made_up["arm"] == "ibma", "accuracy"] += 0.1
    made_up.to_csv(tmp_path / "results/benchmark.csv", index=False)
    after = shown(page, tmp_path)
    assert after != before and "direction only" in after
