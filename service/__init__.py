"""The audit service: control plane."""
