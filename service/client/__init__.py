"""`AuditClient`: the service's API as Python calls. Read `client.py` first.

Importing this package does not load the HTTP library; making a client does.
"""

from service.client.client import AuditClient, GateRequest, JobFilter, Submission, is_final, job_error
from service.client.connection import make_error
from service.client.downloads import target_of
from service.client.files import LocalFiles, TransferObserver, files_below, read_files
from service.upload_names import UPLOAD

__all__ = [
    "UPLOAD",
    "AuditClient",
    "GateRequest",
    "JobFilter",
    "LocalFiles",
    "Submission",
    "TransferObserver",
    "files_below",
    "is_final",
    "job_error",
    "make_error",
    "read_files",
    "target_of",
]
