"""The commands of a deployment guide for vLLM do what they say with `vllm` replaced by `fastllm`."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fastllm import EngineArgs
from fastllm.server.args import limits_from, make_parser
from server_fixtures import wait_until
from server_process import server_process

COMMANDS = [
    line
    for line in (Path(__file__).parent / "data" / "guide_commands.txt").read_text().splitlines()
    if not line.startswith("#")
]
ENVIRONMENT = {
    "CUDA_VISIBLE_DEVICES": "0,1",
    "CUDA_LAUNCH_BLOCKING": "1",
    "NCCL_DEBUG": "INFO",
    "NCCL_DEBUG_SUBSYS": "ALL",
    "OMP_NUM_THREADS": "2",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_LEVEL": "DEBUG",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
}


def without_program(command: str) -> list[str]:
    words = shlex.split(command)
    return words[3:] if words[0] == "python" else words[2:]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_printed_command_becomes_engine_arguments(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    model = str(tmp_path / "Llama-2-7b-chat-hf")
    args = make_parser("test", positional_model=True).parse_args(without_program(command.replace("MODEL", model)))
    args.model = args.model_tag or args.model
    engine = EngineArgs.from_cli_args(args)
    assert engine.model == model
    core = engine.to_core(engine.max_model_len or 4096, 32000)
    words = command.replace("_", "-").split()
    values = dict(zip(words, words[1:], strict=False))
    assert core.tensor_parallel_size == int(values.get("--tensor-parallel-size", 1))
    assert core.max_num_seqs == int(values.get("--max-num-seqs", core.max_num_seqs))
    assert core.swap_bytes == int(values.get("--swap-space", 0)) << 30
    assert core.policy == values.get("--scheduling-policy", "fcfs")
    assert limits_from(args).max_waiting_time_s == (600.0 if "--max-waiting-time" in values else 120.0)
    assert args.log_level == "debug"  # by the flag or by the variable


def test_a_server_starts_as_printed_and_does_what_its_flags_say(llama: Path) -> None:
    flags = (
        "--host 127.0.0.1 --port 0 --gpu-memory-utilization 0.90 --max-model-len 128 --dtype float16 --swap-space 4 "
        "--max-num-batched-tokens 4096 --max-num-seqs 128 --block-size 16 --enable-prefix-caching --enforce-eager "
        "--tensor-parallel-size 1 --pipeline-parallel-size 1 --distributed-executor-backend ray --scheduler-delay 0.1 "
        "--tokenizer-pool-size 4 --max-waiting-time 600 --disable-log-requests --served-model-name llama-2-7b "
        "--trust-remote-code --log-level debug"
    )
    env = ENVIRONMENT | {"CUDA_VISIBLE_DEVICES": ""}
    with server_process("fastllm.entrypoints.api_server", "--model", str(llama), *flags.split(), env=env) as server:
        address = server.wait_ready()
        assert "variables without effect here: VLLM_WORKER_MULTIPROC_METHOD" in server.text
        assert server.text.count("code that comes with a model is never run") == 1
        assert "llama-2-7b" in server.text
        names = ask(address + "/v1/models")
        assert '"id":"llama-2-7b"' in names and '"max_model_len":128' in names
        stats = ask(address + "/stats")
        assert '"max_num_seqs":128' in stats and '"max_num_batched_tokens":4096' in stats
        assert '"block_size":16' in stats
        wait_until(lambda: "GET /v1/models 200" in server.text, 10, lambda: server.text)
        assert server.stop() == 0


def ask(url: str) -> str:
    import urllib.request

    with urllib.request.urlopen(url, timeout=30) as reply:
        return str(reply.read(), "utf-8")
