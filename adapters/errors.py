"""Errors of credence.adapters.

AdapterError
├── ArtifactError   an artifact folder cannot be read, verified or written (``reason`` is from a closed set)
├── PosteriorError  a posterior's tensors or settings do not fit its mean adapter (also a ValueError)
└── KeyFileError    a signing key or a trust file cannot be used (also a ValueError)
"""

from typing import Literal, get_args

ArtifactReason = Literal[
    "missing", "not_a_folder", "symlink", "too_large", "hash_mismatch", "malformed", "unsupported", "not_finite",
    "wrong_shape", "unsigned", "bad_signature", "exists", "io",
]  # fmt: skip
"""Why an artifact was refused; a closed set, so that it can be a metric label. docs/artifacts.md explains each."""

REASONS: tuple[ArtifactReason, ...] = get_args(ArtifactReason)
"""Every reason there is."""


class AdapterError(Exception):
    """Base class: catch it to catch everything credence.adapters raises."""


class ArtifactError(AdapterError):
    """An artifact folder is refused; nothing of it was loaded.

    Attributes:
        reason: one of :data:`ArtifactReason`.
        path: the folder or file concerned.
    """

    def __init__(self, message: str, *, reason: ArtifactReason, path: object) -> None:
        if reason not in REASONS:
            raise ValueError(f"{reason!r} is no reason of an ArtifactError; choose from {', '.join(REASONS)}")
        super().__init__(message)
        self.reason: ArtifactReason = reason
        self.path = str(path)


class PosteriorError(AdapterError, ValueError):
    """A posterior does not fit its mean adapter, or a setting is out of range.

    Attributes:
        reason: the reason of the ArtifactError it becomes when it is found in an artifact.
    """

    def __init__(self, message: str, *, reason: ArtifactReason = "malformed") -> None:
        super().__init__(message)
        self.reason: ArtifactReason = reason


class KeyFileError(AdapterError, ValueError):
    """A signing key or a trust file cannot be read, written or used.

    Attributes:
        path: the file concerned.
    """

    def __init__(self, message: str, *, path: object) -> None:
        super().__init__(message)
        self.path = str(path)
