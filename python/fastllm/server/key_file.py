"""The file of API keys: who may come in, hashed, and what each may use.

    {"tiers": {"free": {"requests_per_minute": 60, "tokens_per_minute": 20000, "concurrent": 4, "weight": 1}},
     "keys": [{"name": "alice", "hash": "sha256:9f86d0...", "tier": "free", "models": ["m"], "expires": "2027-01-01"}]}

A key may set any field of its tier itself. `fastllm key NAME` makes a key and its entry; so does
`printf %s "$KEY" | sha256sum`.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import msgspec

from fastllm.server.client import Allowance

_Count = Annotated[int, msgspec.Meta(ge=1)]
_Weight = Annotated[float, msgspec.Meta(gt=0, le=1e6)]
_HASH = re.compile(r"(?:sha256:)?([0-9a-f]{64})\Z")


class _Terms(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    concurrent: _Count | None = None
    weight: _Weight | None = None
    models: list[str] | None = None
    expires: str | None = None  # ISO 8601; UTC unless it says otherwise


class _Key(_Terms, kw_only=True):
    name: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    hash: str
    tier: str | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: list[_Key]
    tiers: dict[str, _Terms] = {}


@dataclass(frozen=True)
class KnownKey:
    digest: bytes  # SHA-256
    name: str
    allowance: Allowance


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def read_key_file(path: Path) -> list[KnownKey]:
    """Raises ValueError with a sentence that names the file and what is wrong in it."""
    try:
        file = msgspec.json.decode(path.read_bytes(), type=_File)
        known = [_known(key, file.tiers) for key in file.keys]
        for what, values in (("name", [key.name for key in known]), ("hash", [key.digest for key in known])):
            if len(set(values)) < len(values):
                raise ValueError(f"two keys have the same {what}")
        return known
    except OSError as exc:
        raise ValueError(f"The key file {path} cannot be read: {exc.strerror}.") from None
    except ValueError as exc:  # msgspec's errors, too
        raise ValueError(f"The key file {path} is not usable: {exc}.") from None


def _known(key: _Key, tiers: dict[str, _Terms]) -> KnownKey:
    match = _HASH.match(key.hash.strip().lower())
    if not match:
        raise ValueError(f"the hash of {key.name!r} must be sha256: and 64 hexadecimal digits")
    if key.tier is not None and key.tier not in tiers:
        raise ValueError(f"{key.name!r} has the tier {key.tier!r}, which is not among the tiers")
    tier = tiers[key.tier] if key.tier is not None else _Terms()

    def term(name: str) -> int | float | None:
        own: int | float | None = getattr(key, name)
        return getattr(tier, name) if own is None else own

    models = key.models if key.models is not None else tier.models
    expires = key.expires or tier.expires
    allowance = Allowance(
        tier=key.tier or "",
        requests_per_minute=_whole(term("requests_per_minute")),
        tokens_per_minute=_whole(term("tokens_per_minute")),
        concurrent=_whole(term("concurrent")),
        weight=float(term("weight") or 1.0),
        models=None if models is None else frozenset(models),
        expires=None if expires is None else _unix_time(expires, key.name),
    )
    return KnownKey(bytes.fromhex(match[1]), key.name, allowance)


def _whole(value: int | float | None) -> int | None:
    return None if value is None else int(value)


def _unix_time(text: str, name: str) -> float:
    try:
        moment = datetime.fromisoformat(text.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"expires of {name!r} must be a date or time such as 2027-01-31T12:00:00Z") from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return moment.timestamp()
