"""PyJWT with its PyJWKClient, as its documentation shows it."""

import jwt
from jwt import PyJWKClient

from line_protocol import FETCH_TIMEOUT_SECONDS, answer_requests, arguments

url, cache_seconds = arguments()
# The default cool-down of 30 s stays: within it an unknown kid does not make the client fetch again.
client = PyJWKClient(url, lifespan=cache_seconds, timeout=FETCH_TIMEOUT_SECONDS)


def verify(token, iss, aud, alg):
    key = client.get_signing_key_from_jwt(token)
    jwt.decode(token, key, algorithms=[alg], issuer=iss, audience=aud, options={"require": ["exp", "iat", "iss", "aud"]})


answer_requests(f"PyJWT {jwt.__version__}", verify)
