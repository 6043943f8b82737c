"""The words of generated tasks, and the story sentences that stand between what matters."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

PEOPLE = (
    "the dog, the cat, the boy, the girl, a man, a woman, the bird, the cow, my friend, her mother, his father"
).split(", ")
DID = "sat, played, walked, ran, slept, sang, looked around, waited, talked, ate, smiled, worked".split(", ")
WHERE = (
    "near the tree, in the house, by the lake, on the road, at the park, in the garden, under the table, "
    "behind the hill, at the school, in the big room, next to the door, by the sea"
).split(", ")
WHEN = (
    "in the morning, at night, after lunch, on a cold day, in the sun, in the rain, before dinner, for a long time"
).split(", ")
COLORS = "red blue green yellow black white brown pink gray gold".split()
THINGS = "box ball hat car book cup bag door boat chair lamp coat bed bell key cake".split()
NAMES = "Tom Anna Ben Lily Sam Mia Jack Sue Max Lucy Tim Amy Bob Jane Dan Rose".split()


def sentence(rng: Random) -> str:
    """One of some ten thousand sentences, none of which says anything that is asked."""
    who = rng.choice(PEOPLE)
    return f"{who[0].upper()}{who[1:]} {rng.choice(DID)} {rng.choice(WHERE)} {rng.choice(WHEN)}."


def woven(rng: Random, statements: Sequence[str], sentences: int) -> str:
    """The statements in their order, spread at random over that many story sentences."""
    places = set(rng.sample(range(sentences + len(statements)), len(statements)))
    said = iter(statements)
    return " ".join(next(said) if i in places else sentence(rng) for i in range(sentences + len(statements)))


def numbers(rng: Random, count: int) -> list[str]:
    """Different numbers of four digits."""
    return [str(n) for n in rng.sample(range(1000, 10000), count)]


def keys(rng: Random, count: int) -> list[str]:
    """Different things, such as `red box`; at most 160."""
    return rng.sample([f"{color} {thing}" for color in COLORS for thing in THINGS], count)
