package botfarm.junit5;

/** The user is no longer ours: its lock has ended, or could not be renewed in time. */
public final class LockLost extends AssertionError {
    private static final long serialVersionUID = 1;

    LockLost(String login, String why) {
        super("the lock on the user \"" + login + "\" was lost: " + why);
    }
}
