import botfarm.junit5.Account;
import botfarm.junit5.Bot;
import java.net.URI;
import java.net.http.HttpClient;
import java.net.http.HttpRequest;
import java.net.http.HttpResponse.BodyHandlers;
import org.junit.jupiter.api.MethodOrderer;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestMethodOrder;

@TestMethodOrder(MethodOrderer.MethodName.class)
class LostTest {
    @Test
    void a_losesItsUser(@Bot Account bot) throws Exception {
        force(bot);
        Thread.sleep(60_000);
    }

    @Test
    void b_hasAnother(@Bot Account bot) throws Exception {
        Thread.sleep(10); // an interruption that is left would end it
        System.out.println("then " + bot.login());
    }

    @Test
    void c_endsBeforeThatIsKnown(@Bot Account bot, @Bot Account other) throws Exception {
        force(bot);
    }

    private static void force(Account bot) throws Exception {
        URI user = URI.create(System.getenv("BOTFARM_URL") + "/users/" + bot.id() + "/lock");
        HttpClient.newHttpClient().send(HttpRequest.newBuilder(user).DELETE().build(), BodyHandlers.discarding());
    }
}
