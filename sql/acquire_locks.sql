-- Hand out users: many acquires, under several filters, in one statement.
--   $1-$6   filters, one a distinct wish: the user itself, or project, env, domain, labels (null: any),
--           and how many users are wanted
--   $7-$9   where to look first: filter (its ordinal), pool, since when free
--   $10-$16 requests: filter (its ordinal), lock id, holder, ttl in seconds, idempotency key or null, client or null,
--           note
-- A row comes back for each request that got a user; `expired` is the lock that this ended.
-- Atomic because the candidates are locked with skip locked, which also checks them again in their
-- newest version, and stay locked until the commit. A lock that has expired is taken over here, and its
-- end recorded, so that no background task is needed.
-- Labels and keys are compared by a look-up for each, and not in an exists(), which the planner may turn into a
-- hash of the whole table.
-- The search starts where the last one ended and wraps around: while an old snapshot keeps dead
-- versions alive, those lie behind it and are not walked over again.
with filters as materialized (
    select *
    from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[], $6::int[])
        with ordinality as filters (user_id, project_id, env, domain, labels, wanted, filter)
),
pools_in_turn as materialized (
    select filters.filter, filters.labels, filters.wanted, pools.id,
        coalesce(cursors.since, '-infinity') as since
    from filters
    join pools
        on pools.project_id = filters.project_id
        and (filters.env is null or pools.env = filters.env)
        and (filters.domain is null or pools.domain = filters.domain)
    left join unnest($7::bigint[], $8::int[], $9::timestamptz[]) as cursors (filter, pool_id, since)
        on cursors.filter = filters.filter
        and cursors.pool_id = pools.id
    order by random()
),
free as materialized (
    select filters.filter, found.*
    from filters
    cross join lateral (
        select onward.*
        from pools_in_turn as pool
        cross join lateral (
            select *
            from free_users
            where pool_id = pool.id
                and lock_id is null
                and ready_at >= pool.since
                and (pool.labels is null or (select labels @> pool.labels from users where id = free_users.user_id))
            order by ready_at
            limit pool.wanted
            for update skip locked
        ) as onward
        where pool.filter = filters.filter
        union all
        select wrapped.*
        from pools_in_turn as pool
        cross join lateral (
            select *
            from free_users
            where pool_id = pool.id
                and lock_id is null
                and ready_at < pool.since
                and (pool.labels is null or (select labels @> pool.labels from users where id = free_users.user_id))
            order by ready_at
            limit pool.wanted
            for update skip locked
        ) as wrapped
        where pool.filter = filters.filter
        union all
        select expired.*
        from (
            select *
            from free_users
            where pool_id in (select id from pools_in_turn as pool where pool.filter = filters.filter)
                and lock_id is not null
                and holder is not null
                and (
                    filters.labels is null
                    or (select labels @> filters.labels from users where id = free_users.user_id)
                )
            order by ready_at
            limit filters.wanted
            for update skip locked
        ) as expired
        where filters.project_id is not null
        union all
        select itself.*
        from (
            select *
            from free_users
            where user_id = filters.user_id
            order by fence desc
            limit 1
            for update skip locked
        ) as itself
        limit filters.wanted
    ) as found
),
candidates as materialized (
    select free.*, row_number() over (partition by free.filter order by free.ready_at) as turn
    from (select distinct on (user_id) * from free order by user_id, filter) as free
),
requests as materialized (
    select asked.*, row_number() over (partition by asked.filter order by asked.request) as turn
    from unnest($10::bigint[], $11::uuid[], $12::text[], $13::int[], $14::uuid[], $15::uuid[], $16::text[])
        with ordinality as asked (filter, lock_id, holder, ttl, key, client_id, note, request)
    where (select bound.key from idempotency_keys as bound where bound.key = asked.key) is null
),
paired as materialized (
    select requests.lock_id, requests.holder, requests.ttl, requests.key,
        requests.client_id, requests.note, clock_timestamp() as acquired_at, candidates.place, candidates.user_id,
        candidates.ready_at as since, candidates.lock_id as old_lock_id, candidates.holder as old_holder,
        candidates.client_id as old_client_id, candidates.note as old_note,
        candidates.acquired_at as old_acquired_at, candidates.expires_at as old_expires_at,
        candidates.fence as old_fence
    from requests
    join candidates using (filter, turn)
    -- A row that changed after this statement's snapshot is locked in a version that the update below can't
    -- see; its claim is left out here, so that no key is bound to a lock that is not taken.
    join locks as visible
        on visible.ctid = candidates.place
        and visible.user_id = candidates.user_id
),
bound as (
    insert into idempotency_keys (key, lock_ids)
    select paired.key, array[paired.lock_id]
    from paired
    where paired.key is not null
    order by paired.key  -- in one order everywhere, so that two batches can't wait for each other
    on conflict do nothing
    returning lock_ids[1] as lock_id
),
taken as (
    update locks
    set fence = locks.fence + 1,
        lock_id = paired.lock_id,
        client_id = paired.client_id,
        holder = paired.holder,
        note = paired.note,
        ttl = paired.ttl,
        acquired_at = paired.acquired_at,
        expires_at = paired.acquired_at + paired.ttl * interval '1 second',
        ready_at = paired.acquired_at + paired.ttl * interval '1 second'
    from paired
    where locks.ctid = paired.place
        and locks.user_id = paired.user_id
        and (paired.key is null or paired.lock_id in (select bound.lock_id from bound))
    returning locks.user_id, locks.pool_id, locks.fence, locks.lock_id, locks.acquired_at, locks.expires_at,
        locks.ttl, locks.holder, locks.note
),
expired as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
    select old_lock_id, user_id, old_client_id, old_fence, old_holder, old_note, old_acquired_at, old_expires_at,
        'expired'
    from paired
    where old_lock_id is not null
        and paired.lock_id in (select taken.lock_id from taken)
)
select paired.since, taken.*, users.login, users.secret, users.project_id, users.env, users.domain,
    users.labels,
    case when paired.old_lock_id is not null then jsonb_build_object(
        'lock_id', paired.old_lock_id, 'user_id', taken.user_id, 'fence', paired.old_fence, 'holder', paired.old_holder,
        'held_seconds', extract(epoch from paired.old_expires_at - paired.old_acquired_at)
    ) end as expired
from taken
join paired using (lock_id)
join users on users.id = taken.user_id
