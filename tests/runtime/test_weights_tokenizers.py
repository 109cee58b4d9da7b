"""`runtime/tokenizer_files.py`: tokenizer tables: CLIP's own, and those of a folder in either format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.tiny_checkpoints import save_tokenizer, write_json
from latentrt.errors import CheckpointError
from latentrt.runtime.prompt import ClipTokenizer
from latentrt.runtime.tokenizer_files import END_TOKEN, clip_merges, clip_vocabulary, read_tokenizer
from transformers import CLIPTokenizer

Tiny = Callable[..., Path]


def test_clip_has_its_published_ids() -> None:
    """Ids of openai/clip-vit-large-patch14."""
    merges = clip_merges()
    vocab = clip_vocabulary(merges)
    assert (len(merges), len(vocab)) == (48894, 49408)
    assert (merges[0], merges[-1]) == (("i", "n"), ("jeky", "ll</w>"))
    expected = {"!": 0, "~": 93, "!</w>": 256, "a</w>": 320, "cat</w>": 2368, "photo</w>": 1125}
    expected |= {"of</w>": 539, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocab[token] for token in expected} == expected
    assert sorted(vocab.values()) == list(range(49408))


def test_the_same_text_has_the_same_ids_in_transformers(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad_token="!", merges=48894)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]


@pytest.mark.parametrize(("tokenizer", "pad"), [("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")])
def test_a_folder_is_read(tiny: Tiny, tokenizer: str, pad: str) -> None:
    files = read_tokenizer(tiny("sdxl") / tokenizer)
    assert files.vocab == clip_vocabulary(clip_merges()[:1000])
    assert list(files.merges) == clip_merges()[:1000]
    assert files.config["pad_token"] == pad
    assert files.config["model_max_length"] == 77


@pytest.mark.parametrize("paired", [True, False])
def test_tokenizer_json_says_the_same(tiny: Tiny, tmp_path: Path, paired: bool) -> None:
    """Newer files pair the merges, older ones join them by a space."""
    classic = read_tokenizer(tiny("sdxl") / "tokenizer")
    merges = [list(m) if paired else " ".join(m) for m in classic.merges]
    model = {"type": "BPE", "vocab": classic.vocab, "merges": merges}
    write_json(tmp_path / "tokenizer.json", {"model": model})
    token = {"content": "!", "lstrip": False, "normalized": True}
    write_json(tmp_path / "special_tokens_map.json", {"pad_token": token, "model_max_length": 3})
    write_json(tmp_path / "tokenizer_config.json", {"model_max_length": 77})
    files = read_tokenizer(tmp_path)
    assert files.vocab == classic.vocab
    assert list(files.merges) == list(classic.merges)
    assert files.config["pad_token"] == "!"
    assert files.config["model_max_length"] == 77


@pytest.mark.parametrize("decoder", [False, True])
def test_of_two_pad_tokens_the_one_that_transformers_takes(tmp_path: Path, decoder: bool) -> None:
    """SD 2.1 as published has two, and no added_tokens_decoder."""
    token = {"content": END_TOKEN, "lstrip": False, "normalized": False, "special": True}
    added = {"added_tokens_decoder": {"1513": token}} if decoder else {}
    save_tokenizer(tmp_path, pad_token="!", config={"pad_token": END_TOKEN, **added})
    theirs = CLIPTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token == (END_TOKEN if decoder else "!")
    assert read_tokenizer(tmp_path).config["pad_token"] == theirs.pad_token


def test_what_transformers_saves_is_read(tiny: Tiny, tmp_path: Path) -> None:
    CLIPTokenizer.from_pretrained(tiny("sdxl") / "tokenizer_2").save_pretrained(tmp_path)
    files = read_tokenizer(tmp_path)
    assert files.vocab == clip_vocabulary(clip_merges()[:1000])
    assert list(files.merges) == clip_merges()[:1000]
    assert files.config["pad_token"] == "!"


@pytest.fixture(params=["added_tokens_decoder", "added_tokens.json", "tokenizer.json", "both tokenizers"])
def taught(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tokenizer that was taught three tokens, in the files that transformers wrote of it over the years."""
    save_tokenizer(tmp_path / "plain", pad_token="!")
    names = ["<cat-toy>", "<S0>", "Zorg"]
    if request.param.endswith(("tokenizer.json", "tokenizers")):
        tokenizer = CLIPTokenizer.from_pretrained(tmp_path / "plain")
        tokenizer.add_tokens(names)
        tokenizer.save_pretrained(tmp_path / "both")
        if request.param == "both tokenizers":
            for name in ("vocab.json", "merges.txt"):
                shutil.copyfile(tmp_path / "plain" / name, tmp_path / "both" / name)
        return tmp_path / "both"
    if request.param == "added_tokens.json":
        write_json(tmp_path / "plain" / request.param, {name: 1514 + k for k, name in enumerate(names)})
        return tmp_path / "plain"
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        str(1514 + k): {"content": name, "special": False, "normalized": True, **flags}
        for k, name in enumerate(names)
    }
    for index, name in ((1512, "<|startoftext|>"), (1513, END_TOKEN), (0, "!")):
        decoder[str(index)] = {"content": name, "special": True, "normalized": index == 1513, **flags}
    decoder["1515"] |= {"special": True, "normalized": False, "single_word": True}
    save_tokenizer(tmp_path / "plain", pad_token="!", config={"added_tokens_decoder": decoder})
    return tmp_path / "plain"


def test_added_tokens_have_the_ids_of_transformers(taught: Path) -> None:
    files = read_tokenizer(taught)
    ours = ClipTokenizer(files.vocab, files.merges, files.config, files.added)
    theirs = CLIPTokenizer.from_pretrained(taught)
    assert ours.vocab_size == len(theirs) == 1517
    texts = [
        "a photo of <cat-toy>",
        "<CAT-TOY><S0> <s0>x",
        "Zorg zorgs ZORG<|EndOfText|>",
        "x<S0>y! <|endoftext|>!",
        "plain",
    ]
    for text in texts:
        expected = theirs(text, padding="max_length", max_length=77, truncation=True).input_ids
        assert ours.encode([text])[0].tolist() == expected, text
    assert 1514 in ours.encode(texts[:1])


@pytest.mark.parametrize("index", [1600, 5])
def test_an_added_token_has_to_follow_the_vocabulary(tmp_path: Path, index: int) -> None:
    save_tokenizer(tmp_path, pad_token="!")
    write_json(tmp_path / "added_tokens.json", {"<cat-toy>": index})
    files = read_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=rf"'<cat-toy>' has the id {index}, .* it comes to 1514"):
        ClipTokenizer(files.vocab, files.merges, files.config, files.added)


@pytest.mark.parametrize("decoder", [{"x": {"content": "a"}}, {"1514": "a"}, {"1514": {}}, ["a"], None])
def test_added_tokens_that_are_none_are_named(tmp_path: Path, decoder: object) -> None:
    save_tokenizer(tmp_path, pad_token="!", config={"added_tokens_decoder": decoder})
    with pytest.raises(CheckpointError, match=r"has the added token .*, which is none"):
        read_tokenizer(tmp_path)


def test_a_folder_without_a_tokenizer_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"no tokenizer: expected vocab.json and merges.txt, or tokenizer.json"
    ):
        read_tokenizer(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad_token="!")
    (tmp_path / "merges.txt").write_text("#version: 0.2\ni n\nt h e\n")
    with pytest.raises(CheckpointError, match=r"merges.txt is not a list of merges: line 3 is 't h e'"):
        read_tokenizer(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"vocab.json cannot be read as JSON"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "model",
    [
        {"type": "WordPiece", "vocab": {}},
        {"type": "BPE", "vocab": {}},
        {"type": "BPE", "vocab": [], "merges": []},
        {"type": "BPE", "vocab": {}, "merges": {}},
        {},
        [],
        None,
    ],
)
def test_another_kind_of_tokenizer_is_refused(tmp_path: Path, model: object) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(CheckpointError, match=r"tokenizer; CLIP's is 'BPE' with merges"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("merge", ["a", "a b c", ["a"], 3, None])
def test_a_merge_of_something_else_than_two_is_named(tmp_path: Path, merge: object) -> None:
    (tmp_path / "tokenizer.json").write_text(
        json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": [merge]}})
    )
    with pytest.raises(CheckpointError, match=r"tokenizer.json has the merge .*, not two symbols"):
        read_tokenizer(tmp_path)


def test_windows_line_ends_change_nothing(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, pad_token="!")
    unix = read_tokenizer(tmp_path).merges
    file = tmp_path / "merges.txt"
    file.write_bytes(file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_tokenizer(tmp_path).merges == unix
