"""How the server is reached: from pages of other origins, over TLS, through a Unix socket."""

from __future__ import annotations

import asyncio
import shutil
import socket
import ssl
import stat
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fastllm.server.app import Server
from fastllm.server.cors import Cors
from fastllm.server.state import ServerState
from fastllm.server.tls import TlsFiles, TlsRefresh
from fastllm.server.unix_socket import remove_dead_socket
from server_fixtures import Reply, ask, load_null
from server_process import server_process

SITE = "https://site.example"


class CorsServer:
    """Requests to a server with these CORS settings, one loop for all of them."""

    def __init__(self, cors: Cors, loopback_only: bool = False) -> None:
        """loopback_only: and without a key."""
        self._cors = cors
        self._settings: dict[str, Any] = {"loopback_only": True} if loopback_only else {"api_keys": ["sesame"]}

    def ask(self, *requests: tuple[str, str, dict[str, str]]) -> list[Reply]:
        async def run() -> list[Reply]:
            state = ServerState(log_requests=False, **self._settings)
            server = Server(state, load_null(), cors=self._cors)
            port = await server.listen("127.0.0.1", 0)
            await server.load()
            try:
                async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
                    return [await ask(session, method, path, headers=headers) for method, path, headers in requests]
            finally:
                await server.stop(5.0)

        return asyncio.run(run())


def preflight(origin: str = SITE, method: str = "POST", headers: str = "") -> tuple[str, str, dict[str, str]]:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    return "OPTIONS", "/v1/chat/completions", asked | ({"Access-Control-Request-Headers": headers} if headers else {})


def get(origin: str = SITE, path: str = "/v1/models", key: str = "sesame") -> tuple[str, str, dict[str, str]]:
    return "GET", path, {"Origin": origin, "Authorization": f"Bearer {key}"}


def test_no_page_of_another_origin_may_call_unless_named() -> None:
    before, after = CorsServer(Cors()).ask(preflight(), get())
    assert before.status in (401, 405) and after.status == 200
    for reply in (before, after):
        assert not [name for name in reply.headers if name.lower().startswith("access-control")]


def test_a_named_origin_may_call_and_learns_of_errors() -> None:
    server = CorsServer(Cors([SITE], ["GET", "POST"], ["Authorization"]))
    asked, answered, unknown, refused, other = server.ask(
        preflight(headers="authorization, content-type"), get(), get(path="/nowhere"), get(key="x"), get("http://evil")
    )
    assert asked.status == 200 and asked.body == b""
    assert asked.headers["Access-Control-Allow-Methods"] == "GET, POST"
    allowed = {name.lower() for name in asked.headers["Access-Control-Allow-Headers"].split(", ")}
    assert {"authorization", "content-type"} <= allowed
    assert asked.headers["Access-Control-Max-Age"] == "600"
    for reply, status in ((asked, 200), (answered, 200), (unknown, 404), (refused, 401)):
        assert reply.status == status
        assert reply.headers["Access-Control-Allow-Origin"] == SITE and reply.headers["Vary"] == "Origin"
        assert "Access-Control-Allow-Credentials" not in reply.headers
        assert "X-Request-Id" in reply.headers["Access-Control-Expose-Headers"]
    assert other.headers.get("Access-Control-Allow-Origin") is None and other.headers["Vary"] == "Origin"


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (preflight(origin="http://evil"), "origin"),
        (preflight(method="DELETE"), "method"),
        (preflight(headers="x-secret"), "headers"),
    ],
)
def test_a_preflight_that_is_not_allowed_is_refused(request_: tuple[str, str, dict[str, str]], what: str) -> None:
    (reply,) = CorsServer(Cors([SITE], ["GET", "POST"], ["Authorization"])).ask(request_)
    assert reply.status == 400 and reply.error["message"] == f"CORS does not allow this {what}."


def test_any_origin_with_and_without_credentials() -> None:
    asked, answered = CorsServer(Cors(["*"])).ask(preflight(headers="X-Any, authorization"), get())
    assert asked.headers["Access-Control-Allow-Headers"] == "X-Any, authorization"
    assert asked.headers["Access-Control-Allow-Origin"] == answered.headers["Access-Control-Allow-Origin"] == "*"
    (answered,) = CorsServer(Cors(["*"], credentials=True)).ask(get())
    # Browsers refuse the asterisk together with credentials.
    assert answered.headers["Access-Control-Allow-Origin"] == SITE
    assert answered.headers["Access-Control-Allow-Credentials"] == "true" and answered.headers["Vary"] == "Origin"


def test_a_named_origin_and_its_name_pass_where_pages_of_other_sites_do_not() -> None:
    host = {"Host": "site.example"}
    for cors, expected in ((Cors(), [403, 403, 403]), (Cors([SITE]), [200, 200, 403]), (Cors(["*"]), [200, 200, 200])):
        server = CorsServer(cors, loopback_only=True)
        headers = ({"Origin": SITE}, host, {"Origin": "http://evil.example"})
        assert [reply.status for reply in server.ask(*(("GET", "/v1/models", one) for one in headers))] == expected


def test_an_origin_that_is_none_is_an_error() -> None:
    with pytest.raises(ValueError, match="'site.example' is not an origin such as https://example.org"):
        Cors(["site.example"])


# ---- TLS


def make_certificate(folder: Path, name: str) -> tuple[str, str]:
    """A self-signed certificate for localhost and its key."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    cert, key = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-out", cert, "-keyout", key],
        check=True,
        capture_output=True,
    )  # fmt: skip
    return str(cert), str(key)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("tls")
    return {name: make_certificate(folder, name) for name in ("first", "second", "client")}


def get_over_tls(port: int, ca: str, client: tuple[str, str] | None = None, **settings: object) -> tuple[str, str]:
    """(the certificate's name, the protocol) after a request that must succeed."""
    context = ssl.create_default_context(cafile=ca)
    for name, value in settings.items():
        setattr(context, name, value)
    if client:
        context.load_cert_chain(*client)
    with (
        socket.create_connection(("127.0.0.1", port), 10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        secure.sendall(b"GET /live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        answer = secure.recv(1024)
        if not answer:
            raise ConnectionError("the server closed the connection")
        assert answer.startswith(b"HTTP/1.1 200 OK")
        names = dict(pair[0] for pair in secure.getpeercert()["subject"])  # type: ignore[index, misc, union-attr]
        return names["commonName"], str(secure.version())  # type: ignore[index]


def test_tls_from_the_command_line(certificates: dict[str, tuple[str, str]]) -> None:
    cert, key = certificates["first"]
    flags = ("--model", "null", "--port", "0", "--ssl-certfile", cert, "--ssl-keyfile", key)
    with server_process("fastllm.server", *flags) as server:
        address = server.wait_ready()
        assert address.startswith("https://127.0.0.1:")
        port = int(address.rpartition(":")[2])
        assert get_over_tls(port, cert) == ("first", "TLSv1.3")
        assert get_over_tls(port, cert, maximum_version=ssl.TLSVersion.TLSv1_2)[1] == "TLSv1.2"
        with pytest.raises((ssl.SSLError, ConnectionError)), pytest.warns(DeprecationWarning):
            old = ssl.TLSVersion.TLSv1_1
            get_over_tls(port, cert, minimum_version=old, maximum_version=old)
        with pytest.raises(ssl.SSLCertVerificationError):
            get_over_tls(port, certificates["second"][0])
        assert server.stop() == 0


class TlsServer:
    def __init__(self, context: ssl.SSLContext) -> None:
        self.context = context

    def __enter__(self) -> TlsServer:
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self._server = Server(ServerState(log_requests=False), load_null())
        self.port = self._run(self._server.listen("127.0.0.1", 0, self.context))
        return self

    def _run(self, work):  # type: ignore[no-untyped-def]
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)

    def __exit__(self, *_: object) -> None:
        self._run(self._server.stop(1.0))
        self._loop.call_soon_threadsafe(self._loop.stop)


def test_clients_may_have_to_show_a_certificate(certificates: dict[str, tuple[str, str]]) -> None:
    cert, key = certificates["first"]
    client = certificates["client"]
    with TlsServer(TlsFiles(cert, key, ca_certs=client[0], cert_reqs=2).context()) as server:
        assert get_over_tls(server.port, cert, client)[0] == "first"
        for wrong in (None, certificates["second"]):
            with pytest.raises((ssl.SSLError, ConnectionError)):
                get_over_tls(server.port, cert, wrong)


def test_renewed_certificates_are_taken_over_whole_or_not_at_all(
    certificates: dict[str, tuple[str, str]], tmp_path: Path
) -> None:
    cert, key = tmp_path / "live.pem", tmp_path / "live.key"

    def put(cert_of: str, key_of: str) -> None:
        for path, source in ((cert, certificates[cert_of][0]), (key, certificates[key_of][1])):
            new = path.with_suffix(".new")
            shutil.copy(source, new)
            new.replace(path)

    put("first", "first")
    files = TlsFiles(str(cert), str(key))
    context = files.context()
    refresh = TlsRefresh(files, context)
    with TlsServer(context) as server:
        assert refresh.check() is False
        put("second", "first")  # a moment in which they do not belong together
        assert refresh.check() is False
        assert get_over_tls(server.port, certificates["first"][0])[0] == "first"
        put("second", "second")
        assert refresh.check() is True and refresh.check() is False
        assert get_over_tls(server.port, certificates["second"][0])[0] == "second"
        cert.unlink()
        assert refresh.check() is False
        assert get_over_tls(server.port, certificates["second"][0])[0] == "second"


def test_tls_files_that_cannot_be_used_are_named(certificates: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    cert, key = certificates["first"]
    other_key = certificates["second"][1]
    locked = tmp_path / "locked.key"
    subprocess.run(["openssl", "ec", "-aes256", "-passout", "pass:secret", "-in", key, "-out", locked], check=True,
                   capture_output=True)  # fmt: skip
    cases = [
        (TlsFiles("/nonexistent.pem", key), "/nonexistent.pem with the key .* cannot be used: No such file"),
        (TlsFiles(cert, other_key), "cannot be used"),
        (TlsFiles(cert, str(locked)), "without a password"),
        (TlsFiles(cert, key, ca_certs="/nonexistent.pem"), "--ssl-ca-certs /nonexistent.pem cannot be used"),
        (TlsFiles(cert, key, cert_reqs=2), "--ssl-cert-reqs needs --ssl-ca-certs"),
        (TlsFiles(cert, key, ciphers="NO-SUCH"), "--ssl-ciphers 'NO-SUCH' names no cipher"),
    ]
    for files, words in cases:
        with pytest.raises(ValueError, match=words):
            files.context()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--ssl-keyfile", "x"], "--ssl-keyfile and --ssl-certfile go together"),
        (["--enable-ssl-refresh"], "the --ssl-* flags need --ssl-certfile"),
        (["--ssl-keyfile", "x", "--ssl-certfile", "y"], "the TLS certificate y with the key x cannot be used"),
        (["--allowed-origins", '["nowhere"]'], "is not an origin"),
    ],
)
def test_wrong_network_flags_end_the_start(flags: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    from fastllm.server.run import main

    with pytest.raises(SystemExit) as exit:
        main(["--model", "null", *flags])
    assert exit.value.code == 2 and words in capsys.readouterr().err


# ---- Unix sockets


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="fastllm") as name:  # pytest's are too long for a socket's address
        yield Path(name)


def test_a_unix_socket_instead_of_a_port(folder: Path) -> None:
    path = folder / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))  # what a killed server leaves
    with server_process("fastllm.server", "--model", "null", "--uds", str(path), "--root-path", "/proxy") as server:
        assert server.wait_ready() == f"unix:{path}"

        async def get() -> list[int]:
            async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session:
                urls = ("http://x/v1/models", "http://x/proxy/v1/models", "http://x/other/v1/models")
                return [(await ask(session, "GET", url)).status for url in urls]

        assert asyncio.run(get()) == [200, 200, 404]
        server.wait_for("unix GET /v1/models 200")
        assert server.stop() == 0
    assert not path.exists()


def test_only_dead_sockets_make_room(folder: Path) -> None:
    path = folder / "s.sock"
    remove_dead_socket(str(path))
    path.write_text("a file")
    with pytest.raises(FileExistsError):
        remove_dead_socket(str(path))
    assert path.read_text() == "a file"
    path.unlink()
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(str(path))
        live.listen()
        with pytest.raises(OSError, match="is in use"):
            remove_dead_socket(str(path))
        assert stat.S_ISSOCK(path.stat().st_mode)
    remove_dead_socket(str(path))
    assert not path.exists()
