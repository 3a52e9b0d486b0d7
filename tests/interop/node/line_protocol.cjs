// The line protocol of ../python/line_protocol.py, for verifiers that run on Node.
"use strict";

const readline = require("node:readline");

/** The JWKS address and the milliseconds it may be cached. */
exports.arguments = () => {
  const [url, cacheSeconds] = process.argv.slice(2);
  return { url, cacheMillis: Number(cacheSeconds) * 1000 };
};

/** Answers requests with `verify({token, iss, aud, alg})`, which throws what is wrong with the token. */
exports.answerRequests = async (version, verify) => {
  console.log(JSON.stringify({ ready: true, version }));
  for await (const line of readline.createInterface({ input: process.stdin })) {
    let answer = { ok: true };
    try {
      await verify(JSON.parse(line));
    } catch (error) {
      answer = { ok: false, error: `${error.code ?? error.name}: ${error.message}` };
    }
    console.log(JSON.stringify(answer));
  }
};

exports.FETCH_TIMEOUT_MILLIS = 5000;
