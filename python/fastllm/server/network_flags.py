"""Flags of how the server is reached: Unix socket, TLS, pages of other origins."""

from __future__ import annotations

import argparse

from fastllm.arg_parser import OnOff, parse_strings

Group = argparse._ArgumentGroup


def add_network_flags(parser: argparse.ArgumentParser) -> None:
    socket = parser.add_argument_group("socket")
    socket.add_argument("--uds", metavar="PATH", help="Unix socket to listen on, instead of host and port")
    _add_tls_flags(parser.add_argument_group("TLS"))
    _add_cors_flags(parser.add_argument_group("CORS", "Which pages of other origins may call the API from a browser."))


def _add_tls_flags(group: Group) -> None:
    group.add_argument("--ssl-keyfile", metavar="FILE", help="key in PEM; needs --ssl-certfile")
    group.add_argument("--ssl-certfile", metavar="FILE", help="certificate in PEM, with its chain; TLS 1.2 or newer")
    group.add_argument("--ssl-ca-certs", metavar="FILE", help="authorities that sign the certificates of clients")
    group.add_argument(
        "--ssl-cert-reqs",
        type=int,
        choices=(0, 1, 2),
        default=0,
        help="certificates of clients: 0 not asked for, 1 checked if sent, 2 needed",
    )
    group.add_argument("--ssl-ciphers", metavar="LIST", help="ciphers of TLS 1.2, as OpenSSL names them")
    group.add_argument(
        "--enable-ssl-refresh", action=OnOff, default=False, help="take over certificate and key when the files change"
    )


def _add_cors_flags(group: Group) -> None:
    group.add_argument(
        "--allowed-origins", type=parse_strings, default=[], metavar="JSON", help="list of origins, or *; none: no CORS"
    )
    group.add_argument("--allowed-methods", type=parse_strings, default=["*"], metavar="JSON", help="list of methods")
    group.add_argument("--allowed-headers", type=parse_strings, default=["*"], metavar="JSON", help="list of headers")
    group.add_argument("--allow-credentials", action=OnOff, default=False, help="cookies and TLS certificates, too")
