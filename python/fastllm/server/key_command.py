"""`fastllm key`: a new API key, or the entry for --api-key-file of one that exists."""

from __future__ import annotations

import argparse
import json
import secrets
import sys


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", help="whose key it is; shown in logs, never the key itself")
    parser.add_argument("--tier", metavar="TIER", help="tier of the key file that sets its limits")
    parser.add_argument(
        "--existing", action="store_true", help="read the key from standard input instead of making one"
    )


def run(args: argparse.Namespace) -> int:
    """Writes the key to standard error, where it is seen once, and its entry to standard output."""
    from fastllm.server.key_file import digest_of

    if args.existing:
        key = sys.stdin.readline().strip()
        if not key:
            raise ValueError("there is no key on standard input")
    else:
        key = f"sk-{secrets.token_urlsafe(32)}"
        print(f"key (kept nowhere): {key}", file=sys.stderr)
    entry = {"name": args.name, "hash": f"sha256:{digest_of(key.encode()).hex()}"}
    if args.tier:
        entry["tier"] = args.tier
    print(json.dumps(entry))
    return 0
