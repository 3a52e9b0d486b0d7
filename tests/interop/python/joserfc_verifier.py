"""joserfc, with the document cached beside it: the library leaves fetching to its user."""

import json
import warnings

import joserfc
from joserfc import jwt
from joserfc.jwk import KeySet

from line_protocol import CachedKeySet, answer_requests, arguments

# RFC 9864 deprecates the label EdDSA for Ed25519, which most verifiers still need.
warnings.filterwarnings("ignore", message="EdDSA is deprecated")

jwks = CachedKeySet(*arguments(), parse=lambda text: KeySet.import_key_set(json.loads(text)))


def verify(token, iss, aud, alg):
    decoded = jwt.decode(token, jwks.keys(), algorithms=[alg])
    jwt.JWTClaimsRegistry(
        exp={"essential": True},
        iss={"essential": True, "value": iss},
        aud={"essential": True, "value": aud},
    ).validate(decoded.claims)


answer_requests(f"joserfc {joserfc.__version__}", verify)
