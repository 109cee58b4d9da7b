"""Tokens against transformers' CLIPTokenizer, and what is said of a prompt that is cut."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
from latentrt.errors import CheckpointError
from latentrt.runtime.prompt import ClipTokenizer
from latentrt.runtime.tokenizer_files import clip_merges, clip_vocabulary
from transformers import CLIPTokenizer

MERGES = clip_merges()
VOCAB = clip_vocabulary(MERGES)


def config(pad: str) -> dict[str, object]:
    return {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
        "model_max_length": 77,
    }


def texts() -> list[str]:
    rng = random.Random(0)
    alphabet = "abcXYZ  019'.,!?-_<|>/\\\t\n\"éüßñ中文日本🙂🎨ﬁⅷ½́ı"
    noise = ["".join(rng.choices(alphabet, k=rng.randint(0, 60))) for _ in range(300)]
    return [
        "",
        " ",
        "a photo of an astronaut riding a horse on mars",
        "It's we'll THEY'RE I'd 'S",
        "hello! world!! !",
        "<|startoftext|> <|endoftext|> <|EndOfText|>",
        "naïve café, Straße, Ⅷ ½ ﬁ, e\u0301",
        "zero\u200bwidth \u00a0nbsp \r\n crlf",
        "word " * 80,
        "!" * 100,
        *noise,
    ]


@pytest.mark.parametrize("pad", ["<|endoftext|>", "!"])
def test_ids_are_those_of_transformers(pad: str, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text(json.dumps(VOCAB))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in MERGES))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config(pad)))
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    ours = ClipTokenizer(VOCAB, MERGES, config(pad))
    for text in texts():
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode([text])[0].tolist() == expected, repr(text)


def test_what_is_cut_is_quoted(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ClipTokenizer(VOCAB, MERGES, config("<|endoftext|>"))
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode(["cat " * 75 + "velvet elephant"])
    assert ids.shape == (1, 77)
    assert ids[0, -1] == VOCAB["<|endoftext|>"]
    assert "77 tokens and the text encoder reads 75; cut off: 'velvet elephant'" in caplog.text


def test_exactly_full_is_not_cut(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ClipTokenizer(VOCAB, MERGES, config("<|endoftext|>"))
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["cat " * 75])
    assert not caplog.records


def test_ten_thousand_characters_warn_in_a_few_words(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = ClipTokenizer(VOCAB, MERGES, config("<|endoftext|>"))
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["red " * 2500])
    assert "the prompt has 2500 tokens" in caplog.text
    assert len(caplog.text) < 600


def test_special_tokens_must_be_in_the_vocabulary() -> None:
    with pytest.raises(
        CheckpointError, match=r"pad_token '\[PAD\]' is not in its vocabulary of 49408 tokens"
    ):
        ClipTokenizer(VOCAB, MERGES, config("[PAD]"))


def test_no_prompts_give_no_rows() -> None:
    assert ClipTokenizer(VOCAB, MERGES, config("!")).encode([]).shape == (0, 77)


@pytest.mark.parametrize(
    ("vocab", "merges"),
    [
        (VOCAB, [*MERGES, ("not", "there")]),
        ({**VOCAB, "i": "3"}, MERGES),
        ({**VOCAB, "i": -3}, MERGES),
        ({**VOCAB, "i": None}, MERGES),
    ],
    ids=["merge", "text", "negative", "null"],
)
def test_tables_that_do_not_belong_together(vocab: Any, merges: Any) -> None:
    with pytest.raises(CheckpointError, match="vocabulary and merges do not belong together: "):
        ClipTokenizer(vocab, merges, config("!"))


@pytest.mark.parametrize("length", ["77", [77], float("nan"), {"tokens": 77}])
def test_a_length_that_is_no_number(length: object) -> None:
    with pytest.raises(CheckpointError, match=r"model_max_length is .*; it must be a whole number"):
        ClipTokenizer(VOCAB, MERGES, {**config("!"), "model_max_length": length})
