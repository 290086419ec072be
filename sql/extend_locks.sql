-- Let locks end later (or sooner), and tell who holds them now and why: the heartbeat.
--   $1  lock ids  uuid[]  (sorted, so that two batches can't wait for each other)
--   $2  ttls      int[]   (seconds from now; null repeats the last one)
--   $3  clients   uuid[]  (whose lock it has to be; null: anybody's)
--   $4  holders   text[]  (null leaves it)
--   $5  notes     text[]  (null leaves it)
-- Only a lock that is still held is extended. ready_at, which is indexed, moves only when the lock now
-- ends before it, so a renewal is a HOT update. A clock that went back lets no lock end before it began.
-- The ids are compared with the whole array too, see release_locks.sql.
with asked as (
    select lock_id, ttl, client_id, holder, note
    from unnest($1::uuid[], $2::int[], $3::uuid[], $4::text[], $5::text[])
        as asked (lock_id, ttl, client_id, holder, note)
),
extended as (
    update locks
    set ttl = coalesce(asked.ttl, locks.ttl),
        holder = coalesce(asked.holder, locks.holder),
        note = coalesce(asked.note, locks.note),
        expires_at = greatest(clock_timestamp(), locks.acquired_at)
            + coalesce(asked.ttl, locks.ttl) * interval '1 second',
        ready_at = least(
            locks.ready_at,
            clock_timestamp() + coalesce(asked.ttl, locks.ttl) * interval '1 second'
        )
    from asked
    where locks.lock_id = asked.lock_id
        and locks.lock_id = any($1::uuid[])
        and (asked.client_id is null or locks.client_id = asked.client_id)
        and locks.expires_at > clock_timestamp()
    returning locks.user_id, locks.fence, locks.lock_id, locks.acquired_at, locks.expires_at, locks.ttl,
        locks.holder, locks.note
)
select extended.*, users.login, users.project_id, users.env, users.domain, users.labels
from extended
join users on users.id = extended.user_id
