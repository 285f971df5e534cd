"""`sd-recipes convert IN OUT`: weights in .ckpt or .bin files to safetensors, without running code that they may hold.

Tensors that were saved from a compiled or otherwise wrapped model get their plain names.

    sd-recipes convert model.ckpt model.safetensors
    sd-recipes convert my_pipeline my_pipeline-safetensors

IN is a file, or a pipeline's folder or Hub id, of which everything but pickles is copied. Weights stay in their type.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import shutil
from pathlib import Path
from typing import NoReturn

from huggingface_hub import snapshot_download
from safetensors.torch import save_file

from sd_recipes.errors import RecipeError, one_line
from sd_recipes.model.loading import unwrapped
from sd_recipes.model.weight_files import PICKLES, UnreadableWeights, open_weights
from sd_recipes.runtime.console import say

logger = logging.getLogger(__name__)

# Weights in a pipeline's folder: of diffusers, and of transformers, which calls them otherwise in safetensors.
PIPELINE_WEIGHTS = re.compile(r"(diffusion_pytorch_model|pytorch_model)((?:\.\w+?)?(?:-\d+-of-\d+)?)\.bin")
SAFE_WEIGHTS = re.compile(r"(diffusion_pytorch_model|model)(?:\.\w+?)?(?:-\d+-of-\d+)?\.safetensors")
SAFE_INDEX = re.compile(r"(diffusion_pytorch_model|model)\.safetensors\.index(?:\.\w+)?\.json")
INDEX = re.compile(r"(diffusion_pytorch_model|pytorch_model)\.bin\.index((?:\.\w+)?)\.json")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise RecipeError(f"{message}: sd-recipes convert IN OUT")


def main(argv: list[str]) -> None:
    """Convert by the command line `argv`. Raises RecipeError."""
    parser = Parser("sd-recipes convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="IN", help="a .ckpt, .pt or .bin file, a pipeline's folder, or a Hub id")
    parser.add_argument("target", metavar="OUT", help="the .safetensors file, or the folder, to write")
    arguments = parser.parse_args(argv)
    convert(arguments.source, arguments.target)


def convert(source: str, target: str) -> None:
    """Convert the file, folder or Hub repository `source` to `target`, which must not exist yet. Raises RecipeError."""
    path, output = Path(source).expanduser(), Path(target).expanduser()
    if output.exists():
        raise RecipeError(f"{output} exists already: choose another name for the converted model")
    if path.is_file():
        if output.suffix != ".safetensors":
            raise RecipeError(f"{output} is to hold the weights of one file: end its name in .safetensors")
        convert_file(path, output)
        say(f"converted       {output}")
        return
    if not path.is_dir():
        path = _download(source)
    convert_folder(path, output)
    say(f"converted       {output}")


def _download(source: str) -> Path:
    if source.count("/") != 1 or Path(source).suffix in PICKLES:
        raise RecipeError(f"{source}: no such file or folder")
    try:
        return Path(snapshot_download(source, allow_patterns=["*/*.json", "*/*.txt", "*/*.bin", "*.json"]))
    # huggingface_hub reports a missing, forbidden or unreachable repository with errors of several bases.
    except Exception as error:
        raise RecipeError(f"{source}: no such folder, and as a Hub id: {one_line(error)}") from error


def convert_file(path: Path, output: Path) -> None:
    """Write the tensors of a file to safetensors. Raises RecipeError; the output is there whole, or not at all."""
    try:
        weights = open_weights(path, path.name, allow_pickle=True)
    except UnreadableWeights as error:
        raise RecipeError(f"{path} {error}") from error
    if not weights.shapes:
        raise RecipeError(f"{path} holds no tensors: name a file of weights")
    # Copies, since safetensors refuses tensors that share memory, as tied weights do.
    tensors = {unwrapped(name): weights.read(name).clone().contiguous() for name in weights.shapes}
    output.parent.mkdir(parents=True, exist_ok=True)
    partial = output.with_name(f"{output.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        partial.rename(output)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RecipeError(f"{output} cannot be written ({one_line(error)}): make room, or choose another") from error


def convert_folder(folder: Path, output: Path) -> None:
    """Copy a pipeline, its weights as safetensors. Raises RecipeError; the output is there whole, or not at all."""
    pickled = any(PIPELINE_WEIGHTS.fullmatch(path.name) for path in folder.rglob("*.bin"))
    if not pickled and not any(map(has_wrapped_names, folder.rglob("*.safetensors"))):
        raise RecipeError(
            f"{folder} holds no weights in .bin files, and none under the names of a wrapped model: there is nothing "
            "to convert"
        )
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                _convert_one(path, partial / path.relative_to(folder).parent)
        partial.rename(output)
    except OSError as error:
        raise RecipeError(f"{output} cannot be written ({one_line(error)}): make room, or choose another") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def has_wrapped_names(path: Path) -> bool:
    """Whether a pipeline's weights, in one file, are named as within a wrapper. Raises RecipeError."""
    if not SAFE_WEIGHTS.fullmatch(path.name):
        return False
    try:
        return any(unwrapped(name) != name for name in open_weights(path, path.name, allow_pickle=False).shapes)
    except UnreadableWeights as error:
        raise RecipeError(f"{path} {error}") from error


def _convert_one(path: Path, to: Path) -> None:
    to.mkdir(parents=True, exist_ok=True)
    if has_wrapped_names(path):
        convert_file(path, to / path.name)
    elif match := PIPELINE_WEIGHTS.fullmatch(path.name):
        convert_file(path, to / f"{_stem(match[1])}{match[2]}.safetensors")
    elif (match := INDEX.fullmatch(path.name)) or SAFE_INDEX.fullmatch(path.name):
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            files = index["weight_map"].items()
            index["weight_map"] = {unwrapped(name): _safetensors_name(file) for name, file in files}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"{path} is no index of shards ({one_line(error, 100)}): copy it again") from error
        text = json.dumps(index, indent=2) + "\n"
        name = f"{_stem(match[1])}.safetensors.index{match[2]}.json" if match else path.name
        (to / name).write_text(text, encoding="utf-8")
    elif path.suffix in PICKLES:
        logger.warning("%s is left out: it is a pickle, and no weights of a pipeline.", path)
    else:
        shutil.copyfile(path, to / path.name)


def _safetensors_name(file: str) -> str:
    match = PIPELINE_WEIGHTS.fullmatch(file)
    return f"{_stem(match[1])}{match[2]}.safetensors" if match else file


def _stem(pickled: str) -> str:
    """Of a weight file's name in safetensors."""
    return "model" if pickled == "pytorch_model" else pickled
