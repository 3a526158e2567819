"""Every error that Diptych raises on purpose, as one tree.

    DiptychError                       500  internal_error
    ├── Unauthorized                   401  authentication_error    WWW-Authenticate
    ├── Forbidden                      403  permission_error
    ├── InvalidRequest                 400  invalid_request_error
    │   ├── ContextLengthExceeded      400  (code context_length_exceeded)
    │   ├── ModelNotFound              404  (code model_not_found)
    │   ├── NotFound                   404
    │   └── PayloadTooLarge            413
    ├── Overloaded                     429  rate_limit_error        Retry-After
    ├── Unavailable                    503  service_unavailable     Retry-After, retryable
    │   └── WorkerLost                 503  (code worker_lost)
    ├── DeadlineExceeded               504  timeout_error
    ├── Cancelled                      499  cancelled
    ├── TransferError                  500  transfer_error          retryable (by recomputing)
    └── StartupError                   a process cannot start; printed as one line, exit code 2
        ├── ConfigError
        └── ModelLoadError

Foreign exceptions are mapped onto these where they enter.
"""

from typing import Any, ClassVar


class DiptychError(Exception):
    """One sentence for a person, plus what a client program needs to react to it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    retryable: ClassVar[bool] = False
    default_code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or self.default_code
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The OpenAI error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": str(max(1, round(self.retry_after_s)))}


class Unauthorized(DiptychError):
    status = 401
    type = "authentication_error"
    default_code = "invalid_api_key"

    def headers(self) -> dict[str, str]:
        return {**super().headers(), "WWW-Authenticate": "Bearer"}


class Forbidden(DiptychError):
    status = 403
    type = "permission_error"
    default_code = "forbidden"


class InvalidRequest(DiptychError):
    status = 400
    type = "invalid_request_error"


class ContextLengthExceeded(InvalidRequest):
    default_code = "context_length_exceeded"


class ModelNotFound(InvalidRequest):
    status = 404
    default_code = "model_not_found"


class NotFound(InvalidRequest):
    status = 404
    default_code = "not_found"


class PayloadTooLarge(InvalidRequest):
    status = 413
    default_code = "payload_too_large"


class Overloaded(DiptychError):
    status = 429
    type = "rate_limit_error"
    retryable = True
    default_code = "overloaded"


class Unavailable(DiptychError):
    status = 503
    type = "service_unavailable"
    retryable = True
    default_code = "unavailable"


class WorkerLost(Unavailable):
    default_code = "worker_lost"


class DeadlineExceeded(DiptychError):
    status = 504
    type = "timeout_error"
    default_code = "deadline_exceeded"


class Cancelled(DiptychError):
    status = 499
    type = "cancelled"
    default_code = "cancelled"


class TransferError(DiptychError):
    """A KV transfer that did not deliver; the reader recomputes. code: peer_gone, stale,
    corrupt, deadline, layout, refused, cancelled, internal."""

    type = "transfer_error"
    retryable = True


class StartupError(DiptychError):
    type = "startup_error"


class ConfigError(StartupError):
    default_code = "invalid_config"


class ModelLoadError(StartupError):
    default_code = "model_load_failed"


def from_wire(status: int, error: dict[str, Any]) -> DiptychError:
    """Rebuild the error of another process from its status and OpenAI error object."""
    code = error.get("code")
    same_status = [leaf for leaf in _LEAVES if leaf.status == status]
    by_code = [leaf for leaf in same_status if leaf.default_code == code]
    leaf = next(iter(by_code or same_status), DiptychError)
    return leaf(str(error.get("message", "")), param=error.get("param"), code=code)


# The first one of a status is what an unknown code of that status becomes.
_LEAVES: tuple[type[DiptychError], ...] = (
    DiptychError,
    Unauthorized,
    Forbidden,
    InvalidRequest,
    ContextLengthExceeded,
    NotFound,
    ModelNotFound,
    PayloadTooLarge,
    Overloaded,
    Unavailable,
    WorkerLost,
    DeadlineExceeded,
    Cancelled,
    TransferError,
)
