"""Errors of the service beside the engine's.

::

    SaferError
    └── ServiceError
        ├── Malformed            not JSON, not UTF-8, too deep, a bad header          400
        ├── RequestInvalid       well-formed, but fields are wrong; `problems` names  422
        ├── NotFound             no such thing in this project                       404
        ├── Gone                 it was made, and removed since                      410
        ├── Conflict             the state, or an earlier request, forbids it        409
        ├── NotAuthenticated     no key, or one that is wrong, expired or revoked    401
        ├── NotAllowed           the key lacks the role                              403
        ├── SourceNotAllowed     a model, dataset or URL the operator does not allow 422
        ├── QuotaExceeded        the project's limit                                 429
        ├── TooManyRequests      the key's rate                                      429
        ├── TooLarge             a body or upload over the limit                     413
        ├── Unavailable          database, broker or store cannot be reached         503
        ├── SchemaMismatch       the database has another schema than this program   (stops the start)
        ├── Unreachable          nobody answers at the service's address              (raised by clients)
        └── LeaseLost            another worker has the unit: write nothing          (never sent to a client)
"""

from __future__ import annotations

from dataclasses import dataclass

from safer_engine.errors import SaferError


@dataclass(frozen=True)
class FieldProblem:
    """What is wrong with one field of a request; `path` is dotted (`spec.sae.k`), empty for the whole."""

    path: str
    message: str


class ServiceError(SaferError):
    """Base of the service's own errors."""

    code = "service_error"


class Malformed(ServiceError):
    """The request cannot be read: not JSON, not UTF-8, too deep, a header that no client should send."""

    code = "malformed"


class RequestInvalid(ServiceError):
    """The request can be read, but fields of it are wrong."""

    code = "request_invalid"

    def __init__(self, message: str, hint: str = "", problems: tuple[FieldProblem, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems


class NotFound(ServiceError):
    """There is no such thing, or it belongs to another project: the answer is the same."""

    code = "not_found"


class Gone(ServiceError):
    """It was made, and has been removed since: by retention, or by a purge of someone's data."""

    code = "gone"


class Conflict(ServiceError):
    """The present state, or an earlier request under the same key, forbids this."""

    code = "conflict"


class NotAuthenticated(ServiceError):
    """No API key, or one that is wrong, expired or revoked."""

    code = "not_authenticated"


class NotAllowed(ServiceError):
    """The API key lacks the role."""

    code = "not_allowed"


class SourceNotAllowed(ServiceError):
    """A model, dataset or address outside what the operator allows."""

    code = "source_not_allowed"


class QuotaExceeded(ServiceError):
    """A limit of the project is reached."""

    code = "quota_exceeded"


class TooManyRequests(ServiceError):
    """The API key's rate is used up; `retry_after` says when to come back."""

    code = "too_many_requests"
    retryable = True

    def __init__(self, message: str, hint: str = "", retry_after: float = 1.0) -> None:
        super().__init__(message, hint)
        self.retry_after = retry_after


class TooLarge(ServiceError):
    """A body, a part or an upload is over its limit."""

    code = "too_large"


class Unavailable(ServiceError):
    """The database, the broker or the artifact store cannot be reached."""

    code = "unavailable"
    retryable = True


class SchemaMismatch(ServiceError):
    """The database's schema is older or newer than this program's."""

    code = "schema_mismatch"


class Unreachable(ServiceError):
    """Nobody answers at the service's address, or the connection broke. Raised by clients."""

    code = "unreachable"
    retryable = True


class LeaseLost(ServiceError):
    """The unit was given to another worker; nothing may be written under this lease."""

    code = "lease_lost"
    retryable = True
