"""What a model's folder or file is, by its JSON files and its tensors' names and shapes; no weights are read."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sd_recipes.assets import Generation
from sd_recipes.model.distilled import LCM
from sd_recipes.model.loading import unwrapped
from sd_recipes.model.weight_files import Shape

PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
ONLY_OF_XL = ("text_encoder_2", "tokenizer_2")
NOT_YET = "only Stable Diffusion 1, 2 and XL are trained here so far: choose a model that was made from one of them"
REFINER_WIDTH = 2560  # of what the refiner's UNet takes besides the text; the base's takes 2816
# By the channels that the UNet takes: the latents' four, and others that this program has nothing to put into.
OTHER_INPUTS = {
    5: "a depth-to-image model (its UNet takes 5 channels: latents and a depth map)",
    7: "an upscaling model (its UNet takes 7 channels: latents and a small picture)",
    8: "an instruct-pix2pix model (its UNet takes 8 channels: latents of two pictures)",
    9: "an inpainting model (its UNet takes 9 channels: latents, a mask and the masked picture)",
}
PLAIN = "text-to-image training needs the plain model that it was made from: choose that one"
REFINER = "the refiner of SDXL, which only finishes pictures"


@dataclass(frozen=True)
class Recognised:
    """What a folder or file is, in words, and which parts can be taken from it; if there are none, what to do."""

    words: str
    parts: frozenset[str] = frozenset()
    way_out: str = ""
    generation: Generation = 1  # which a file's own tensors tell apart; of a folder, whether it is XL

    @property
    def missing(self) -> tuple[str, ...]:
        """The parts that a whole model of its generation has besides."""
        wanted = (part for part in PARTS if self.generation == "XL" or part not in ONLY_OF_XL)
        return tuple(part for part in wanted if part not in self.parts)


def of_tensors(shapes: Mapping[str, Shape]) -> Recognised:
    """What a file of weights holds."""
    plain = {unwrapped(name): shape for name, shape in shapes.items()}
    for recognise in (_add_on, _unet_of_another_kind, _other_model, _stable_diffusion):
        if recognised := recognise(plain):
            return recognised
    some = ", ".join(sorted(shapes)[:2])
    words = f"no model that is known here ({len(shapes)} tensors, such as {some})" if some else "a file without tensors"
    return Recognised(words, way_out="name a checkpoint of Stable Diffusion 1, 2 or XL")


def _has(shapes: Mapping[str, Shape], *patterns: str) -> bool:
    """Whether a name begins with one of the regular expressions."""
    return any(re.match(pattern, name) for pattern in patterns for name in shapes)


def _add_on(shapes: Mapping[str, Shape]) -> Recognised | None:
    """Files that change a model or are put next to one."""
    adapters = r".*(lora[_.](A|B|up|down|linear|mid)|\.lora\.|_lora\.|hada_w[12]|lokr_w[12]|oft_blocks|dora_scale)"
    if _has(shapes, adapters):
        return Recognised(
            "a LoRA (small changes to a model, not a model)",
            way_out="name the model that it was trained on, and give the LoRA as --lora_weights",
        )
    vectors = bool(shapes) and len(shapes) <= 4 and all(len(shape) <= 2 for shape in shapes.values())
    if _has(shapes, "emb_params", "string_to_param") or (vectors and not _has(shapes, r".*\.")):
        return Recognised(
            "a textual-inversion embedding (vectors for a new word, not a model)",
            way_out="name the model that it was trained on",
        )
    add_ons = {
        "a ControlNet": ("control_model\\.", "controlnet_", "input_hint_block", "control_net"),
        "a T2I-Adapter": ("adapter\\.body", "body\\.\\d"),
        "an IP-Adapter": ("ip_adapter\\.", "image_proj\\."),
        "a motion module": (".*motion_modules\\.",),
        "a hypernetwork": ("\\d+\\.\\d+\\.linear",),
    }
    for words, patterns in add_ons.items():
        if _has(shapes, *patterns):
            return Recognised(f"{words}, which works next to a model", way_out="name the model itself")
    return None


def _other_model(shapes: Mapping[str, Shape]) -> Recognised | None:
    """Models of other families, whole or without their text encoders."""
    inside = r"(model\.diffusion_model\.)?"
    if _has(shapes, r"conditioner\.embedders\.0\.model\.") or _added_width(shapes) == REFINER_WIDTH:
        return _refiner()
    if _has(shapes, r"edm_mean$", r"edm_vpred\.sigma_max$"):
        return Recognised("a variant of SDXL that was trained by EDM (Playground v2.5, CosXL)", way_out=NOT_YET)
    if _has(shapes, r".*\.time_stack\."):
        return Recognised("Stable Video Diffusion", way_out=NOT_YET)
    if _has(shapes, rf"{inside}joint_blocks\.", r"transformer_blocks\.0\.norm1_context"):
        return Recognised("Stable Diffusion 3", way_out=NOT_YET)
    if _has(shapes, rf"{inside}(double_blocks|single_blocks)\.", r"single_transformer_blocks\."):
        return Recognised("Flux", way_out=NOT_YET)
    if _has(shapes, r"model\.diffusion_model\.") and not _has(shapes, r"model\.diffusion_model\.(input_blocks|out)"):
        return Recognised("a diffusion model without Stable Diffusion's UNet", way_out=NOT_YET)
    return None


def _refiner() -> Recognised:
    return Recognised(REFINER, way_out="choose the base model of SDXL, or one that was made from it")


def _latent_consistency() -> Recognised:
    way_out = "its UNet takes the guidance scale besides, which is not known here: choose the model it was made from"
    return Recognised(f"{LCM}, distilled to draw in a few steps", way_out=way_out)


def _added_width(shapes: Mapping[str, Shape]) -> int | None:
    """How wide the condition is that SDXL's UNet takes besides the text: sizes, and a second text state."""
    names = ("model.diffusion_model.label_emb.0.0.weight", "label_emb.0.0.weight", "add_embedding.linear_1.weight")
    return next((shapes[name][-1] for name in names if shapes.get(name)), None)


def _unet_of_another_kind(shapes: Mapping[str, Shape]) -> Recognised | None:
    first = shapes.get("model.diffusion_model.input_blocks.0.0.weight") or shapes.get("input_blocks.0.0.weight")
    if first is None and _has(shapes, "time_embedding"):
        first = shapes.get("conv_in.weight")
    if _has(shapes, r"embedder\.model\.", r"noise_augmentor\."):
        return Recognised("an image-variation model (unCLIP), which takes a picture", way_out=PLAIN)
    if first and len(first) == 4 and first[1] in OTHER_INPUTS:
        return Recognised(OTHER_INPUTS[first[1]], way_out=PLAIN)
    if _has(shapes, r"(model\.diffusion_model\.)?time_embed\.cond_proj\.", r"time_embedding\.cond_proj\."):
        return _latent_consistency()
    return None


def _stable_diffusion(shapes: Mapping[str, Shape]) -> Recognised | None:
    has_unet = _has(shapes, r"model\.diffusion_model\.", r"input_blocks\.") or (
        _has(shapes, r"time_embedding\.") and _has(shapes, r"down_blocks\.")
    )
    has_vae = _has(shapes, r"first_stage_model\.", r"vae\.") or (
        not has_unet and _has(shapes, r"(encoder|decoder)\.(down|up|mid|down_blocks|up_blocks|mid_block)\.")
    )
    has_open_clip = _has(shapes, r"cond_stage_model\.model\.")
    in_sdxl = r"conditioner\.embedders\.0\.transformer\."
    has_text = has_open_clip or _has(
        shapes, r"cond_stage_model\.transformer\.", in_sdxl, r"text_model\.", r"encoder\.layers\."
    )
    has_second = _has(shapes, r"conditioner\.embedders\.1\.model\.")
    if not has_unet and _has(shapes, r"model_ema\."):
        return Recognised(
            "a checkpoint that holds the UNet only as averages (model_ema.), without their names",
            way_out="choose the file that has its plain weights",
        )
    there = {"unet": has_unet, "vae": has_vae, "text_encoder": has_text, "text_encoder_2": has_second}
    found = [part for part, is_there in there.items() if is_there]
    if not found:
        return None
    is_xl = has_second or _has(shapes, in_sdxl) or (has_unet and _added_width(shapes) is not None)
    generation: Generation = "XL" if is_xl else 2 if has_open_clip or 1024 in _text_widths(shapes) else 1
    # And what follows from them.
    parts = {*found, *(part.replace("text_encoder", "tokenizer") for part in found if part.startswith("text_encoder"))}
    if has_unet and len(found) > 1:
        parts.add("scheduler")
    if len(found) == (4 if is_xl else 3):
        words = f"a checkpoint of Stable Diffusion {generation} in one file"
    else:
        names = {
            "unet": "a UNet",
            "vae": "a VAE",
            "text_encoder": "a text encoder",
            "text_encoder_2": "a second text encoder",
        }
        some = " and ".join(names[part] for part in found)
        words = f"{some} of SDXL" if is_xl else some
        words += " alone" if len(found) == 1 else ""
    return Recognised(words, frozenset(parts), "", generation)


def _text_widths(shapes: Mapping[str, Shape]) -> set[int]:
    """Widths of the text states that a UNet attends to."""
    return {shape[-1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}


def of_pipeline(index: Mapping[str, Any]) -> Recognised:
    """What a pipeline in diffusers format is, by its model_index.json."""
    name = str(index.get("_class_name", ""))
    present = {part for part, value in index.items() if isinstance(value, list) and value and value[0] is not None}
    is_xl = generation_of(present) == "XL" or "XL" in name
    if is_xl and "text_encoder" in index and "text_encoder" not in present:
        return _refiner()
    if "transformer" in present or "prior" in present or not present & set(PARTS):
        return Recognised(f"a model of another family ({name})", way_out=NOT_YET)
    return Recognised("a pipeline", frozenset(present & set(PARTS)), generation="XL" if is_xl else 1)


def of_unet(config: Mapping[str, Any]) -> Recognised | None:
    """What a pretrained UNet's configuration says of the model, if it is of another kind than those trained here."""
    if is_xl_unet(config) and config.get("projection_class_embeddings_input_dim") == REFINER_WIDTH:
        return _refiner()
    if config.get("time_cond_proj_dim") is not None:  # for the guidance scale
        return _latent_consistency()
    if config.get("in_channels") in OTHER_INPUTS:
        return Recognised(OTHER_INPUTS[config["in_channels"]], way_out=PLAIN)
    if config.get("class_embed_type") == "projection":
        return Recognised("an image-variation model (unCLIP), which takes a picture", way_out=PLAIN)
    return None


def is_xl_unet(config: Mapping[str, Any]) -> bool:
    """Whether a UNet of that configuration takes sizes and a second text state, as SDXL's do."""
    return config.get("addition_embed_type") == "text_time"


def of_part(config: Mapping[str, Any]) -> Recognised:
    """What a folder with a `config.json` of its own is: one part of a pipeline."""
    name = str(config.get("_class_name") or (config.get("architectures") or [""])[0])
    if name == "UNet2DConditionModel":
        generation: Generation = "XL" if is_xl_unet(config) else 1
        return of_unet(config) or Recognised("a UNet alone", frozenset({"unet"}), generation=generation)
    if name == "AutoencoderKL":
        return Recognised("a VAE alone", frozenset({"vae"}))
    if name in ("CLIPTextModel", "CLIPModel", "CLIPTextModelWithProjection"):
        return Recognised("a text encoder alone", frozenset({"text_encoder"}))
    if "ControlNet" in name:
        return Recognised("a ControlNet, which works next to a model", way_out="name the model itself")
    words = f"a model of the class {name}" if name else "no model (its config.json names no class)"
    return Recognised(words, way_out=NOT_YET)


def generation_of(parts: Collection[str]) -> Generation:
    """Of a folder by its parts; those of Stable Diffusion 1 and 2 need no telling apart, for they say what they are."""
    return "XL" if "text_encoder_2" in parts else 1


def of_plain_folder(folder: Path) -> Recognised:
    """What a folder without a pipeline's files is, and where the model may be that is meant."""
    if (folder / "adapter_config.json").is_file() or any(folder.glob("pytorch_lora_weights.*")):
        return Recognised(
            "the folder of a LoRA", way_out="name the model that it was trained on, and give this as --lora_weights"
        )
    if present := frozenset(part for part in PARTS if (folder / part).is_dir()):
        words = f"a folder with {', '.join(part + '/' for part in PARTS if part in present)}"
        return Recognised(words, present, generation=generation_of(present))
    # Of a clone in a folder of its own, of several models, and of a Hub model in the cache.
    depths = ("*", "*/*", "*/*/*")
    inside = sorted({path.parent for depth in depths for path in folder.glob(f"{depth}/model_index.json")})
    if inside:
        return Recognised("a folder around a pipeline", way_out=f"name the pipeline: {inside[-1]}")
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt") and path.is_file())
    if files:
        others = f" (or another of its {len(files)} files)" if len(files) > 1 else ""
        return Recognised("a folder of single files", way_out=f"name the file: {files[0]}{others}")
    return Recognised(
        "a folder without a model" if any(folder.iterdir()) else "an empty folder",
        way_out="a pipeline in diffusers format has a model_index.json, and a folder for each of its parts",
    )
