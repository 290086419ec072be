-- Who may call when authentication is on, and whose a lock is.
create table clients (
    id uuid primary key,
    name text not null,
    created_at timestamptz not null default clock_timestamp(),
    secret_hash text not null,
    -- After a rotation the secret before it stays valid for a while.
    previous_hash text,
    previous_until timestamptz,
    scopes text[] not null,
    projects uuid[],  -- null: all
    constraint "a client's name is given once" unique (name),
    constraint "a client's secret is hashed" check (
        starts_with(secret_hash, '$argon2id$')
        and (previous_hash is null or starts_with(previous_hash, '$argon2id$'))
    ),
    constraint "an old secret has an end" check ((previous_hash is null) = (previous_until is null)),
    constraint "a client has a scope" check (cardinality(scopes) > 0),
    constraint "a limit to projects names one" check (cardinality(projects) > 0)
);

-- How often each client asks for a token from each address: one row for both, counted for a minute.
-- Not logged: after a crash of the database the counts begin anew, and nothing else is lost.
create unlogged table token_requests (
    caller bytea primary key,
    since timestamptz not null,
    requests integer not null,
    failures integer not null
) with (
    autovacuum_vacuum_threshold = 500,
    autovacuum_vacuum_cost_delay = 0
);

-- Whose a lock is; null: taken without authentication, so nobody's. No index holds it: renewals stay HOT
-- updates, and who releases knows the lock's id.
drop view lock_states;

alter table locks add column client_id uuid;

-- How a lock ended is told to nobody but its client.
alter table history add column client_id uuid;

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
