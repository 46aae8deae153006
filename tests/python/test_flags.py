"""The server's command line: what vLLM's users type is accepted, or refused with the reason; nothing is ignored."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from fastllm import EngineArgs
from fastllm.environment import defaults_from_environment, without_effect
from fastllm.refused_flags import reason_for
from fastllm.server import run
from fastllm.server.args import make_parser

_LINES = (Path(__file__).parent / "data" / "vllm_flags.txt").read_text().splitlines()
ACCEPTED = [line for line in _LINES if line.startswith("-")]
REFUSED = [line[2:] for line in _LINES if line.startswith("! ")]
# vLLM's defaults of flags that are accepted; where ours differ, the second one is ours, for a reason.
DEFAULTS: dict[str, tuple[Any, ...]] = {
    "served_model_name": (None,),
    "host": (None, "127.0.0.1"),  # nobody outside gets in unless asked for
    "port": (8000,),
    "uds": (None,),
    "root_path": (None, ""),
    "uvicorn_log_level": ("info",),
    "allowed_origins": ([],),
    "allowed_methods": (["*"],),
    "allowed_headers": (["*"],),
    "allow_credentials": (False,),
    "ssl_keyfile": (None,),
    "ssl_certfile": (None,),
    "ssl_ca_certs": (None,),
    "ssl_cert_reqs": (0,),
    "ssl_ciphers": (None,),
    "enable_ssl_refresh": (False,),
    "chat_template": (None,),
    "chat_template_content_format": ("auto",),
    "response_role": ("assistant",),
    "enable_force_include_usage": (False,),
    "enable_log_requests": (False,),
    "disable_log_stats": (False,),
    "disable_uvicorn_access_log": (False,),
    "max_log_len": (None,),
    "shutdown_timeout": (0, 30.0),  # accepted requests are finished
    "sse_keep_alive_interval": (0,),
    "tokenizer": (None,),
    "tokenizer_mode": ("auto",),
    "trust_remote_code": (False,),
    "dtype": ("auto",),
    "quantization": (None,),
    "load_format": ("auto",),
    "download_dir": (None,),
    "revision": (None,),
    "hf_overrides": ({},),
    "hf_token": (None,),
    "seed": (0,),
    "max_model_len": (None,),
    "gpu_memory_utilization": (0.92,),
    "kv_cache_memory_bytes": (None,),
    "kv_cache_dtype": ("auto",),
    "block_size": (None,),
    "num_gpu_blocks_override": (None,),
    "enable_prefix_caching": (None, True),
    "prefix_caching_hash_algo": ("sha256",),
    "max_num_seqs": (None,),
    "max_num_batched_tokens": (None,),
    "enable_chunked_prefill": (None,),
    "long_prefill_token_threshold": (0,),
    "scheduling_policy": ("fcfs",),
    "async_scheduling": (None, True),
    "stream_interval": (1,),
    "tensor_parallel_size": (1,),
    "pipeline_parallel_size": (1,),
    "data_parallel_size": (1,),
    "distributed_executor_backend": (None,),
    "enforce_eager": (False,),
    "optimization_level": ("2",),
    "attention_backend": (None,),
    "max_logprobs": (20,),
    "logprobs_mode": ("raw_logprobs",),
    "generation_config": ("auto",),
    "override_generation_config": ({},),
    "performance_mode": ("balanced",),
    "api_server_count": (None,),
    "nnodes": (1,),
    "runner": ("auto",),
    "convert": ("auto",),
}


def parse(*arguments: str) -> Any:
    return make_parser("test", positional_model=True).parse_args(arguments)


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as exit:
        EngineArgs.from_cli_args(parse(*arguments))
    assert exit.value.code == 2
    text = capsys.readouterr().err
    assert "Traceback" not in text
    return text.splitlines()[0]


def test_the_hundred_flags_and_their_short_forms_are_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(ACCEPTED) > 110
    for line in ACCEPTED:
        args = parse(*shlex.split(line))
        flag, *values = shlex.split(line)
        if flag.startswith("--"):  # underscores and an equals sign mean the same
            name = "--" + flag[2:].replace("-", "_")
            again = [f"{name}={values[0]}"] if len(values) == 1 else [name, *values]
            assert parse(*again) == args, line


def test_defaults_are_those_of_vllm() -> None:
    args = parse()
    for name, (*_, default) in DEFAULTS.items():
        assert getattr(args, name) == default, name


def test_every_other_flag_of_vllm_is_refused_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(REFUSED) > 200
    parser = make_parser("test", positional_model=True)
    for flag in REFUSED:
        assert reason_for(flag), flag
        assert not any(known.startswith(flag) for known in parser._option_string_actions), f"{flag} is an abbreviation"
    for flag in ("--grpc", "--kv-transfer-config", "-sc", "--lora-modules", "--mm-processor-cache-gb", "--enable_eplb"):
        with pytest.raises(SystemExit):
            parser.parse_args([flag, "1"])
        name = flag.replace("_", "-")
        assert capsys.readouterr().err == f"test: error: {name}: {reason_for(name)}.\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--data-parallel-size 2", "--data-parallel-size 2: one process serves one replica"),
        ("-cc.mode=3", '--compilation-config {"mode": 3}: no graph is compiled'),
        ("-O3", "--optimization-level 3: no graph is compiled"),
        ("--enable-lora", "--enable-lora: LoRA adapters are not served"),
        ("--limit-mm-per-prompt.image 3", "images, audio and video are not served"),
        ("--prefix-caching-hash-algo xxhash", "compared token by token"),
        ("--structured-outputs-config.backend xgrammar", "llguidance checks all grammars"),
        ("--no-enable-request-id-headers", "every answer carries X-Request-Id"),
        ("--nnodes 2", "a model runs on one host"),
        ("--spec-tokens 3", "speculative decoding is not supported"),
        ("--speculative-model x", "speculative decoding is not supported"),
        ("--rope-scaling {}", "--hf-overrides.rope_scaling"),
        ("--gpu-memory-utilisation 0.9", "did you mean --gpu-memory-utilization?"),
        ("--port 70000", "must be a port from 0 to 65535"),
        ("--log-level loud", "invalid choice: 'loud'"),
        ("--hf-overrides [1]", "'[1]' is not a JSON object"),
        ("--hf-overrides.a", "expected one argument"),
        ("--config /nonexistent.yaml", "--config /nonexistent.yaml cannot be read: No such file or directory."),
    ],
)
def test_what_cannot_be_honoured_is_an_error(arguments: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in error_of(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ("--max_model_len 4k", "max_model_len", 4000),
        ("--max-model-len=4K", "max_model_len", 4096),
        ("--max-num-batched-tokens 2M", "max_num_batched_tokens", 2 << 20),
        ("--hf-overrides.rope_scaling.factor 2.5 --hf_overrides.rope_scaling.rope_type=yarn", "hf_overrides",
         {"rope_scaling": {"factor": 2.5, "rope_type": "yarn"}}),
        ('--hf-overrides {"a":1,"b":{"c":2}} --hf-overrides.b.d true', "hf_overrides",
         {"a": 1, "b": {"c": 2, "d": True}}),
        ("--override-generation-config.temperature 0", "override_generation_config", {"temperature": 0}),
        ("--device-memory-utilization 0.5", "gpu_memory_utilization", 0.5),
        ("-q gptq", "quantization", "gptq"),
        ("--hf-token", "hf_token", True),
        ("--hf-token abc", "hf_token", "abc"),
        ("--log-level DEBUG", "log_level", "debug"),
        ("--allowed-origins *", "allowed_origins", ["*"]),
        ("--enable-log-requests --disable-log-requests", "enable_log_requests", False),
        ("--disable-uvicorn-access-log --enable-uvicorn-access-log", "disable_uvicorn_access_log", False),
        ("--swap-space 4", "swap_space", 4.0),
        ("--max-waiting-time 600", "max_waiting_time_s", 600.0),
        ("--scheduler-delay 0.1", "scheduler_delay", 0.1),
        ("--tokenizer-pool-size 4", "tokenizer_pool_size", 4),
    ],
)  # fmt: skip
def test_what_users_write_is_understood(arguments: str, name: str, value: Any) -> None:
    assert getattr(parse(*arguments.split()), name) == value


def test_defaults_are_not_changed_by_one_command_line() -> None:
    parse("--hf-overrides.a", "1", "--api-key", "k", "--allowed-origins", "*")
    args = parse()
    assert (args.hf_overrides, args.api_key, args.allowed_origins) == ({}, [], [])


def test_giving_swap_space_means_using_it() -> None:
    plain, sized = EngineArgs().to_core(64, 10), EngineArgs(swap_space=2).to_core(64, 10)
    assert (plain.preemption, plain.swap_bytes) == ("recompute", 0)
    assert (sized.preemption, sized.swap_bytes) == ("swap", 2 << 30)
    assert EngineArgs(swap_space=2, preemption_mode="recompute").to_core(64, 10).swap_bytes == 0
    assert EngineArgs(preemption_mode="swap").to_core(64, 10).swap_bytes == 4 << 30


def test_kernel_names_of_quantizations_mean_the_format() -> None:
    assert EngineArgs(quantization="awq_marlin").quantization == "awq"
    assert "secret" not in repr(EngineArgs(hf_token="secret"))


# ---- --config


def test_a_config_file_says_what_flags_say_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "model: null-model\nport: 8010\nmax_model_len: 4k\nserved-model-name: [a, b]\nenable-prefix-caching: false\n"
        "enforce-eager: true\nhf-overrides: {rope_scaling: {factor: 2}}\nallowed-origins: ['http://a']\n"
        "chat-template: --x\nseed: ~\n"
    )
    args = parse("--config", str(file), "--port", "9000", "--hf-overrides.rope_scaling.rope_type", "yarn")
    assert (args.model, args.port, args.max_model_len, args.served_model_name) == ("null-model", 9000, 4000, ["a", "b"])
    assert (args.enable_prefix_caching, args.enforce_eager, args.chat_template, args.seed) == (False, True, "--x", 0)
    assert args.hf_overrides == {"rope_scaling": {"factor": 2, "rope_type": "yarn"}}
    assert args.allowed_origins == ["http://a"]
    assert parse("other", f"--config={file}").model_tag == "other"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max-model-lenn: 3", "unrecognized arguments: --max-model-lenn=3"),
        ("kv-transfer-config: {a: 1}", "--kv-transfer-config: KV blocks are not moved"),
        ("port: many", "must be a port from 0 to 65535, got 'many'"),
        ("- a\n- b", "must map flags to values"),
        ("a: [b", "is not valid YAML"),
        ("config: other.yaml", "cannot name another file"),
        ("x: !!python/object/apply:os.system [id]", "is not valid YAML"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(text)
    assert words in error_of(capsys, "--config", str(file))


# ---- environment


def test_variables_give_defaults_under_both_prefixes(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {"VLLM_LOGGING_LEVEL": "DEBUG", "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "5", "VLLM_BATCH_INVARIANT": "1"}
    assert defaults_from_environment(environ) == {
        "log_level": "debug",
        "keepalive_timeout_s": 5.0,
        "deterministic": True,
    }
    assert defaults_from_environment(environ | {"FASTLLM_LOGGING_LEVEL": "error"})["log_level"] == "error"
    with pytest.raises(ValueError, match="VLLM_LOGGING_LEVEL must be a log level.*got 'LOUD'"):
        defaults_from_environment({"VLLM_LOGGING_LEVEL": "LOUD"})
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
    assert parse().log_level == "warning" and parse("--log-level", "info").log_level == "info"


def test_variables_of_a_kubernetes_service_are_left_alone() -> None:
    environ = {f"{name}_{rest}": "tcp://10.0.0.1:8000" for name in ("FASTLLM", "VLLM")
               for rest in ("PORT", "SERVICE_HOST", "SERVICE_PORT", "PORT_8000_TCP", "PORT_8000_TCP_ADDR")}  # fmt: skip
    assert defaults_from_environment(environ) == {} and without_effect(environ) == []
    assert without_effect({"VLLM_USE_V1": "1", "VLLM_API_KEY": "k", "PATH": "x"}) == ["VLLM_USE_V1"]


def test_variables_of_the_cpu_size_its_cache_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    core = EngineArgs().to_core(64, 10)
    assert (core.kv_cache_bytes, core.cpu_threads) == (2 << 30, 1)
    core = EngineArgs(kv_cache_memory_bytes=1 << 20, cpu_threads=2, tensor_parallel_size=2).to_core(64, 10)
    assert (core.kv_cache_bytes, core.cpu_threads) == (1 << 20, 2)


# ---- help


@pytest.mark.parametrize(
    ("topic", "words"),
    [
        ("listgroup", "scheduler"),
        ("CORS", "--allowed-origins"),
        ("max-num", "--max-num-seqs"),
        ("refused", "--grpc: requests come over HTTP"),
        ("environment", "FASTLLM_LOGGING_LEVEL, VLLM_LOGGING_LEVEL: --log-level"),
        ("all", "usage:"),
    ],
)
def test_help_has_topics(topic: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([f"--help={topic}"]) == 0
    assert words in capsys.readouterr().out


def test_the_server_tells_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    from fastllm import __version__

    with pytest.raises(SystemExit):
        run.main(["--version"])
    assert capsys.readouterr().out == f"fastllm {__version__}\n"


def test_help_without_such_a_topic_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--help=nothing-like-it"]) == 2
    assert "--help=listgroup" in capsys.readouterr().err
