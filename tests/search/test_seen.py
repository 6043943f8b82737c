from __future__ import annotations

import hashlib
from typing import Any

import pytest

from kvplan.search.seen import KEY, MOST_HASHES, num_seen, packed, unpacked

HASHES = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(50)]


def test_short_hashes_survive_packing_in_any_order() -> None:
    text = packed(HASHES[:20])
    assert unpacked(text) == {one[:8] for one in HASHES[:20]}
    assert packed(reversed(HASHES[:20])) == packed([*HASHES[:20], HASHES[0]]) == text


def test_of_many_hashes_a_sample_is_kept_whatever_was_packed_before() -> None:
    text = packed(HASHES)
    assert unpacked(text) == {one[:8] for one in sorted(HASHES)[:MOST_HASHES]} and len(text) == 128
    assert packed([*unpacked(packed(HASHES[:30])), *unpacked(packed(HASHES[30:]))]) == text


@pytest.mark.parametrize("damaged", [None, 3, "not base64!", ["a"], "ä"])
def test_what_is_no_list_of_hashes_holds_none(damaged: Any) -> None:
    assert unpacked(damaged) == set()
    assert num_seen(HASHES, "sha256:data", {KEY: damaged}) == 0


def test_prompts_are_counted() -> None:
    found_on = {KEY: packed(HASHES[:20]), "data": "sha256:data"}
    assert num_seen(HASHES[10:], "sha256:data", found_on) == 10
    assert num_seen(HASHES[20:], "sha256:data", found_on) == 0
    sample = {KEY: packed(HASHES)}
    assert num_seen(HASHES, "sha256:data", sample) == MOST_HASHES


def test_a_policy_without_hashes_is_recognised_by_its_whole_sets() -> None:
    whole = "sha256:" + hashlib.sha256("\n".join(sorted(HASHES)).encode()).hexdigest()[:32]
    assert num_seen(HASHES, "sha256:a", {"data": "sha256:a"}) == 50
    assert num_seen(HASHES, "sha256:b", {"data": "sha256:a", "profile": whole}) == 50
    assert num_seen(HASHES[1:], "sha256:b", {"data": "sha256:a", "profile": whole}) == 0
    assert num_seen(HASHES, "sha256:b", {}) == 0
