// panva/jose with createRemoteJWKSet, as its documentation shows it.
import { createRequire } from "node:module";

// `import` does not look at NODE_PATH, `require` does.
const require = createRequire(import.meta.url);
const { createRemoteJWKSet, jwtVerify } = require("jose");
const { version } = require("jose/package.json");
const protocol = require("./line_protocol.cjs");

const { url, cacheMillis } = protocol.arguments();
// The default cool-down of 30 s stays: within it an unknown kid does not make the set fetch again.
const jwks = createRemoteJWKSet(new URL(url), {
  cacheMaxAge: cacheMillis,
  timeoutDuration: protocol.FETCH_TIMEOUT_MILLIS,
});

await protocol.answerRequests(`jose ${version}`, ({ token, iss, aud, alg }) =>
  jwtVerify(token, jwks, { algorithms: [alg], issuer: iss, audience: aud, requiredClaims: ["exp", "iat"] }),
);
