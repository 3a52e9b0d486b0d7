"""The line protocol every verifier of these tests speaks.

Started as `VERIFIER JWKS_URL CACHE_SECONDS`, a verifier prints one line `{"ready": true, "version": …}` and then
answers each line `{"token", "iss", "aud", "alg"}` with one line `{"ok": true}` or `{"ok": false, "error": "Class: text"}`.
It ends when its standard input does.
"""

import json
import sys
import time
import urllib.request

FETCH_TIMEOUT_SECONDS = 5


class CachedKeySet:
    """A JWKS held for its declared time and never refetched because of a key it does not know.

    For the libraries that verify but leave fetching to their users.
    """

    def __init__(self, url, cache_seconds, parse):
        self._url, self._cache_seconds, self._parse = url, cache_seconds, parse
        self._keys, self._fetched_at = None, None

    def keys(self):
        now = time.monotonic()
        if self._fetched_at is None or now >= self._fetched_at + self._cache_seconds:
            with urllib.request.urlopen(self._url, timeout=FETCH_TIMEOUT_SECONDS) as response:
                assert response.status == 200, response.status
                self._keys, self._fetched_at = self._parse(response.read().decode()), now
        return self._keys


def arguments():
    """The JWKS address and the seconds it may be cached."""
    url, cache_seconds = sys.argv[1:]
    return url, float(cache_seconds)


def answer_requests(version, verify):
    """Answers requests with `verify(token, iss, aud, alg)`, which raises what is wrong with the token."""
    print(json.dumps({"ready": True, "version": version}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            verify(request["token"], request["iss"], request["aud"], request["alg"])
            answer = {"ok": True}
        except Exception as error:  # Whatever a library raises is a rejection; the tests check which one.
            answer = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
