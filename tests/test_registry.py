import pytest

from kvplan.errors import MethodError
from kvplan.registry import Registry, unknown


@pytest.fixture
def animals() -> Registry[object]:
    registry: Registry[object] = Registry("animal")
    registry.register("zebra")(type("Zebra", (), {}))
    registry.register("camel")(type("Camel", (), {}))
    return registry


def test_a_registered_class_is_found_and_knows_its_name(animals: Registry[object]) -> None:
    assert animals["camel"].__name__ == "Camel"
    assert animals["camel"].name == "camel"  # type: ignore[attr-defined]


def test_names_are_sorted(animals: Registry[object]) -> None:
    assert animals.names() == list(animals) == ["camel", "zebra"]


def test_membership(animals: Registry[object]) -> None:
    assert "camel" in animals
    assert "horse" not in animals


def test_an_unknown_name_is_answered_with_the_closest(animals: Registry[object]) -> None:
    with pytest.raises(MethodError, match=r"^unknown animal 'zebr'; did you mean 'zebra'\? \(known: camel, zebra\)$"):
        animals["zebr"]


def test_a_name_is_taken_once(animals: Registry[object]) -> None:
    with pytest.raises(MethodError, match="animal 'zebra' is registered twice"):
        animals.register("zebra")(type("Other", (), {}))


def test_no_hint_without_a_close_name() -> None:
    assert unknown("dtype", "q", ["float32"]) == "unknown dtype 'q' (known: float32)"
