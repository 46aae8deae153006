"""`fastllm run-batch`: every line gets its answer once, whatever the lines are and however often it is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastllm.async_llm import AsyncLLM
from fastllm.errors import RequestError
from fastllm.server.batch import URLS, main
from fastllm.server.batch_file import BatchError, BatchOutput, BatchResult, check_input, read_lines
from fastllm.server.limits import Limits

FLAGS = ("--max-model-len", "4k", "--num-gpu-blocks-override", "1024")


def line(id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    if url.endswith("/completions") and "chat" not in url:
        body = {"prompt": "Hello", **body}
    elif url == "/v1/responses":
        body = {"input": "Hello", **body}
    else:
        body = {"messages": [{"role": "user", "content": "Hello"}], **body}
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": {"model": "null", **body}})


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(text + "\n" for text in lines))
    return path


def results(path: Path) -> dict[str | None, Any]:
    """The answers by custom_id; a line that is there twice fails."""
    found = [json.loads(text) for text in path.read_bytes().splitlines()]
    by_id = {result["custom_id"]: result for result in found}
    assert len(by_id) == len(found)
    return by_id


def run(source: Path, output: Path, *more: str) -> int:
    return main(["null", "-i", str(source), "-o", str(output), *FLAGS, *more])


def test_every_kind_of_line_gets_its_answer_or_its_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(
        tmp_path / "in.jsonl",
        [
            line("chat", max_tokens=3, n=2),
            line("text", "/v1/completions", max_tokens=3, prompt=["a", "b"]),
            line("response", "/v1/responses", max_output_tokens=3),
            line("message", "/v1/messages", max_tokens=3),
            "",
            line("bad field", temperature=9),
            line("bad url", "/v1/images"),
            line("stream", stream=True),
            json.dumps({"custom_id": "get", "method": "GET", "url": "/v1/completions", "body": {}}),
            json.dumps({"custom_id": "body", "url": "/v1/completions", "body": "x"}),
            '{"custom_id": "torn',
        ],
    )
    assert run(source, tmp_path / "out.jsonl") == 1
    answers = results(tmp_path / "out.jsonl")
    bodies = {id: answer["response"]["body"] for id, answer in answers.items() if answer["response"]}
    assert len(bodies["chat"]["choices"]) == 2 and len(bodies["text"]["choices"]) == 2
    assert bodies["response"]["object"] == "response" and bodies["message"]["type"] == "message"
    assert answers["chat"]["response"]["status_code"] == 200 and answers["chat"]["error"] is None
    assert answers["bad field"]["response"]["status_code"] == 400
    assert bodies["bad field"]["error"]["param"] == "temperature"
    errors = {id: answer["error"]["code"] for id, answer in answers.items() if answer["error"]}
    assert errors == {
        "bad url": "invalid_url",
        "stream": "stream_not_supported",
        "get": "invalid_method",
        "body": "invalid_body",
        None: "invalid_line",
    }
    assert answers[None]["error"]["line"] == 11
    said = capfd.readouterr().err
    assert "10 requests answered, 6 failed" in said and "answering: 100%" in said
    before = (tmp_path / "out.jsonl").read_bytes()
    assert run(source, tmp_path / "out.jsonl") == 1
    assert (tmp_path / "out.jsonl").read_bytes() == before, "everything was answered already"


def test_interrupted_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    count = 800
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", max_tokens=16, ignore_eos=True) for i in range(count)])
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "fastllm", "run-batch", "null", "-i", str(source), "-o", str(output), *FLAGS]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not output.exists() or output.stat().st_size < 20_000:
        assert first.poll() is None
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    _, said = first.communicate(timeout=30)
    assert first.returncode == 130 and "interrupted after" in said and "Traceback" not in said
    done = len(results(output))
    assert 0 < done < count
    with output.open("a") as file:
        file.write('{"id": "batch_req_1", "custom_id": "r29')  # as a machine that lost its power leaves it
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 0 and f"going on: {done} of {count}" in second.stderr
    assert set(results(output)) == {f"r{i}" for i in range(count)}


def test_engine_that_dies_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", max_tokens=4, ignore_eos=True) for i in range(40)])
    generate, calls = AsyncLLM.generate, iter(range(40))

    def dying(self: AsyncLLM, *args: Any, **options: Any) -> Any:
        if next(calls) == 20:
            self.shutdown()
        return generate(self, *args, **options)

    monkeypatch.setattr(AsyncLLM, "generate", dying)
    assert run(source, tmp_path / "out.jsonl", "--max-num-seqs", "1") == 1
    assert "The engine has stopped" in capfd.readouterr().err
    assert all(answer["response"]["status_code"] == 200 for answer in results(tmp_path / "out.jsonl").values())
    monkeypatch.undo()
    assert run(source, tmp_path / "out.jsonl") == 0
    assert len(results(tmp_path / "out.jsonl")) == 40


def test_line_that_finds_the_server_busy_comes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Limits, "waiting_limit", lambda self, max_num_seqs: 0)
    source = write(tmp_path / "in.jsonl", [line(f"r{i}", max_tokens=500, ignore_eos=True) for i in range(3)])
    assert run(source, tmp_path / "out.jsonl", "--max-num-seqs", "1") == 0
    assert set(results(tmp_path / "out.jsonl")) == {"r0", "r1", "r2"}


def test_batch_without_failures_returns_0_and_overwrite_starts_anew(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a", max_tokens=1)])
    output = write(tmp_path / "out.jsonl", ["something else"])
    assert run(source, output) == 1, "a file that is no output of a batch must survive"
    assert output.read_text() == "something else\n"
    assert run(source, output, "--overwrite") == 0
    assert list(results(output)) == ["a"]


@pytest.mark.parametrize("same", [False, True])
def test_files_that_cannot_be_used_are_named_before_the_model_loads(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], same: bool
) -> None:
    source = tmp_path / "in.jsonl"
    if same:
        write(source, [line("a")])
    assert run(source, source if same else tmp_path / "out.jsonl") == 1
    said = capfd.readouterr().err
    assert ("the same file" if same else "in.jsonl") in said and "Traceback" not in said
    assert not same or source.read_text() == line("a") + "\n"


def test_two_lines_with_one_id_are_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [line("a"), line("b"), line("a")])
    with pytest.raises(RequestError, match="lines 1 and 3 have the same custom_id 'a'"):
        check_input(source, URLS)


def test_line_that_is_too_long_costs_itself_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastllm.server.batch_file.MAX_LINE_BYTES", 1000)
    exact = line("exact", user="")
    exact = line("exact", user="u" * (999 - len(exact)))
    source = write(tmp_path / "in.jsonl", [line("a"), line("long", user="u" * 5000), line("b"), exact])
    found = list(read_lines(source, URLS))
    assert [item.custom_id for item in found] == ["a", None, "b", "exact"]
    assert found[1].error is not None and found[1].error.code == "line_too_long" and found[1].number == 2


def test_output_is_locked_and_keeps_whole_lines_only(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    first = BatchOutput(path)
    with pytest.raises(RequestError, match="another run"):
        BatchOutput(path)
    first.write(BatchResult("1", "a", error=BatchError("invalid_url", "x", 1)))
    first.write(BatchResult("2", None, error=BatchError("invalid_line", "x", 2)))
    first.close()
    whole = path.read_bytes()
    for torn in (b'{"id": "3', b'{"id": "3", "custom_id": "c"}', b"\xff\xfe"):
        path.write_bytes(whole + torn)
        again = BatchOutput(path)
        again.close()
        assert path.read_bytes() == whole and again.num_failed == 2
    source = write(tmp_path / "in.jsonl", [line("a"), "not JSON", line("c")])
    assert [again.has(item) for item in read_lines(source, URLS)] == [True, True, False]
    assert again.count(check_input(source, URLS)) == 2
