"""Health check of a container: `healthy.py VARIABLE PORT PATH` asks for the path at the port that the variable names, else PORT.

Exit code 0 when it answers 200, or the port is 0: then there is nothing to ask. It heeds no proxy variables.
"""

from __future__ import annotations

import http.client
import os
import sys


def main(variable: str, usual: str, path: str) -> int:
    """Returns the exit code."""
    port = int(os.environ.get(variable) or usual)
    if port == 0:
        return 0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", path)
        return int(connection.getresponse().status != 200)
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
