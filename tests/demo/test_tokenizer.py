from random import Random

import pytest
from transformers import AutoTokenizer

from kvplan.demo.prompts import TASKS, make_record
from kvplan.demo.stream import encode
from kvplan.demo.tokenizer import build_tokenizer
from kvplan.demo.world import Words, vocabulary


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def texts(num_tokens=400):
    for task in TASKS:
        record = make_record(f"tokenizer-{task}", Words(), task, num_tokens)
        yield [m["content"] for m in record["messages"]] if "messages" in record else [record["prompt"]]


def test_it_encodes_as_the_training_stream_does(tokenizer):
    for pieces in texts():
        text = " ".join(pieces)
        assert tokenizer.encode(text, add_special_tokens=False) == encode(text)


def test_pieces_encoded_apart_are_the_whole(tokenizer):
    for pieces in texts():
        apart = [i for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]
        assert [2, *apart] == tokenizer.encode(" ".join(pieces))


def test_text_comes_back(tokenizer):
    for pieces in texts():
        text = " ".join(pieces)
        assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text


def test_random_tokens_come_back(tokenizer):
    rng, words = Random(0), [t for t in vocabulary()[4:] if t.startswith(" ") and t[1].isalpha()]
    for _ in range(20):
        text = "".join(rng.choices(words, k=50)).strip()
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_whitespace_does_not_matter(tokenizer):
    assert tokenizer.encode("  The \n\n cat\t") == tokenizer.encode("The cat")


def test_unknown_words_become_unk(tokenizer):
    assert 1 in tokenizer.encode("Zanzibar")


def test_special_tokens(tokenizer):
    assert len(tokenizer) == len(vocabulary())
    ids = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids == (0, 1, 2, 3)
    assert (tokenizer.padding_side, tokenizer.model_max_length) == ("left", 2048)


def test_it_survives_saving(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded, text = AutoTokenizer.from_pretrained(tmp_path), "Code of Ala 0471. Here ka 9912."
    assert loaded.encode(text) == tokenizer.encode(text)
    assert loaded.decode(loaded.encode(text), skip_special_tokens=True) == text
    assert loaded.padding_side == "left"
