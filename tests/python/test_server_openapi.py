"""The OpenAPI document names every route, and no request made from it, or against it, brings a server error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from fastllm.server import protocol
from fastllm.server.openapi import OPERATIONS
from server_fixtures import RunningServer, running_server


@pytest.fixture(scope="module")
def server():
    with running_server({"max_model_len": 512, "max_num_seqs": 16}) as running:
        yield running
        running.check_alive()


@pytest.fixture(scope="module")
def document(server: RunningServer) -> dict[str, Any]:
    reply = server.ask("GET", "/openapi.json")
    assert reply.status == 200 and reply.headers["Content-Type"] == "application/json; charset=utf-8"
    return dict(reply.json)


def test_every_route_is_in_the_document_and_no_other(server: RunningServer, document: dict[str, Any]) -> None:
    from fastllm.server.app import create_app

    routes = set()
    for resource in create_app(server.state, console=False).router.resources():
        for route in resource:
            if route.method != "HEAD":
                routes.add((route.method, resource.canonical))
    assert routes == set(OPERATIONS)
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert listed == routes


def test_schemas_are_those_of_the_structs(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for kind in (protocol.CompletionRequest, protocol.ChatRequest, protocol.TokenizeRequest):
        assert set(schemas[kind.__name__]["properties"]) == set(kind.__struct_fields__)
    text = msgspec.json.encode(document).decode()
    names = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= set(schemas), "every reference leads somewhere"


def attack(server: RunningServer, document: dict[str, Any], examples: int) -> int:
    """Requests that fit the document and requests that do not, `examples` of each kind for each operation."""
    schemathesis = pytest.importorskip("schemathesis")
    hypothesis = pytest.importorskip("hypothesis")
    from schemathesis.checks import not_a_server_error
    from schemathesis.generation import GenerationMode
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=server.url)
    sent = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode is GenerationMode.NEGATIVE and not list(operation.body):
                continue  # nothing to get wrong

            @hypothesis.settings(
                max_examples=examples, deadline=None, database=None, suppress_health_check=list(hypothesis.HealthCheck)
            )
            @hypothesis.seed(20)
            @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
            def send(case: Any) -> None:
                nonlocal sent
                sent += 1
                case.call_and_validate(checks=checks, timeout=20)

            send()
    return sent


def test_no_generated_request_brings_a_server_error(server: RunningServer, document: dict[str, Any]) -> None:
    assert attack(server, document, 6) > 50


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_no_generated_request_brings_a_server_error_in_a_long_run(
    server: RunningServer, document: dict[str, Any]
) -> None:
    """For releases: an hour or so. FASTLLM_FUZZ_EXAMPLES is the number for each operation and kind of data."""
    assert attack(server, document, int(os.environ.get("FASTLLM_FUZZ_EXAMPLES", "2000"))) > 50


@pytest.mark.slow
def test_no_boundary_value_brings_a_server_error(server: RunningServer, tmp_path: Path) -> None:
    """Every bound and every kind of value of every field, valid and not, as schemathesis derives them: some 5,000."""
    pytest.importorskip("schemathesis")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    command = [sys.executable, "-m", "schemathesis.cli", "run", server.url + "/openapi.json", "--phases", "coverage"]
    command += ["--checks", checks, "--mode", "all", "--generation-database", "none", "--no-color"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
