"""What sections are made of: settings, the checks that all of them share, and types that several of them use."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from sd_recipes.redaction import LEFT_OUT, has_login, in_texts, redacted

# What it means for a resumed run that a setting differs from the checkpoint's. `refused`: the state would not fit.
# `warned`: the run continues with the new value, and differs from the uninterrupted one. `compared`: what it stands for
# is compared (checkpoints/resume.py), since a folder may have moved, or several settings decide it together. `free`:
# the weights do not depend on it, except for rounding.
OnResume = Literal["refused", "warned", "compared", "free"]


def setting(default: Any, on_resume: OnResume, description: str, **constraints: Any) -> Any:
    """A field of a section: its default, what a change means for a resumed run, its help, and its range."""
    return Field(default, description=description, json_schema_extra={"on_resume": on_resume}, **constraints)


def _check_no_password(text: str) -> str:
    if has_login(text):
        raise ValueError(
            "a user name or password in a URL is refused, because recipes are saved and shared: put it in ~/.netrc "
            "(https), in the environment (HF_TOKEN for the Hub, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY for s3), "
            "or in fsspec's configuration (~/.config/fsspec)"
        )
    if LEFT_OUT in text:
        raise ValueError(f"{LEFT_OUT} stands for a secret that was not written down: give the whole value")
    return text


class Section(BaseModel):
    """Settings that belong together. A section's docstring is `Title: description.`, which help and docs show."""

    # A ValidationError would print the input, which may hold a password. Validators are built when one is first needed:
    # those of all sections took half of the time in which a mistake in a flag is answered.
    model_config = ConfigDict(
        extra="forbid",
        validate_assignment=False,
        protected_namespaces=(),
        hide_input_in_errors=True,
        defer_build=True,
    )

    @field_validator("*")
    @classmethod
    def hold_no_password(cls, value: Any) -> Any:
        """Refuse a password, which would be saved with the recipe. Raises ValueError."""
        in_texts(_check_no_password, value)
        return value


def heading(section: type[Section]) -> tuple[str, str]:
    """Title and description of a section."""
    title, _, description = (section.__doc__ or "").partition(": ")
    return title, description[:1].upper() + description[1:]


def also_called(settings: Any, name: str, other: str) -> Any:
    """Settings in which `other`, another script's name of the setting `name`, counts for it. Raises ValueError."""
    if not isinstance(settings, dict) or settings.get(other) is None:
        return settings
    if settings.get(name, settings[other]) not in (None, settings[other]):
        raise ValueError(
            redacted(f"--{other} {settings[other]} is another name of --{name}, which is {settings[name]}: drop one")
        )
    return {**{key: value for key, value in settings.items() if key != other}, name: settings[other]}


def number_from_text(value: Any) -> Any:
    """YAML 1.1 reads `1e-5` as text; the command line reads it as a number. Here both are numbers."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


Number = Annotated[float, BeforeValidator(number_from_text)]
