"""The service, asked over a socket, against scores and products in process."""

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from torch import nn

import forebear as fb
from forebear.store import Column, Manifest, StoreBuilder

FILE = """
import numpy as np, torch
from torch import nn
import forebear as fb

N = 40

def data(size, seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=draw), torch.randint(3, (size,), generator=draw)

def task():
    torch.manual_seed(0)
    return fb.Task(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)),
                   fb.losses.cross_entropy)

def train():
    return data(N, 1)

def queries():
    return data(3, 2)

def examples():
    return {"train": {f"z/{i}": f"<b>drawing</b> {i}" for i in range(N)}}
"""
IDS = [f"z/{i}" for i in range(40)]
SOURCES = np.asarray(["web", "book"])[np.arange(40) % 2]
METHOD = fb.TRAK(dimension=12, damping=0.05)


def made() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(FILE, names)
    return names


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    (folder / "file.py").write_text(FILE)
    names = made()
    store = fb.build_store(
        METHOD, names["task"](), names["train"](), folder / "store", ids=IDS, dtype="float32",
        columns={"label": names["train"]()[1], "source": SOURCES},
    )  # fmt: skip
    fb.fit_store(METHOD, names["task"](), names["train"](), store, ids=IDS)
    return folder


def started(*arguments: object) -> tuple[subprocess.Popen[str], str]:
    command = [sys.executable, "-m", "forebear", "serve", *map(str, arguments), "--port", "0"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout is not None
    line = process.stdout.readline()
    if "http://" not in line:
        process.kill()
        raise AssertionError(line + process.communicate()[1])
    return process, line.split("at ")[1].split(" until")[0]


@pytest.fixture(scope="module")
def client(place: Path) -> Iterator[httpx.Client]:
    """A server as a person starts it; it ends by Ctrl-C, with code 0 and nothing to say."""
    process, address = started(place / "store", place / "file.py")
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in errors


@pytest.fixture(scope="module")
def scores() -> fb.Scores:
    names = made()
    return METHOD.fit(names["task"](), names["train"](), ids=IDS).score(names["queries"]())


def asked(client: httpx.Client, **question: Any) -> dict[str, Any]:
    answer = client.post("/search", json=question)
    assert answer.status_code == 200, answer.text
    return answer.json()


def refused(client: httpx.Client, status: int, **question: Any) -> str:
    answer = client.post("/search", json=question)
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    return answer.json()["error"]


def test_it_says_what_it_is(client: httpx.Client, place: Path) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    about = client.get("/info").json()
    store = fb.Store.open(place / "store")
    assert (about["rows"], about["dimension"], about["method"]) == (40, 12, "trak")
    assert about["model"] == store.manifest.model
    assert about["columns"] == {"label": "int64", "source": "string"}
    assert (about["search"], about["recall"]) == ("exact", None)
    assert about["asks"] == ["vector", "row", "query"]
    assert "/search" in client.get("/openapi.json").json()["paths"]


def test_queries_get_what_the_scores_say(client: httpx.Client, scores: fb.Scores) -> None:
    inputs, labels = made()["queries"]()
    for opponents in (False, True):
        expected = scores.top(6, opponents=opponents)
        answer = asked(client, query=[inputs.tolist(), labels.tolist()], k=6, opponents=opponents)
        ids = [[row["id"] for row in one["rows"]] for one in answer["answers"]]
        assert ids == expected.ids.tolist()
        values = [[row["score"] for row in one["rows"]] for one in answer["answers"]]
        np.testing.assert_allclose(values, expected.values, rtol=1e-3)
    about = answer["provenance"]
    mine = scores.provenance
    assert (about["units"], about["model"], about["train"]) == (mine.units, mine.model, mine.train)
    assert about["queries"] == mine.queries
    assert about["coverage"] == 1.0


def test_vectors_and_rows_get_products(client: httpx.Client, place: Path) -> None:
    rows = fb.Store.open(place / "store").rows(range(40)).double()
    vector = torch.randn(12, generator=torch.Generator().manual_seed(4))
    expected = (rows @ vector.double()).topk(5)
    answer = asked(client, vector=vector.tolist(), k=5)["answers"][0]["rows"]
    assert [row["id"] for row in answer] == [IDS[i] for i in expected.indices]
    np.testing.assert_allclose([row["score"] for row in answer], expected.values, rtol=1e-5)
    products = rows @ rows[9]
    products[9] = -torch.inf
    near = asked(client, row="z/9", k=5)["answers"][0]["rows"]
    assert [row["id"] for row in near] == [IDS[i] for i in products.topk(5).indices]


def test_conditions_and_groups(client: httpx.Client, place: Path) -> None:
    rows = fb.Store.open(place / "store").rows(range(40)).double()
    products = rows @ rows[3]
    products[3] = -torch.inf
    products[torch.from_numpy(SOURCES != "book")] = -torch.inf
    near = asked(client, row="z/3", k=4, where=["source=book"])["answers"][0]["rows"]
    assert [row["id"] for row in near] == [IDS[i] for i in products.topk(4).indices]
    grouped = asked(client, row="z/3", k=1, group="source")["answers"][0]["rows"]
    assert [row["group"] for row in grouped] == ["book", "web"]
    assert grouped[0]["id"] == near[0]["id"]


def test_a_row_by_its_id(client: httpx.Client, place: Path) -> None:
    row = client.get("/rows/z/9").json()
    assert (row["id"], row["position"], row["columns"]["source"]) == ("z/9", 9, "book")
    assert row["length"] == pytest.approx(fb.Store.open(place / "store").norms[9].item())
    missing = client.get("/rows/z/99")
    assert missing.status_code == 404
    assert "id 'z/99' is not in the store" in missing.json()["error"]


@pytest.mark.parametrize(
    ("question", "status", "sentence"),
    [
        ({"row": "z/1", "k": 41}, 400, "k is 41 and the filter leaves 39 rows"),
        ({"vector": [0.0] * 12, "k": 41}, 400, "k is 41 and there are 40 rows"),
        ({"vector": [0.0] * 12, "k": 1001}, 400, "this service answers up to 1000"),
        ({"row": "z/1", "k": 0}, 422, "k: Input should be greater than or equal to 1"),
        ({"row": "nope"}, 400, "id 'nope' is not in the store"),
        ({"row": 3}, 400, "id '3' is not in the store"),
        ({"vector": [1, 2]}, 400, "queries have 2 columns and the rows have 12"),
        ({"vector": [[1.0] * 12, [1.0]]}, 400, "lists of different lengths"),
        ({"vector": [[1.0] * 12] * 65}, 400, "65 queries in one request"),
        ({"vector": []}, 400, "queries"),
        ({"row": "z/1", "where": ["lable=1"]}, 400, "unknown column 'lable': did you mean 'label'"),
        ({"row": "z/1", "where": ["label"]}, 400, "'label' is no condition"),
        ({"row": "z/1", "group": "sorce"}, 400, "unknown column 'sorce'"),
        ({}, 400, "give one of vector, row and query; this request has none of them"),
        ({"row": "z/1", "vector": [1.0]}, 400, "this request has vector and row"),
        ({"rows": "z/1"}, 422, "unknown key 'rows': known: vector, row, query"),
        ({"query": [[[1.0] * 5]]}, 400, "must be a list of 2 columns"),
        ({"query": [[[1.0] * 4], [1]]}, 400, "column 0 of the query has shape (1, 4)"),
        ({"query": [[[1.0] * 5], [1.5]]}, 400, "column 1 of the query must be whole numbers"),
        ({"query": [[[1.0] * 5], [7]]}, 400, "the model cannot take this query"),
        ({"query": [[[1.0] * 5], ["x"]]}, 400, "column 1 of the query is not a list of numbers"),
    ],
)
def test_wrong_questions_are_one_sentence(
    question: dict[str, Any], status: int, sentence: str, client: httpx.Client
) -> None:
    assert sentence in refused(client, status, **question)


def test_requests_that_are_no_questions(client: httpx.Client) -> None:
    answer = client.post(
        "/search", content=b'{"row": ', headers={"content-type": "application/json"}
    )
    assert (answer.status_code, set(answer.json())) == (422, {"error"})
    assert "not JSON" in answer.json()["error"]
    nan = '{"vector": [NaN' + ", 0" * 11 + "]}"
    answer = client.post("/search", content=nan, headers={"content-type": "application/json"})
    assert answer.status_code == 400
    assert "NaN or infinite" in answer.json()["error"]
    answer = client.get("/nothing")
    assert answer.status_code == 404
    assert "GET /nothing is not answered here" in answer.json()["error"]
    assert client.get("/search").status_code == 405


def test_a_request_is_bounded_whatever_it_says_of_itself(client: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(9):
            yield bytes(2**20)

    answer = client.post("/search", content=bytes(9 * 2**20))
    assert (answer.status_code, set(answer.json())) == (413, {"error"})
    try:
        answer = client.post("/search", content=chunks())
    except httpx.TransportError:  # it may hang up while the rest is still being sent
        pass
    else:
        assert answer.status_code == 413
    assert client.get("/health").status_code == 200


def test_many_at_a_time_get_the_same_answers(client: httpx.Client) -> None:
    inputs, labels = made()["queries"]()
    questions = [{"query": [inputs.tolist(), labels.tolist()], "k": 4}]
    questions += [{"row": f"z/{i}", "k": 4} for i in range(5)]
    alone = [asked(client, **question) for question in questions]
    with ThreadPoolExecutor(12) as pool:
        together = list(pool.map(lambda question: asked(client, **question), questions * 4))
    assert together == alone * 4


def test_the_page_needs_no_script_and_no_network(client: httpx.Client) -> None:
    page = client.get("/", params={"row": "z/9", "k": 3, "where": "source=book,label>=0"})
    assert page.status_code == 200
    near = asked(client, row="z/9", k=3, where=["source=book", "label>=0"])["answers"][0]["rows"]
    assert all(f">{row['id']}</a>" in page.text for row in near)
    assert "<script" not in page.text
    assert "http://" not in page.text.replace(str(client.base_url), "")
    assert "https://" not in page.text
    assert "&lt;b&gt;drawing" in page.text
    assert "<b>drawing" not in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]
    empty = client.get("/")
    assert empty.status_code == 200
    assert "<tbody>" not in empty.text
    wrong = client.get("/", params={"row": "<i>no"})
    assert wrong.status_code == 400
    assert "&lt;i&gt;no" in wrong.text


def own_rows(folder: Path) -> fb.Store:
    """A store without a method, whose column holds a number that JSON does not have."""
    manifest = Manifest(rows=3, dimension=2, dtype="float32", columns={"x": Column("float64")})
    with StoreBuilder.create(folder, manifest) as builder:
        columns = {"x": np.asarray([1.5, np.nan, np.inf])}
        builder.write(0, torch.eye(3)[:, :2] + 1, np.arange(3), columns)
        return builder.finish()


def test_rows_without_a_method_are_served_too(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from forebear.service import Searcher, create

    with TestClient(create(Searcher(own_rows(tmp_path)))) as client:
        assert client.get("/info").json()["asks"] == ["vector", "row"]
        answer = client.post("/search", json={"row": 0, "k": 2}).json()["answers"][0]["rows"]
        assert [row["columns"]["x"] for row in answer] == [None, None]
        assert client.get("/rows/0").json()["columns"] == {"x": 1.5}
        sentence = client.post("/search", json={"query": [[1.0]]}).json()["error"]
        assert "this service has no model to take queries" in sentence
        assert client.get("/", params={"row": "0", "k": 2}).status_code == 200


def test_too_many_at_a_time_are_told_to_come_back(tmp_path: Path) -> None:
    from fastapi.testclient import TestClient

    from forebear.service import Searcher, create

    begun, go_on = Event(), Event()

    class Slow(Searcher):
        def neighbours(self, position: int, question: Any) -> Any:
            begun.set()
            assert go_on.wait(60)
            return super().neighbours(position, question)

    app = create(Slow(own_rows(tmp_path)), searches=1, waiting=1)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(client.post, "/search", json={"row": 0, "k": 1})
        assert begun.wait(60)
        second = client.post("/search", json={"row": 0, "k": 1})
        assert (second.status_code, set(second.json())) == (503, {"error"})
        assert client.get("/health").status_code == 200
        go_on.set()
        assert first.result().status_code == 200


def test_serving_does_not_begin_with_what_is_wrong(
    place: Path, tmp_path: Path, client: httpx.Client
) -> None:
    from typer.testing import CliRunner

    from forebear.cli import app

    def sentence(*arguments: object) -> str:
        result = CliRunner().invoke(app, ["serve", *map(str, arguments)])
        assert result.exit_code == 2, result.output
        return result.stderr

    other = tmp_path / "other.py"
    other.write_text(FILE.replace("manual_seed(0)", "manual_seed(7)"))
    assert "model differs" in sentence(place / "store", other)
    assert "is not a store" in sentence(tmp_path)
    taken = client.base_url.port
    assert f"cannot listen at 127.0.0.1, port {taken}" in sentence(place / "store", "--port", taken)
    newer = tmp_path / "newer"
    newer.mkdir()
    manifest = json.loads((place / "store" / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    assert "upgrade forebear" in sentence(newer)


def test_a_server_ends_when_it_is_told_to(place: Path) -> None:
    process, address = started(place / "store")
    assert httpx.get(f"{address}info").json()["asks"] == ["vector", "row"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGTERM)


def test_answers_do_not_wait_for_nagle() -> None:
    """asyncio sets TCP_NODELAY only where a socket says that it is TCP."""
    from forebear.service import listen

    with listen("127.0.0.1", 0) as at:
        assert at.proto == socket.IPPROTO_TCP


def test_models_are_asked_one_at_a_time(place: Path) -> None:
    """Gradients are taken with hooks on the model, which two threads would share."""
    from forebear.methods.stored import load_fitted
    from forebear.service import Searcher

    names = made()
    queries = fb.Data(names["queries"]())
    store = fb.Store.open(place / "store")
    searcher = Searcher(store, fitted=load_fitted(store, names["task"](), queries))
    alone = searcher.vectors(queries)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(searcher.vectors, [queries] * 24))
    assert all(torch.equal(vectors, alone) for vectors in found)
    assert isinstance(searcher.fitted.task.model, nn.Sequential)
