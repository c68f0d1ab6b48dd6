"""Finished audits in the forms that others read."""
