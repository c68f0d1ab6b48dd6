"""Stages: load inputs, call science, save. Wiring only."""
