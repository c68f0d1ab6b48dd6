"""Every error the engine raises on purpose.

::

    SaferError                     code, retryable; message, hint
    ├── SpecError                  the spec is wrong                          (usage, exit 2)
    ├── InputRefused               a model or dataset cannot be audited       (usage, exit 2)
    │   ├── ModelRefused
    │   └── DatasetRefused
    ├── ArtifactError              a stored artifact is missing, torn or in conflict
    │   ├── DamagedArtifact        it was set aside; running again computes it anew
    │   └── WorkBusy               another process is computing the same key  (retryable)
    ├── NumericalError             a non-finite value where none may be
    ├── LabellerError              the labelling endpoint failed for good     (retryable)
    ├── ResourceError              out of memory or disk                      (retryable)
    └── Interrupted                the observer asked to stop; work is kept   (exit 130)
"""

from __future__ import annotations

from typing import ClassVar


class SaferError(Exception):
    """Base of all errors raised on purpose.

    Args:
        message: what is wrong, in one sentence, naming the value.
        hint: what the reader should do about it; may be empty.
    """

    code: ClassVar[str] = "error"
    retryable: ClassVar[bool] = False

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class SpecError(SaferError):
    """The audit spec is invalid or contradicts itself."""

    code = "spec_invalid"


class InputRefused(SaferError):
    """An input was read and found unfit to audit."""

    code = "input_refused"


class ModelRefused(InputRefused):
    """The reward model cannot be trusted to be what it claims (head, weights, tokenizer, code)."""

    code = "model_refused"


class DatasetRefused(InputRefused):
    """The dataset cannot be read as preference pairs, or too few pairs are left."""

    code = "dataset_refused"


class ArtifactError(SaferError):
    """A stored artifact is missing, damaged, or of another type than asked for."""

    code = "artifact_error"


class DamagedArtifact(ArtifactError):
    """A committed artifact whose record or files are not as they were written.

    Attributes:
        stage, key: which it is.
    """

    code = "artifact_damaged"

    def __init__(self, message: str, stage: str, key: str) -> None:
        super().__init__(message, "run the same command again: it is computed anew")
        self.stage = stage
        self.key = key


class WorkBusy(ArtifactError):
    """Another process holds the work area of the same cache key."""

    code = "work_busy"
    retryable = True


class NumericalError(SaferError):
    """A computation gave a non-finite value; nothing is reported from it."""

    code = "numerical_error"


class LabellerError(SaferError):
    """A labeller gave up after its retries."""

    code = "labeller_error"
    retryable = True


class ResourceError(SaferError):
    """Memory or disk ran out."""

    code = "resource_exhausted"
    retryable = True


class Interrupted(SaferError):
    """The observer asked to stop; what was finished stays in the work area."""

    code = "interrupted"
    retryable = True
