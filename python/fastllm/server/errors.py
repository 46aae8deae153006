"""The shape every error leaves the server in: {"error": {"message", "type", "param", "code"}}.

Under /v1/messages it is that API's instead: {"type": "error", "error": {"type", "message"}}.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping

import msgspec
from aiohttp import web

MAX_MESSAGE_CHARS = 500

# HTTP status -> (type, code) where the thrower names neither.
_KINDS: dict[int, tuple[str, str | None]] = {
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", "forbidden"),
    404: ("not_found_error", "not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("invalid_request_error", "request_timeout"),
    413: ("invalid_request_error", "content_too_large"),
    415: ("invalid_request_error", "unsupported_media_type"),
    417: ("invalid_request_error", "expectation_failed"),
    422: ("invalid_request_error", None),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    431: ("invalid_request_error", "headers_too_large"),
    500: ("server_error", "internal_error"),
    503: ("overloaded_error", "unavailable"),
    504: ("overloaded_error", "timeout"),
}

# The same for /v1/messages; what is not here is api_error from 500 on and invalid_request_error below.
_MESSAGES_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}

# fastllm.errors.RequestError.kind -> HTTP status; "invalid" names a field and is handled apart
ENGINE_ERROR_STATUS = {"overloaded": 429, "timeout": 503, "engine": 500}


class ErrorBody(msgspec.Struct):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorEnvelope(msgspec.Struct):
    error: ErrorBody


class MessagesErrorBody(msgspec.Struct):
    type: str
    message: str


class MessagesErrorEnvelope(msgspec.Struct):
    error: MessagesErrorBody
    type: str = "error"


def speaks_messages(path: str) -> bool:
    """This path belongs to the Messages API, whose clients expect its errors."""
    return "/v1/messages" in path


class ApiError(Exception):
    """A refusal with its HTTP status; `retry_after` is in seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        kind, default_code = _KINDS.get(status, _KINDS[500] if status >= 500 else _KINDS[400])
        self.status = status
        self.retry_after = retry_after
        if len(message) > MAX_MESSAGE_CHARS:
            message = message[: MAX_MESSAGE_CHARS - 3] + "..."
        self.body = ErrorBody(message, type or kind, param, code or default_code)

    @property
    def reason(self) -> str:
        """For logs: what was refused, without what the client wrote."""
        field = f" ({self.body.param})" if self.body.param else ""
        # These sentences are made of our own words and numbers.
        sentence = f": {self.body.message}" if self.status in (401, 408, 413, 429, 503, 504) else ""
        return f"{self.body.code or self.body.type}{field}{sentence}"

    def without_frames(self) -> ApiError:
        """The same error, that no longer keeps what the handler held when it failed, such as a large body, alive."""
        self.__traceback__ = self.__context__ = self.__cause__ = None
        return self

    def renamed(self, names: Mapping[str, str]) -> ApiError:
        """The same error for an API that calls the field it is about by another name."""
        old = self.body.param or ""
        if old in names:
            self.body.param = names[old]
            self.body.message = re.sub(rf"\b{re.escape(old)}\b", names[old], self.body.message)
        return self

    def payload(self, path: str = "") -> bytes:
        """The body, in the shape of the API that `path` belongs to."""
        if speaks_messages(path):
            kind = _MESSAGES_TYPES.get(self.status, "api_error" if self.status >= 500 else "invalid_request_error")
            return msgspec.json.encode(MessagesErrorEnvelope(MessagesErrorBody(kind, self.body.message)))
        return msgspec.json.encode(ErrorEnvelope(self.body))

    def response(self, headers: dict[str, str] | None = None, path: str = "") -> web.Response:
        headers = dict(headers or ())
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return web.Response(
            status=self.status,
            body=self.payload(path),
            content_type="application/json",
            charset="utf-8",
            headers=headers,
        )


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


_HTTP_SENTENCES = {
    404: "There is no {method} {path} here. See /v1/models, /v1/completions, /v1/chat/completions.",
    405: "{method} is not allowed on {path}.",
    413: "The request body is larger than this server accepts.",
    417: "The Expect header is not understood.",
}


def api_error(exc: web.HTTPException, request: web.BaseRequest) -> ApiError:
    sentence = _HTTP_SENTENCES.get(exc.status, exc.reason or "The request failed.")
    return ApiError(exc.status, sentence.format(method=request.method[:16], path=request.path[:100]))


def from_http_exception(exc: web.HTTPException, request: web.BaseRequest) -> web.Response:
    allow = exc.headers.get("Allow")
    return api_error(exc, request).response({"Allow": allow} if allow else None, request.path)


def internal_error() -> ApiError:
    return ApiError(500, "The server failed to answer this request; its log has the details under the request id.")


_JSON_NAMES = {
    "int": "an integer",
    "float": "a number",
    "str": "a string",
    "bool": "true or false",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_EXPECTED = re.compile(r"^Expected `(?P<want>[^`]+)`, got `(?P<got>[^`]+)`(?: - at `(?P<path>[^`]+)`)?")
_AT = re.compile(r" - at `(?P<path>[^`]+)`$")


def from_decode_error(exc: Exception) -> ApiError:
    """A sentence that names the field, from what msgspec says."""
    text = str(exc)
    if not isinstance(exc, msgspec.ValidationError):
        if isinstance(exc, RecursionError):
            text = "it is nested too deeply"
        elif isinstance(exc, UnicodeDecodeError):
            text = "it is not valid UTF-8"
        return bad_request(f"The request body is not valid JSON: {text}.", code="invalid_json")
    match = _EXPECTED.match(text)
    if match:
        path = (match["path"] or "$")[1:].lstrip(".")
        want = " or ".join(_JSON_NAMES.get(name, name) for name in match["want"].split(" | "))
        got = _JSON_NAMES.get(match["got"], match["got"])
        message = f"{path or 'The request body'} must be {want}, got {got}."
        return bad_request(message, param=_root(path), code="invalid_type")
    match = _AT.search(text)
    path = match["path"][1:].lstrip(".") if match else ""
    reason = _AT.sub("", text)
    missing = re.search(r"missing required field `([^`]+)`", text)
    if missing:
        name = f"{path}.{missing[1]}" if path else missing[1]
        return bad_request(f"{name} is required.", param=_root(name), code="missing_required_parameter")
    return bad_request(f"{path or 'The request body'}: {reason}.", param=_root(path), code="invalid_value")


def _root(path: str) -> str | None:
    return re.split(r"[.\[]", path, maxsplit=1)[0] or None


def from_value_error(exc: Exception, fields: Container[str]) -> ApiError:
    """Library and engine name the field in their sentences; `fields` are the request's names."""
    message = str(exc)
    words = re.findall(r"\w+", message[:120])
    param = next((word for word in words if word in fields), None)
    return bad_request(message, param=param, code="invalid_value")
