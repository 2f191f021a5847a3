"""What the door asks of a request: who it is from, and whether that key may ask for it. See docs/security.md.

With user keys, every request also carries a salt of vLLM's prefix cache that is its tenant's alone: how fast an answer comes would
otherwise tell whether somebody else has sent the same prompt before.
"""

import hashlib
import hmac
import json
import secrets
from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

from credence.serve.audit import AuditLog
from credence.serve.errors import BadRequest, Forbidden, NotFound, Unauthorized
from credence.serve.keys import KeyRecord, KeyRing
from credence.serve.limits import RequestLimits
from credence.serve.rates import Rates
from credence.serve.routes import ROUTES, UNCERTAINTY_PATHS, Access, Route
from credence.serve.schemas import UncertaintyOptions

SCOPE_KEY = "credence.key"

Scope = MutableMapping[str, Any]


@dataclass(kw_only=True)
class Security:
    """Settings and state of the door. The defaults are an open server's.

    Attributes:
        users, admins: the keys; without any, user routes are open and admin routes closed.
        routes: what the server answers.
        return_samples: whether ``uncertainty.return_samples`` is permitted at all.
        max_inflight: requests of users that are answered at once. vLLM's own bound is asked only after a body was read, validated and
            tokenised, which costs more than the answer of a full server should.
        max_model_len: tokens of the longest sequence, for the estimate of a request's cost.
        secret: of this start of the server; the salts are made from it.
    """

    users: KeyRing = field(default_factory=lambda: KeyRing(None))
    admins: KeyRing = field(default_factory=lambda: KeyRing(None, admin=True))
    routes: tuple[Route, ...] = ROUTES
    limits: RequestLimits = field(default_factory=RequestLimits)
    rates: Rates = field(default_factory=Rates)
    return_samples: bool = True
    max_body_bytes: int = 8 * 2**20
    max_inflight: int = 2048
    max_model_len: int = 2**17
    audit: AuditLog | None = None
    secret: bytes = field(default_factory=lambda: secrets.token_bytes(32), repr=False)

    def authenticate(self, scope: Scope, route: Route) -> KeyRecord | None:
        """The key of a request, None where none is needed.

        Raises:
            Unauthorized: a key is needed and none that is known was given.
            Forbidden: the key is known and opens other routes.
        """
        if route.access is Access.OPEN or scope["method"] == "OPTIONS":
            return None
        admin = route.access is Access.ADMIN
        ring, other = (self.admins, self.users) if admin else (self.users, self.admins)
        if not ring.guards and not admin:
            return None
        token = _bearer(scope)
        key = ring.find(token) if token else None
        if key is None and token and other.find(token) is not None:
            raise Forbidden(f"this key does not open {'/admin' if admin else 'the routes of users'}", param=None)
        if key is None or (route.extra and not key.sees_all):
            raise Unauthorized
        scope[SCOPE_KEY] = key
        return key

    def permit_model(self, key: KeyRecord | None, model: object) -> None:
        """Checks that the key may ask for a model. One that it may not ask for does not exist, so that names do not leak.

        Raises:
            BadRequest: a key with a list of models must name one, or the base model would answer.
            NotFound: not one of its models.
        """
        if key is None or key.sees_all:
            return
        if not isinstance(model, str) or not model:
            raise BadRequest("this key must name the model it asks for; GET /v1/models lists its models", param="model")
        if not key.sees(model):
            raise NotFound(f"The model `{model[:80]}` does not exist.", param="model")

    def permit_options(self, key: KeyRecord | None, options: UncertaintyOptions) -> None:
        """Checks what a key may ask of the uncertainty; raises Forbidden."""
        if options.return_samples and not (self.return_samples and (key is None or key.return_samples)):
            raise Forbidden(
                f"{'this key' if self.return_samples else 'this server'} does not permit uncertainty.return_samples; leave it out",
                param="uncertainty.return_samples",
            )
        most = None if key is None else key.max_samples
        if most is None:
            return
        for name in ("n_samples", "min_samples"):
            asked = getattr(options, name)
            if isinstance(asked, int) and asked > most:
                raise Forbidden(
                    f"this key may ask for at most {most} samples, got uncertainty.{name} {asked}",
                    param=f"uncertainty.{name}",
                )

    def salt(self, key: KeyRecord | None, path: str, body: dict[str, Any]) -> bool:
        """Puts the tenant's cache salt into a body; a salt of the client's own becomes a part of it and reaches no other tenant.

        Returns:
            Whether the body was changed.

        Raises:
            BadRequest: the client's salt is no text.
        """
        if key is None or path not in UNCERTAINTY_PATHS:
            return False
        own = body.get("cache_salt")
        if own is not None and (not isinstance(own, str) or not 0 < len(own) <= 1024):
            raise BadRequest("cache_salt must be a text of 1 to 1024 characters", param="cache_salt")
        parts = json.dumps([key.owner(), own]).encode()
        body["cache_salt"] = hmac.new(self.secret, parts, hashlib.sha256).hexdigest()
        return True


def key_of(scope: Scope) -> KeyRecord | None:
    """The key that a request was let in with."""
    key = scope.get(SCOPE_KEY)
    assert key is None or isinstance(key, KeyRecord)
    return key


def _bearer(scope: Scope) -> str:
    """The token of the Authorization header; empty without. Two such headers are no key."""
    given = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
    return token.strip().decode("utf-8", "surrogateescape") if scheme.lower() == b"bearer" else ""
