-- The users that are free for those who wait: some for each distinct wish, longest unused first.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
--   $6     how many for each  int
-- Reads only and locks nothing. Who gets whom is decided by `match`, and acquire_users.sql then takes those
-- that are still free.
with filters as materialized (
    select *
    from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[])
        with ordinality as filters (user_id, project_id, env, domain, labels, filter)
)
select filters.filter, users.id, users.project_id, users.env, users.domain, users.labels
from filters
cross join lateral (
    select unused.user_id, unused.ready_at
    from pools
    cross join lateral (
        select locks.user_id, locks.ready_at
        from locks
        where locks.pool_id = pools.id
            and locks.lock_id is null
            and locks.quarantine is null
            and locks.ready_at <= (select clock_timestamp())
            and (
                filters.labels is null
                or (select labels @> filters.labels from users where id = locks.user_id)
            )
        order by locks.ready_at
        limit $6::int
    ) as unused
    where pools.project_id = filters.project_id
        and (filters.env is null or pools.env = filters.env)
        and (filters.domain is null or pools.domain = filters.domain)
    union all
    select expired.*
    from (
        select locks.user_id, locks.ready_at
        from locks
        where locks.lock_id is not null
            and locks.holder is not null
            and locks.quarantine is null
            and locks.ready_at <= (select clock_timestamp())
            and locks.expires_at <= clock_timestamp()
            and locks.pool_id in (
                select id
                from pools
                where pools.project_id = filters.project_id
                    and (filters.env is null or pools.env = filters.env)
                    and (filters.domain is null or pools.domain = filters.domain)
            )
            and (
                filters.labels is null
                or (select labels @> filters.labels from users where id = locks.user_id)
            )
        order by locks.ready_at
        limit $6::int
    ) as expired
    where filters.project_id is not null
    union all
    select locks.user_id, locks.ready_at
    from locks
    where locks.user_id = filters.user_id
        and locks.quarantine is null
        and locks.ready_at <= clock_timestamp()
        and (locks.lock_id is null or locks.expires_at <= clock_timestamp())
) as free
join users on users.id = free.user_id
order by filters.filter, free.ready_at
