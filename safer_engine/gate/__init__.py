"""The gate: whether a reward model may ship, decided from finished audits by the rules of a policy.

Needs the base install alone. Read `judge.py` first.
"""
