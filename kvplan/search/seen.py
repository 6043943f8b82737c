"""Which prompts a policy was found on, as a few bytes each, so that nobody is judged on them unawares."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

HASH_BYTES = 4  # of 300 prompts one is taken for one of 300 others in 50,000 evaluations
# The smallest hashes are a fair sample, and those of a union are among those of its parts. A file that people read
# should not hold hundreds: if a tenth of what a policy was found on comes again, 24 show it 12 times in 13.
MOST_HASHES = 24
KEY = "prompt_hashes"  # in a policy's provenance


def packed(hashes: Iterable[str]) -> str:
    """The first bytes of the smallest hexadecimal hashes, sorted, as base64."""
    short = sorted({bytes.fromhex(one)[:HASH_BYTES] for one in hashes})[:MOST_HASHES]
    return base64.b64encode(b"".join(short)).decode()


def unpacked(text: Any) -> set[str]:
    """The hashes as hexadecimal; none where `text` is not what `packed` wrote."""
    try:
        data = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        return set()
    return {data[i : i + HASH_BYTES].hex() for i in range(0, len(data) - HASH_BYTES + 1, HASH_BYTES)}


def num_seen(hashes: Sequence[str], data: str, provenance: Mapping[str, Any]) -> int:
    """How many of some prompts a policy was calibrated or searched on, at least.

    Args:
        hashes: `prompt_hash` of each.
        data: Their `data_fingerprint`.
        provenance: Of the policy. One that says no hashes is recognised only where its prompts are given whole.
    """
    if KEY not in provenance:
        whole = "sha256:" + hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()[:32]
        return len(hashes) if provenance.get("data") == data or provenance.get("profile") == whole else 0
    known = unpacked(provenance[KEY])
    return sum(one[: 2 * HASH_BYTES] in known for one in hashes)
