"""The `fastllm` command: help that helps, answers on standard output, sentences instead of tracebacks."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from server_fixtures import RunningServer, running_server


def fastllm(*args: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fastllm", *args]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=60, errors="replace")


@pytest.fixture(scope="module")
def server():
    with running_server(api_keys=["secret"]) as running:
        yield running


def test_version() -> None:
    from fastllm import __version__

    done = fastllm("--version")
    assert (done.returncode, done.stdout) == (0, f"fastllm {__version__}\n")


@pytest.mark.parametrize("command", [[], ["serve"], ["chat"], ["generate"], ["export"]])
def test_help_shows_examples(command: list[str]) -> None:
    done = fastllm(*command, "--help")
    assert done.returncode == 0 and "examples:" in done.stdout and "fastllm serve" in done.stdout


def test_serve_help_is_grouped_and_names_the_flags_of_vllm() -> None:
    text = fastllm("serve", "--help").stdout
    for group in ("network:", "API:", "limits:", "scheduler:", "cache:"):
        assert f"\n{group}" in text
    for flag in ("--host", "--api-key", "--served-model-name", "--max-model-len", "--tensor-parallel-size"):
        assert flag in text


def test_no_command_is_a_usage_error() -> None:
    assert fastllm().returncode == 2


def test_generate_writes_the_text_to_stdout() -> None:
    flags = ("--max-tokens", "24", "--sampling-seed", "1", "--max_model_len", "4k")
    done = fastllm("generate", "null", "--prompt", "Hello", *flags)
    assert done.returncode == 0 and len(done.stdout) > 1 and "Traceback" not in done.stderr
    assert fastllm("generate", "null", *flags, stdin="Hello").stdout == done.stdout


def test_chat_answers_piped_input() -> None:
    done = fastllm("chat", "null", "--max-tokens", "12", "--temperature", "0", stdin="Hello\n")
    assert done.returncode == 0 and done.stdout.endswith("\n") and len(done.stdout) > 2


def test_chat_with_a_server_gives_its_answer(server: RunningServer) -> None:
    fields = {"max_tokens": 12, "temperature": 0, "ignore_eos": False}
    headers = {"Authorization": "Bearer secret"}
    messages = [{"role": "user", "content": "Hello"}]
    body = {"messages": messages, **fields}
    expected = server.ask("POST", "/v1/chat/completions", body, headers=headers).json["choices"][0]["message"][
        "content"
    ]
    flags = ("--api-key", "secret", "--max-tokens", "12", "--temperature", "0")
    for url in (server.url, server.url + "/v1"):
        done = fastllm("chat", "--url", url, *flags, stdin="Hello")
        assert done.returncode == 0 and done.stdout.strip() == expected.replace("\r", "\n").strip()


@pytest.mark.parametrize(
    "args, status, words",
    [
        (["generate", "/nonexistent/model", "--prompt", "x"], 2, "/nonexistent/model"),
        (["generate", "null", "--prompt", "x", "--temperature", "-1"], 2, "temperature must be non-negative"),
        (["generate", "null", "--prompt", "x", "--temperature", "hot"], 2, "--temperature"),
        (["generate", "null", "--prompt", "x" * 5000], 1, "maximum context length"),
        (["generate", "null"], 2, "the prompt is empty"),
        (["chat"], 2, "name a MODEL to load, or give the --url"),
        (["chat", "--url", "ftp://x"], 1, "must begin with http"),
        (["chat", "--url", "http://127.0.0.1:9"], 1, "cannot be reached"),
        (["export", "/nonexistent/model", "/tmp/unused-bundle"], 2, "/nonexistent/model"),
        (["serve", "null", "--port", "99999"], 2, "0 to 65535"),
        (["serve", "null", "--ssl-keyfile", "x"], 2, "go together"),
        (["serve", "null", "--no-such-flag"], 2, "--no-such-flag"),
        (["serve", "null", "--max-num-seqs", "0"], 2, "max_num_seqs must be at least 1"),
        (["nonsense"], 2, "nonsense"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_user_error_is_one_sentence(args: list[str], status: int, words: str) -> None:
    stdin = "Hello" if args[0] == "chat" else ""
    done = fastllm(*args, stdin=stdin)
    assert done.returncode == status, done.stderr
    assert words in done.stderr and "Traceback" not in done.stderr


def test_chat_shows_the_error_of_the_server(server: RunningServer) -> None:
    done = fastllm("chat", "--url", server.url, stdin="Hello")
    assert done.returncode == 1 and "API key is missing or wrong" in done.stderr


def test_port_in_use_is_a_sentence(server: RunningServer) -> None:
    done = fastllm("serve", "null", "--port", str(server.port))
    assert done.returncode == 1 and "cannot listen on 127.0.0.1" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "args, words",
    [
        (("serve", "null", "--max-model-length", "4"), "did you mean --max-model-len?"),
        (("serve", "null", "--max-waiting", "-5"), "--max-waiting: must be a whole number"),
        (("serve", "null", "--body-timeout", "nan"), "--body-timeout: must be seconds"),
        (("serve", "null", "--port", "65536"), "--port: must be a port"),
        (("generate", "null", "--temperature", "hot"), "--temperature: invalid float value: 'hot'"),
        (("generate",), "MODEL"),
    ],
)
def test_wrong_flags_are_one_sentence_and_a_hint(args: tuple[str, ...], words: str) -> None:
    done = fastllm(*args)
    assert done.returncode == 2 and words in done.stderr
    assert len(done.stderr.splitlines()) == 2 and "--help" in done.stderr


def test_interrupted_generation_says_so_with_its_status() -> None:
    command = [
        sys.executable,
        "-m",
        "fastllm",
        "generate",
        "null",
        "--prompt",
        "Hello",
        "--max-model-len",
        "1M",
        "--ignore-eos",
    ]

    def hear_interrupts() -> None:  # a job that a shell put in the background ignores them, and so do its children
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=hear_interrupts)
    assert process.stdout is not None
    assert process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in error


def test_reader_that_closes_the_pipe_ends_the_command_quietly() -> None:
    command = [sys.executable, "-m", "fastllm", "generate", "null", "--prompt", "Hello", "--max-model-len", "1M"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()  # before the first word is written
    assert process.wait(60) == 1 and process.stderr.read() == b""
    process.stderr.close()
