import json
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from forebear import report
from forebear.report.page import embed
from forebear.run import DatasetFacts, MethodResult, Run, top_path
from tests.page_elements import Elements


@pytest.fixture(scope="module")
def page(digits_run: Path) -> str:
    path = report.write(digits_run)
    assert path == digits_run / "report.html"
    return path.read_text(encoding="utf-8")


def payload(page: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert found
    return json.loads(found[1])


def test_all_sections_are_there_and_the_page_is_well_formed(page: str) -> None:
    ids = Elements(page).ids()
    assert {"queries", "lds", "removal", "labels", "methods", "made"} <= ids


def test_nothing_is_loaded_from_elsewhere_and_the_page_is_light(page: str) -> None:
    for tag, attrs in Elements(page).tags:
        assert tag not in ("link", "img", "iframe", "object")
        assert "src" not in attrs
        assert not (attrs.get("href") or "#").startswith(("http", "//"))
    style = re.findall(r"<style>(.*?)</style>", page, re.S)[0]
    assert set(re.findall(r"url\((.{5})", style)) == {"data:"}
    assert "@import" not in style
    assert len(page.encode()) < 2_500_000


def test_the_numbers_are_those_of_the_run(page: str, digits_run: Path) -> None:
    run, text = Run.load(digits_run), Elements(page).text.replace("\u00a0", " ")
    best = run.best_method
    assert best is not None
    assert best.lds is not None
    assert f"rank correlation {best.lds.mean:.2f}" in text
    for method in run.methods:
        assert f"{method.label_error_auc:.3f}" in text


def test_the_first_card_holds_the_strongest_examples_in_order(page: str, digits_run: Path) -> None:
    run = Run.load(digits_run)
    values = load_scores(digits_run, run.best or "")
    elements = Elements(page)
    shown = [a["title"] or "" for t, a in elements.tags if t == "li" and "title" in a]
    query = int(re.findall(r">query (\d+)<", page)[0])
    strongest = [int(i) for i in np.argsort(-values[query], kind="stable")[:6]]
    assert [int(re.findall(r"Example (\d+),", title)[0]) for title in shown[:6]] == strongest
    weakest = [int(i) for i in np.argsort(values[query], kind="stable")[:6]]
    assert [int(re.findall(r"Example (\d+),", title)[0]) for title in shown[6:12]] == weakest


def load_scores(folder: Path, method: str) -> np.ndarray:
    return load_file(folder / "scores" / method / "scores.safetensors")["values"]


def test_the_data_of_the_page_holds_every_method(page: str, digits_run: Path) -> None:
    data = payload(page)
    names = [example["id"] for example in data["examples"]]
    for method in ("graddot", "exact", "random"):
        table = pq.read_table(top_path(digits_run, method)).to_pydict()
        for query in data["queries"]:
            first = table["query"].index(int(names[query["example"]]))
            ranked = query["proponents"][method]
            examples = [int(names[number]) for number, _ in ranked]
            assert examples == table["example"][first : first + 6]
            wanted = table["score"][first : first + 6]
            assert [score for _, score in ranked] == pytest.approx(wanted, rel=1e-4)


def test_labels_and_flips_are_those_of_the_data(page: str, digits_run: Path) -> None:
    arrays = load_file(digits_run / "data.safetensors")
    influence = np.load(digits_run / "self_influence" / "exact.npy")
    order = np.argsort(-influence, kind="stable")
    data = payload(page)
    head = [data["examples"][number] for number in data["suspects"]["exact"]["examples"]]
    assert [int(example["id"]) for example in head] == order[: len(influence) // 10].tolist()
    for example in head:
        row = int(example["id"])
        assert example["label"] == str(arrays["train_given_labels"][row])
        assert example["true"] == str(arrays["train_labels"][row])
        assert example["flipped"] == arrays["flipped"][row]
    for share, found in data["suspects"]["exact"]["curve"]:
        read = round(share * len(influence))
        expected = arrays["flipped"][order[:read]].sum() / arrays["flipped"].sum()
        assert found == pytest.approx(expected, abs=1e-4)


def test_mistakes_come_first(page: str, digits_run: Path) -> None:
    arrays = load_file(digits_run / "data.safetensors")
    queries = [int(q) for q in re.findall(r">query (\d+)<", page)]
    wrong = (arrays["query_labels"] != arrays["query_predictions"])[queries]
    assert len(set(queries)) == len(queries) == 16
    assert wrong[0]
    assert wrong.sum() == page.count('<p class="wrong">') > 0


def text_run(folder: Path, texts: dict[str, str]) -> Path:
    names = list(texts)
    scores = np.linspace(1.0, -1.0, len(names))
    for opponents in (False, True):
        order = np.argsort(scores if opponents else -scores)
        path = top_path(folder, "graddot", opponents=opponents)
        path.parent.mkdir(exist_ok=True)
        table = {
            "query": ["q"] * len(names),
            "rank": list(range(1, len(names) + 1)),
            "example": [names[i] for i in order],
            "score": scores[order].tolist(),
        }
        pq.write_table(pa.table(table), path)
    (folder / "examples.json").write_text(json.dumps({"train": texts, "queries": {"q": "Why?"}}))
    Run(
        kind="attribute",
        title="Texts",
        dataset=DatasetFacts(name="texts", train=len(names), queries=1),
        methods=[MethodResult(name="graddot", label="GradDot")],
    ).save(folder)
    return report.write(folder)


def test_a_run_without_images_or_truth_leaves_sections_out_and_shows_texts(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script> & <b>"
    page = text_run(
        tmp_path, {"a": "First.", "b": hostile, "c": "Third.", "d": "Last."}
    ).read_text()
    elements = Elements(page)
    assert "queries" in elements.ids()
    assert not {"lds", "removal", "labels"} & elements.ids()
    assert hostile in elements.text
    assert hostile in [example["text"] for example in payload(page)["examples"]]
    assert ".thumb{background-image" not in page
    assert "LDS</th>" not in page


def test_proponents_are_above_zero_and_opponents_below(tmp_path: Path) -> None:
    query = payload(text_run(tmp_path, {"a": "1", "b": "2", "c": "3"}).read_text())["queries"][0]
    assert [score for _, score in query["proponents"]["graddot"]] == [1.0]
    assert [score for _, score in query["opponents"]["graddot"]] == [-1.0]


def test_a_run_with_nothing_in_it_still_has_a_page(tmp_path: Path) -> None:
    Run(kind="attribute").save(tmp_path)
    elements = Elements(report.write(tmp_path).read_text())
    assert {"made"} <= elements.ids()
    assert not {"queries", "lds", "removal", "labels", "methods"} & elements.ids()


def test_what_is_not_finite_is_null_and_no_tag_can_close_the_script() -> None:
    text = embed({"a": [float("nan"), float("inf"), 1.5], "b": "</script><!--"})
    assert "<" not in text
    assert json.loads(text) == {"a": [None, None, 1.5], "b": "</script><!--"}


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium")
def test_in_a_browser_charts_are_drawn_and_methods_can_be_chosen_by_keyboard(
    page: str, digits_run: Path
) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    data = payload(page)
    complaints: list[str] = []
    requests: list[str] = []
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        tab = browser.new_page(viewport={"width": 400, "height": 800})
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda request: requests.append(request.url.split(":")[0]))
        tab.goto((digits_run / "report.html").as_uri())
        for chart in ("lds", "removal", "found"):
            assert tab.locator(f"#chart-{chart} svg").count() == 1
        tab.locator("input[name=query-method]:checked").focus()
        tab.keyboard.press("ArrowLeft")
        method = tab.locator("input[name=query-method]:checked").get_attribute("value")
        titles = (
            tab.locator("#cards .card")
            .first.locator(".slot")
            .evaluate_all("slots => slots.filter(s => !s.hidden).map(s => s.title)")
        )
        overflow = tab.evaluate("document.documentElement.scrollWidth - innerWidth")
        browser.close()
    assert complaints == []
    assert set(requests) <= {"file", "data"}
    assert overflow <= 0
    assert method != Run.load(digits_run).best
    first = data["queries"][0]
    ranked = first["proponents"][method] + first["opponents"][method]
    assert [re.findall(r"Example (\d+),", title)[0] for title in titles] == [
        data["examples"][number]["id"] for number, _ in ranked
    ]
