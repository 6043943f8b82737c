"""Files are told apart by their content, and what cannot go together is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_fakes import policy, results

from kvplan.check.results import save_results
from kvplan.errors import KVPlanError
from kvplan.policy.serialize import save_policy
from kvplan.report.inputs import kind_of, read_inputs
from kvplan.report.sample import token_texts


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_policy(policy(), tmp_path / "a.yaml")
    save_policy(policy(16), tmp_path / "b.yaml")
    save_results(results(), tmp_path / "r.json")
    (tmp_path / "profile.json").write_text('{"kind": "kvplan profile"}')
    (tmp_path / "x.journal").write_text('{"op_code":0,"worker_id":"w","study_name":"s","directions":[1]}\n')
    (tmp_path / "other.json").write_text('{"kind": "something"}')
    (tmp_path / "notes.txt").write_text("hello\n")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "kind"),
    [("a.yaml", "policy"), ("r.json", "results"), ("profile.json", "profile"), ("x.journal", "study")],
)
def test_a_file_is_known_by_its_content(folder: Path, name: str, kind: str) -> None:
    renamed = folder / "some-file"
    (folder / name).rename(renamed)
    assert kind_of(renamed) == kind


@pytest.mark.parametrize("name", ["other.json", "notes.txt"])
def test_other_files_are_refused(folder: Path, name: str) -> None:
    with pytest.raises(KVPlanError, match=f"{name}: not a profile, a search's journal, a policy or a results file"):
        kind_of(folder / name)


def test_missing_files_and_folders_are_refused(folder: Path) -> None:
    with pytest.raises(KVPlanError, match="cannot read"):
        kind_of(folder / "none.json")
    with pytest.raises(KVPlanError, match="a folder"):
        kind_of(folder)


def test_everything_is_read_into_its_place(folder: Path) -> None:
    found = read_inputs([folder / "r.json", folder / "a.yaml"])
    assert [p.name for p in found.policies] == ["a"] and found.policy == found.policies[0].policy
    assert found.results == results()
    assert found.profile is None and found.study is None


def test_two_results_files_are_refused(folder: Path) -> None:
    with pytest.raises(KVPlanError, match="2 results files were given, and a report draws one"):
        read_inputs([folder / "r.json", folder / "r.json"])


def test_files_of_models_of_other_sizes_are_refused(folder: Path) -> None:
    with pytest.raises(KVPlanError, match=r"different numbers of layers \(a 8, b 16\)"):
        read_inputs([folder / "a.yaml", folder / "b.yaml"])


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, ids: list[int]) -> str:
        return bytes(ids).decode(errors="replace")


def test_characters_of_several_tokens_stand_whole_with_their_last_one() -> None:
    text = "a é日 z"
    pieces = token_texts(Bytes(), list(text.encode()))
    assert "".join(pieces) == text
    assert pieces == ["a", " ", "", "é", "", "", "日", " ", "z"]
