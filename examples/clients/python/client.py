"""Prints a token of jwksd for each subject (a line of standard input), asked for over the signer's Unix socket:

    echo alice | python client.py /run/jwksd/signer.sock default https://api.example.com
"""

import http.client
import json
import socket
import sys
import time

ATTEMPT = 3  # seconds for one answer
PATIENCE = 30  # seconds for a token


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket. After `close` the next request dials again."""

    def __init__(self, path):
        super().__init__("localhost", timeout=ATTEMPT)
        self._path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def sign(connection, keyset, claims):
    """Asks until there is a token: again when the daemon cannot be reached, and when it says "not now" (503)."""
    body = json.dumps({"claims": claims, "ttl": "5m"})
    deadline = time.monotonic() + PATIENCE
    while True:
        pause = 0.5
        try:
            connection.request("POST", f"/v1/keysets/{keyset}/sign", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            answer = json.load(response)
            if response.status == 200:
                return answer["token"]
            problem = RuntimeError(f"{response.status} {answer.get('type')} {answer.get('detail', '')}")
            if response.status != 503:
                raise problem  # our request is wrong: asking again does not help
            pause = float(response.headers.get("Retry-After", pause))
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            problem = error
        if time.monotonic() + pause > deadline:
            raise problem
        time.sleep(pause)


path, keyset, audience = sys.argv[1:]
connection = UnixConnection(path)
for line in sys.stdin:
    print(sign(connection, keyset, {"sub": line.strip(), "aud": audience}), flush=True)
