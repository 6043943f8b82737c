from __future__ import annotations

import json

import pytest

from kvplan.check import doctor
from kvplan.cli.app import app
from kvplan.cli.exits import run_app
from kvplan.report.methods import KINDS, found


def test_every_registered_method_is_listed_in_80_columns(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    listed = {line.split()[0] for line in lines if line.startswith("  ") and line[2:3] != " "}
    assert listed == {name for registry in KINDS.values() for name in registry}


@pytest.mark.parametrize("name", sorted({method.name for method in found()}))
def test_one_method_is_told_in_full(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["methods", name]) == 0
    told = capsys.readouterr().out
    method = next(method for method in found() if method.name == name)
    assert max(map(len, told.splitlines())) <= 80
    assert all(f"  {parameter.name}: " in told for parameter in method.parameters)
    assert " ".join(method.does.split()) in " ".join(told.split())


def test_what_cannot_go_together_is_what_the_rules_say() -> None:
    unfit = {method.name: set(method.unfit) for method in found()}
    assert unfit["kivi"] >= {"h2o", "tova", "corm"} and not unfit["kivi"] & {"streaming", "snapkv"}
    assert "adakv" in unfit["tova"] and "tova" in unfit["adakv"]
    assert unfit["int8"] == set()


def test_methods_as_data_and_unknown_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["methods", "snapkv", "--json"]) == 0
    (snapkv,) = json.loads(capsys.readouterr().out)
    assert snapkv["paper"] == "Li et al. 2024, arXiv:2404.14469"
    assert {"name": "pool_width", "default": 5, "search": "1, 5, 7, 13"} in snapkv["parameters"]
    assert run_app(app, ["methods", "snapvk"]) == 2
    assert "unknown method 'snapvk'; did you mean 'snapkv'?" in capsys.readouterr().err


def test_the_doctor_finds_nothing_wrong_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_app(app, ["doctor"]) == 0
    told = capsys.readouterr().out
    assert "nothing is wrong" in told and max(map(len, told.splitlines())) <= 80
    assert run_app(app, ["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []


def test_the_doctor_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("KVPLAN_KERNELS", "fast")
    versions = {"transformers": "4.57.0"}
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name) or real(name))
    assert run_app(app, ["doctor"]) == 1
    told = capsys.readouterr().out
    assert "wrong: transformers is 4.57.0; kvplan needs <6,>=5.17" in told
    assert "wrong: KVPLAN_KERNELS is 'fast'; it must be one of" in told
    assert "nothing is wrong" not in told
