"""Settings of captions."""

from typing import Any, Literal

from pydantic import model_validator

from sd_recipes.recipe.section import Number, Section, also_called, setting


class CaptionConfig(Section):
    """Captions: which text goes with a picture, and what happens to missing and long captions."""

    caption_column: str = setting("text", "warned", "Column with the caption, or with a list of captions.")
    caption_columns: list[str] | None = setting(
        None, "warned", "Several caption columns instead; each sample draws one of them."
    )
    caption_template: str | None = setting(
        None, "warned", 'Caption made from columns, such as "a photo of {name}", instead of a caption column.'
    )
    caption_prefix: str | None = setting(None, "warned", "What comes before every caption, and a space.")
    caption_suffix: str | None = setting(None, "warned", "What comes after every caption and a space.")
    enable_wildcard: bool = setting(
        False, "warned", "Draw one of a, b and c for {a|b|c} in a caption, anew for every sample; {{ and }} are braces."
    )
    shuffle_tags: bool = setting(False, "warned", "Shuffle the parts of a caption, split at --tag_separator.")
    caption_tag_dropout_rate: Number = setting(
        0.0, "warned", "Fraction of a caption's parts that are left out, each by itself.", ge=0, le=1
    )
    keep_tags: int = setting(
        0,
        "warned",
        "With --shuffle_tags or --caption_tag_dropout_rate, leave this many leading parts in place.",
        ge=0,
    )
    tag_separator: str = setting(",", "warned", "What separates the tags of a caption.", min_length=1)
    keep_tokens_separator: str | None = setting(
        None,
        "warned",
        "A mark in captions, such as |||: tags before it, and after a second one, stay in place. Trained without it.",
        min_length=1,
    )
    secondary_separator: str | None = setting(
        None,
        "warned",
        "What joins tags that move and are left out together, such as ;;;. Trained as --tag_separator.",
        min_length=1,
    )
    caption_dropout: Number = setting(
        0.0, "warned", "Fraction of captions replaced by the empty one, for classifier-free guidance.", ge=0, le=1
    )
    caption_dropout_every_n_epochs: int = setting(
        0, "warned", "Train every so many epochs on the empty caption alone; 0: none of them.", ge=0
    )
    proportion_empty_prompts: Number | None = setting(
        None, "free", "Same as --caption_dropout, as diffusers' SDXL script calls it.", ge=0, le=1
    )
    blank_captions: Literal["skip", "empty", "error"] = setting(
        "skip",
        "warned",
        "Rows whose caption is missing or blank: skip them as bad, train on the empty caption, or stop.",
    )
    long_captions: Literal["error", "truncate", "chunk"] = setting(
        "truncate", "warned", "Captions over the tokenizer's limit: stop, truncate them, or encode them in chunks."
    )
    caption_chunks: int = setting(
        3, "warned", "With --long_captions chunk, the number of chunks per caption; longer ones are truncated.", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def name_the_dropout(cls, settings: Any) -> Any:
        return also_called(settings, "caption_dropout", "proportion_empty_prompts")
