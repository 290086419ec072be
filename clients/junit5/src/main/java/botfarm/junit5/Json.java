package botfarm.junit5;

import java.util.ArrayList;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Map;
import java.util.regex.Matcher;
import java.util.regex.Pattern;
import java.util.stream.Collectors;

/** As much of JSON as calls and replies of the service need: Java brings none. What is read is well-formed. */
final class Json {
    private static final Pattern TOKEN =
            Pattern.compile("\\s*(\"((?:[^\"\\\\]|\\\\.)*+)\"|[\\[\\]{}:,]|[^\\s\\[\\]{}:,\"]+)");
    private static final Pattern ESCAPE = Pattern.compile("\\\\(?:u(\\p{XDigit}{4})|(.))");

    private final Matcher tokens;

    private Json(String text) {
        tokens = TOKEN.matcher(text);
    }

    static Object read(String text) {
        return new Json(text).value();
    }

    private String next() {
        if (!tokens.find()) {
            throw new IllegalArgumentException("the reply ends in the midst of its JSON");
        }
        return tokens.group(1);
    }

    private Object value() {
        return valueOf(next());
    }

    private Object valueOf(String token) {
        return switch (token.charAt(0)) {
            case '{' -> object();
            case '[' -> list();
            case '"' -> unescape(tokens.group(2));
            case 't', 'f' -> Boolean.valueOf(token);
            case 'n' -> null;
            default -> token.matches("-?\\d+") ? (Object) Long.valueOf(token) : Double.valueOf(token);
        };
    }

    private Map<String, Object> object() {
        Map<String, Object> read = new LinkedHashMap<>();
        for (String token = next(); !token.equals("}"); token = next()) {
            if (!token.equals(",")) {
                String key = unescape(tokens.group(2));
                next(); // the colon
                read.put(key, value());
            }
        }
        return read;
    }

    private List<Object> list() {
        List<Object> read = new ArrayList<>();
        for (String token = next(); !token.equals("]"); token = next()) {
            if (!token.equals(",")) {
                read.add(valueOf(token));
            }
        }
        return read;
    }

    private static String unescape(String text) {
        return ESCAPE.matcher(text).replaceAll(found -> Matcher.quoteReplacement(
                found.group(1) != null
                        ? String.valueOf((char) Integer.parseInt(found.group(1), 16))
                        : switch (found.group(2)) {
                            case "n" -> "\n";
                            case "r" -> "\r";
                            case "t" -> "\t";
                            case "b" -> "\b";
                            case "f" -> "\f";
                            default -> found.group(2);
                        }));
    }

    static String write(Object value) {
        if (value instanceof Map<?, ?> map) {
            return map.entrySet().stream()
                    .map(entry -> write(entry.getKey()) + ":" + write(entry.getValue()))
                    .collect(Collectors.joining(",", "{", "}"));
        }
        return value instanceof String text ? quote(text) : String.valueOf(value);
    }

    private static String quote(String text) {
        return text.codePoints()
                .mapToObj(c -> c < ' ' || c == '"' || c == '\\' ? "\\u%04x".formatted(c) : Character.toString(c))
                .collect(Collectors.joining("", "\"", "\""));
    }
}
