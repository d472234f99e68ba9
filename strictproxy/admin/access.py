"""
Who may do what on the admin listener.

A token is needed for whatever changes something; and for reading too, where
the listener can be reached from other machines, unless it is said to be open.
"""

from __future__ import annotations

import hmac
import re
from pathlib import Path

from strictproxy.config.model import AdminConfig


class Refused(Exception):
    """
    No.

    :param status: 401 if another token would do, 403 if none would.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Access:
    """The rules of one admin listener. The token's file is read each time, as it may change."""

    def __init__(self, config: AdminConfig) -> None:
        self._config = config
        self._local = is_local(config.endpoint)

    def check(self, authorization: str | None, *, changes: bool) -> None:
        """
        Check a request.

        :param authorization: its header field of that name.
        :raise Refused: it is not allowed.
        """
        config = self._config
        if not changes and (self._local or config.open):
            return
        what = "changing anything" if changes else "reading from other machines"
        if config.token_file is None:
            also = "" if changes else " or admin.open"
            raise Refused(403, f"{what} needs admin.token_file{also} in the configuration")
        try:
            token = Path(config.token_file).read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise Refused(403, f"the token's file cannot be read: {error}") from None
        if not token:
            raise Refused(403, "the token's file is empty")
        given = re.fullmatch(r"[Bb]earer +(\S+)", authorization or "")
        if given is None:
            raise Refused(401, f"{what} needs a bearer token")
        if not hmac.compare_digest(given[1].encode(), token.encode()):
            raise Refused(401, "this is not the token")


def is_local(endpoint: str) -> bool:
    """Whether an endpoint can be reached from its own machine only."""
    if endpoint.startswith("unix:"):
        return True
    found = re.search(r":interface=((?:\\.|[^:\\])+)", endpoint)
    host = "" if found is None else found[1].replace("\\", "")
    return host == "localhost" or host == "::1" or host.startswith("127.")
