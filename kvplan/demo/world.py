"""The small world that the bundled model was trained on: its words, its sentences, its questions.

Everything here is generated; no text comes from elsewhere. A document is a list of `Piece`s: sentences of a
story whose people keep their job, home and animal (so plain text needs memory too), statements worth
remembering, and questions about them. Words are split over `calibrate`, `search` and `heldout`
so that the three share no person, place, variable or number.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from random import Random

SPLITS = ("calibrate", "search", "heldout")
SPECIAL_TOKENS = ("<pad>", "<unk>", "<bos>", "<eos>")
TOKEN_PATTERN = r" \d\d|\d\d| \w+|[^\w\s]"

_NAME_HEADS = "Al Ber Cor Dan El Fen Gar Hal Is Jor Kel Lor".split()
_NAME_TAILS = "a o in us ea wyn ric dra".split()
NAMES = tuple(head + tail for tail in _NAME_TAILS for head in _NAME_HEADS)
_PLACE_HEADS = "Ost Wes Nor Sud Hol Mar Tor Vin".split()
_PLACE_TAILS = "ham dale wick port ford mere".split()
PLACES = tuple(head + tail for tail in _PLACE_TAILS for head in _PLACE_HEADS)
VARIABLES = tuple(a + b for b in "abcdefghijklmnopqrstuvwxyz" for a in "kvz")
JOBS = tuple("baker smith miller weaver sailor teacher farmer painter tailor hunter healer singer".split())
ANIMALS = tuple("cat dog horse goat owl fox hen mule".split())
COLOURS = tuple("red blue green grey white black brown golden".split())
OBJECTS = tuple("lamp ring book drum sword crown clock bell rope shield mirror basket".split()) + tuple(
    "hammer candle needle barrel ladder saddle kettle violin anchor chest flute map".split()
)
FRUITS = tuple("apple pear plum cherry lemon grape fig melon".split())
SONG_WORDS = tuple("sun moon star rain snow wind fire stone river hill tree leaf rose bird wolf bear".split()) + tuple(
    "bread salt honey milk gold silver iron glass night dawn summer winter song dream road home".split()
)
_TIMES = tuple("morning evening autumn spring noon night".split())
_WEATHER = tuple("cold warm wet bright dark quiet".split())
_GOODS = tuple("bread cheese wool fish wood paper cloth oil".split())
_VERBS = tuple("sold bought carried found lost wanted".split())

# {p} a person of the cast; {j} {h} {a} {c} that person's job, home, animal and its colour; {q} another one.
_STORY = (
    "In the {time} {p} the {j} walked to {place}.",
    "{p} the {j} came home to {h}.",
    "The {c} {a} of {p} slept in {h}.",
    "{p} {verb} {goods} with {q} the {qj}.",
    "It was a {weather} {time} in {h}, and {p} fed the {c} {a}.",
    "{p} from {h} met {q} from {qh}.",
    "The {j} of {h} is {p}.",
    "{q} asked about the {c} {a} of {p}.",
    "The road from {h} to {qh} was {weather}.",
    "{p} {verb} {goods} in the {time}, then went back to {h}.",
    "A {weather} wind came over {place}.",
    "{q} the {qj} and {p} the {j} sang in the {time}.",
)
_FUNCTION_WORDS = (
    "In the to came home of slept with It was a in and fed from met The is asked about road then went back A wind"
    " came over sang walked Code Hidden Here passkey code Question What Answer Where song votes for Which fruit has"
    " most Song Sing"
    " Who What an are The that this on at by not no yes"
).split()


def vocabulary() -> list[str]:
    """Every token of the tokenizer, in id order: special tokens, punctuation, numbers, words (with a leading space)."""
    words: dict[str, None] = {}
    groups = (
        NAMES,
        PLACES,
        VARIABLES,
        JOBS,
        ANIMALS,
        COLOURS,
        OBJECTS,
        FRUITS,
        SONG_WORDS,
        _TIMES,
        _WEATHER,
        _GOODS,
        _VERBS,
    )
    for group in (*groups, _FUNCTION_WORDS):
        words.update(dict.fromkeys(group))
    pairs = [f"{n:02d}" for n in range(100)]
    return [*SPECIAL_TOKENS, *".,?:;", *(" " + p for p in pairs), *pairs, *(" " + w for w in words)]


@dataclass(frozen=True)
class Words:
    """The people, places, variables and numbers that one split may use. `split=None` is all of them (training)."""

    split: str | None = None

    def _mine(self, items: tuple[str, ...]) -> tuple[str, ...]:
        return items if self.split is None else items[SPLITS.index(self.split) :: 3]

    @property
    def names(self) -> tuple[str, ...]:
        return self._mine(NAMES)

    @property
    def places(self) -> tuple[str, ...]:
        return self._mine(PLACES)

    @property
    def variables(self) -> tuple[str, ...]:
        return self._mine(VARIABLES)

    def number(self, rng: Random) -> str:
        """Four digits, which the tokenizer reads as two tokens."""
        value = rng.randrange(3333) * 3 + (rng.randrange(3) if self.split is None else SPLITS.index(self.split))
        return f"{value:04d}"


@dataclass(frozen=True)
class Piece:
    """One sentence. `kind` is story, statement, question or answer; `task` names what a question tests."""

    text: str
    kind: str
    task: str = "story"


@dataclass(frozen=True)
class Item:
    """Something said that can be asked about. `lead` repeats the statement's own words up to the answer."""

    task: str
    question: str
    lead: str
    answer: str


@dataclass
class Document:
    """Builds one document sentence by sentence, and remembers what can be asked."""

    rng: Random
    words: Words = field(default_factory=Words)
    cast_size: int = 4

    def __post_init__(self) -> None:
        rng, words = self.rng, self.words
        names = list(words.names)
        rng.shuffle(names)
        self._cast = [
            (name, rng.choice(JOBS), rng.choice(words.places), rng.choice(ANIMALS), rng.choice(COLOURS))
            for name in names[: self.cast_size]
        ]
        self._coded = names[self.cast_size :]
        self._singers = list(words.places)
        self._objects = list(OBJECTS)
        self._variables = list(words.variables)
        for pool in (self._coded, self._singers, self._objects, self._variables):
            rng.shuffle(pool)
        self._values: list[tuple[str, str, int]] = []
        self._fruits = rng.sample(FRUITS, 3)
        self._votes: Counter[str] = Counter()
        self._passkey = False
        self.items: list[Item] = []

    def story(self) -> Piece:
        rng = self.rng
        (p, j, h, a, c), (q, qj, qh, _, _) = rng.sample(self._cast, 2)
        text = rng.choice(_STORY).format(
            p=p, j=j, h=h, a=a, c=c, q=q, qj=qj, qh=qh,
            time=rng.choice(_TIMES), weather=rng.choice(_WEATHER), goods=rng.choice(_GOODS),
            verb=rng.choice(_VERBS), place=rng.choice(self.words.places),
        )  # fmt: skip
        return Piece(text, "story")

    def fact(self) -> Piece | None:
        if not self._coded:
            return None
        name, number = self._coded.pop(), self.words.number(self.rng)
        self.items.append(Item("fact", f"What is the code of {name}?", f" Code of {name}", number))
        return Piece(f"Code of {name} {number}.", "statement", "fact")

    def hidden(self) -> Piece | None:
        if not self._objects:
            return None
        thing, place = self._objects.pop(), self.rng.choice(self.words.places)
        self.items.append(Item("hidden", f"Where is the {thing}?", f" Hidden {thing}", place))
        return Piece(f"Hidden {thing} {place}.", "statement", "hidden")

    def passkey(self) -> Piece | None:
        if self._passkey:
            return None
        self._passkey = True
        number = self.words.number(self.rng)
        self.items.append(Item("passkey", "What is the passkey?", " The passkey", number))
        return Piece(f"The passkey {number}.", "statement", "passkey")

    def variable(self, hops: int) -> Piece | None:
        """Set a variable to a number (`hops=0`), or to one that is already `hops - 1` steps from its number."""
        sources = [v for v in self._values if v[2] == hops - 1]
        if not self._variables or (hops and not sources):
            return None
        name = self._variables.pop()
        if hops:
            source, number, _ = self.rng.choice(sources)
        else:
            source = number = self.words.number(self.rng)
        self._values.append((name, number, hops))
        self.items.append(Item(f"hops{hops}", f"What is {name}?", f" Here {name}", number))
        return Piece(f"Here {name} {source}.", "statement", f"hops{hops}")

    def song(self, num_words: int = 6) -> Piece | None:
        if not self._singers:
            return None
        name = self._singers.pop()
        line = " ".join(self.rng.sample(SONG_WORDS, num_words))
        self.items.append(Item("song", f"Sing the song of {name}.", f" Song of {name}", line))
        return Piece(f"Song of {name} {line}.", "statement", "song")

    def vote(self) -> Piece:
        weights = (4, 2, 1)
        fruit = self.rng.choices(self._fruits, weights)[0]
        self._votes[fruit] += 1
        return Piece(f"{self.rng.choice(self.words.names)} votes for {fruit}.", "statement", "vote")

    def vote_item(self) -> Item | None:
        """The aggregation question, once a fruit leads by two votes or more."""
        counts = [*self._votes.most_common(2), ("", 0), ("", 0)]
        if counts[0][1] < counts[1][1] + 2:
            return None
        return Item("vote", "Which fruit has the most votes?", "", counts[0][0])


def ask(item: Item) -> tuple[Piece, Piece]:
    """A question and its answer, as text that follows any other piece."""
    return (
        Piece(f"Question: {item.question} Answer:{item.lead}", "question", item.task),
        Piece(f"{item.answer};", "answer", item.task),
    )


def split_tokens(text: str) -> list[str]:
    """Token strings of `text`; what the shipped tokenizer does, in plain Python for the training loop."""
    return re.findall(TOKEN_PATTERN, " " + re.sub(r"\s+", " ", text).strip())
