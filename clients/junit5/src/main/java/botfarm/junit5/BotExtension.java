package botfarm.junit5;

import java.lang.reflect.Method;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import org.junit.jupiter.api.extension.ExtensionContext;
import org.junit.jupiter.api.extension.ExtensionContext.Namespace;
import org.junit.jupiter.api.extension.ExtensionContext.Store;
import org.junit.jupiter.api.extension.InvocationInterceptor;
import org.junit.jupiter.api.extension.ParameterContext;
import org.junit.jupiter.api.extension.ParameterResolver;
import org.junit.jupiter.api.extension.ReflectiveInvocationContext;
import org.opentest4j.TestAbortedException;

/** What is behind {@link Bot}. */
public final class BotExtension implements ParameterResolver, InvocationInterceptor {
    private static final Namespace NAMESPACE = Namespace.create(BotExtension.class);

    /** The accounts of one test, or of one class; JUnit closes them with it. */
    private static final class Accounts extends ArrayList<Account> implements AutoCloseable {
        private static final long serialVersionUID = 1;

        private final transient ExtensionContext context;

        Accounts(ExtensionContext context) {
            this.context = context;
        }

        @Override
        public void close() {
            Account.release(iterator(), outcome());
        }

        /** How the test went. Nothing is told of one that was aborted, nor of a class, which has several. */
        private String outcome() {
            Throwable failure = context.getExecutionException().orElse(null);
            if (context.getTestMethod().isEmpty() || failure instanceof TestAbortedException) {
                return null;
            }
            return failure == null ? "passed" : "failed";
        }
    }

    /** So that an account of a constructor is its test's, where each test has an instance of its own. */
    @Override
    public ExtensionContextScope getTestInstantiationExtensionContextScope(ExtensionContext root) {
        return ExtensionContextScope.TEST_METHOD;
    }

    @Override
    public boolean supportsParameter(ParameterContext parameter, ExtensionContext context) {
        return parameter.isAnnotated(Bot.class) && parameter.getParameter().getType() == Account.class;
    }

    @Override
    public Account resolveParameter(ParameterContext parameter, ExtensionContext context) {
        Bot bot = parameter.findAnnotation(Bot.class).orElseThrow();
        int ttl = bot.ttl() > 0 ? bot.ttl() : number(context, "ttl", 60);
        int wait = bot.waitSeconds() >= 0 ? bot.waitSeconds() : number(context, "wait", 300);
        try {
            Account account = farm(context).acquire(bot.user(), filter(bot, context), ttl, wait);
            accounts(context).add(account);
            return account;
        } catch (InterruptedException interrupted) {
            Thread.currentThread().interrupt();
            throw new IllegalStateException("interrupted while it waited for a test account", interrupted);
        }
    }

    private static Map<String, Object> filter(Bot bot, ExtensionContext context) {
        Map<String, Object> filter = new HashMap<>();
        if (!bot.user().isEmpty()) {
            return filter;
        }
        Map.of("project_id", bot.project(), "env", bot.env(), "domain", bot.domain()).forEach((field, given) -> {
            String value = given.isEmpty() ? setting(context, field.replace("_id", "")).orElse("") : given;
            if (!value.isEmpty()) {
                filter.put(field, value);
            }
        });
        Map<String, String> labels = new HashMap<>();
        for (String label : bot.labels()) {
            String[] parts = label.split("=", 2);
            if (parts.length < 2) {
                throw new IllegalArgumentException("the label \"" + label + "\" of @Bot has to be name=value");
            }
            labels.put(parts[0], parts[1]);
        }
        filter.put("labels", labels);
        return filter;
    }

    private static Optional<String> setting(ExtensionContext context, String name) {
        return context.getConfigurationParameter("botfarm." + name);
    }

    private static int number(ExtensionContext context, String name, int otherwise) {
        String given = setting(context, name).orElse(String.valueOf(otherwise));
        if (!given.matches("\\d{1,9}")) {
            throw new IllegalArgumentException("botfarm." + name + " is \"" + given + "\": it has to be a number of seconds");
        }
        return Integer.parseInt(given);
    }

    private static Farm farm(ExtensionContext context) {
        Store store = context.getRoot().getStore(NAMESPACE);
        return store.getOrComputeIfAbsent(Farm.class, key -> new Farm(System.getenv()), Farm.class);
    }

    /** By the context's id: a store would show a test those of its class, which last longer. */
    private static Accounts accounts(ExtensionContext context) {
        Store store = context.getStore(NAMESPACE);
        return store.getOrComputeIfAbsent(context.getUniqueId(), id -> new Accounts(context), Accounts.class);
    }

    @Override
    public void interceptTestMethod(
            Invocation<Void> test, ReflectiveInvocationContext<Method> method, ExtensionContext context)
            throws Throwable {
        watched(test, context);
    }

    @Override
    public void interceptTestTemplateMethod(
            Invocation<Void> test, ReflectiveInvocationContext<Method> method, ExtensionContext context)
            throws Throwable {
        watched(test, context);
    }

    /** The test, interrupted once a user of it or of its class is lost; that is then why it fails. */
    private static void watched(Invocation<Void> test, ExtensionContext context) throws Throwable {
        List<Account> held = new ArrayList<>();
        for (var at = Optional.of(context); at.isPresent(); at = at.get().getParent()) {
            held.addAll(accounts(at.get()));
        }
        Throwable failure = null;
        try {
            for (Account account : held) {
                account.watchOver(Thread.currentThread());
            }
            test.proceed();
        } catch (Throwable thrown) {
            failure = thrown;
        } finally {
            held.forEach(Account::watchNoMore);
        }
        for (Account account : held) {
            failure = account.lossOr(failure);
        }
        if (failure != null) {
            throw failure;
        }
    }
}
