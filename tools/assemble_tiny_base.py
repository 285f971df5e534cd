"""Put the parts of the embedded base into one folder: everything but the UNet, which is trained on top of them.

    python tools/assemble_tiny_base.py --vae build/tiny_vae --clip build/tiny_clip --output_dir build/tiny_parts

The text encoder is the text tower of the small CLIP; weights are written in float16.
"""

import argparse
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vae", type=Path, required=True)
    parser.add_argument("--clip", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()

    AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float16).save_pretrained(args.output_dir / "vae")
    clip = CLIPModel.from_pretrained(args.clip, dtype=torch.float32)
    text_encoder = CLIPTextModel(clip.config.text_config)
    weights = {name.removeprefix("text_model."): value for name, value in clip.text_model.state_dict().items()}
    # CLIPTextModel wraps the tower in some versions of transformers, and is the tower in others.
    prefix = "text_model." if any(name.startswith("text_model.") for name in text_encoder.state_dict()) else ""
    text_encoder.load_state_dict({prefix + name: value for name, value in weights.items()})
    text_encoder.half().save_pretrained(args.output_dir / "text_encoder")
    CLIPTokenizer.from_pretrained(args.clip).save_pretrained(args.output_dir / "tokenizer")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
        prediction_type="v_prediction",
    ).save_pretrained(args.output_dir / "scheduler")
    print(f"{args.output_dir}: {sum(f.stat().st_size for f in args.output_dir.rglob('*') if f.is_file()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
