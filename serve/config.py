"""Configuration of the server: what the launcher hands to the plugins, through one environment variable.

vLLM starts its own processes and builds its own parser, so the configuration travels as JSON in :data:`CONFIG_VARIABLE`; it is read in
one place, :func:`from_environment`.
"""

import os
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from credence.serve.errors import ConfigurationError
from credence.serve.limits import RequestLimits

CONFIG_VARIABLE = "CREDENCE_SERVE_CONFIG"
TOKEN_VARIABLE = "CREDENCE_PLUGIN_TOKEN"
ADAPTER_NAME = re.compile(r"^[a-z0-9][a-z0-9._-]{0,63}$")


class ServeConfig(BaseModel):
    """Settings of our part of the server; everything else is vLLM's own.

    Attributes:
        adapters: artifact folder by served name.
        merged: the base model holds the mean of the one adapter: its samples are served as delta adapters, its mean without LoRA.
        default_samples: K when a request does not say.
        max_samples: largest K a request may ask for; needs as many LoRA slots.
        sample_slots: samples the workers keep; None for every adapter's resident set and room for the largest request beside them.
        max_adapters: adapters that may be served at once; their means need as many LoRA slots.
        adapter_roots: folders below which an artifact must lie to be loaded at run time.
        adapter_dir: folder whose sub-folders are adapters, watched while the server runs.
        adapters_of_dir: those of ``adapters`` that came from it.
        max_inflight_rows: member rows in flight before requests get 503.
        max_scored_rows: largest number of (sample, token) pairs that one text may be scored on; a worker holds a hidden state for each.
        max_body_bytes: largest request body.
        limits: what one request may ask for.
        api_key_file, admin_key_file: keys of users, and of /admin; None: user routes are open, and /admin closed.
        extra_routes: further routes of vLLM's that are open to users.
        return_samples: whether ``uncertainty.return_samples`` is permitted at all.
        audit_log: file of the audit log; None for none.
        trust: absolute path of the trust file; an artifact must then be signed by one of its keys. None accepts unsigned ones.
        readiness_timeout_s: how long /readyz waits for its own small request.
        state_dir: private folder of this server: verified artifact copies.
        stats_dir: tmpfs folder of this server: one statistics file per running ensemble.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    adapters: dict[str, str] = Field(min_length=1)
    merged: bool = False
    default_samples: Annotated[int, Field(ge=1)] = 8
    max_samples: Annotated[int, Field(ge=1, le=1024)] = 32
    sample_slots: Annotated[int, Field(ge=1)] | None = None
    max_adapters: Annotated[int, Field(ge=1, le=1024)] | None = None
    adapter_roots: tuple[str, ...] = ()
    adapter_dir: str | None = None
    adapters_of_dir: tuple[str, ...] = ()
    max_inflight_rows: Annotated[int, Field(ge=1)] = 1024
    max_scored_rows: Annotated[int, Field(ge=1)] = 65536
    max_body_bytes: Annotated[int, Field(ge=1024)] = 8 * 2**20
    limits: RequestLimits = RequestLimits()
    api_key_file: str | None = None
    admin_key_file: str | None = None
    extra_routes: tuple[str, ...] = ()
    return_samples: bool = True
    audit_log: str | None = None
    trust: str | None = None
    readiness_timeout_s: Annotated[float, Field(gt=0)] = 5.0
    state_dir: str
    stats_dir: str

    @field_validator("adapters")
    @classmethod
    def _names(cls, adapters: dict[str, str]) -> dict[str, str]:
        for name in adapters:
            if not ADAPTER_NAME.match(name):
                raise ValueError(f"adapter name {name!r} must match {ADAPTER_NAME.pattern}")
        return adapters

    @model_validator(mode="after")
    def _one_mean_is_merged(self) -> "ServeConfig":
        if self.merged and len(self.adapters) != 1:
            raise ValueError(f"a merged model serves one adapter, its own; got {sorted(self.adapters)}")
        return self

    @model_validator(mode="after")
    def _room_for_the_adapters(self) -> "ServeConfig":
        if len(self.adapters) > self.num_adapters:
            raise ValueError(f"{len(self.adapters)} adapters are more than max_adapters = {self.num_adapters}")
        return self

    @property
    def num_slots(self) -> int:
        """Samples the workers keep."""
        return self.sample_slots or self.default_samples * self.num_adapters + self.max_samples

    @property
    def max_inflight_requests(self) -> int:
        """Requests of users, running and queued, before further ones get 503."""
        return 2 * self.max_inflight_rows

    @property
    def num_adapters(self) -> int:
        """Adapters that may be served at once."""
        return self.max_adapters or len(self.adapters)

    @property
    def num_mean_loras(self) -> int:
        """Means that take a LoRA slot: one per adapter, none of a merged model."""
        return 0 if self.merged else self.num_adapters


def from_environment() -> ServeConfig:
    """Reads the configuration the launcher left.

    Raises:
        ConfigurationError: if it is absent or not valid.
    """
    text = os.environ.get(CONFIG_VARIABLE)
    if text is None:
        raise ConfigurationError(
            f"the credence plugin is loaded but {CONFIG_VARIABLE} is not set; start the server with `credence serve`, "
            "or remove credence from VLLM_PLUGINS"
        )
    try:
        return ServeConfig.model_validate_json(text)
    except ValidationError as error:
        raise ConfigurationError(f"{CONFIG_VARIABLE} is not valid: {error}") from None
