"""CLIP's byte-pair tokenizer, cut to its first merges, as the two tokenizer folders of an SDXL checkpoint.

`python -m latentrt.bench.demo_model.tokenizer bpe_simple_vocab_16e6.txt.gz OUT` takes the published merge list
(in the open-clip-torch wheel) and writes `OUT/tokenizer` and `OUT/tokenizer_2`.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path

DEMO = Path(__file__).resolve().parents[2] / "runtime" / "demo"  # the shipped checkpoint, tokenizers included
MERGES = 3000
MAX_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
NOTICE = """MIT License

vocab.json and merges.txt are the first part of CLIP's byte-pair vocabulary (bpe_simple_vocab_16e6.txt).

Copyright (c) 2021 OpenAI

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def byte_symbols() -> list[str]:
    """One printable character per byte, in CLIP's order: printable bytes first, the others from U+0100 on."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = 256 - len(printable)
    return [chr(byte) for byte in printable] + [chr(256 + k) for k in range(others)]


def write_tokenizers(merge_list: Path, out: Path) -> None:
    """Write both tokenizer folders; the second pads with "!" as SDXL's does."""
    lines = gzip.decompress(merge_list.read_bytes()).decode("utf-8").split("\n")
    merges = lines[1 : 1 + MERGES]
    symbols = byte_symbols()
    tokens = symbols + [s + "</w>" for s in symbols] + ["".join(m.split()) for m in merges] + [START, END]
    vocabulary = json.dumps({token: k for k, token in enumerate(tokens)}, ensure_ascii=False)
    for name, pad in (("tokenizer", END), ("tokenizer_2", "!")):
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "vocab.json").write_text(vocabulary, encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
        special = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
        config = {
            **special,
            "add_prefix_space": False,
            "do_lower_case": True,
            "model_max_length": MAX_LENGTH,
            "tokenizer_class": "CLIPTokenizer",
        }
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
        (folder / "LICENSE").write_text(NOTICE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("merge_list", type=Path, help="bpe_simple_vocab_16e6.txt.gz")
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_tokenizers(options.merge_list, options.out)


if __name__ == "__main__":
    main()
