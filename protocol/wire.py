"""Version and HTTP headers of the protocol, paths of the split plane, bytes of a float32."""

from __future__ import annotations

from typing import Final

__all__ = [
    "BACKWARD_PATH",
    "CHECKSUM_HEADER",
    "EXCHANGE_PATH",
    "FLOAT32_BYTES",
    "FORWARD_PATH",
    "FRAME_MEDIA_TYPE",
    "IDEMPOTENCY_HEADER",
    "INFER_PATH",
    "LABELS_PATH",
    "MISSING_PATH",
    "PROTOCOL_VERSION",
    "REQUEST_ID_HEADER",
    "SAMPLES_PATH",
    "SOLVE_PATH",
    "START_PATH",
    "VERSION_HEADER",
]

PROTOCOL_VERSION = 2  # in every frame, and in the version header of every request

VERSION_HEADER = "sfprompt-version"

IDEMPOTENCY_HEADER = "idempotency-key"

CHECKSUM_HEADER = "sfprompt-checksum"  # of a JSON body

REQUEST_ID_HEADER = "x-request-id"

FRAME_MEDIA_TYPE = "application/vnd.sfprompt.frame"

FORWARD_PATH: Final = "/v1/split/forward"

BACKWARD_PATH: Final = "/v1/split/backward"

INFER_PATH: Final = "/v1/split/infer"

EXCHANGE_PATH: Final = "/v1/split/exchange"

SAMPLES_PATH: Final = "/v1/split/samples"

MISSING_PATH: Final = "/v1/split/missing"

START_PATH: Final = "/v1/split/start"

SOLVE_PATH: Final = "/v1/split/solve"

LABELS_PATH: Final = "/v1/split/labels"

FLOAT32_BYTES: Final = 4  # bytes of one float32
