"""Prompts become token ids.

Each CLIP text encoder has a byte-pair tokenizer of its own (SDXL's two differ in how they pad). Text is
lower-cased and split as in OpenAI's CLIP; a prompt longer than the encoder's context is cut, and a warning
quotes what was cut.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from textwrap import shorten
from types import MappingProxyType
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from torch import Tensor

from ..errors import CheckpointError
from .tokenizer_files import END_OF_WORD, END_TOKEN, START_TOKEN, AddedTokens

__all__ = ["ClipTokenizer"]

_log = logging.getLogger(__name__)

# What a token is where the configuration does not say.
_SPECIAL = {"bos_token": START_TOKEN, "eos_token": END_TOKEN, "pad_token": END_TOKEN, "unk_token": END_TOKEN}

_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class ClipTokenizer:
    """CLIP's byte-pair encoding, padded to the encoder's context.

    Args:
        vocab: token -> id.
        merges: pairs in order of rank.
        config: as `TokenizerFiles` has it: special tokens and `model_max_length`.
        added: tokens beside the merges, by their ids, which go on where those of the vocabulary end.

    Raises:
        CheckpointError: the tables do not belong together, or a special token is not in the vocabulary.
    """

    def __init__(
        self,
        vocab: Mapping[str, int],
        merges: Sequence[tuple[str, str]],
        config: Mapping[str, Any],
        added: AddedTokens = MappingProxyType({}),
    ) -> None:
        tokens = _SPECIAL | {role: str(config[role]) for role in _SPECIAL if config.get(role) is not None}
        start, end, pad, unknown = tokens.values()
        names = {token["content"] for token in added.values()}
        for role, token in tokens.items():
            if token not in vocab and token not in names:
                raise CheckpointError(
                    f"the tokenizer's {role} {token!r} is not in its vocabulary of {len(vocab)} tokens; "
                    "the tokenizer files do not belong together"
                )
        backend = _backend(vocab, merges, unknown)
        backend.add_tokens([AddedToken(**token) for _, token in sorted(added.items())])
        special = [token for token in dict.fromkeys((start, end, unknown, pad)) if token not in names]
        backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
        ids = backend.get_vocab(with_added_tokens=True)
        for index, fields in added.items():
            name = fields["content"]
            if ids.get(name) != index:
                raise CheckpointError(
                    f"the tokenizer's added token {name!r} has the id {index}, and after a vocabulary of {len(vocab)} "
                    f"tokens it comes to {ids.get(name)}; the tokenizer files do not belong together"
                )
        self._backend = backend
        self._start, self.end, self._pad = ids[start], ids[end], ids[pad]
        self.vocab_size = max(ids.values()) + 1
        length = config.get("model_max_length") or 77
        if not isinstance(length, (int, float)) or math.isnan(length):
            raise CheckpointError(
                f"the tokenizer's model_max_length is {length!r}; it must be a whole number"
            )
        # Some configurations carry 1e30, which stands for "not set".
        self.context = int(length) if length <= 1024 else 77

    def equals(self, other: ClipTokenizer) -> bool:
        """Whether both give every prompt the same ids."""
        return (self._pad, self.context, self._backend.to_str()) == (
            other._pad,
            other.context,
            other._backend.to_str(),
        )

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Token ids of each prompt.

        Returns:
            int64 `[len(prompts), context]`: start token, text, end token, padding.
        """
        rows = []
        for prompt in prompts:
            text = self._backend.encode(prompt, add_special_tokens=False).ids
            kept, cut = text[: self.context - 2], text[self.context - 2 :]
            if cut:
                _log.warning(
                    "the prompt has %d tokens and the text encoder reads %d; cut off: %r",
                    len(text),
                    self.context - 2,
                    shorten(self.decode(cut), 200, placeholder=" ..."),
                )
            row = [self._start, *kept, self.end]
            rows.append(row + [self._pad] * (self.context - len(row)))
        return torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), self.context)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, with single spaces between words."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=False)
        return text.replace(END_OF_WORD, " ").strip()


def _backend(
    vocab: Mapping[str, int], merges: Sequence[tuple[str, str]], unknown: str
) -> tokenizers.Tokenizer:
    """CLIP's encoding of text without added or special tokens.

    Raises:
        CheckpointError: the tables do not belong together.
    """
    try:
        bpe = models.BPE(
            vocab=dict(vocab),
            merges=list(merges),
            continuing_subword_prefix="",
            end_of_word_suffix=END_OF_WORD,
            unk_token=unknown,
        )
    except Exception as error:  # the library's errors have no base of their own
        raise CheckpointError(
            f"the tokenizer's vocabulary and merges do not belong together: {str(error).splitlines()[0]}"
        ) from error
    backend = tokenizers.Tokenizer(bpe)
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    return backend
