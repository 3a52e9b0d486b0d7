import java.io.IOException;
import java.net.URI;
import java.net.http.*;
import java.nio.file.*;
import java.time.*;
import java.util.Scanner;
import java.util.regex.*;

/**
 * Prints a token of jwksd for each subject (a line of standard input), asked for over loopback TCP with a client token:
 *
 * <pre>echo alice | java Client.java http://127.0.0.1:8621 client.token default https://api.example.com</pre>
 */
public class Client {
    static final Duration ATTEMPT = Duration.ofSeconds(3); // for one answer
    static final Duration PATIENCE = Duration.ofSeconds(30); // for a token
    static final Pattern TOKEN = Pattern.compile("\"token\"\\s*:\\s*\"([A-Za-z0-9_.-]+)\""); // the JDK reads no JSON
    static final HttpClient HTTP = HttpClient.newHttpClient(); // dials again when the daemon has restarted

    /** Asks until there is a token: again when the daemon cannot be reached, and when it says "not now" (503). */
    static String sign(URI address, Path tokenFile, String body) throws IOException, InterruptedException {
        Instant deadline = Instant.now().plus(PATIENCE);
        while (true) {
            Duration pause = Duration.ofMillis(500);
            IOException problem;
            try {
                HttpRequest request = HttpRequest.newBuilder(address).timeout(ATTEMPT).version(HttpClient.Version.HTTP_1_1)
                        .header("Authorization", "Bearer " + Files.readString(tokenFile).strip()) // it may be replaced
                        .header("Content-Type", "application/json")
                        .POST(HttpRequest.BodyPublishers.ofString(body)).build();
                HttpResponse<String> response = HTTP.send(request, HttpResponse.BodyHandlers.ofString());
                Matcher token = TOKEN.matcher(response.body());
                if (response.statusCode() == 200 && token.find()) return token.group(1);
                problem = new IOException(response.statusCode() + " " + response.body());
                if (response.statusCode() != 503) throw new IllegalArgumentException(problem); // ours to mend
                pause = response.headers().firstValue("Retry-After").filter(s -> s.matches("\\d{1,9}"))
                        .map(s -> Duration.ofSeconds(Long.parseLong(s))).orElse(pause);
            } catch (IOException error) {
                problem = error;
            }
            if (Instant.now().plus(pause).isAfter(deadline)) throw problem;
            Thread.sleep(pause.toMillis());
        }
    }

    public static void main(String[] args) throws Exception {
        URI address = URI.create(args[0] + "/v1/keysets/" + args[2] + "/sign");
        for (Scanner lines = new Scanner(System.in); lines.hasNextLine(); ) {
            String claims = "{\"sub\":%s,\"aud\":%s}".formatted(quote(lines.nextLine()), quote(args[3]));
            System.out.println(sign(address, Path.of(args[1]), "{\"claims\":" + claims + ",\"ttl\":\"5m\"}"));
        }
    }

    static String quote(String text) {
        return '"' + text.replace("\\", "\\\\").replace("\"", "\\\"") + '"';
    }
}
