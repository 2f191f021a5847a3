"""What a client is made with: the address of a server, the key, and how long and how often it is asked."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import httpx2

DEFAULT_TIMEOUT_S = 60.0
DEFAULT_MAX_RETRIES = 2
CONNECT_TIMEOUT_S = 5.0
# Below the five seconds after which uvicorn closes an idle connection: a request sent into a closing connection
# has an unknown outcome and could not be retried.
KEEPALIVE_EXPIRY_S = 3.0


@dataclass(frozen=True, slots=True)
class Settings:
    """Checked arguments of `Client` and `AsyncClient`, which describe them.

    Raises:
        ValueError: An argument is not usable; the message never contains the key.
    """

    base_url: str
    _: KW_ONLY
    api_key: str | None = field(default=None, repr=False)
    timeout_s: float = DEFAULT_TIMEOUT_S
    max_retries: int = DEFAULT_MAX_RETRIES

    def __post_init__(self) -> None:
        """Check the arguments."""
        object.__setattr__(self, "base_url", _checked_base_url(self.base_url))
        checked_seconds("timeout_s", self.timeout_s)
        key, retries = self.api_key, self.max_retries
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise ValueError(f"max_retries is {retries!r}; give a whole number, 0 or more")
        if key is not None and (not key.isascii() or not key.isprintable() or not key.strip(" ")):
            raise ValueError("api_key is empty or has characters that no HTTP header may carry; give printable ASCII")

    def http_options(self) -> dict[str, Any]:
        """Arguments of httpx2's client, synchronous or not."""
        return {
            "headers": {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key.strip(' ')}"},
            # The number of connections is the caller's concurrency: a request never waits for another's to be free.
            "limits": httpx2.Limits(keepalive_expiry=KEEPALIVE_EXPIRY_S),
        }


def checked_seconds(name: str, value: float) -> float:
    """Return a positive, finite number of seconds.

    Raises:
        ValueError: It is something else; `name` says which argument.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0.0 < value < float("inf"):
        raise ValueError(f"{name} is {value!r}; give a positive number of seconds")
    return float(value)


def _checked_base_url(base_url: str) -> str:
    try:
        url = httpx2.URL(base_url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"base_url is {base_url!r}; give an address such as http://localhost:8000") from error
    if url.userinfo:
        raise ValueError("base_url carries a user name or password; give the key as api_key instead")
    if url.scheme not in {"http", "https"} or not url.host or url.query or url.fragment:
        raise ValueError(f"base_url is {base_url!r}; give an address such as http://localhost:8000")
    return str(url).rstrip("/").removesuffix("/v1").rstrip("/")
