// Prints a token of jwksd for each subject (a line of standard input), asked for over the signer's Unix socket:
//
//   echo alice | node client.mjs /run/jwksd/signer.sock default https://api.example.com
import http from "node:http";
import readline from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";

const ATTEMPT = 3_000; // milliseconds for one answer
const PATIENCE = 30_000; // milliseconds for a token

const agent = new http.Agent({ keepAlive: true }); // dials again when the daemon has restarted

/** One POST: its status, its Retry-After in milliseconds (if any) and its body. */
function post(socketPath, path, body) {
  return new Promise((resolve, reject) => {
    const headers = { "content-type": "application/json", host: "localhost" };
    const signal = AbortSignal.timeout(ATTEMPT);
    const request = http.request({ socketPath, path, method: "POST", headers, agent, signal }, async (response) => {
      try {
        const chunks = await response.toArray();
        const retryAfter = Number(response.headers["retry-after"] ?? NaN) * 1000;
        resolve({ status: response.statusCode, retryAfter, body: JSON.parse(Buffer.concat(chunks)) });
      } catch (error) {
        reject(error);
      }
    });
    request.on("error", reject).end(JSON.stringify(body));
  });
}

/** Asks until there is a token: again when the daemon cannot be reached, and when it says "not now" (503). */
async function sign(socketPath, keyset, claims) {
  const deadline = Date.now() + PATIENCE;
  for (;;) {
    let problem;
    let pause = 500;
    try {
      const { status, retryAfter, body } = await post(socketPath, `/v1/keysets/${keyset}/sign`, { claims, ttl: "5m" });
      if (status === 200) return body.token;
      problem = new Error(`${status} ${body.type} ${body.detail ?? ""}`, { cause: status });
      if (retryAfter >= 0) pause = retryAfter;
    } catch (error) {
      problem = error;
    }
    const refused = typeof problem.cause === "number" && problem.cause !== 503; // asking again does not help
    if (refused || Date.now() + pause > deadline) throw problem;
    await sleep(pause);
  }
}

const [socketPath, keyset, aud] = process.argv.slice(2);
for await (const sub of readline.createInterface({ input: process.stdin })) {
  console.log(await sign(socketPath, keyset, { sub, aud }));
}
process.exit(); // without waiting for the idle connection
