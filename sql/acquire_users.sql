-- Hand out the very users that were chosen for those who wait, a group for each call: all of it or none.
--   $1  groups    bigint[]  (one number a call)
--   $2  users     uuid[]
--   $3  lock ids  uuid[]
--   $4  holders   text[]
--   $5  ttls      int[]     (seconds)
--   $6  keys      uuid[]    (the group's idempotency key, or null)
--   $7  clients   uuid[]    (whose it will be, or null)
--   $8  domains   text[]    (what was asked for, null: any; $9 too)
--   $9  labels    jsonb[]
--   $10 notes     text[]
-- Atomic as acquire_locks.sql is: the users are locked with skip locked, checked in their newest version, and
-- stay locked until the commit; a group of which one is not free any more, or was changed so that it does not fit,
-- gets none. A row comes back for each user that was taken; `expired` is the lock that this ended.
with chosen as materialized (
    select *
    from unnest(
        $1::bigint[], $2::uuid[], $3::uuid[], $4::text[], $5::int[], $6::uuid[], $7::uuid[], $8::text[], $9::jsonb[],
        $10::text[]
    ) with ordinality as chosen (call, user_id, lock_id, holder, ttl, key, client_id, domain, labels, note, turn)
),
candidates as materialized (
    select chosen.call, chosen.lock_id as new_lock_id, chosen.holder as new_holder, chosen.ttl as new_ttl, chosen.key,
        chosen.client_id as new_client_id, chosen.note as new_note, chosen.turn, clock_timestamp() as taken_at, found.*
    from chosen
    cross join lateral (
        select *
        from free_users
        where user_id = chosen.user_id
            and (
                select (chosen.domain is null or users.domain = chosen.domain)
                    and (chosen.labels is null or users.labels @> chosen.labels)
                from users
                where users.id = chosen.user_id
            )
        order by fence desc
        limit 1
        for update skip locked
    ) as found
    where (select bound.key from idempotency_keys as bound where bound.key = chosen.key) is null
),
complete as materialized (
    -- A row that changed after this statement's snapshot is locked in a version that the update below can't
    -- see: it counts as not free.
    select candidates.call, candidates.key, array_agg(candidates.new_lock_id order by candidates.turn) as lock_ids
    from candidates
    join locks as visible
        on visible.ctid = candidates.place
        and visible.user_id = candidates.user_id
    group by candidates.call, candidates.key
    having count(*) = (select count(*) from chosen where chosen.call = candidates.call)
),
bound as (
    insert into idempotency_keys (key, lock_ids)
    select complete.key, complete.lock_ids
    from complete
    where complete.key is not null
    order by complete.key  -- in one order everywhere, so that two batches can't wait for each other
    on conflict do nothing
    returning lock_ids
),
taken as (
    update locks
    set fence = locks.fence + 1,
        lock_id = candidates.new_lock_id,
        client_id = candidates.new_client_id,
        holder = candidates.new_holder,
        note = candidates.new_note,
        ttl = candidates.new_ttl,
        acquired_at = candidates.taken_at,
        expires_at = candidates.taken_at + candidates.new_ttl * interval '1 second',
        ready_at = candidates.taken_at + candidates.new_ttl * interval '1 second'
    from candidates
    join complete using (call)
    where locks.ctid = candidates.place
        and locks.user_id = candidates.user_id
        and (complete.key is null or complete.lock_ids in (select bound.lock_ids from bound))
    returning locks.user_id, locks.pool_id, locks.fence, locks.lock_id, locks.acquired_at, locks.expires_at,
        locks.ttl, locks.holder, locks.note
),
expired as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
    select candidates.lock_id, candidates.user_id, candidates.client_id, candidates.fence, candidates.holder,
        candidates.note, candidates.acquired_at, candidates.expires_at, 'expired'
    from candidates
    where candidates.lock_id is not null
        and candidates.new_lock_id in (select taken.lock_id from taken)
)
select taken.*, users.login, users.secret, users.project_id, users.env, users.domain, users.labels,
    case when candidates.lock_id is not null then jsonb_build_object(
        'lock_id', candidates.lock_id, 'user_id', taken.user_id, 'fence', candidates.fence,
        'holder', candidates.holder, 'held_seconds', extract(epoch from candidates.expires_at - candidates.acquired_at)
    ) end as expired
from taken
join candidates on candidates.new_lock_id = taken.lock_id
join users on users.id = taken.user_id
