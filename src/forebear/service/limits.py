"""Requests of a bounded size, whatever they say of themselves."""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.responses import JSONResponse

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Bounded:
    """Middleware: a request whose body is longer than `limit` bytes gets 413, unread."""

    def __init__(self, app: Any, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Read the body up to the limit, then hand it on whole."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # Not by the length it says it has: a body that comes in chunks says none.
        pieces, more = [], True
        size = int(dict(scope["headers"]).get(b"content-length", b"0") or 0)
        while more and size <= self.limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            pieces.append(message.get("body", b""))
            size = max(size, sum(map(len, pieces)))
            more = message.get("more_body", False)
        if size > self.limit:
            text = f"the request has more than {self.limit:,} bytes, which is the most taken here"
            await JSONResponse({"error": text}, 413)(scope, receive, send)
            return
        whole: list[Message] = [{"type": "http.request", "body": b"".join(pieces)}]

        async def again() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, again, send)
