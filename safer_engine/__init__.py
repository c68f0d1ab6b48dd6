"""safer_engine: the science of safer-audit. Knows nothing of queues, databases, HTTP servers or S3."""
