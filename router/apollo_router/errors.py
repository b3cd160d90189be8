"""Errors as HTTP: OpenAI's error object, for every exception that can leave one of our routes.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "examples[0].messages",
               "code": "invalid_example"}}

The route class below turns exceptions into answers itself: vLLM installs handlers of its own on the app after
our routes are attached (vllm/entrypoints/launchers/app.py), and those would write another format.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from apollo_ipc.errors import ApolloError
from apollo_router.log import logger
from apollo_router.metrics import count_request

RETRY_AFTER_S = 2  # a worker that systemd restarts is back within this

_TYPES = {401: "authentication_error", 403: "permission_error", 503: "service_unavailable_error"}


class HttpError(ApolloError):
    """An error that only HTTP knows, with its status and headers."""

    def __init__(
        self,
        http_status: int,
        code: str,
        message: str,
        *,
        field: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message, field=field, code=code)
        self.http_status = http_status
        self.headers = headers or {}


def json_response(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """`data`: anything msgspec encodes."""
    return Response(msgspec.json.encode(data), status, headers, media_type="application/json")


def error_body(error: ApolloError) -> dict[str, Any]:
    kind = _TYPES.get(error.http_status)
    if kind is None:
        kind = "invalid_request_error" if error.http_status < 500 else "internal_error"
    return {"message": error.message, "type": kind, "param": error.field, "code": error.code}


def error_response(error: ApolloError, **beside: Any) -> Response:
    """OpenAI's error object, with the fields of `beside` next to it."""
    headers = dict(getattr(error, "headers", {}))
    if error.http_status == 503:
        headers["Retry-After"] = str(RETRY_AFTER_S)
    return json_response({"error": error_body(error), **beside}, error.http_status, headers)


class ErrorRoute(APIRoute):
    """A route whose failures are OpenAI's error object, whatever handlers the app has."""

    def get_route_handler(self) -> Callable[[Request], Awaitable[Response]]:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            response = await self._answer(handler, request)
            count_request(self.path, request.method, response.status_code)
            return response

        return answer

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.methods and scope["method"] not in self.methods:
            same_path = [r for r in scope["app"].routes if getattr(r, "path", None) == self.path]
            methods = {method for route in same_path for method in route.methods or ()}
            allowed = {"Allow": ", ".join(sorted(methods or self.methods))}
            error = HttpError(
                405, "method_not_allowed", f"{self.path} takes {allowed['Allow']}", headers=allowed
            )
            await error_response(error)(scope, receive, send)
        else:
            await super().handle(scope, receive, send)

    async def _answer(self, handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
        try:
            self.check(request)
            return await handler(request)
        except ApolloError as error:
            if error.http_status >= 500 and error.http_status != 503:
                # The worker's traceback, where it sent one, is for the log; it never goes to an HTTP client.
                details = getattr(error, "traceback", None) or ""
                logger.error("%s %s failed: %s\n%s", request.method, self.path, error, details)
            return error_response(error)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; nginx's number, for the metric
        except Exception:
            logger.exception("%s %s failed", request.method, self.path)
            return error_response(HttpError(500, "internal_error", "internal error; see vLLM's log"))

    def check(self, request: Request) -> None:
        """Runs before anything else, the body unread. Raises ApolloError to refuse."""
