"""MLflow's model registry: its webhooks come in, verdicts go back as tags. Plain REST; MLflow itself is not imported."""
