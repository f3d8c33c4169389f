"""Whether a process of this container answers: `healthcheck.py VARIABLE PATH`, the first of which names its port."""

import http.client
import os
import sys

TIMEOUT_S = 5


def main(variable: str, path: str) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", int(os.environ.get(variable, "8000")), timeout=TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        print(answer.status, answer.read(1000).decode(errors="replace"))  # `docker inspect` shows it
    except (OSError, http.client.HTTPException) as exc:
        print(exc)
        return 1
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
