"""The TLS side of the listening socket: its context, and taking over certificates that were renewed."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger("fastllm.server")


@dataclass(frozen=True)
class TlsFiles:
    """What the --ssl-* flags say."""

    certfile: str
    keyfile: str
    ca_certs: str | None = None
    cert_reqs: int = 0  # 0: certificates of clients are not asked for, 1: checked if sent, 2: needed
    ciphers: str | None = None  # of TLS 1.2; None: OpenSSL's choice

    def context(self) -> ssl.SSLContext:
        """Raises ValueError with a sentence if a file or value cannot be used."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.load(context)
        if self.cert_reqs and not self.ca_certs:
            raise ValueError("--ssl-cert-reqs needs --ssl-ca-certs, the authorities that sign clients' certificates")
        context.verify_mode = ssl.VerifyMode(self.cert_reqs)
        if self.ciphers:
            try:
                context.set_ciphers(self.ciphers)
            except ssl.SSLError:
                raise ValueError(f"--ssl-ciphers {self.ciphers!r} names no cipher that OpenSSL has") from None
        return context

    def load(self, context: ssl.SSLContext) -> None:
        """Certificate, key and authorities into a context. Raises ValueError with a sentence."""
        try:
            # Without a password callback OpenSSL would ask on the terminal.
            context.load_cert_chain(self.certfile, self.keyfile, password=lambda: "")
        except OSError as error:
            raise ValueError(
                f"the TLS certificate {self.certfile} with the key {self.keyfile} cannot be used: "
                f"{error.strerror or error} (keys must be in PEM, without a password)"
            ) from None
        if self.ca_certs:
            try:
                context.load_verify_locations(self.ca_certs)
            except OSError as error:
                raise ValueError(f"--ssl-ca-certs {self.ca_certs} cannot be used: {error.strerror or error}") from None

    def stamp(self) -> tuple[int, ...]:
        """Changes when a file does; follows links, as certificates are often renewed by moving one."""
        paths = [Path(name) for name in (self.certfile, self.keyfile, self.ca_certs) if name]
        return tuple(number for path in paths for number in (path.stat().st_mtime_ns, path.stat().st_ino))


class TlsRefresh:
    """Looks at the files when asked and moves new ones into the live context; open connections keep theirs."""

    def __init__(self, files: TlsFiles, context: ssl.SSLContext) -> None:
        self._files = files
        self._context = context
        self._seen = files.stamp()

    def check(self) -> bool:
        """True if new files were taken over. Files that cannot be used are logged once and left until they change."""
        try:
            stamp = self._files.stamp()
        except OSError:  # in the middle of being replaced
            return False
        if stamp == self._seen:
            return False
        self._seen = stamp
        try:
            self._files.context()  # a certificate without its key would damage the live context
            self._files.load(self._context)
        except ValueError as error:
            logger.warning("kept the old TLS certificate: %s", error)
            return False
        logger.info("took over the new TLS certificate %s", self._files.certfile)
        return True
