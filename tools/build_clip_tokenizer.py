"""Build the embedded CLIP tokenizer from the vocabulary in the wheel of open_clip_torch.

pip download --no-deps open_clip_torch==3.3.0
python tools/build_clip_tokenizer.py --wheel open_clip_torch-3.3.0-py3-none-any.whl

The vocabulary is a list of merges, the same file that came with CLIP. Its tokens are numbered as CLIP numbers them: the
256 bytes, the same at the end of a word, one token for each merge, and the two special ones.
"""

from __future__ import annotations

import argparse
import gzip
import json
import zipfile
from pathlib import Path

from transformers.convert_slow_tokenizer import bytes_to_unicode

VOCABULARY = "open_clip/bpe_simple_vocab_16e6.txt.gz"
LICENSE = "open_clip_torch-3.3.0.dist-info/licenses/LICENSE"
NUM_TOKENS = 49408


def read_merges(packed: bytes) -> list[str]:
    """Those that CLIP uses: after a line with the version, as many as its number of tokens leaves room for."""
    lines = gzip.decompress(packed).decode().splitlines()
    return lines[1 : 1 + NUM_TOKENS - 2 * 256 - 2]


def vocabulary(merges: list[str]) -> dict[str, int]:
    characters = list(bytes_to_unicode().values())
    tokens = [
        *characters,
        *(f"{character}</w>" for character in characters),
        *(merge.replace(" ", "") for merge in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    assert len(set(tokens)) == NUM_TOKENS
    return {token: number for number, token in enumerate(tokens)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, default=Path("sd_recipes/assets/clip-tokenizer"))
    arguments = parser.parse_args()
    with zipfile.ZipFile(arguments.wheel) as wheel:
        merges = read_merges(wheel.read(VOCABULARY))
        licence = wheel.read(LICENSE).decode()
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    files = {
        "vocab.json": json.dumps(vocabulary(merges), ensure_ascii=False, separators=(",", ":")) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *merges]) + "\n",
        "LICENSE-MIT": licence,
    }
    for name, content in files.items():
        (arguments.output_dir / name).write_text(content, encoding="utf-8")


if __name__ == "__main__":
    main()
