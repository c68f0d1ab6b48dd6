"""The `safer-audit` command."""
