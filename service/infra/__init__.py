"""Settings, artifact stores, metrics and logs of the service and its workers."""
