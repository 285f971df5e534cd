"""What kohya's sd-scripts and OneTrainer call their settings, and what they are here.

Messages about unknown names look in these tables, and docs/from_kohya.md and docs/from_onetrainer.md show them. An
entry begins with the flag that is its counterpart, or says why there is none. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

BUCKETS = "buckets have about as many pixels as --resolution squared, in shapes from --bucket_step"
AS_IT_IS = "colours are left as they are"
NO_REPETITION = "caches keep what is found by its content, and need no check"
ALL_TAGS = "every tag of a caption is there from the first step on"
IN_THE_FOLDER = (
    "what was trained is in --output_dir; sd-recipes export writes single files, as A1111 and ComfyUI read them"
)
BY_STEPS = "--checkpointing_steps, in optimizer steps; each holds the state, and a killed run goes on from it"
KEPT = "--checkpoints_total_limit, which counts checkpoints; --keep_best keeps the best weights besides"
BY_ITSELF = "a run that is in --output_dir goes on by itself, in the middle of an epoch"
PICTURES = "--validation_steps, or --validation_epochs"
UPLOAD = "the pipeline is uploaded once, at the end, by --push_to_hub"
NO_TOKEN = "log in with `hf auth login`, or set HF_TOKEN"
NOT_CHOSEN = "loaded once and kept where it fits; sd-recipes plan tells what a run needs"
FOR_WANDB = "--report_to wandb, with the settings of its own environment variables"
NO_SWAP = "blocks stay on the device; --memory 8GB chooses what makes a run fit"
NO_DEEPSPEED = "several GPUs share a model by FSDP2 (docs/distributed.md)"
CARD = "what a file says of itself is written by sd-recipes export, with --title"
OF_FLOWS = "of models of flow matching, which are not trained here; --timestep_sampling logit_normal is for these"
MERGED = "merge it first: sd-recipes export MODEL --lora FILE:WEIGHT --to pipeline"
OTHER_NETWORKS = "a LoRA is trained by --lora_rank, a DoRA by --lora_use_dora; LoHa, LoKr and OFT are not"

SD_SCRIPTS: dict[str, str] = {
    # The model
    "v2": "a model is recognised by itself",
    "v_parameterization": "--prediction_type v_prediction; if not given, what the model says",
    "tokenizer_cache_dir": "--cache_dir",
    "max_token_length": "--long_captions chunk with --caption_chunks: 150 tokens are 2 chunks, 225 are 3",
    "no_half_vae": "a VAE that overflows in fp16, as SDXL's, runs in float32 by itself; all leave the run so",
    "disable_mmap_load_safetensors": "weights are read tensor by tensor",
    # LoRA
    "network_module": OTHER_NETWORKS,
    "network_dim": "--lora_rank",
    "network_alpha": "--lora_alpha; if not given, it is the rank, and there 1",
    "network_dropout": "--lora_dropout",
    "network_args": "--lora_targets for the layers, and --lora_use_dora for a DoRA",
    "network_weights": "--lora_weights",
    "dim_from_weights": "the file of --lora_weights says it by itself",
    "network_train_unet_only": "the UNet alone is trained unless --lora_text_encoder is given",
    "network_train_text_encoder_only": "the UNet is always trained; --lora_text_encoder trains both",
    "scale_weight_norms": "weights are not scaled; --lora_use_dora trains their lengths apart",
    "base_weights": MERGED,
    "base_weights_multiplier": MERGED,
    "unet_lr": "--learning_rate",
    "text_encoder_lr": "--text_encoder_learning_rate, with --lora_text_encoder",
    "learning_rate_te": "--text_encoder_learning_rate",
    "learning_rate_te1": "--param_groups 'text_encoder.*=1e-5', with --train_text_encoder",
    "learning_rate_te2": "--param_groups 'text_encoder_2.*=1e-5', with --train_text_encoder",
    "training_comment": CARD,
    "no_metadata": "a LoRA's file says its rank, its base and its recipe, without this machine's folders",
    # Data
    "in_json": "--dataset_name FILE, with --image_root FOLDER and --caption_column caption",
    "reg_data_dir": "--class_data_dir",
    "dataset_repeats": "repeats of a source, in data_sources of a recipe",
    "dataset_class": "data are read by this program's own readers",
    "caption_extention": "--caption_extension",
    "shuffle_caption": "--shuffle_tags",
    "caption_separator": "--tag_separator",
    "keep_tokens": "--keep_tags",
    "caption_dropout_rate": "--caption_dropout",
    "weighted_captions": "brackets and numbers in captions are text like any other",
    "token_warmup_min": ALL_TAGS,
    "token_warmup_step": ALL_TAGS,
    "color_aug": AS_IT_IS,
    "flip_aug": "--random_flip",
    "random_crop": "--crop random, which is the default; there it is the center",
    "face_crop_aug_range": "crops do not look for faces",
    "alpha_mask": "--mask_from_alpha",
    "conditioning_data_dir": "ControlNets are not trained; masks lie beside their pictures, as a-mask.png",
    "resize_interpolation": "--image_interpolation_mode",
    "enable_bucket": "--aspect_ratio_buckets",
    "bucket_reso_steps": "--bucket_step",
    "bucket_no_upscale": "--max_upscale 1",
    "min_bucket_reso": BUCKETS,
    "max_bucket_reso": BUCKETS,
    "cache_info": "sizes and captions are read anew by every run",
    "debug_dataset": "sd-recipes inspect --train_data_dir FOLDER looks at a data set and writes a page",
    "cache_latents_to_disk": "--cache_latents disk",
    "vae_batch_size": "--micro_batch, which divides what the VAE encodes at once too",
    "skip_cache_check": NO_REPETITION,
    "cache_text_encoder_outputs": "--cache_text",
    "cache_text_encoder_outputs_to_disk": "--cache_text, in memory: what fits into 1 GiB",
    "text_encoder_batch_size": "captions are encoded in the batches that are trained on",
    "max_data_loader_n_workers": "--dataloader_num_workers",
    "persistent_data_loader_workers": "workers stay from epoch to epoch in any case",
    # Steps and the optimizer
    "max_train_epochs": "--num_train_epochs",
    "optimizer_type": "--optimizer, in small letters: adamw8bit, prodigy, lion, …; any other by its class",
    "use_lion_optimizer": "--optimizer lion",
    "optimizer_args": "--optimizer_kwargs, in the same form",
    "lr_scheduler_type": "--lr_scheduler",
    "lr_scheduler_args": "schedules have no settings but --lr_warmup_steps",
    "lr_decay_steps": "schedules go down over the whole run",
    "lr_scheduler_num_cycles": "cosine_with_restarts has one cycle",
    "lr_scheduler_power": "polynomial has the power 1",
    "lr_scheduler_timescale": "there is no such schedule",
    "lr_scheduler_min_lr_ratio": "schedules go down to 0",
    "block_lr": "--param_groups, such as 'unet.down_blocks.0.*=1e-5'",
    "fused_optimizer_groups": "--fused_backward_pass",
    "full_fp16": "--weights_dtype bf16: weights in fp16 lose small steps",
    "full_bf16": "--weights_dtype bf16, which rounds at random so that small steps are not lost",
    "fp8_base": "frozen parts are in the type of --mixed_precision",
    "fp8_base_unet": "frozen parts are in the type of --mixed_precision",
    # Memory and speed
    "cpu_offload_checkpointing": "activations are recomputed, and not moved to the host",
    "blocks_to_swap": NO_SWAP,
    "lowram": NOT_CHOSEN,
    "highvram": NOT_CHOSEN,
    "xformers": "--enable_xformers_memory_efficient_attention; PyTorch's own attention is as fast",
    "diffusers_xformers": "--enable_xformers_memory_efficient_attention; PyTorch's own attention is as fast",
    "sdpa": "PyTorch's own attention is used in any case",
    "mem_eff_attn": "PyTorch's own attention is used in any case",
    "torch_compile": "--compile_unet",
    "dynamo_backend": "it is torch's own, with --compile_unet",
    "ddp_timeout": "the limit is that of accelerate",
    "ddp_gradient_as_bucket_view": "gradients are summed without DDP",
    "ddp_static_graph": "gradients are summed without DDP",
    **dict.fromkeys(
        (
            "deepspeed", "zero_stage", "offload_optimizer_device", "offload_optimizer_nvme_path",
            "offload_param_device", "offload_param_nvme_path", "zero3_init_flag", "zero3_save_16bit_model",
            "fp16_master_weights_and_gradients",
        ),
        NO_DEEPSPEED,
    ),
    # Loss and noise
    "min_snr_gamma": "--snr_gamma",
    "scale_v_pred_loss_like_noise_pred": "--snr_gamma 1e9, which comes to the same",
    "v_pred_like_loss": "the loss is the error of what is predicted",
    "zero_terminal_snr": "--rescale_betas_zero_snr",
    "ip_noise_gamma": "--input_perturbation",
    "ip_noise_gamma_random_strength": "the strength is one number, that of --input_perturbation",
    "noise_offset_random_strength": "the strength is one number, that of --noise_offset",
    "adaptive_noise_scale": "the offset does not depend on the latent",
    "huber_scale": "--huber_c, which is the whole parameter",
    "weighting_scheme": OF_FLOWS,
    "mode_scale": OF_FLOWS,
    # Saving, resuming, publishing
    "output_name": IN_THE_FOLDER,
    "save_model_as": IN_THE_FOLDER,
    "use_safetensors": "files are safetensors in any case",
    "save_precision": "a run leaves float32; sd-recipes export has --dtype",
    "save_every_n_epochs": BY_STEPS,
    "save_every_n_steps": BY_STEPS,
    "save_n_epoch_ratio": BY_STEPS,
    "save_last_n_epochs": KEPT,
    "save_last_n_epochs_state": KEPT,
    "save_last_n_steps": KEPT,
    "save_last_n_steps_state": KEPT,
    "save_state": "every checkpoint holds the state",
    "save_state_on_train_end": "every checkpoint holds the state, and there is one at the end",
    "resume": f"--resume_from_checkpoint; {BY_ITSELF}",
    "initial_epoch": BY_ITSELF,
    "initial_step": BY_ITSELF,
    "skip_until_initial_step": BY_ITSELF,
    "huggingface_repo_id": "--hub_model_id, with --push_to_hub",
    "huggingface_token": NO_TOKEN,
    **dict.fromkeys(
        (
            "huggingface_repo_type", "huggingface_path_in_repo", "huggingface_repo_visibility",
            "save_state_to_huggingface", "resume_from_huggingface", "async_upload",
        ),
        UPLOAD,
    ),
    **dict.fromkeys(
        (
            "metadata_title", "metadata_author", "metadata_description", "metadata_license", "metadata_tags",
            "metadata_usage_hint", "metadata_thumbnail", "metadata_merged_from", "metadata_trigger_phrase",
            "metadata_preprocessor", "metadata_is_negative_embedding",
        ),
        CARD,
    ),
    # Watching
    "log_with": "--report_to",
    "log_prefix": "--logging_dir",
    "log_tracker_name": "--tracker_project_name",
    "wandb_run_name": FOR_WANDB,
    "wandb_api_key": FOR_WANDB,
    "log_tracker_config": FOR_WANDB,
    "log_config": "the resolved recipe is in recipe.yaml of --output_dir",
    "sample_every_n_steps": PICTURES,
    "sample_every_n_epochs": PICTURES,
    "sample_at_first": "--validate_before_training",
    "sample_prompts": "--validation_prompts, each prompt in quotes",
    "sample_sampler": "--validation_sampler",
    "validate_every_n_steps": "--validation_steps",
    "validate_every_n_epochs": "--validation_epochs",
    "validation_seed": "what is held out does not depend on a seed: --validation_split",
    "max_validation_steps": "--validation_rows",
    "config_file": "--config",
    "output_config": "--dry_run, which prints the settings as a recipe; a run writes recipe.yaml",
}  # fmt: skip

CONCEPT = "--train_data_dir, or data_sources in a recipe, with an entry for each concept"
NOT_THESE_MODELS = "only of models that are not trained here"
NO_EMBEDDING = "embeddings (textual inversion) are not trained"
OTHER_LOSS = "--loss_type l2, huber or smooth_l1: one of them, not a sum"

ONE_TRAINER: dict[str, str] = {
    # The model
    "training_method": "--lora_rank 16 for a LoRA; without it the UNet is trained whole",
    "model_type": "a model is recognised by itself",
    "base_model_name": "--pretrained_model_name_or_path",
    "vae.model_name": "--vae",
    "huggingface_cache_dir": "--cache_dir",
    "output_model_destination": "--output_dir; sd-recipes export writes the single file",
    "output_model_format": "sd-recipes export RUN --to single_file, or pipeline, lora, kohya_lora",
    "output_dtype": "a run leaves float32; sd-recipes export has --dtype",
    "text_encoder_layer_skip": "--clip_skip, in the same count",
    "text_encoder_2_layer_skip": "--clip_skip, which is one number for both",
    # LoRA
    "peft_type": "a LoRA is trained by --lora_rank; OFT and LoKr are not",
    "lora_rank": "--lora_rank",
    "lora_alpha": "--lora_alpha; if not given, it is the rank, and there 1",
    "lora_decompose": "--lora_use_dora",
    "lora_model_name": "--lora_weights",
    "lora_weight_dtype": "--mixed_precision; a LoRA's weights are float32 in any case",
    "dropout_probability": "--lora_dropout",
    "layer_filter": "--lora_targets",
    "layer_filter_preset": "--lora_targets attention, or all",
    # What is trained
    "unet.train": "the UNet is always trained",
    "unet.learning_rate": "--learning_rate",
    "unet.weight_dtype": "--weights_dtype float32 or bf16, where it is trained whole",
    "text_encoder.train": "--train_text_encoder, or --lora_text_encoder",
    "text_encoder.learning_rate": "--text_encoder_learning_rate",
    "text_encoder.stop_training_after": "--text_encoder_steps",
    "text_encoder.dropout_probability": "--caption_dropout, of all captions",
    "text_encoder_2.train": "--train_text_encoder, or --lora_text_encoder, which train both",
    "text_encoder_2.learning_rate": "--param_groups 'text_encoder_2.*=1e-5'",
    "text_encoder_2.stop_training_after": "--text_encoder_steps, of both",
    "text_encoder_2.dropout_probability": "--caption_dropout, of all captions",
    "embedding": NO_EMBEDDING,
    "additional_embeddings": NO_EMBEDDING,
    "prior": NOT_THESE_MODELS,
    "transformer": NOT_THESE_MODELS,
    # Data, of each concept
    "concepts": CONCEPT,
    "concept_file_name": CONCEPT,
    "concept.path": "--train_data_dir",
    "concept.include_subdirectories": "folders in folders are read, too",
    "concept.balancing": "repeats of a source, in data_sources of a recipe",
    "concept.loss_weight": "weight of a source, in data_sources of a recipe: how often it is drawn",
    "concept.type": "--validation_split FOLDER, for the type VALIDATION",
    "concept.seed": "--seed, of the whole run",
    "concept.text.prompt_source": "found by itself; --caption_from file takes the pictures' names",
    "concept.text.enable_tag_shuffling": "--shuffle_tags",
    "concept.text.tag_delimiter": "--tag_separator",
    "concept.text.keep_tags_count": "--keep_tags",
    "concept.text.tag_dropout_probability": "--caption_tag_dropout_rate",
    "concept.text.tag_dropout_mode": "RANDOM is --caption_tag_dropout_rate; FULL and RANDOM WEIGHTED are not here",
    "concept.text.tag_dropout_special_tags": "--keep_tokens_separator, which marks in captions what always stays",
    "concept.text.caps_randomize_enable": "CLIP's tokenizer does not tell capitals from other letters",
    "concept.image.enable_crop_jitter": "--crop random, which is the default",
    "concept.image.enable_random_flip": "--random_flip",
    "concept.image.enable_random_rotate": "pictures are not rotated",
    "concept.image.enable_random_brightness": AS_IT_IS,
    "concept.image.enable_random_contrast": AS_IT_IS,
    "concept.image.enable_random_saturation": AS_IT_IS,
    "concept.image.enable_random_hue": AS_IT_IS,
    "concept.image.resolution_override": "all sources have one --resolution",
    "aspect_ratio_bucketing": "--aspect_ratio_buckets",
    "latent_caching": "--cache_latents disk, with --center_crop",
    "only_cache": "sd-recipes cache, with the flags of the run",
    "clear_cache_before_training": NO_REPETITION,
    "dataloader_threads": "--dataloader_num_workers",
    "resolution": "--resolution, one number",
    # Steps and the optimizer
    "epochs": "--num_train_epochs",
    "batch_size": "--train_batch_size",
    "gradient_accumulation_steps": "--gradient_accumulation_steps",
    "learning_rate": "--learning_rate",
    "learning_rate_scheduler": "--lr_scheduler",
    "learning_rate_warmup_steps": "--lr_warmup_steps",
    "learning_rate_cycles": "cosine_with_restarts has one cycle",
    "learning_rate_min_factor": "schedules go down to 0",
    "learning_rate_scaler": "--scale_lr, by the global batch size",
    "optimizer.optimizer": "--optimizer: adamw, adamw8bit (ADAMW_8BIT), prodigy, lion, …; any other by its class",
    "optimizer.d_coef": "--optimizer_kwargs d_coef=1, and so with other settings of an optimizer",
    "optimizer.beta1": "--adam_beta1",
    "optimizer.beta2": "--adam_beta2",
    "optimizer.eps": "--adam_epsilon",
    "optimizer.weight_decay": "--adam_weight_decay",
    "optimizer.fused_back_pass": "--fused_backward_pass, with --max_grad_norm 0",
    "optimizer.stochastic_rounding": "--weights_dtype bf16, which rounds so in any case",
    "clip_grad_norm": "--max_grad_norm",
    "ema": "--use_ema, with --offload_ema for CPU",
    "ema_decay": "--ema_decay",
    "ema_update_step_interval": "the average of --use_ema is updated at every step",
    # Memory and speed
    "train_dtype": "--mixed_precision no, fp16 or bf16",
    "fallback_train_dtype": "--mixed_precision, one type for all",
    "gradient_checkpointing": "--gradient_checkpointing",
    "compile": "--compile_unet",
    "attention_mechanism": "PyTorch's own attention; --enable_xformers_memory_efficient_attention",
    "force_circular_padding": "models are trained as they are",
    "multi_gpu": "accelerate launch starts a process for each GPU",
    "train_device": "--device",
    "unet.offload_fraction": NO_SWAP,
    # Loss and noise
    "mse_strength": OTHER_LOSS,
    "mae_strength": OTHER_LOSS,
    "log_cosh_strength": OTHER_LOSS,
    "huber_strength": "--loss_type huber",
    "huber_delta": "--huber_c, of a pseudo-Huber loss",
    "loss_weight_fn": "--snr_gamma for MIN_SNR_GAMMA, --debiased_estimation_loss, --p2_gamma for P2",
    "loss_weight_strength": "--snr_gamma, or --p2_gamma",
    "offset_noise_weight": "--noise_offset",
    "perturbation_noise_weight": "there it makes the noise larger that is predicted; --input_perturbation does not",
    "rescale_noise_scheduler_to_zero_terminal_snr": "--rescale_betas_zero_snr",
    "force_v_prediction": "--prediction_type v_prediction",
    "force_epsilon_prediction": "--prediction_type epsilon",
    "min_noising_strength": "--min_timestep, as a share of the timesteps there",
    "max_noising_strength": "--max_timestep, as a share of the timesteps there",
    "timestep_distribution": "--timestep_sampling uniform or logit_normal",
    "noising_weight": "--logit_std, which of LOGIT_NORMAL is noising_weight + 1",
    "noising_bias": "--logit_mean, of LOGIT_NORMAL",
    "masked_training": "--masked_loss",
    # Saving and watching
    "workspace_dir": "--output_dir",
    "cache_dir": "--latent_cache_dir",
    "continue_last_backup": BY_ITSELF,
    "backup_after": "--checkpointing_minutes, or --checkpointing_steps",
    "rolling_backup_count": "--checkpoints_total_limit",
    "save_every": BY_STEPS,
    "validation": "--validation_split, such as 0.05",
    "validate_after": "--validation_steps, or --validation_epochs",
    "samples": "--validation_prompts, and --validation_inference_steps, _guidance_scale and _sampler",
    "sample_definition_file_name": "--validation_prompts, each prompt in quotes",
    "sample_after": "--validation_steps, or --validation_epochs",
    "non_ema_sampling": "pictures are drawn with what is exported",
    "tensorboard": "--report_to tensorboard, which is the default",
    "include_train_config": "recipe.yaml is in --output_dir in any case",
    "secrets": NO_TOKEN,
}  # fmt: skip


class Trainer(NamedTuple):
    """Another trainer: whose its settings are, what they are here, and which names mean something else here."""

    whose: str
    settings: Mapping[str, str]
    otherwise: Mapping[str, str]


TRAINERS = (
    Trainer(
        "sd-scripts'",
        SD_SCRIPTS,
        {"clip_skip": "2 there is --clip_skip 1 here; of SDXL it is ignored there, so drop it"},
    ),
    Trainer("OneTrainer's", ONE_TRAINER, {"cache_dir": "what is cached there is in --latent_cache_dir here"}),
)


def answers(names: Iterable[str], given: Collection[str], flags: Collection[str], prefix: str = "") -> str | None:
    """What settings of other trainers are here, in words, all of them at once; None if none of the names is one.

    And of the settings `given`, which are known here: those that mean something else to whose settings were found.
    """
    told = {name: words for name in names if (words := named_elsewhere(name, flags))}
    for trainer in TRAINERS:
        if told.keys() & trainer.settings.keys():
            same = (name for name in trainer.otherwise if name in given)
            told |= {name: f"is {trainer.whose} name, too: {trainer.otherwise[name]}" for name in same}
    return ". ".join(f"{prefix}{name} {words}" for name, words in told.items()) or None


def keys_of(settings: Mapping[Any, Any], within: str = "") -> list[str]:
    """A file's keys as the tables have them: nested ones with dots, and those of a concept behind `concept.`."""
    keys = []
    for key, value in settings.items():
        name = f"{within}{key}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in ONE_TRAINER):
            keys += keys_of(value, f"{name}.")
            continue
        keys.append(name)
        if name == "concepts" and isinstance(value, list):
            keys += [inner for concept in value if isinstance(concept, dict) for inner in keys_of(concept, "concept.")]
    return list(dict.fromkeys(keys))


def named_elsewhere(name: str, flags: Collection[str]) -> str | None:
    """What a setting of another trainer is here, in words.

    None for a name that none of them has, or whose counterpart is not among these flags.
    """
    for whose, settings, _ in TRAINERS:
        here = settings.get(name)
        if here is None:
            continue
        flag = re.match(r"--\w+", here)
        if flag is None:
            return f"is {whose} name, and is not here: {here}"
        if flag[0] in flags:
            return f"is {whose} name: here it is {here}"
    return None
