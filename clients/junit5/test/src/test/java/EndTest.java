import botfarm.junit5.Account;
import botfarm.junit5.Bot;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;

class EndTest {
    private Account bot;

    @Test
    void isShort(@Bot Account bot) {
        this.bot = bot;
        System.out.println("worker " + ProcessHandle.current().pid() + " holds " + bot.login());
    }

    @AfterEach
    void takesItsTime() throws Exception {
        Thread.sleep(1500);
    }
}
