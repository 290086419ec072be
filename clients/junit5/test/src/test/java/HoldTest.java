import botfarm.junit5.Account;
import botfarm.junit5.Bot;
import org.junit.jupiter.api.Test;

class HoldTest {
    @Test
    void holdsItsUser(@Bot Account bot) throws InterruptedException {
        System.out.println("worker " + ProcessHandle.current().pid() + " holds " + bot.login());
        Thread.sleep(60_000);
    }
}
