"""A configuration file that may change while we run."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from strictproxy.config.model import Config
from strictproxy.config.schema import decode, parse
from strictproxy.errors import ConfigError


class ConfigFile:
    """
    A file and what it said last.

    What counts is its content: a ConfigMap's mount swaps symbolic links, and
    editors keep time stamps as they please.
    """

    def __init__(self, path: str | Path, environ: Mapping[str, str] | None = None) -> None:
        self.path = Path(path)
        self._environ = os.environ if environ is None else environ
        self._seen: bytes | None = None

    @property
    def digest(self) -> str:
        """A short hash of the content that was read last."""
        return hashlib.sha256(self._seen or b"").hexdigest()[:16]

    def read(self) -> Config:
        """
        Read the file.

        :raise ConfigError: it cannot be read, or has mistakes.
        """
        self._seen = None
        try:
            self._seen = self.path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error
        content = decode(self._seen, str(self.path))
        return parse(content, str(self.path), self._environ)

    def read_if_changed(self) -> Config | None:
        """
        Read the file if its content is not what it was, else return None.

        A mistake is told once, not at each look.

        :raise ConfigError: it has changed, and has mistakes.
        """
        try:
            content = self.path.read_bytes()
        except OSError:
            # Between two symbolic links, perhaps; SIGHUP would tell.
            return None
        return None if content == self._seen else self.read()
