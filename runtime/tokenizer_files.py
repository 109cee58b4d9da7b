"""A tokenizer's tables: CLIP's byte-pair encoding as a vocabulary, an ordered list of merges and a config.

A diffusers folder brings its own; a single-file checkpoint brings none, so CLIP's full merges are shipped as
`data/clip_merges.txt.gz` and the vocabulary is rebuilt from them, as CLIP defines it: 256 byte symbols, the
same 256 ending a word, one entry for each merge, then the start and end tokens.
Source: openai/CLIP, `clip/simple_tokenizer.py`; licence in `data/clip_merges.LICENSE`.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .json_file import read_json

__all__ = [
    "END_OF_WORD",
    "END_TOKEN",
    "START_TOKEN",
    "AddedTokens",
    "TokenizerFiles",
    "clip_merges",
    "clip_vocabulary",
    "read_tokenizer",
]

START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"
END_OF_WORD = "</w>"

_FLAGS = ("special", "normalized", "lstrip", "rstrip", "single_word")

Merge = tuple[str, str]
AddedTokens = Mapping[int, Mapping[str, Any]]
"""id -> `content` and flags of tokens beside the merges, as `tokenizers.AddedToken` takes them."""


@dataclass(frozen=True)
class TokenizerFiles:
    """What it takes to build a CLIP tokenizer.

    Attributes:
        vocab: token -> id.
        merges: pairs in order of priority, the first merges first.
        config: pad_token, model_max_length and the like; token entries are plain strings.
        added: tokens beside the merges, such as those of textual inversion. Special ones may be among them.
    """

    vocab: Mapping[str, int]
    merges: Sequence[Merge]
    config: Mapping[str, Any]
    added: AddedTokens = field(default_factory=dict)


def byte_symbols() -> list[str]:
    """CLIP's 256 printable stand-ins for bytes, in vocabulary order: printable bytes first, then the rest
    shifted to U+0100 and up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    others = 256 - len(printable)
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(others)]


def clip_merges() -> list[Merge]:
    """CLIP's 48,894 merges."""
    data = (files(__package__) / "data" / "clip_merges.txt.gz").read_bytes()
    return _parse_merges(gzip.decompress(data).decode("utf-8"))


def clip_vocabulary(merges: Sequence[Merge]) -> dict[str, int]:
    """token -> id for these merges; 49,408 tokens for all of CLIP's."""
    symbols = byte_symbols()
    ending = [symbol + END_OF_WORD for symbol in symbols]
    tokens = [*symbols, *ending, *(a + b for a, b in merges), START_TOKEN, END_TOKEN]
    return {token: index for index, token in enumerate(tokens)}


def read_tokenizer(folder: Path) -> TokenizerFiles:
    """The tokenizer of a diffusers folder: `vocab.json` and `merges.txt`, or else `tokenizer.json`.

    Raises:
        CheckpointError: neither is there, or a file is not what it should be.
    """
    vocab_file, merges_file, both = folder / "vocab.json", folder / "merges.txt", folder / "tokenizer.json"
    config = _read_config(folder)
    added = _added_tokens(folder, config)
    if vocab_file.is_file() and merges_file.is_file():
        vocab = read_json(vocab_file)
        try:
            merges = _parse_merges(merges_file.read_text("utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{merges_file} is not a list of merges: {error}") from error
        return TokenizerFiles(vocab, merges, config, added)
    if both.is_file():
        return _read_both(both, config, added)
    raise CheckpointError(f"{folder} has no tokenizer: expected vocab.json and merges.txt, or tokenizer.json")


def _read_config(folder: Path) -> dict[str, Any]:
    """`tokenizer_config.json`. Where it is of a time before `added_tokens_decoder`, the special tokens are those of
    `special_tokens_map.json`, as for transformers: SD 2.1's two files name different tokens to pad with."""
    config, special = (
        read_json(folder / name) if (folder / name).is_file() else {}
        for name in ("tokenizer_config.json", "special_tokens_map.json")
    )
    if "added_tokens_decoder" not in config:
        config |= {key: value for key, value in special.items() if key.endswith("_token")}
    return {key: _token_text(value) for key, value in config.items()}


def _added_tokens(folder: Path, config: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    """From where transformers of all times put them: `added_tokens_decoder` of the config; else `added_tokens.json`,
    which has ids alone, and `tokenizer.json`."""
    found: list[tuple[Any, Any]] = []
    if "added_tokens_decoder" in config:
        decoder = config["added_tokens_decoder"]
        found += decoder.items() if isinstance(decoder, dict) else [(None, decoder)]
    else:
        named = [value for key, value in config.items() if key.endswith("_token")]
        if (file := folder / "added_tokens.json").is_file():
            for token, index in read_json(file).items():
                special = token in named
                found.append((index, {"content": token, "special": special, "normalized": not special}))
        if (file := folder / "tokenizer.json").is_file():
            listed = read_json(file).get("added_tokens")
            for token in listed if isinstance(listed, list) else []:
                found.append((token.get("id") if isinstance(token, dict) else None, token))
    added = {}
    for index, token in found:
        try:
            flags = {name: bool(token[name]) for name in _FLAGS if name in token}
            added[int(index)] = {"content": str(token["content"]), **flags}
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the tokenizer in {folder} has the added token {token!r} with the id {index!r}, which is none"
            ) from error
    return added


def _read_both(file: Path, config: Mapping[str, Any], added: AddedTokens) -> TokenizerFiles:
    """`tokenizer.json`, as the tokenizers library writes it."""
    model = read_json(file).get("model")
    model = model if isinstance(model, dict) else {}
    vocab, merges = model.get("vocab"), model.get("merges")
    if model.get("type") != "BPE" or not isinstance(vocab, dict) or not isinstance(merges, list):
        raise CheckpointError(f"{file} holds a {model.get('type')!r} tokenizer; CLIP's is 'BPE' with merges")
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in merges]
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            raise CheckpointError(f"{file} has the merge {pair!r}, not two symbols")
    return TokenizerFiles(vocab, [(a, b) for a, b in pairs], config, added)


def _parse_merges(text: str) -> list[Merge]:
    """One pair a line; a first line `#version: ...` and empty lines are skipped."""
    merges: list[Merge] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        pair = line.split()
        if len(pair) != 2:
            raise ValueError(f"line {number} is {line!r}, not two symbols")
        merges.append((pair[0], pair[1]))
    return merges


def _token_text(value: Any) -> Any:
    """Saved tokens are strings or `{"content": ..., "lstrip": ...}`; both become strings."""
    return value["content"] if isinstance(value, dict) and "content" in value else value
