"""`Provenance`: what a checkpoint was converted from and how it was changed since, typed where code decides on it."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, Self


class SourceFormat(enum.StrEnum):
    """The naming scheme of the PyTorch state dict that a checkpoint was converted from."""

    HUGGING_FACE = "huggingface"
    HUGGING_FACE_LIVE = "huggingface-live"
    ORIGINAL = "original"
    DEIT = "deit"

    @property
    def description(self) -> str:
        """The format in words, for reports."""
        return _DESCRIPTIONS[self]


_DESCRIPTIONS = {
    SourceFormat.HUGGING_FACE: "Hugging Face",
    SourceFormat.HUGGING_FACE_LIVE: "Hugging Face, as in a live transformers 5 model",
    SourceFormat.ORIGINAL: "original repository",
    SourceFormat.DEIT: "distilled vision transformer (DeiT, timm's names)",
}
Pairs = tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a checkpoint's weights came from; the default is a model that was initialised or trained here.

    Attributes:
        source: file name or Hub id of the PyTorch weights; None where the checkpoint was not converted.
        format: their naming scheme.
        num_tensors: how many of their tensors were used.
        ignored: (name, reason) of each tensor that was not used.
        dtype: the dtype of most of their tensors.
        other_dtypes: (name, dtype) of the others, by the name that `to_torch` writes, without the format's prefix.
        statistics_assumed: the mean and standard deviation of the features are a guess, not the source's.
        problem_type_resolved: the source's `problem_type` was None; the config holds what None stands for.
        grid_resized: the grid of position embeddings was resized after the conversion.
        notes: what the conversion assumed, for people; no code reads them.
        changes: what `resize` and `convert` changed since, for people; no code reads them.
    """

    source: str | None = None
    format: SourceFormat | None = None
    num_tensors: int = 0
    ignored: Pairs = ()
    dtype: str | None = None
    other_dtypes: Pairs = ()
    statistics_assumed: bool = False
    problem_type_resolved: bool = False
    grid_resized: bool = False
    notes: tuple[str, ...] = ()
    changes: tuple[str, ...] = ()

    @property
    def imagenet_only(self) -> bool:
        """Whether the weights are an ImageNet model's that was not trained on audio yet."""
        return self.format is SourceFormat.DEIT

    def changed(self, *changes: str, **fields: Any) -> Self:
        """Return a copy with notes on changes appended, and other fields replaced."""
        return dataclasses.replace(self, changes=(*self.changes, *changes), **fields)

    def dtype_of(self, name: str) -> str | None:
        """Return the source dtype of a tensor (its name as in `other_dtypes`), None where it was not converted."""
        return dict(self.other_dtypes).get(name, self.dtype)

    def report(self) -> list[str]:
        """Return lines for people: the source, its tensors, the notes and the changes."""
        lines = []
        if self.format:
            lines.append(f"{self.source}: {self.format.description}, {self.dtype}")
            lines.append(f"tensors: {self.num_tensors} used, {len(self.ignored)} ignored")
            for reason in sorted({why for _, why in self.ignored}):
                names = ", ".join(name for name, why in self.ignored if why == reason)
                lines.append(f"ignored: {names}: {reason}")
        return [*lines, *(f"note: {note}" for note in self.notes), *(f"changed: {change}" for change in self.changes)]

    def to_json_dict(self) -> dict[str, Any]:
        """Return the fields that differ from their defaults, for JSON."""
        values = {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }
        return values | {name: dict(values[name]) for name in ("ignored", "other_dtypes") if name in values}

    @classmethod
    def from_json_dict(cls, values: Mapping[str, Any]) -> Self:
        """Invert `to_json_dict`.

        Raises:
            ValueError: an unknown field or format, or a value of another type.
        """
        try:
            fields = dict(values)
            for name in ("ignored", "other_dtypes"):
                fields[name] = tuple((str(key), str(value)) for key, value in fields.get(name, {}).items())
            for name in ("notes", "changes"):
                fields[name] = tuple(map(str, fields.get(name, ())))
            if fields.get("format") is not None:
                fields["format"] = SourceFormat(fields["format"])
            return cls(**fields)
        except (TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"provenance: expected the fields of Provenance ({error})") from error


def split_origin(origin: Mapping[str, Any]) -> tuple[Provenance, dict[str, Any]]:
    """Return the provenance in a checkpoint's `metadata` object, and the rest, which is free-form.

    Checkpoints written before there was a `Provenance` keep the same under "converted_from", "conversion" and
    "adapted", and do not say which change resized the position grid: there any change counts as one.

    Raises:
        ValueError: the provenance is malformed.
    """
    metadata = dict(origin)
    if "provenance" in metadata:
        return Provenance.from_json_dict(metadata.pop("provenance")), metadata
    conversion, changes = metadata.get("conversion"), metadata.get("adapted")
    fields: dict[str, Any] = {}
    if isinstance(changes, list):
        fields |= {"changes": metadata.pop("adapted"), "grid_resized": bool(changes)}
    formats = {description: kind for kind, description in _DESCRIPTIONS.items()}
    if isinstance(conversion, dict) and conversion.get("format") in formats:
        fields |= metadata.pop("conversion")
        fields |= {"source": metadata.pop("converted_from", None), "format": formats[conversion["format"]]}
        fields["num_tensors"] = fields.pop("tensors", 0)
    return Provenance.from_json_dict(fields), metadata
