"""Authlib's own JOSE module, deprecated and still in many services; the document is cached beside it."""

import json
import warnings

import authlib
from authlib.deprecate import AuthlibDeprecationWarning

warnings.simplefilter("ignore", AuthlibDeprecationWarning)
from authlib.jose import JsonWebKey, JsonWebToken  # noqa: E402 (the filter must come first)

from line_protocol import CachedKeySet, answer_requests, arguments

jwks = CachedKeySet(*arguments(), parse=lambda text: JsonWebKey.import_key_set(json.loads(text)))


def verify(token, iss, aud, alg):
    claims = JsonWebToken([alg]).decode(
        token,
        jwks.keys(),
        claims_options={
            "exp": {"essential": True},
            "iss": {"essential": True, "value": iss},
            "aud": {"essential": True, "value": aud},
        },
    )
    claims.validate()


answer_requests(f"Authlib {authlib.__version__}", verify)
