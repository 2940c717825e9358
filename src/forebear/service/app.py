"""The application: routes, what requests may hold, and errors as one sentence."""

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, TypeVar

import torch
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, StrictFloat, StrictInt, StrictStr
from starlette.exceptions import HTTPException

from forebear.data import Data
from forebear.errors import DataError, ForebearError, MissingDependencyError
from forebear.service.limits import Bounded
from forebear.service.page import page
from forebear.service.searcher import Question, Searcher, inputs

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much the service takes upon itself.

    Attributes:
        searches: at a time; each uses all threads of torch.
        waiting: requests that are answered or wait for it; further ones get 503.
        body: bytes of a request.
        k: rows of each query and group.
        queries: of one request.
    """

    searches: int = 2
    waiting: int = 64
    body: int = 2**23
    k: int = 1000
    queries: int = 64


class Asked(BaseModel):
    """A question: exactly one of `vector`, `row` and `query`, and what answers are wanted."""

    model_config = ConfigDict(extra="forbid")

    vector: list[StrictFloat | StrictInt] | list[list[StrictFloat | StrictInt]] | None = None
    row: StrictInt | StrictStr | None = None
    query: Any = None
    k: StrictInt = Field(default=10, ge=1)
    where: list[str] = Field(default_factory=list, max_length=32)
    group: str | None = None
    opponents: bool = False

    @property
    def question(self) -> Question:
        """What is wanted of the vectors."""
        return Question(k=self.k, where=self.where, group=self.group, opponents=self.opponents)


class Busy(Exception):
    """More requests wait than the service takes upon itself."""


class Desk:
    """Answers questions in a few threads of its own, so that the server stays free to listen."""

    def __init__(self, searcher: Searcher, limits: Limits) -> None:
        self.searcher = searcher
        self.limits = limits
        self.waiting = 0
        # A search leaves the threads of the thread that asked as they are, but not those that
        # later threads of the program begin with: each says how many it wants.
        self.pool = ThreadPoolExecutor(
            limits.searches,
            thread_name_prefix="search",
            initializer=torch.set_num_threads,
            initargs=(torch.get_num_threads(),),
        )

    async def do(self, work: Callable[[], T]) -> T:
        """The result of some work, done in a thread.

        Raises:
            Busy: too much waits already.
        """
        if self.waiting >= self.limits.waiting:
            raise Busy
        self.waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self.pool, work)
        finally:
            self.waiting -= 1

    def close(self) -> None:
        """Finish what was begun and drop what waits."""
        self.pool.shutdown(cancel_futures=True)

    def answer(self, asked: Asked) -> dict[str, Any]:
        """The answer to a question, ready for JSON."""
        given = [name for name in ("vector", "row", "query") if getattr(asked, name) is not None]
        if len(given) != 1:
            said = " and ".join(given) or "none of them"
            raise DataError(f"give one of vector, row and query; this request has {said}")
        if asked.k > self.limits.k:
            raise DataError(f"k is {asked.k} and this service answers up to {self.limits.k}")
        if asked.row is not None:
            position = self.searcher.position(asked.row)
            found = self.searcher.neighbours(position, asked.question)
            return self.searcher.told(found, [asked.row])
        if asked.query is None:
            vectors, fingerprint = _vectors(asked.vector), ""
            self._require_few(len(vectors))
        else:
            vectors, fingerprint = self._queries(asked.query)
        found = self.searcher.search(vectors, asked.question)
        return self.searcher.told(found, range(len(vectors)), fingerprint)

    def _queries(self, given: Any) -> tuple[torch.Tensor, str]:
        fitted = self.searcher.fitted
        if fitted is None or self.searcher.form is None:
            raise DataError(
                "this service has no model to take queries: start it with the FILE.py that defines "
                "task() and queries(), or ask for a vector or a row"
            )
        data = Data(inputs(given, self.searcher.form))
        self._require_few(len(data))
        try:
            return self.searcher.vectors(data), data.fingerprint
        except ForebearError:
            raise
        except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"the model cannot take this query: {reason}") from error

    def _require_few(self, queries: int) -> None:
        if queries > self.limits.queries:
            raise DataError(
                f"{queries} queries in one request: this service takes {self.limits.queries}"
            )


def _vectors(given: Any) -> torch.Tensor:
    try:
        return torch.atleast_2d(torch.tensor(given, dtype=torch.float32))
    except (ValueError, RuntimeError, OverflowError):
        raise DataError(
            "vector has lists of different lengths: give one number a dimension"
        ) from None


def create(searcher: Searcher, limits: Limits) -> FastAPI:
    """The application of one store."""
    desk = Desk(searcher, limits)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        desk.close()

    # Its own pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="forebear", docs_url=None, redoc_url=None, lifespan=life)
    app.add_middleware(Bounded, limit=limits.body)
    _errors(app)
    _routes(app, desk)
    return app


def _routes(app: FastAPI, desk: Desk) -> None:
    searcher = desk.searcher

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/info")
    async def info() -> dict[str, Any]:
        return searcher.facts()

    @app.post("/search")
    async def search(asked: Asked) -> dict[str, Any]:
        return await desk.do(lambda: desk.answer(asked))

    @app.get("/rows/{name:path}")
    async def row(name: str) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            position = searcher.position(name)
            return {
                **searcher.about(position),
                "position": position,
                "length": searcher.store.norms[position].item(),
            }

        try:
            return await desk.do(look)
        except DataError as error:
            raise HTTPException(404, str(error)) from error

    @app.get("/", response_class=HTMLResponse)
    async def show(
        row: Annotated[str, Query(max_length=1000)] = "",
        where: Annotated[str, Query(max_length=1000)] = "",
        k: int = 10,
        opponents: bool = False,
    ) -> Response:
        asked = {"row": row, "where": where, "k": k, "opponents": opponents}
        found, error = None, ""
        if row.strip():
            conditions = [text for text in where.split(",") if text.strip()]
            question = Asked(row=row.strip(), k=max(1, k), where=conditions, opponents=opponents)
            try:
                found = await desk.do(lambda: (desk.answer(question), _asked(searcher, question)))
            except ForebearError as refused:
                error = str(refused)
        text = page(searcher.facts(), asked, found, error)
        return HTMLResponse(text, 400 if error else 200, headers=HEADERS)


HEADERS = {
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


def _asked(searcher: Searcher, asked: Asked) -> dict[str, Any]:
    assert asked.row is not None
    return searcher.about(searcher.position(asked.row))


def _errors(app: FastAPI) -> None:
    """Whatever is wrong is `{"error": a sentence}`."""

    def answered(status: int, text: str) -> JSONResponse:
        return JSONResponse({"error": " ".join(text.split())}, status)

    @app.exception_handler(ForebearError)
    async def refused(_: Request, error: ForebearError) -> JSONResponse:
        return answered(501 if isinstance(error, MissingDependencyError) else 400, str(error))

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answered(422, f"the request is not JSON: {first['ctx']['error']}")
        place = ".".join(str(part) for part in first["loc"][1:]) or "the request"
        if first["type"] == "extra_forbidden":
            known = ", ".join(Asked.model_fields)
            return answered(422, f"unknown key {place!r}: known: {known}")
        return answered(422, f"{place}: {first['msg']}")

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> JSONResponse:
        text = str(error.detail)
        if text == HTTPStatus(error.status_code).phrase:  # the framework's own, no sentence
            text = (
                f"{request.method} {request.url.path} is not answered here: there are GET /health, "
                "GET /info, POST /search, GET /rows/ID and the page at /"
            )
        return answered(error.status_code, text)

    @app.exception_handler(Busy)
    async def busy(_: Request, error: Busy) -> JSONResponse:
        return answered(503, "too many requests wait already: try again in a moment")

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return answered(500, "the service failed: its log says why")
