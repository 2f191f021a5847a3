"""An artifact put on its base model, ready to predict: what release and evaluation share."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from credence.adapters.artifact import Artifact
from credence.training.classifier import check_padding, load_model
from credence.training.config import LoraSettings
from credence.training.data import DataFormat
from credence.training.errors import ModelError
from credence.training.modeling import add_lora, context_length, load_tokenizer
from credence.training.predict import Predictor
from credence.training.prompts import Encoder, LabelSpace


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A model with the artifact's LoRA modules, and the encoder of the artifact's data format."""

    format: DataFormat
    encoder: Encoder
    predictor: Predictor


@contextmanager
def open_session(
    artifact: Artifact, base: str | Path, *, dtype: str | None = None, batch_size: int = 64
) -> Iterator[Session]:
    """Loads the base model, adds LoRA modules of the artifact's names and rank, and frees the model at the end.

    Args:
        dtype: of the base model; None takes the one the adapter was trained with (float32 if unknown).

    Raises:
        ModelError: the base model is not the adapter's, or the artifact does not say what data it was trained on.
    """
    training, data_format = artifact.config.training, artifact_format(artifact)
    dtype = dtype or training.get("config", {}).get("train", {}).get("dtype", "float32")
    model, head = load_model(base, dtype, num_classes=len(training.get("labels", ())) or None)
    if bool(artifact.head) != bool(head.parameters):
        raise ModelError(
            f"{artifact.path} was trained on {_with_head(bool(artifact.head))}, {base} is {_with_head(not artifact.head)}; give the "
            f"adapter's own base model, {artifact.config.base_model.name}"
        )
    head.load(artifact.head)
    settings = LoraSettings(
        r=artifact.config.rank, alpha=artifact.config.lora_alpha, target_modules=tuple(sorted(artifact.mean))
    )
    encoder = artifact_encoder(artifact, base, max_length=context_length(model))
    if artifact.head:
        check_padding(model, encoder.tokenizer)
    model, sites = add_lora(model, settings, head.modules)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    yield Session(
        format=data_format, encoder=encoder, predictor=Predictor(model, sites, pad_token(encoder.tokenizer), batch_size)
    )


def _with_head(is_classifier: bool) -> str:
    return "an encoder" if is_classifier else "a causal language model"


def artifact_format(artifact: Artifact) -> DataFormat:
    """What the rows are that the artifact was trained on.

    Raises:
        ModelError: the artifact does not say.
    """
    try:
        return DataFormat(artifact.config.training["format"])
    except (KeyError, ValueError):
        raise ModelError(
            f"{artifact.path} does not record the data format it was trained on (posterior.json, training.format: "
            f"{', '.join(DataFormat)}), so its rows cannot be encoded"
        ) from None


def artifact_encoder(artifact: Artifact, base: str | Path, *, max_length: int) -> Encoder:
    """Encodes rows as in the artifact's training; reads the base model's tokenizer alone.

    Raises:
        ModelError: the tokenizer or the artifact's training record is not usable.
    """
    data_format = artifact_format(artifact)
    space = LabelSpace.from_record(artifact.config.training) if data_format is DataFormat.LABEL else None
    return Encoder(load_tokenizer(base), data_format, space=space, max_length=max_length)


def pad_token(tokenizer: Any) -> int:
    """Token to pad with; it is masked out, so the end-of-text token or 0 serve where there is no padding token."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
