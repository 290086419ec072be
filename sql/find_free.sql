-- The users that are free for those who wait: some for each distinct wish, longest unused first.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
--   $6     which of them few users fit, by their labels: found by these, and not among the free  boolean[]
--   $7     how many for each  int
-- Reads only and locks nothing. Who gets whom is decided by `match`, and acquire_users.sql then takes those
-- that are still free.
with filters as materialized (
    select *
    from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[], $6::boolean[])
        with ordinality as filters (user_id, project_id, env, domain, labels, is_rare, filter)
)
select filters.filter, free.user_id as id
from filters
cross join lateral (
    select unused.user_id, unused.ready_at
    from pools
    cross join lateral (
        select user_id, ready_at
        from free_users
        where pool_id = pools.id
            and lock_id is null
            and (filters.labels is null or (select labels @> filters.labels from users where id = free_users.user_id))
        order by ready_at
        limit $7::int
    ) as unused
    where not filters.is_rare
        and pools.project_id = filters.project_id
        and (filters.env is null or pools.env = filters.env)
        and (filters.domain is null or pools.domain = filters.domain)
    union all
    select expired.*
    from (
        select user_id, ready_at
        from free_users
        where pool_id in (
                select id
                from pools
                where project_id = filters.project_id
                    and (filters.env is null or env = filters.env)
                    and (filters.domain is null or domain = filters.domain)
            )
            and lock_id is not null
            and holder is not null
            and (filters.labels is null or (select labels @> filters.labels from users where id = free_users.user_id))
        order by ready_at
        limit $7::int
    ) as expired
    where not filters.is_rare
        and filters.project_id is not null
    union all
    select labelled.*
    from (
        select free_users.user_id, free_users.ready_at
        from users
        join free_users on free_users.user_id = users.id
        where users.project_id = filters.project_id
            and (filters.env is null or users.env = filters.env)
            and (filters.domain is null or users.domain = filters.domain)
            and users.labels @> filters.labels
        order by free_users.ready_at
        limit $7::int
    ) as labelled
    where filters.is_rare
    union all
    select user_id, ready_at
    from free_users
    where user_id = filters.user_id
) as free
order by filters.filter, free.ready_at
