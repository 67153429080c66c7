"""Bounds of the server, and the errors that it answers with in the form of OpenAI's API."""

from dataclasses import dataclass

MEBIBYTE = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of requests."""

    max_batch: int = 8  # requests that are answered together
    max_queue: int = 64  # requests that wait
    time_limit_seconds: float = 300.0  # of a request, waiting included
    max_images: int = 16
    max_image_bytes: int = 20 * MEBIBYTE
    max_image_px: int = 32_000_000
    max_text_characters: int = 1_000_000
    max_body_bytes: int = 64 * MEBIBYTE


class ApiError(Exception):
    """An error of a request.

    Attributes:
      status: of HTTP.
      param: field of the request.
      code: a word for programs.
    """

    def __init__(
        self, message: str, status: int = 400, param: str | None = None, code: str | None = None
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code

    def body(self) -> dict:
        """Returns the JSON body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}
