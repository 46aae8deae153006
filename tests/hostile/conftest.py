"""Shares the server fixture and the tiny models with the ordinary tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

from model_fixtures import llama, seed, tiny_model  # noqa: E402, F401
