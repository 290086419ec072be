package botfarm.junit5;

import java.util.Iterator;
import java.util.Map;
import java.util.stream.Collectors;

/** A test account that is held: renewed until it is closed, or lost. */
public final class Account implements AutoCloseable {
    private final Farm farm;
    private final Map<?, ?> lock;
    private final Map<?, ?> user;
    private final long ttl;
    private final Thread heartbeat = new Thread(this::beat, "botfarm heartbeat");
    private volatile double deadline; // the service may hand the user on from here, as far as we can know
    private boolean renewAtOnce;
    private boolean closed;
    private LockLost lost;
    private boolean told; // a test has failed of that
    private Thread test; // to be interrupted when the user is lost

    Account(Farm farm, Map<?, ?> lock, double asked) {
        this.farm = farm;
        this.lock = lock;
        user = (Map<?, ?>) lock.get("user");
        ttl = (Long) lock.get("ttl");
        deadline = Farm.clock() + ttl;
        // Who has waited learns from a renewal alone when the lock ends at the soonest.
        renewAtOnce = Farm.clock() - asked > 1;
        farm.held.add(this);
        heartbeat.setDaemon(true);
        heartbeat.start();
    }

    public String login() {
        return (String) user.get("login");
    }

    /** Null where the deployment stores only hashes. */
    public String password() {
        return (String) user.get("password");
    }

    public String id() {
        return (String) user.get("id");
    }

    public Map<String, String> labels() {
        return ((Map<?, ?>) user.get("labels"))
                .entrySet().stream().collect(Collectors.toMap(e -> (String) e.getKey(), e -> (String) e.getValue()));
    }

    public String lockId() {
        return (String) lock.get("id");
    }

    /** A number that is greater with every lock of this user. */
    public long fence() {
        return (Long) lock.get("fence");
    }

    @Override
    public String toString() {
        return login();
    }

    /** Fails when the user is no longer ours. */
    public synchronized void check() {
        if (lost != null) {
            throw lost;
        }
    }

    /** Give the user back. */
    @Override
    public void close() {
        release(null);
    }

    /** And say how it went: passed, failed, or bad-login where the account itself did not work. */
    public void release(String outcome) {
        synchronized (this) {
            if (closed) {
                return;
            }
            closed = true;
        }
        boolean inTime = Farm.clock() < deadline;
        heartbeat.interrupt();
        farm.held.remove(this);
        boolean interrupted = Thread.interrupted(); // a test that was stopped gives its user back all the same
        try {
            String query = outcome == null ? "" : "?outcome=" + Farm.encode(outcome);
            farm.call("DELETE", "/locks/" + lockId() + query, null, () -> "", () -> Farm.REPLY, 0);
        } catch (Refused refused) {
            if (!"lock-not-held".equals(refused.slug())) {
                synchronized (this) {
                    closed = false; // it can be said again
                }
                throw refused;
            }
            // What has released it is this call, where the reply to it was lost; it ran out while the service was away.
            String why = refused.getMessage();
            if (!why.startsWith("released") && !(inTime && why.startsWith("expired"))) {
                loseAtLast(new LockLost(login(), why));
            }
        } catch (InterruptedException again) {
            interrupted = true;
        }
        if (interrupted) {
            Thread.currentThread().interrupt();
        }
        tell();
    }

    /** Give all of them back, whatever one of them meets. */
    static void release(Iterator<Account> left, String outcome) {
        if (left.hasNext()) {
            try {
                left.next().release(outcome);
            } finally {
                release(left, outcome);
            }
        }
    }

    private synchronized void loseAtLast(LockLost found) {
        lost = lost == null ? found : lost;
    }

    /** Fails when the user was lost, and no test has failed of that: it may have been so after the test. */
    private synchronized void tell() {
        if (lost != null && !told) {
            told = true;
            throw lost;
        }
    }

    /** From now on this thread is interrupted when the user is lost. */
    synchronized void watchOver(Thread thread) {
        check();
        test = thread;
    }

    /** Until here; an interruption of ours stays with the test that it was for. */
    synchronized void watchNoMore() {
        test = null;
        if (lost != null) {
            Thread.interrupted();
        }
    }

    /** Why a test failed: because the user was lost, where it was. */
    synchronized Throwable lossOr(Throwable failure) {
        told = lost != null;
        if (lost != null && failure != null && failure != lost) {
            lost.addSuppressed(failure);
        }
        return lost != null ? lost : failure;
    }

    private void beat() {
        try {
            while (true) {
                double due = Farm.clock() + (renewAtOnce ? 0 : ttl / 3.0);
                while (Farm.clock() < due) {
                    Thread.sleep(Math.min((long) ((due - Farm.clock()) * 1000) + 1, 1000)); // it stands still in a suspend
                }
                renewAtOnce = false;
                renew();
            }
        } catch (InterruptedException closing) {
            // Closed.
        } catch (LockLost told) {
            lose(told);
        }
    }

    private void renew() throws InterruptedException {
        try {
            deadline = farm.call("PATCH", "/locks/" + lockId(), null, () -> "{}", () -> Farm.REPLY, deadline).sent() + ttl;
        } catch (Refused refused) {
            if ("lock-not-held".equals(refused.slug())) {
                throw new LockLost(login(), refused.getMessage());
            }
            Thread.sleep(Math.max((long) ((deadline - Farm.clock()) * 1000), 0));
            throw new LockLost(login(), "it could not be renewed in time: " + refused.getMessage());
        }
    }

    private synchronized void lose(LockLost told) {
        if (!closed) {
            lost = told;
            if (test != null) {
                test.interrupt();
            }
        }
    }
}
