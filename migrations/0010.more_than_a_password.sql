-- With a lock come a session, one-time codes, a note, and how it went.
-- What the hot statements change stands in the narrow row of the lock; what is large or read seldom has tables of its
-- own, which they never open. Replicas of the version before go on meanwhile: they leave the new columns as they are.
alter table locks
    -- Shown with the lock, as its holder is. No index holds it, so a renewal that changes it is a HOT update.
    add column note text not null default '',
    -- The locks that ended in bad-login since one ended in passed, or since a quarantine ended. Counted here, because
    -- the history is pruned.
    add column bad_logins integer not null default 0,
    add column last_outcome text,
    -- Until when the session of the user is worth something; null: there is none, whatever user_sessions still holds.
    -- Here, so that what ends a session, a quarantine as its lock is released among it, need not open that table.
    add column session_until timestamptz;

alter table history
    add column note text not null default '',
    add column outcome text;

-- Not valid: rows from before have no outcome, and reading a long history would hold up all calls.
alter table history
    add constraint "a lock went in one of three ways" check (outcome in ('passed', 'failed', 'bad-login')) not valid;

-- The users that fail, few among many, for the counts of pools.
create index locks_failing on locks (pool_id) where last_outcome = 'bad-login';

-- The users to hand out to calls that prefer one with a session.
create index locks_with_session on locks (pool_id, ready_at)
where lock_id is null and quarantine is null and session_until is not null;

-- What tests need to be logged in already, sealed. No foreign key, for its check would wait for an import of the same
-- user.
create table user_sessions (
    user_id uuid primary key,
    key_id text not null,
    sealed bytea not null,
    stored_at timestamptz not null,
    ends_at timestamptz not null,  -- session_until says whether it has ended before
    constraint "a session has a nonce and a tag" check (octet_length(sealed) > 28)
) with (
    autovacuum_vacuum_scale_factor = 0.02,
    toast.autovacuum_vacuum_scale_factor = 0.02
);

create index user_sessions_by_end on user_sessions (ends_at);

-- Ciphertext cannot be compressed, so nobody tries to.
alter table user_sessions alter column sealed set storage external;

-- The secrets of one-time codes, sealed, and how far their codes are given out. A secret that is taken out leaves that
-- behind, for it may be put back within the period of a code that was given.
create table user_codes (
    user_id uuid primary key,
    key_id text,
    sealed bytea,
    period integer not null,
    -- Seconds since 1970: the end of the step whose code was given last. It only grows, whatever secret or period comes.
    spent_until bigint not null default 0,
    constraint "a code belongs to a user" foreign key (user_id) references users on delete cascade,
    constraint "a secret of codes is sealed with a key" check ((key_id is null) = (sealed is null)),
    constraint "a secret of codes has a nonce and a tag" check (octet_length(sealed) > 28),
    constraint "a period is 15 to 120 seconds" check (period between 15 and 120)
);

drop view lock_states;

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

create or replace view free_users as
select ctid as place, user_id, pool_id, fence, ready_at, lock_id, client_id, holder, acquired_at, expires_at, note,
    session_until
from locks
where quarantine is null
    and ready_at <= (select clock_timestamp())
    and (lock_id is null or expires_at <= clock_timestamp());
