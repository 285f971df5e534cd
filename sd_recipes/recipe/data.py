"""Settings of the data: sources of rows, caches, and all that training and `inspect` share."""

import itertools
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from sd_recipes.recipe.captions import CaptionConfig
from sd_recipes.recipe.images import ImageConfig, MaskConfig
from sd_recipes.recipe.prior_preservation import PriorConfig
from sd_recipes.recipe.section import Number, Section, number_from_text, setting


class DataSource(Section):
    """One of several sources of rows, mixed by weight; the other fields are like the flags of the same names."""

    dataset_name: str | None = None
    dataset_config_name: str | None = None
    dataset_revision: str | None = None
    train_data_dir: str | None = None
    train_split: str = "train"
    weight: Annotated[float, Field(gt=0), BeforeValidator(number_from_text)] | Literal["rows"] = 1.0
    repeats: int = Field(1, ge=1)  # of every row in an epoch
    image_root: str | None = None
    caption_extension: str | None = None
    caption_column: str | None = None
    caption: str | None = None  # of pictures without one of their own
    is_reg: bool = False  # class pictures, for prior preservation

    @property
    def flag(self) -> str:
        """How messages name the source."""
        if self.dataset_name is not None:
            return f"--dataset_name {self.dataset_name}"
        return f"--train_data_dir {self.train_data_dir}"


class ClassSource(DataSource):
    """The folder that --class_data_dir names."""

    @property
    def flag(self) -> str:
        return f"--class_data_dir {self.train_data_dir}"


# Settings that say where rows come from, if data_sources do not; the first two name the place.
OF_ONE_SOURCE = (
    "dataset_name", "train_data_dir", "dataset_config_name", "dataset_revision", "train_split", "image_root",
)  # fmt: skip


class DataConfig(Section):
    """Data: where the rows come from, and what happens to those that cannot be used."""

    dataset_name: str | None = setting(
        None,
        "compared",
        "A Hub data set, a folder, a table (.csv, .tsv, .jsonl, .parquet), .arrow or .tar files (globs, braces and "
        "URLs too), or sd-recipes/emoji.",
    )
    dataset_config_name: str | None = setting(None, "compared", "Configuration of the data set, if it has several.")
    dataset_revision: str | None = setting(None, "compared", "Branch, tag or commit of the Hub data set.")
    train_data_dir: str | None = setting(
        None, "compared", "Folder of images, with captions in .txt files beside them, or in a metadata.jsonl or .csv."
    )
    train_split: str = setting("train", "compared", "Split of the data set to train on.")
    data_sources: list[DataSource] | None = setting(
        None, "compared", "Several sources mixed by weight, instead of --dataset_name; only in a recipe file."
    )
    dataset_config: str | None = setting(
        None,
        "free",
        "kohya's dataset.toml or .json, whose keys are read as settings; those without a counterpart are warned of.",
    )
    image_column: str = setting("image", "warned", "Column with the image, its path, or its bytes in base64.")
    image_root: str | None = setting(
        None, "compared", "Folder in which a table's relative paths begin; if not given, the table's own."
    )
    caption_extension: str | None = setting(
        None, "warned", "Suffix of the files beside the images that hold their captions: .txt, .caption or .json."
    )
    caption_lines: Literal["several", "one"] = setting(
        "several",
        "warned",
        "What lines of a caption file are: several captions, of which one is drawn, or one caption.",
    )
    caption_from: Literal["file", "folder"] | None = setting(
        None, "warned", "Take as caption the name of the image's file or folder."
    )
    folder_repeats: bool = setting(
        True,
        "compared",
        "Train images in a folder named like `10_cat` that often in every epoch, as kohya's scripts do.",
    )
    follow_links: bool = setting(False, "compared", "Follow links that lead out of the folder of images.")
    text_encoding: str | None = setting(
        None, "warned", "Encoding of tables and caption files that are neither UTF-8 nor marked, such as cp1252."
    )
    max_train_samples: int | None = setting(None, "warned", "Train on this many rows, drawn with the seed.", ge=1)
    streaming: bool = setting(False, "refused", "Stream the rows from the Hub, local files or a URL.")
    shuffle_block: int = setting(1000, "warned", "How many rows of a stream are shuffled together, per process.", ge=1)
    stream_outage_minutes: Number = setting(
        10.0, "free", "How long a stream may keep failing before the run gives up.", ge=0
    )
    check_data: Literal["full", "sample", "off"] = setting(
        "sample", "free", "Which rows to check before the model is loaded: all, a sample, or none."
    )
    max_bad_rows: int | None = setting(
        None, "free", "Stop when more rows than this are unusable; if not given, at 1 % of the rows.", ge=0
    )
    dataloader_num_workers: int | None = setting(
        None,
        "free",
        "Number of loader processes; 0 reads ahead in a thread. If not given, 0 on a CPU, and on a GPU one for each "
        "core of a training process, at most 8, for which shared memory has room.",
        ge=0,
    )


class CacheConfig(Section):
    """Caches: what is computed once and kept, instead of again in every epoch."""

    cache_latents: Literal["disk", "memory", "off"] = setting(
        "off", "warned", "Keep the VAE's moments: later epochs skip image decoding and the VAE. Needs a fixed crop."
    )
    latent_cache_dir: str | None = setting(
        None, "free", "Where the moments are kept, to share them between runs; if not given, in --output_dir."
    )
    latent_cache_dtype: Literal["fp16", "bf16"] = setting("fp16", "warned", "Precision of the kept moments.")
    cache_text: bool = setting(
        False, "warned", "Keep the captions' text states, up to 1 GiB; for captions that are few and do not change."
    )


class DataSettings(DataConfig, ImageConfig, MaskConfig, PriorConfig, CaptionConfig, CacheConfig):
    """The data settings that training and `inspect` share: where rows come from, and what is made of them."""

    @property
    def sources(self) -> list[DataSource]:
        """The sources to mix, a single one if it is given by flags; and after them those of class pictures."""
        sources = self.data_sources or [
            DataSource(
                dataset_name=self.dataset_name,
                dataset_config_name=self.dataset_config_name,
                dataset_revision=self.dataset_revision,
                train_data_dir=self.train_data_dir,
                train_split=self.train_split,
                image_root=self.image_root,
                caption_extension=self.caption_extension,
            )
        ]
        if self.class_data_dir is not None:
            own = ClassSource(train_data_dir=self.class_data_dir, caption=self.class_prompt, is_reg=True)
            sources = [*sources, own]
        return sorted(sources, key=lambda source: source.is_reg)

    @property
    def trained_sources(self) -> list[DataSource]:
        """The sources but for those of class pictures."""
        return [source for source in self.sources if not source.is_reg]

    @property
    def has_class_pictures(self) -> bool:
        return len(self.trained_sources) < len(self.sources)

    @model_validator(mode="after")
    def settings_agree(self) -> "DataSettings":
        if self.data_sources is not None:
            if self.dataset_name or self.train_data_dir:
                raise ValueError(
                    "data_sources of the recipe file contradict --dataset_name and --train_data_dir: drop one"
                )
            if not self.data_sources:
                raise ValueError("data_sources of the recipe file is empty: name a dataset_name or a train_data_dir")
            for name in OF_ONE_SOURCE[2:]:
                # A resolved recipe names them too, at their defaults.
                if getattr(self, name) != DataConfig.model_fields[name].default:
                    raise ValueError(
                        f"--{name} {getattr(self, name)} is not read with data_sources of the recipe file: set it "
                        "in the sources that it is meant for"
                    )
        if any(source.dataset_name is None and source.train_data_dir is None for source in self.sources):
            raise ValueError("no data: give --train_data_dir FOLDER or --dataset_name NAME")
        for source in self.sources:
            if source.dataset_name is None and source.dataset_revision is not None:
                raise ValueError(f"{source.flag} has no revisions: drop --dataset_revision")
        if not self.trained_sources:
            raise ValueError(
                "all data_sources hold class pictures (is_reg), and there is none that they could come beside: add one"
            )
        if len({source.weight == "rows" for source in self.trained_sources}) > 1:
            raise ValueError(
                "data_sources of the recipe file give some a weight and some `rows`: give all of them one or the other"
            )
        if self.caption_from and (self.caption_template or self.caption_columns):
            raise ValueError("--caption_from says what the caption is: drop --caption_template and --caption_columns")
        if self.center_crop and self.crop not in (None, "center"):
            raise ValueError(f"--center_crop contradicts --crop {self.crop}: drop one")
        if self.caption_columns and self.caption_template:
            raise ValueError("--caption_columns and --caption_template both say what the caption is: drop one")
        if self.keep_tags and not (self.shuffle_tags or self.caption_tag_dropout_rate):
            raise ValueError(
                "--keep_tags needs --shuffle_tags or --caption_tag_dropout_rate: add one, or drop --keep_tags"
            )
        names = ("tag_separator", "keep_tokens_separator", "secondary_separator")
        separators = {name: value for name in names if (value := getattr(self, name)) is not None}
        for one, other in itertools.permutations(separators, 2):
            if separators[one] in separators[other]:
                raise ValueError(
                    f"--{other} {separators[other]!r} holds --{one} {separators[one]!r}, so that captions could be "
                    "read in two ways: choose another"
                )
        for source in self.sources:
            if source.is_reg and source.weight not in (1.0, "rows"):
                raise ValueError(
                    f"the weight {source.weight:g} of {source.flag} is not read, since one of its class pictures comes "
                    "beside every trained one: use --prior_loss_weight"
                )
        if not self.has_class_pictures:
            for name in ("prior_loss_weight", "prior_preservation"):
                if (value := getattr(self, name)) != PriorConfig.model_fields[name].default:
                    raise ValueError(
                        f"--{name} {value} is of class pictures, and there are none: add --class_data_dir, or drop it"
                    )
        elif self.streaming:
            raise ValueError(
                "class pictures (--class_data_dir, is_reg) come beside known rows, which a stream has not: drop "
                "--streaming"
            )
        if self.streaming and len(self.sources) > 1 and self.sources[0].weight == "rows":
            raise ValueError(
                "the weight `rows` in data_sources, which kohya's dataset.toml gives, needs their numbers, and streams "
                "do not know them: drop --streaming, or give weights in a recipe"
            )
        if self.streaming and any(source.repeats > 1 for source in self.sources):
            raise ValueError(
                "`repeats` in data_sources, num_repeats of kohya's dataset.toml, repeats known rows, which a stream "
                "has not: drop --streaming, or the repeats"
            )
        if self.streaming and len(self.sources) > 1 and self.caption_dropout_every_n_epochs:
            raise ValueError(
                "--caption_dropout_every_n_epochs counts epochs, and several streams have no common one that ends: use "
                "--caption_dropout, or drop --streaming"
            )
        if self.streaming and self.max_train_samples is not None:
            raise ValueError(
                "--max_train_samples draws from all rows, which a stream does not know: drop it, or drop --streaming"
            )
        if self.cache_latents != "off" and self.cropping == "random":
            raise ValueError(
                "--cache_latents keeps one crop of an image, and the crop is random: add --center_crop or --crop none"
            )
        return self
