"""The train key: every route but /train/health wants `Authorization: Bearer <train key>`, or the session of
a browser that has shown it (session.py).

vLLM's --api-key middleware guards its own prefixes only (GUARDED_PREFIX in
vllm/entrypoints/serve/middleware/authenticate.py), so these routes check for themselves. The check is part of
the route, after Starlette has matched it: there is no path, Host header or mount that reaches the handler
around it. It runs before the body is read.
"""

from __future__ import annotations

from argparse import Namespace

from starlette.datastructures import Headers
from starlette.requests import Request

from apollo_ipc.errors import ConfigError
from apollo_ipc.keys import keys_equal
from apollo_router.errors import ErrorRoute, HttpError
from apollo_router.session import COOKIE, check_session


def check_key(headers: Headers, train_key: str) -> None:
    """Raises HttpError: 401 where no bearer key was sent, 403 where it is not the train key."""
    scheme, _, given = headers.get("authorization", "").partition(" ")
    given = given.strip()
    if scheme.lower() != "bearer" or not given:
        raise HttpError(
            401,
            "missing_train_key",
            "training needs the train key: send `Authorization: Bearer <key>` (`apollo-ipc key` shows it)",
            headers={"WWW-Authenticate": 'Bearer realm="apollo-ipc"'},
        )
    if not keys_equal(given, train_key):
        raise HttpError(
            403,
            "wrong_train_key",
            "this is not the train key (`apollo-ipc key` shows it); a key for inference never trains",
        )


def refuse_shared_key(train_key: str, args: Namespace, environ_key: str | None) -> None:
    """Raises ConfigError where the train key is also a key for inference (--api-key, VLLM_API_KEY)."""
    api_keys = [*(getattr(args, "api_key", None) or []), environ_key or ""]
    if any(keys_equal(key, train_key) for key in api_keys):
        raise ConfigError(
            "the train key equals vLLM's --api-key: whoever may ask could also train. "
            "Set another one (http.train_key), or none: it is then generated",
            field="http.train_key",
        )


class KeyedRoute(ErrorRoute):
    def check(self, request: Request) -> None:
        train_key = request.app.state.apollo.train_key
        if "authorization" not in request.headers and COOKIE in request.cookies:
            check_session(request, train_key)
        else:
            check_key(request.headers, train_key)
