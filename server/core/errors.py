"""The errors a request can end with, and the one table of their statuses.

    ServiceError
    ├── InvalidRequest          400  a field is missing, malformed or out of range
    │   ├── UnknownModel        400  no such model is served
    │   └── ContextExceeded     400  the prompt, or what is asked for after it, does not fit the model's context
    ├── Unauthorized            401  no key, or a key that is not (or no longer) ours
    ├── Forbidden               403  the key is known but may not do this
    ├── NotFound                404
    ├── MethodNotAllowed        405
    ├── ClientTooSlow           408  the client did not send its request, or read its answer, in time
    ├── PayloadTooLarge         413
    ├── Unprocessable           422  an Idempotency-Key that stands for another request
    ├── HeadersTooLarge         431
    ├── Cancelled               499  DELETE /v1/requests/{id}; nginx's status, and gRPC's for what its caller cancelled
    ├── TooManyRequests         429  retry_after_s says when
    │   ├── RateLimited              past the key's requests per minute
    │   └── QueueFull                the broker refused the job: the model's queue is full
    ├── EngineFailed            500  the engine broke on this request
    ├── RecordRefused           500  Postgres will never take this data; its text may hold what was said
    ├── Unavailable             503  retry_after_s says when
    │   ├── BrokerUnavailable
    │   ├── DatabaseUnavailable
    │   │   └── DatabaseFull          its disk is; reading may go on
    │   ├── NoWorker                 no live worker serves the model
    │   └── AnswerLost               the worker or the connection to it went away in the middle of the work
    └── DeadlineExceeded        504

Library errors become one of these once, at the boundary (`raise X from exc`). A dialect gives them its
own shape; the message is written for the caller and never carries `str(exc)`.
"""

from typing import ClassVar


class ServiceError(Exception):
    """A request that ended badly.

    `message` is for the caller; `param` names the offending field as a dotted path, if there is one. `code` is
    OpenAI's word for it, empty where that has none. `may_have_run` says that the work may have been done, so
    that a client that asks again on its own may pay twice. `retry_after_s` has a default where asking again helps.
    """

    status: ClassVar[int] = 500
    code: ClassVar[str] = ""
    may_have_run: ClassVar[bool] = False
    retry_after_s: int | None = None

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if retry_after_s is not None:
            self.retry_after_s = retry_after_s


class InvalidRequest(ServiceError):
    status = 400


class UnknownModel(InvalidRequest):
    code = "model_not_found"


class ContextExceeded(InvalidRequest):
    code = "context_length_exceeded"


class Unauthorized(ServiceError):
    status = 401
    code = "invalid_api_key"


class Forbidden(ServiceError):
    status = 403


class NotFound(ServiceError):
    status = 404


class MethodNotAllowed(ServiceError):
    status = 405


class ClientTooSlow(ServiceError):
    status = 408


class PayloadTooLarge(ServiceError):
    status = 413


class HeadersTooLarge(ServiceError):
    status = 431


class Unprocessable(ServiceError):
    status = 422


class Cancelled(ServiceError):
    """Not 409, which the dialects' SDKs would try again."""

    status = 499
    code = "cancelled"


class TooManyRequests(ServiceError):
    status = 429


class RateLimited(TooManyRequests):
    code = "rate_limit_exceeded"


class QueueFull(TooManyRequests):
    code = "queue_full"


class EngineFailed(ServiceError):
    status = 500
    may_have_run = True


class RecordRefused(ServiceError):
    status = 500


class Unavailable(ServiceError):
    status = 503
    retry_after_s = 2


class BrokerUnavailable(Unavailable):
    pass


class DatabaseUnavailable(Unavailable):
    pass


class DatabaseFull(DatabaseUnavailable):
    pass


class NoWorker(Unavailable):
    pass


class AnswerLost(Unavailable):
    may_have_run = True


class DeadlineExceeded(ServiceError):
    status = 504
    may_have_run = True


_BY_STATUS: dict[int, type[ServiceError]] = {
    cls.status: cls
    for cls in (
        InvalidRequest,
        Unauthorized,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        ClientTooSlow,
        PayloadTooLarge,
        Cancelled,
        TooManyRequests,
        EngineFailed,
        Unavailable,
        DeadlineExceeded,
    )
}


def from_status(status: int, message: str, param: str | None = None, code: str = "") -> ServiceError:
    """The error for a status that came over the wire (a worker's error frame, the web framework's own)."""
    fallback = EngineFailed if status >= 500 else InvalidRequest
    kind = ContextExceeded if code == ContextExceeded.code else _BY_STATUS.get(status, fallback)
    return kind(message, param=param)
