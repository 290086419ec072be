-- The lock of each user, held or not, and the record of those that have ended.
-- One row per user, made with the user. lock_id is set while the lock is held (and stays until
-- somebody notices that it expired); holder, ttl and acquired_at tell of the last one after that.
-- No foreign keys: checking the two took 18 of the 21 us of a new row, and imports make a million. Each
-- statement that makes or deletes a user does the same with its lock, and pools are never deleted.
create table locks (
    user_id uuid not null,
    pool_id integer not null,
    fence bigint not null default 0,
    lock_id uuid,
    -- From when the user may be handed out: the end of its rest, or the expiry as it was when the lock
    -- was taken. Renewals move expires_at alone, which no index holds, so they are HOT updates; the
    -- sweep moves ready_at after it.
    ready_at timestamptz not null default clock_timestamp(),
    acquired_at timestamptz,
    expires_at timestamptz,
    ttl integer,
    holder text,
    quarantine text,
    -- The fence is part of the key so that each lock has an entry of its own: while an old snapshot
    -- keeps dead versions alive, neither this check nor a look-up has to walk over them.
    constraint "a fence is given once" unique (user_id, fence),
    constraint "a held lock has its times and its holder" check (
        lock_id is null
        or num_nonnulls(acquired_at, expires_at, ttl, holder) = 4
    ),
    constraint "a fence never shrinks below zero" check (fence >= 0)
) with (
    fillfactor = 60,
    autovacuum_vacuum_scale_factor = 0.02,
    autovacuum_vacuum_threshold = 2000,
    autovacuum_vacuum_cost_delay = 0,
    autovacuum_analyze_scale_factor = 0.1
);

-- Two live locks never have one id.
create unique index locks_by_id on locks (lock_id) where lock_id is not null;

-- The users to hand out, longest unused first.
create index locks_free on locks (pool_id, ready_at) where lock_id is null and quarantine is null;

-- The held locks in the order in which they may expire, for take-overs and for the sweep.
create index locks_due on locks (ready_at) where lock_id is not null;

-- Locks that have ended. No foreign key: the record outlives its user.
create table history (
    lock_id uuid primary key,
    user_id uuid not null,
    fence bigint not null,
    holder text not null,
    acquired_at timestamptz not null,
    ended_at timestamptz not null,
    ended_by text not null,
    constraint "a fence ends once" unique (user_id, fence),
    constraint "a lock ends in one of three ways" check (ended_by in ('released', 'expired', 'forced')),
    constraint "a lock ends after it began" check (ended_at >= acquired_at)
);

-- What a repeated acquire finds: the locks that its key has bound.
create table idempotency_keys (
    key uuid primary key,
    lock_ids uuid[] not null,
    bound_at timestamptz not null default clock_timestamp()
);

create index idempotency_keys_by_age on idempotency_keys (bound_at);

-- The state of every user at this moment of the database's clock.
-- statement_timestamp() and not clock_timestamp(), because a volatile function would keep the planner
-- from using the indexes below the view; what changes a lock asks clock_timestamp() itself.
create view lock_states as
select
    locks.*,
    case
        when lock_id is not null and expires_at > statement_timestamp() then 'locked'
        when quarantine is not null then 'quarantined'
        when ready_at > statement_timestamp() then 'resting'
        else 'free'
    end as state
from locks;
