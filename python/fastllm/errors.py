"""The errors a user of the package can meet; every message is a sentence that says what to do."""

from fastllm._core import FastllmError, InvalidArgument, LoadError, ResourceError

__all__ = ["FastllmError", "InvalidArgument", "LoadError", "RequestError", "ResourceError"]

BAD_MODEL = 2  # status of a process whose model cannot be loaded, as for other wrong arguments


class RequestError(RuntimeError):
    """A request that the engine did not finish.

    kind: "invalid" (the request is wrong), "overloaded" (try again later), "timeout" (it waited longer than its
    queue_timeout) or "engine" (a fault of the engine).
    """

    def __init__(self, message: str, kind: str = "engine") -> None:
        super().__init__(message)
        self.kind = kind
