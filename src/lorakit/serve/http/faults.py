"""What went wrong, as OpenAI's clients read it: an HTTP status and `{"error": {message, type, param, code}}`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from lorakit.errors import LorakitError
from lorakit.serve.request import Failed, Overloaded, Refused, TooLong, UnknownAdapter

TYPES: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    413: "invalid_request_error",
    421: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}
"""Status -> the `type` that goes with it."""


class Fault(LorakitError):  # noqa: N818 - named by what it is
    """An answer that is an error. `param` names the field that is wrong, `code` is for programs."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """The JSON that clients read."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.body(), self.status, self.headers)


def later(seconds: float) -> dict[str, str]:
    """The headers that say when to try again, in whole seconds, at least one. OpenAI's clients wait for two minutes at most,
    and else try at once."""
    wait = max(1, math.ceil(seconds))
    return {"Retry-After": str(wait)} | ({"x-should-retry": "false"} if wait > 120 else {})


def too_long(text: str, param: str) -> Fault:
    """A prompt, or a prompt and its answer, that the model cannot read."""
    return Fault(400, text, "context_length_exceeded", param)


def fault_of(error: BaseException) -> Fault:
    """Any error as an answer. What is not the client's to mend says nothing about the inside of the server."""
    match error:
        case Fault():
            return error
        case UnknownAdapter():
            return Fault(404, error.reason, "model_not_found", "model")
        case TooLong():
            return Fault(400, error.reason, "context_length_exceeded", error.param or "prompt")
        case Refused():
            return Fault(400, error.reason, "refused", error.param or "model")
        case Overloaded():
            return Fault(429, str(error), "overloaded", headers=later(error.retry_after))
        case Failed():
            return Fault(500, str(error), "engine_failed")
        case LorakitError():
            return Fault(400, str(error), "refused", "model")
    return Fault(500, "internal error; the server's log has the details under this request id.", "internal")
