"""Rubrics: what a labeller is asked. A YAML file; three are built in, any other is named by its path."""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safer_engine.errors import SpecError

_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")
_TERM = re.compile(r"[^\W_]+(?:'[^\W_]+)*\*?(?: [^\W_]+(?:'[^\W_]+)*\*?)*")
_MAX_BYTES = 1 << 20

Name = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,39}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Direction(_Strict):
    """A way in which a latent can bear on the rubric."""

    name: Name = Field(description="Short name stored with labels.")
    description: str = Field(min_length=1, description="What it means, for the reader and for a model.")


class TermCategory(_Strict):
    """Terms of one kind, for the offline labeller."""

    name: Name = Field(description="Short name, shown in explanations.")
    direction: Name | None = Field(None, description="The direction these terms speak for; null where they only name a topic.")
    weight: float = Field(1.0, gt=0, le=1, description="How surely a term alone shows relevance, in (0, 1].")
    terms: tuple[str, ...] = Field(
        min_length=1, description="Lower-case words or phrases; `stem*` also matches longer words. Hyphens are written as spaces."
    )

    @field_validator("terms")
    @classmethod
    def _well_formed(cls, terms: tuple[str, ...]) -> tuple[str, ...]:
        for term in terms:
            if not _TERM.fullmatch(term) or term != term.lower():
                raise ValueError(f"{term!r} is not a lower-case word or phrase (letters, digits, inner apostrophes, a final *)")
        if len(set(terms)) != len(terms):
            raise ValueError("a term is listed twice")
        return terms


class Rubric(_Strict):
    """What is asked of a labeller."""

    name: Name = Field(description="Short name, recorded with the labels.")
    title: str = Field(min_length=1, description="Title for people.")
    question: str = Field(min_length=1, description="What is to be rated, as put to a model.")
    scale: dict[int, str] = Field(description="What each rating 1–5 means.")
    directions: tuple[Direction, ...] = Field(default=(), description="Ways in which a latent can bear on the rubric.")
    categories: tuple[TermCategory, ...] = Field(min_length=1, description="Terms for the offline labeller.")

    @model_validator(mode="after")
    def _consistent(self) -> Rubric:
        if sorted(self.scale) != [1, 2, 3, 4, 5]:
            raise ValueError("scale must describe exactly the ratings 1, 2, 3, 4 and 5")
        known = [direction.name for direction in self.directions]
        if len(set(known)) != len(known) or "unclear" in known:
            raise ValueError("directions must have distinct names, and none may be `unclear`")
        for category in self.categories:
            if category.direction is not None and category.direction not in known:
                raise ValueError(f"category {category.name} names the unknown direction {category.direction}")
        return self


def built_in_rubrics() -> tuple[str, ...]:
    """Names of the rubrics that come with the package."""
    folder = resources.files("safer_engine.labellers") / "rubrics"
    return tuple(sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml")))


def is_text(given: str) -> bool:
    """Whether a spec holds the rubric itself, not its name: a YAML document has more than one line."""
    return "\n" in given


def rubric_label(given: str) -> str:
    """What a rubric is called in messages and reports: its name or path; of a text, the name that it gives itself."""
    return load_rubric(given).name if is_text(given) else given


def rubric_text(path: Path) -> str:
    """A rubric file as a spec can hold it. Raises SpecError where it is no rubric."""
    load_rubric(str(path))
    text = _read(str(path)).decode()
    return text if is_text(text) else f"{text}\n"


def load_rubric(name_or_path: str) -> Rubric:
    """A built-in rubric by name, one from a YAML file, or from the text of one.

    Raises:
        SpecError: there is none, or it is not a rubric; the message names the field.
    """
    import yaml

    called = "given as text" if is_text(name_or_path) else name_or_path
    raw = _read(name_or_path)
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(raw, yaml.SafeLoader)):
            raise SpecError(f"rubric {called}: it has aliases (*name), which are not read", "quote terms that begin with *")
        document: Any = yaml.safe_load(raw)
        return Rubric.model_validate(document)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"rubric {called} is not YAML: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise SpecError(f"rubric {called}: {where}: {first['msg']}", "compare it with a built-in rubric file") from error


def rubric_digest(name_or_path: str) -> str:
    """sha256 of the rubric's file, for the cache key of the labels. Raises SpecError when there is none."""
    return hashlib.sha256(_read(name_or_path)).hexdigest()


def words_of(text: str) -> list[str]:
    """Lower-case words of a text; typographic apostrophes are plain ones, everything else splits words."""
    return _WORD.findall(_plain(text))


def word_at(text: str, start: int, stop: int) -> str:
    """The first word (as in `words_of`) that reaches into characters start … stop − 1, or "" where none does."""
    plain = _plain(text)
    if len(plain) != len(text):  # lower case of a few letters is longer
        return (words_of(text[start:stop]) or [""])[0]
    return next((found[0] for found in _WORD.finditer(plain) if found.end() > start and found.start() < stop), "")


def _plain(text: str) -> str:
    return text.replace("’", "'").replace("ʼ", "'").lower()


def _read(name_or_path: str) -> bytes:
    if name_or_path in built_in_rubrics():
        return (resources.files("safer_engine.labellers") / "rubrics" / f"{name_or_path}.yaml").read_bytes()
    if is_text(name_or_path):
        return _within_limit(name_or_path.encode())
    path = Path(name_or_path).expanduser()
    hint = f"give the path of a YAML file, or one of {', '.join(built_in_rubrics())}"
    if not path.is_file():
        raise SpecError(f"there is no rubric {name_or_path!r}", hint)
    if path.stat().st_size > _MAX_BYTES:
        raise SpecError(f"rubric {path} is larger than {_MAX_BYTES} bytes", hint)
    return path.read_bytes()


def _within_limit(raw: bytes) -> bytes:
    if len(raw) > _MAX_BYTES:
        raise SpecError(f"the rubric's text is larger than {_MAX_BYTES} bytes", "shorten its terms")
    return raw
