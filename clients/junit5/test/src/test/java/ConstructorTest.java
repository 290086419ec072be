import botfarm.junit5.Account;
import botfarm.junit5.Bot;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class ConstructorTest {
    private final Account bot;

    ConstructorTest(@Bot Account bot) {
        this.bot = bot;
    }

    @ParameterizedTest
    @ValueSource(ints = {1, 2})
    void eachTestHasOne(int number) {
        bot.check();
    }
}
