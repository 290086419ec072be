import botfarm.junit5.Account;
import botfarm.junit5.Bot;
import org.junit.jupiter.api.Test;

class WrongTest {
    @Test
    void aLabelHasAValue(@Bot(labels = "role", waitSeconds = 0) Account bot) {}

    @Test
    void aNumberIsOne(@Bot Account bot) {}
}
