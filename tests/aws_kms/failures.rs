//! What DESIGN §10 says happens when AWS KMS is away, slow, throttles or refuses.
