"""
TLS towards clients and towards pods.

Certificates come from files and are read again when those change, for new
connections. Pods are verified by service_identity, through Twisted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from cryptography import x509
from OpenSSL import SSL, crypto
from twisted.internet.error import VerifyError
from twisted.internet.interfaces import (
    IOpenSSLClientConnectionCreator,
    IOpenSSLServerConnectionCreator,
)
from twisted.internet.ssl import (
    Certificate,
    CertificateOptions,
    PrivateCertificate,
    TLSVersion,
    optionsForClientTLS,
    trustRootFromCertificates,
)
from twisted.logger import Logger
from twisted.protocols.tls import TLSMemoryBIOProtocol
from zope.interface import implementer

from strictproxy.config.model import CertificateFiles, ListenTls, PodTls
from strictproxy.errors import ConfigError

_log = Logger()

_BLOCK = re.compile(rb"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL)
_VERSIONS = {"1.2": TLSVersion.TLSv1_2, "1.3": TLSVersion.TLSv1_3}


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error


def _certificates(path: str) -> list[Certificate]:
    found = [Certificate.loadPEM(block) for block in _BLOCK.findall(_read(path))]
    if not found:
        raise ConfigError(f"{path}: has no certificate in PEM")
    return found


def _private(files: CertificateFiles) -> tuple[PrivateCertificate, list[Certificate]]:
    """Return a certificate with its key, and the chain that goes with it."""
    first, *chain = _certificates(files.cert)
    try:
        return PrivateCertificate.loadPEM(first.dumpPEM() + _read(files.key)), chain
    except (SSL.Error, crypto.Error, VerifyError) as error:
        raise ConfigError(f"{files.key}: is not the key of {files.cert}: {error}") from error


def _names(certificate: Certificate) -> Iterable[str]:
    """Return the DNS names that a certificate is for."""
    parsed = x509.load_pem_x509_certificate(certificate.dumpPEM())
    try:
        extension = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        return ()
    return [name.lower() for name in extension.value.get_values_for_type(x509.DNSName)]


@implementer(IOpenSSLServerConnectionCreator)
class ServerCertificates:
    """
    What a TLS listener presents, by the name that the client asks for.

    :raise ConfigError: a file is missing or no good.
    """

    def __init__(self, config: ListenTls) -> None:
        self._config = config
        self._seen: tuple[bytes, ...] = ()
        self._default: SSL.Context
        self._by_name: Mapping[str, SSL.Context] = {}
        self.refresh()

    def serverConnectionForTLS(self, tlsProtocol: object) -> SSL.Connection:
        """Return the TLS state of a new connection."""
        return SSL.Connection(self._default, None)

    def refresh(self) -> None:
        """
        Read the files again if they have changed.

        :raise ConfigError: they are no good; those read before stay in use.
        """
        paths = [path for files in self._config.certificates for path in (files.cert, files.key)]
        if self._config.client_ca is not None:
            paths.append(self._config.client_ca)
        content = tuple(_read(path) for path in paths)
        if content == self._seen:
            return
        contexts = []
        by_name: dict[str, SSL.Context] = {}
        for files in self._config.certificates:
            context, names = self._context(files)
            contexts.append(context)
            for name in names:
                by_name.setdefault(name, context)
        for context in contexts:
            context.set_tlsext_servername_callback(self._choose)
        self._default, self._by_name = contexts[0], by_name
        if self._seen:
            _log.info("certificates read again: {names}", names=", ".join(by_name) or "no names")
        self._seen = content

    def _context(self, files: CertificateFiles) -> tuple[SSL.Context, Iterable[str]]:
        certificate, chain = _private(files)
        trust = None
        if self._config.client_ca is not None:
            trust = trustRootFromCertificates(_certificates(self._config.client_ca))
        options = CertificateOptions(
            privateKey=certificate.privateKey.original,
            certificate=certificate.original,
            extraCertChain=[each.original for each in chain],
            raiseMinimumTo=_VERSIONS[self._config.min_version],
            trustRoot=trust,
            acceptableProtocols=[b"http/1.1"],
        )
        context: SSL.Context = options.getContext()
        return context, _names(certificate)

    def _choose(self, connection: SSL.Connection) -> None:
        """Switch to the certificate for the name that the client sent (RFC 6066, 3)."""
        name = (connection.get_servername() or b"").decode("ascii", "replace").lower()
        found = self._by_name.get(name) or self._by_name.get("*." + name.partition(".")[2])
        if found is not None:
            connection.set_context(found)


class PodTlsOptions:
    """
    How connections to pods are made secure.

    :raise ConfigError: a file is missing or no good.
    """

    def __init__(self, config: PodTls) -> None:
        self._name = config.server_name
        self._trust = None
        if config.ca is not None:
            self._trust = trustRootFromCertificates(_certificates(config.ca))
        self._client = None if config.client is None else _private(config.client)[0]

    def for_host(self, host: str) -> IOpenSSLClientConnectionCreator:
        """Return the options for a pod; it must prove to be `server_name`, or `host`."""
        more = {} if self._trust is None else {"trustRoot": self._trust}
        options: IOpenSSLClientConnectionCreator = optionsForClientTLS(
            self._name or host, clientCertificate=self._client, **more
        )
        return options


def is_secure(transport: object) -> bool:
    """Whether a transport carries TLS."""
    return isinstance(transport, TLSMemoryBIOProtocol)
