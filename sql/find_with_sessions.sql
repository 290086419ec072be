-- The free users with a live session, for calls that prefer one: some for each distinct wish, longest unused first.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
--   $6     how many for each  int
-- Reads only and locks nothing: acquire_users.sql then takes those that are still free. A statement of its own, so that
-- calls without a preference pay nothing for it.
with filters as materialized (
    select *
    from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[])
        with ordinality as filters (user_id, project_id, env, domain, labels, filter)
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
            and session_until > clock_timestamp()
            and (filters.labels is null or (select labels @> filters.labels from users where id = free_users.user_id))
        order by ready_at
        limit $6::int
    ) as unused
    where pools.project_id = filters.project_id
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
            and session_until > clock_timestamp()
            and (filters.labels is null or (select labels @> filters.labels from users where id = free_users.user_id))
        order by ready_at
        limit $6::int
    ) as expired
) as free
order by filters.filter, free.ready_at
