import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertNotEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;

import botfarm.junit5.Account;
import botfarm.junit5.Bot;
import botfarm.junit5.Refused;
import java.util.Map;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class ScopesTest {
    static Account ofTheClass;

    @BeforeAll
    static void acquire(@Bot(labels = {"role=admin", "name=Zoë \"Z\"\\"}) Account account) {
        ofTheClass = account;
    }

    @Test
    void aTestThatFailsGivesItsUserBack(@Bot Account bot) {
        assertEquals("nobody", bot.login());
    }

    @Test
    void ofOneThatIsAbortedNothingIsTold(@Bot Account bot) {
        Assumptions.abort();
    }

    @Test
    void anAccountThatDoesNotWorkIsGivenBackAsSuch(@Bot Account bot) {
        assertThrows(Refused.class, () -> bot.release("bad login"));
        bot.release("bad-login");
    }

    @ParameterizedTest
    @ValueSource(ints = {1, 2})
    void eachRunHasOne(int number, @Bot Account bot) {
        assertNotEquals(ofTheClass.login(), bot.login());
    }

    @Test
    void whatItIsIsTold(@Bot(ttl = 9, waitSeconds = 0) Account bot) {
        ofTheClass.check();
        assertEquals(Map.of("role", "admin", "name", "Zoë \"Z\"\\"), ofTheClass.labels());
        assertEquals(bot.login().replace("bot", "pw"), bot.password());
    }
}
