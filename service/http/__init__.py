"""The HTTP interface: API under /v1 and server-rendered pages."""
