"""Answers over HTTP: a store that programs and people ask."""

from contextlib import suppress
from socket import (
    AF_INET,
    AF_INET6,
    IPPROTO_TCP,
    SO_REUSEADDR,
    SOCK_STREAM,
    SOL_SOCKET,
    socket,
)
from typing import TYPE_CHECKING, Any

from forebear.errors import ForebearError, MissingDependencyError
from forebear.service.conditions import parse
from forebear.service.searcher import Question, Searcher

if TYPE_CHECKING:
    from fastapi import FastAPI

__all__ = ["Question", "Searcher", "create", "listen", "parse", "run"]


def create(searcher: Searcher, **limits: Any) -> "FastAPI":
    """An application that answers questions about a store; any ASGI server runs it.

    Args:
        searcher: the store, with a method and an index where it has them.
        limits: those of `forebear.service.app.Limits` that should be others.

    Raises:
        MissingDependencyError: FastAPI is not installed.
    """
    try:
        from forebear.service import app
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    return app.create(searcher, app.Limits(**limits))


def listen(host: str, port: int) -> socket:
    """A socket that takes requests; port 0 is any that is free.

    Raises:
        ForebearError: the address is not this machine's, or the port is taken.
    """
    # Without its protocol asyncio does not know it for TCP, and every answer waits 40 ms for Nagle.
    made = socket(AF_INET6 if ":" in host else AF_INET, SOCK_STREAM, IPPROTO_TCP)
    try:
        made.setsockopt(SOL_SOCKET, SO_REUSEADDR, 1)
        made.bind((host, port))
        made.listen()
        return made
    except OSError as error:
        made.close()
        raise ForebearError(
            f"cannot listen at {host}, port {port} ({error.strerror}): choose another with --port "
            "or --host"
        ) from error


def run(app: "FastAPI", at: socket) -> None:
    """Serve an application until it is stopped; answers that were begun are finished.

    Raises:
        MissingDependencyError: uvicorn is not installed.
    """
    try:
        import uvicorn
    except ModuleNotFoundError as error:
        raise _missing(error) from error
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=10)
    with suppress(KeyboardInterrupt):  # the usual way to end it
        uvicorn.Server(config).run(sockets=[at])


def _missing(error: ModuleNotFoundError) -> MissingDependencyError:
    return MissingDependencyError(
        f"serving needs {error.name}, which is not installed: pip install 'forebear[serve]'"
    )
