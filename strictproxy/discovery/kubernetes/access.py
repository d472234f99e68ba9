"""
Where the API server is and what to show it: in a pod, by a kubeconfig, or as configured.

Everything is read again whenever it is asked for, as tokens and certificates are
rotated: https://kubernetes.io/docs/tasks/run-application/access-api-from-pod/
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from strictproxy.config.model import KubernetesSource

#: Where every pod finds its service account.
SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")


class NoAccess(Exception):
    """It cannot be found out where the API server is, or what to show it."""


@dataclass(frozen=True, slots=True)
class Access:
    """How to reach an API server. Certificates and keys in PEM."""

    #: URL without a slash at its end
    server: str
    namespace: str
    token: str | None = None
    #: whom to trust; None is the system's store
    ca: bytes | None = None
    client_cert: bytes | None = None
    client_key: bytes | None = None
    #: what the server must prove to be, if not its address
    server_name: str | None = None


def find_access(
    source: KubernetesSource, environ: Mapping[str, str], account: Path = SERVICE_ACCOUNT
) -> Access:
    """
    Find out how to reach the API server.

    :raise NoAccess: something is missing, or cannot be read.
    """
    if source.kubeconfig is not None:
        return _by_kubeconfig(source, Path(source.kubeconfig))
    if source.server is not None:
        token = None if source.token_file is None else _text(Path(source.token_file))
        ca = None if source.ca is None else _bytes(Path(source.ca))
        namespace = source.namespace or "default"
        return Access(source.server.rstrip("/"), namespace, token, ca)
    host, port = environ.get("KUBERNETES_SERVICE_HOST"), environ.get("KUBERNETES_SERVICE_PORT")
    if not host or not port:
        raise NoAccess("not in a pod (no KUBERNETES_SERVICE_HOST), and no kubeconfig or server")
    shown = f"[{host}]" if ":" in host else host
    return Access(
        f"https://{shown}:{port}",
        source.namespace or _text(account / "namespace"),
        _text(account / "token"),
        _bytes(account / "ca.crt"),
    )


def _by_kubeconfig(source: KubernetesSource, path: Path) -> Access:
    document: Any = None
    try:
        document = yaml.safe_load(_bytes(path))
        context = _named(document, "contexts", document["current-context"])["context"]
        cluster = _named(document, "clusters", context["cluster"])["cluster"]
        user = _named(document, "users", context["user"])["user"] or {}
        server = cluster["server"].rstrip("/")
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise NoAccess(f"{path}: {error!r} is missing or wrong") from None
    for key in ("exec", "auth-provider", "username"):
        if key in user:
            raise NoAccess(f"{path}: {key!r} is not supported; use a token or a certificate")
    if cluster.get("insecure-skip-tls-verify"):
        raise NoAccess(f"{path}: 'insecure-skip-tls-verify' is not supported; give the authority")
    token = user.get("token")
    if "tokenFile" in user:
        token = _text(path.parent / user["tokenFile"])
    return Access(
        server,
        source.namespace or context.get("namespace") or "default",
        token,
        _data(cluster, "certificate-authority", path),
        _data(user, "client-certificate", path),
        _data(user, "client-key", path),
        cluster.get("tls-server-name"),
    )


def _named(document: Any, kind: str, name: str) -> Any:
    for each in document[kind]:
        if each["name"] == name:
            return each
    raise KeyError(f"{kind}: {name}")


def _data(part: Mapping[str, Any], key: str, path: Path) -> bytes | None:
    """Return what a key says: in place, or by the name of a file."""
    try:
        if f"{key}-data" in part:
            return base64.b64decode(part[f"{key}-data"], validate=True)
    except (binascii.Error, TypeError) as error:
        raise NoAccess(f"{path}: {key}-data: {error}") from None
    # Relative to where it is written.
    return _bytes(path.parent / part[key]) if key in part else None


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise NoAccess(f"{path}: {error.strerror}") from None


def _text(path: Path) -> str:
    return _bytes(path).decode("utf-8", "replace").strip()
