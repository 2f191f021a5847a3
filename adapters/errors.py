"""Errors of credence.adapters.

AdapterError
├── ArtifactError   an artifact folder cannot be read, verified or written (``reason`` is from a closed set)
└── PosteriorError  a posterior's tensors or settings do not fit its mean adapter (also a ValueError)
"""

from typing import Literal

ArtifactReason = Literal[
    "missing", "not_a_folder", "symlink", "too_large", "hash_mismatch", "malformed", "unsupported", "not_finite",
    "wrong_shape", "exists", "io",
]  # fmt: skip
"""Why an artifact was refused; a closed set, so that it can be a metric label."""


class AdapterError(Exception):
    """Base class: catch it to catch everything credence.adapters raises."""


class ArtifactError(AdapterError):
    """An artifact folder is refused; nothing of it was loaded.

    Attributes:
        reason: one of :data:`ArtifactReason`.
        path: the folder or file concerned.
    """

    def __init__(self, message: str, *, reason: ArtifactReason, path: object) -> None:
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
