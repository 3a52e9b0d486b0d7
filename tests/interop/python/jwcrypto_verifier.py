"""jwcrypto, with the document cached beside it: the library leaves fetching to its user."""

from importlib.metadata import version

from jwcrypto import jwk, jwt

from line_protocol import CachedKeySet, answer_requests, arguments

jwks = CachedKeySet(*arguments(), parse=jwk.JWKSet.from_json)


def verify(token, iss, aud, alg):
    decoded = jwt.JWT(
        algs=[alg],
        check_claims={"iss": iss, "aud": aud, "exp": None},
        expected_type="JWS",
    )
    decoded.leeway = 0
    decoded.deserialize(token, jwks.keys())


answer_requests(f"jwcrypto {version('jwcrypto')}", verify)
