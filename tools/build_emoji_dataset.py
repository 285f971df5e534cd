"""Build the embedded emoji data set: 1,911 captioned 64x64 pictures in four parquet splits.

    python tools/build_emoji_dataset.py --output_dir sd_recipes/assets/emoji

The pictures are Noto emoji (Apache-2.0, Google) from the npm package `emoji-datasource-google`;
names, keywords and groups are from `emojibase-data` (MIT). Both are fetched with `npm pack`.
Flags are kept apart from everything else, so that a base model can be trained that has never
drawn one. One picture in 20 of either kind is held out, chosen by a hash of its code point, so
that the split does not depend on the order of the files.
"""

import argparse
import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import datasets

PACKAGES = ["emoji-datasource-google@16.0.0", "emojibase-data@17.0.0"]
HELD_OUT_ONE_IN = 20

FEATURES = datasets.Features(
    {
        "image": datasets.Image(),
        "text": datasets.Value("string"),
        "keywords": datasets.List(datasets.Value("string")),
        "category": datasets.Value("string"),
        "subcategory": datasets.Value("string"),
        "unicode": datasets.Value("string"),
    }
)


def fetch_packages(folder: Path) -> Path:
    """Download the two npm packages and unpack them under `folder`/<name>/package."""
    for package in PACKAGES:
        name = package.split("@")[0]
        reply = subprocess.run(
            ["npm", "pack", "--json", "--pack-destination", str(folder), package],
            check=True,
            capture_output=True,
            text=True,
        )
        archive = folder / json.loads(reply.stdout)[0]["filename"]
        with tarfile.open(archive) as tar:
            tar.extractall(folder / name, filter="data")
    return folder


def caption(label: str) -> str:
    """`flag: France` becomes `flag of France`: as a person would ask for it."""
    if label.startswith("flag: "):
        return "flag of " + label.removeprefix("flag: ")
    return label.replace(":", "")


def read_rows(folder: Path) -> list[dict]:
    """One row per picture. Skin-tone variants are left out, as they share the picture of their name."""

    def key(code: str) -> str:  # variation selectors differ between the two packages
        return code.upper().replace("-FE0F", "")

    names = {
        key(entry["hexcode"]): entry
        for entry in json.loads((folder / "emojibase-data/package/en/data.json").read_text(encoding="utf-8"))
    }
    rows = []
    pictures = folder / "emoji-datasource-google/package"
    for entry in json.loads((pictures / "emoji.json").read_text(encoding="utf-8")):
        named = names.get(key(entry["unified"]), {})
        rows.append(
            {
                "image": {
                    "bytes": (pictures / "img/google/64" / entry["image"]).read_bytes(),
                    "path": entry["image"],
                },
                "text": caption(named.get("label") or entry["name"].lower()),
                "keywords": named.get("tags", []),
                "category": entry["category"],
                "subcategory": entry["subcategory"],
                "unicode": entry["unified"],
            }
        )
    return sorted(rows, key=lambda row: row["unicode"])


def split_of(row: dict) -> str:
    held_out = int(hashlib.sha256(row["unicode"].encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0
    subject = "flags" if row["category"] == "Flags" else "train"
    return f"{subject}_heldout" if held_out else subject


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--packages_dir", type=Path, help="folder where both packages are already unpacked")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as temporary:
        rows = read_rows(args.packages_dir or fetch_packages(Path(temporary)))
    (args.output_dir / "data").mkdir(parents=True, exist_ok=True)
    for split in sorted({split_of(row) for row in rows}):
        chosen = [row for row in rows if split_of(row) == split]
        path = args.output_dir / "data" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(chosen, features=FEATURES).to_parquet(path)
        print(f"{path}: {len(chosen)} pictures, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
