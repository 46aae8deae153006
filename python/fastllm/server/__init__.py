"""The HTTP server: OpenAI's wire format over one AsyncLLM. Start it with `fastllm serve MODEL`."""
