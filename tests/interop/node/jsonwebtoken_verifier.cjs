// jsonwebtoken with jwks-rsa, as their documentation shows them together.
"use strict";

const jwt = require("jsonwebtoken");
const jwksClient = require("jwks-rsa");
const protocol = require("./line_protocol.cjs");

const { url, cacheMillis } = protocol.arguments();
const client = jwksClient({
  jwksUri: url,
  cache: true,
  cacheMaxAge: cacheMillis,
  timeout: protocol.FETCH_TIMEOUT_MILLIS,
});

const keyOf = (header, done) =>
  client.getSigningKey(header.kid, (error, key) => (error ? done(error) : done(null, key.getPublicKey())));

const verify = ({ token, iss, aud, alg }) =>
  new Promise((resolve, reject) => {
    jwt.verify(token, keyOf, { algorithms: [alg], issuer: iss, audience: aud }, (error, claims) =>
      error ? reject(error) : resolve(claims),
    );
  });

const versionOf = (name) => `${name} ${require(`${name}/package.json`).version}`;
protocol.answerRequests(`${versionOf("jsonwebtoken")}, ${versionOf("jwks-rsa")}`, verify);
