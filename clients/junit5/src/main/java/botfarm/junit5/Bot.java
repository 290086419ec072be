package botfarm.junit5;

import java.lang.annotation.ElementType;
import java.lang.annotation.Retention;
import java.lang.annotation.RetentionPolicy;
import java.lang.annotation.Target;
import org.junit.jupiter.api.extension.ExtendWith;

/**
 * A test account for this parameter, an {@link Account}: of a test or its constructor for as long as that lasts, of
 * {@code @BeforeAll} and the like for as long as the class does.
 *
 * <p>What is left out is the configuration parameter of JUnit {@code botfarm.project}, {@code botfarm.env}, and so on.
 */
@Target(ElementType.PARAMETER)
@Retention(RetentionPolicy.RUNTIME)
@ExtendWith(BotExtension.class)
public @interface Bot {
    String project() default "";

    String env() default "";

    String domain() default "";

    /** As {@code "role=admin"}. */
    String[] labels() default {};

    /** The id of this very user. */
    String user() default "";

    /** Seconds after which the user is free again when this process is gone: 60. Renewed every third of it. */
    int ttl() default 0;

    /** Seconds to wait for a user: 300, with {@code botfarm.wait}. */
    int waitSeconds() default -1;
}
