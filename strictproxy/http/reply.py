"""An answer of our own to a request that no pod is needed for."""

from __future__ import annotations

from strictproxy.errors import ProxyError
from strictproxy.http.heads import Field
from strictproxy.http.problems import reason_phrase
from strictproxy.http.request import ClientRequest


class Reply:
    """Answers a request without a body, once the request's own has come and been dropped."""

    def __init__(self, request: ClientRequest, status: int) -> None:
        self._request = request
        self._status = status
        request.handler = self
        if request.body_ended:
            self._send()
        else:
            request.open_body()

    def _send(self) -> None:
        request = self._request
        request.send_head(
            self._status,
            reason_phrase(self._status),
            [] if self._status == 204 else [b"Content-Length: 0\r\n"],
            has_body=False,
            framed=True,
            data=b"",
            ended=True,
        )

    def client_data(self, data: bytes) -> None:
        """Drop it."""

    def client_end(self, trailers: list[Field]) -> None:
        """Answer."""
        self._send()

    def client_failed(self, error: ProxyError) -> None:
        """Say what is wrong with the request."""
        self._request.fail(error, None, b"-")

    def client_full(self) -> None:
        """Do nothing: there is nothing to hold back."""

    def client_drained(self) -> None:
        """Do nothing."""

    def client_gone(self) -> None:
        """Do nothing: nobody waits."""
