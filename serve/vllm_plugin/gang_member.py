"""The reserved keys (``credence_*`` in ``SamplingParams.extra_args``) that make a request one member of a gang."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vllm import SamplingParams

from credence.serve.step_stats import MAX_TOP

PREFIX = "credence_"
_KEYS = frozenset(PREFIX + name for name in (
    "gang", "k", "member", "seed", "stats", "support", "targets", "temperature", "token", "top",
))  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class GangMember:
    """The reserved keys of one member request (``SamplingParams.extra_args``), validated.

    Attributes:
        gang: id of the gang, unique among the running ones.
        num_samples: K.
        index: which posterior sample this member is, 0..K-1.
        seed: key of the token generator, 0..2**64-1.
        stats: absolute path of the gang's statistics file; "" for none.
        temperature, support: the calibration: temperature on the averaged probabilities, over these tokens (all if empty).
        num_top: how many of the most likely tokens of the average are recorded per step, 0..1000.
        targets: (position, token) pairs by ascending position: record i is the average after prompt position ``targets[i][0]``, at token
            ``targets[i][1]``. Empty unless this is a scoring gang.
    """

    gang: str
    num_samples: int
    index: int
    seed: int
    stats: str
    temperature: float = 1.0
    support: tuple[int, ...] = ()
    num_top: int = 0
    targets: tuple[tuple[int, int], ...] = ()

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> "GangMember | None":
        """Reads the reserved keys; None if there are none. The token is not checked here.

        Raises:
            ValueError: if a key is unknown or missing, or has a value it may not have.
        """
        keys = {key for key in extra_args or () if isinstance(key, str) and key.startswith(PREFIX)}
        if extra_args is None or not keys:
            return None
        if keys != _KEYS:
            raise ValueError(f"gang requests need exactly the keys {sorted(_KEYS)}, got {sorted(keys)}")
        gang, num_samples, index, seed, stats = (
            extra_args[PREFIX + name] for name in ("gang", "k", "member", "seed", "stats")
        )
        if not isinstance(gang, str) or not gang:
            raise ValueError(f"{PREFIX}gang must be a non-empty string, got {gang!r}")
        num_top = extra_args[PREFIX + "top"]
        limits = (
            ("k", num_samples, 2**16),
            ("seed", seed, 2**64),
            ("member", index, 2**16),
            ("top", num_top, MAX_TOP + 1),
        )
        for name, value, limit in limits:
            if type(value) is not int or not 0 <= value < limit:
                raise ValueError(f"{PREFIX}{name} must be an integer in 0..{limit - 1}, got {value!r}")
        if index >= num_samples:
            raise ValueError(f"{PREFIX}member must be below {PREFIX}k, got member {index} of {num_samples}")
        if not isinstance(stats, str) or (stats and not os.path.isabs(stats)):
            raise ValueError(f"{PREFIX}stats must be an absolute path or an empty string, got {stats!r}")
        temperature, support = extra_args[PREFIX + "temperature"], extra_args[PREFIX + "support"]
        if not isinstance(temperature, (int, float)) or not 0 < temperature < float("inf"):
            raise ValueError(f"{PREFIX}temperature must be a positive number, got {temperature!r}")
        if not all(type(token) is int and token >= 0 for token in support):
            raise ValueError(f"{PREFIX}support must be a list of token ids, got {support!r}")
        return cls(
            gang=gang,
            num_samples=num_samples,
            index=index,
            seed=seed,
            stats=stats,
            temperature=float(temperature),
            support=tuple(support),
            num_top=num_top,
            targets=_targets(extra_args[PREFIX + "targets"]),
        )


def _targets(value: Any) -> tuple[tuple[int, int], ...]:
    pairs: list[Any] = list(value) if isinstance(value, (list, tuple)) else [None]
    well_formed = all(
        isinstance(pair, (list, tuple)) and len(pair) == 2 and all(type(item) is int and item >= 0 for item in pair)
        for pair in pairs
    )
    if not well_formed or any(later[0] < earlier[0] for earlier, later in itertools.pairwise(pairs)):
        raise ValueError(
            f"{PREFIX}targets must be a list of [position, token] pairs by ascending position, got {str(value)[:80]}"
        )
    return tuple((position, token) for position, token in pairs)


def constrained(params: SamplingParams) -> bool:
    """Whether vLLM will forbid or favour tokens of this request before sampling."""
    return bool(
        params.logit_bias
        or params.allowed_token_ids
        or params.bad_words
        or params.min_tokens
        or params.structured_outputs is not None
    )
