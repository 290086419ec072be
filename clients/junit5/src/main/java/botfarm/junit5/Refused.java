package botfarm.junit5;

/** The service says no, or is not reached: then the status is 0. */
public final class Refused extends RuntimeException {
    private static final long serialVersionUID = 1;

    private final int status;
    private final String slug;

    Refused(String message, int status, String slug) {
        super(message);
        this.status = status;
        this.slug = slug;
    }

    public int status() {
        return status;
    }

    /** The kind of the problem, as {@code no-matching-user}. */
    public String slug() {
        return slug;
    }
}
