package botfarm.junit5;

import static java.nio.charset.StandardCharsets.UTF_8;

import java.io.IOException;
import java.net.URI;
import java.net.URLEncoder;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpRequest.BodyPublishers;
import java.net.http.HttpResponse;
import java.net.http.HttpResponse.BodyHandlers;
import java.time.Duration;
import java.util.HashMap;
import java.util.LinkedHashMap;
import java.util.Map;
import java.util.Set;
import java.util.UUID;
import java.util.concurrent.ConcurrentHashMap;
import java.util.function.DoubleSupplier;
import java.util.function.Supplier;
import java.util.stream.Collectors;

/** The service, as BOTFARM_URL and its like name it. When Java ends, it gives back what is still held. */
final class Farm {
    private static final double PATIENCE = 60; // seconds for which a service that is away is asked again
    static final double REPLY = 10; // seconds in which a call that does not wait is answered
    private static final double THERE = 20; // seconds after which a wait that is cut off, by a proxy, had got through
    private static final Set<Integer> AWAY = Set.of(0, 429, 502, 503, 504); // it, or what a proxy says of it
    private static final long NANOS = System.nanoTime();
    private static final long MILLIS = System.currentTimeMillis();

    final Set<Account> held = ConcurrentHashMap.newKeySet();
    private final HttpClient http = HttpClient.newBuilder().version(HttpClient.Version.HTTP_1_1).build();
    private final Map<String, String> settings;
    private final String url;
    private final String holder;
    private volatile String token;

    Farm(Map<String, String> settings) {
        this.settings = new HashMap<>(settings);
        this.settings.values().removeIf(String::isEmpty); // CI sets to nothing what it does not have
        this.url = settings.getOrDefault("BOTFARM_URL", "").strip().replaceAll("/+$", "");
        if (!url.matches("(?i)https?://[^@?#\\s]+")) { // no password in it, as it is told when something fails
            throw new IllegalStateException("BOTFARM_URL is not set to the address of BotFarm, as http://botfarm:8000");
        }
        this.holder = this.settings.getOrDefault("BOTFARM_HOLDER", "junit5/" + UUID.randomUUID());
        Runtime.getRuntime().addShutdownHook(new Thread(() -> Account.release(held.iterator(), null)));
    }

    /** Seconds: of two clocks that on which more have passed, as one of them stops while the machine is suspended. */
    static double clock() {
        return Math.max((System.nanoTime() - NANOS) / 1e9, (System.currentTimeMillis() - MILLIS) / 1e3);
    }

    /** A free user that fits, or the one with that id; waits for one. The filter has the fields of POST /locks. */
    Account acquire(String user, Map<String, Object> filter, int ttl, int wait) throws InterruptedException {
        double asked = clock();
        double end = asked + wait;
        String key = UUID.randomUUID().toString(); // the same in every try: a lost reply's lock comes with the next one
        DoubleSupplier left = () -> Math.max(Math.ceil(end - clock()), 0);
        Supplier<String> body = () -> {
            Map<String, Object> wish = new HashMap<>(filter);
            wish.putAll(Map.of("holder", holder, "ttl", ttl, "wait", (long) left.getAsDouble()));
            return Json.write(wish);
        };
        DoubleSupplier reply = () -> left.getAsDouble() + REPLY;
        try {
            Reply granted = user.isEmpty()
                    ? call("POST", "/locks", key, body, reply, 0)
                    : call("PUT", "/users/" + encode(user) + "/lock", key, body, reply, 0);
            return new Account(this, granted.body, asked);
        } catch (Refused refused) {
            if (!"lock-ended".equals(refused.slug())) { // it was granted, and over before a reply came through
                throw refused;
            }
            return acquire(user, filter, ttl, (int) left.getAsDouble());
        }
    }

    /**
     * One call, repeated while the service is away. One with a key may wait, and be cut off as often as it takes. With
     * a deadline (not 0) it is repeated until then, whatever is refused (a token, perhaps) but the lock itself.
     */
    Reply call(String method, String path, String key, Supplier<String> body, DoubleSupplier reply, double deadline)
            throws InterruptedException {
        double end = deadline;
        for (double pause = 0.25; ; pause = Math.min(pause * 2, 5)) {
            double seconds = reply.getAsDouble();
            Reply answer = ask(method, path, key, body, deadline == 0 ? seconds : Math.min(seconds, deadline - clock()));
            if (answer.isGood()) {
                return answer;
            }
            Refused refused = answer.refusal(method + " " + url + path);
            if (end == 0 || (key != null && clock() - answer.sent > THERE)) {
                end = clock() + PATIENCE;
            }
            double next = answer.after > 0 ? answer.after : pause;
            boolean fatal = deadline == 0 ? !AWAY.contains(answer.status) : "lock-not-held".equals(refused.slug());
            if (fatal || clock() + next >= end) {
                throw refused;
            }
            Thread.sleep((long) (next * 1000));
        }
    }

    private Reply ask(String method, String path, String key, Supplier<String> body, double seconds)
            throws InterruptedException {
        Map<String, String> headers = new HashMap<>(Map.of("Content-Type", "application/json"));
        if (key != null) {
            headers.put("Idempotency-Key", key);
        }
        Reply answer = exchange(method, path, headers, body.get(), seconds);
        // A token is asked for where one is asked for: a service without authentication is never shown the secret.
        if (answer.status != 401 || form().isEmpty()) {
            return answer;
        }
        Map<String, String> asForm = Map.of("Content-Type", "application/x-www-form-urlencoded");
        Reply granted = exchange("POST", "/token", asForm, form(), REPLY);
        if (!granted.isGood()) {
            return granted;
        }
        token = (String) granted.body.get("access_token");
        return exchange(method, path, headers, body.get(), seconds);
    }

    private String form() {
        Map<String, String> form = new LinkedHashMap<>();
        if (settings.containsKey("BOTFARM_CLIENT_SECRET")) {
            form.put("grant_type", "client_credentials");
            form.put("client_id", settings.getOrDefault("BOTFARM_CLIENT_ID", ""));
            form.put("client_secret", settings.get("BOTFARM_CLIENT_SECRET"));
        } else if (settings.containsKey("BOTFARM_ID_TOKEN")) {
            form.put("grant_type", "urn:ietf:params:oauth:grant-type:token-exchange");
            form.put("subject_token", settings.get("BOTFARM_ID_TOKEN"));
            form.put("subject_token_type", "urn:ietf:params:oauth:token-type:jwt");
        }
        return form.entrySet().stream()
                .map(field -> field.getKey() + "=" + encode(field.getValue()))
                .collect(Collectors.joining("&"));
    }

    private Reply exchange(String method, String path, Map<String, String> headers, String body, double seconds)
            throws InterruptedException {
        HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(url + path))
                .method(method, body.isEmpty() ? BodyPublishers.noBody() : BodyPublishers.ofString(body))
                .timeout(Duration.ofMillis(Math.max((long) (seconds * 1000), 1)));
        headers.forEach(request::setHeader);
        if (token != null) {
            request.setHeader("Authorization", "Bearer " + token);
        }
        double sent = clock();
        try {
            HttpResponse<String> answer = http.send(request.build(), BodyHandlers.ofString());
            boolean json = answer.headers().firstValue("Content-Type").orElse("").contains("json");
            Map<?, ?> read = json && Json.read(answer.body()) instanceof Map<?, ?> map ? map : Map.of();
            String after = answer.headers().firstValue("Retry-After").orElse("0");
            return new Reply(answer.statusCode(), read, after.matches("\\d+") ? Integer.parseInt(after) : 0, sent);
        } catch (IOException | IllegalArgumentException fault) { // the latter where its JSON is none
            return new Reply(0, Map.of("detail", "not reached: " + fault), 0, sent);
        }
    }

    static String encode(String text) {
        return URLEncoder.encode(text, UTF_8);
    }

    /** The answer to a call: status 0 where there was none. `sent` is when it was asked for. */
    record Reply(int status, Map<?, ?> body, double after, double sent) {
        boolean isGood() {
            return status >= 200 && status < 300;
        }

        Refused refusal(String call) {
            Object slug = body.containsKey("type") ? body.get("type") : body.get("error");
            Object detail = body.containsKey("detail") ? body.get("detail") : body.get("error_description");
            String ended = body.get("ended_by") == null ? "" : body.get("ended_by") + " at " + body.get("ended_at");
            return new Refused(
                    ended.isEmpty() ? "%s: status %d: %s".formatted(call, status, detail) : ended,
                    status,
                    String.valueOf(slug).replace("urn:botfarm:", ""));
        }
    }
}
