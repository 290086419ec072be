-- Why there is no free user: the users that fit each filter, by state.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
-- Where labels are asked for their index leads to the users, and each user to its lock ("offset 0" keeps it so):
-- a rare label in a pool of 100,000 is counted in 1 ms and not in 110.
-- Columns are named, because `*` would plan and carry all of them (1,000 users: 0.86 ms, else 0.93).
-- A user that was released after this statement began seems to rest, because its states are those of its beginning: of
-- the one user that is asked for it is told that it does not.
select filters.filter, counted.*
from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[])
    with ordinality as filters (user_id, project_id, env, domain, labels, filter)
cross join lateral (
    select count(*) as matching,
        count(*) filter (where state = 'free') as free,
        count(*) filter (where state = 'locked') as locked,
        count(*) filter (where state = 'resting') as resting,
        count(*) filter (where state = 'quarantined') as quarantined,
        min(case when state = 'locked' then expires_at else ready_at end)
            filter (where quarantine is null and state in ('locked', 'resting')) as next_free_at,
        min(state) as state,
        min(holder) as holder,
        min(expires_at) as expires_at,
        min(ready_at) as ready_at,
        min(quarantine) as quarantine
    from (
        select case when state = 'resting' and ready_at <= clock_timestamp() then 'free' else state end as state,
            holder, expires_at, ready_at, quarantine
        from lock_states
        where user_id = filters.user_id
        union all
        select state, holder, expires_at, ready_at, quarantine
        from lock_states
        where filters.labels is null
            and pool_id in (
                select id
                from pools
                where project_id = filters.project_id
                    and (filters.env is null or env = filters.env)
                    and (filters.domain is null or domain = filters.domain)
            )
        union all
        select labelled.*
        from users
        cross join lateral (
            select state, holder, expires_at, ready_at, quarantine
            from lock_states
            where user_id = users.id
            offset 0
        ) as labelled
        where users.project_id = filters.project_id
            and (filters.env is null or users.env = filters.env)
            and (filters.domain is null or users.domain = filters.domain)
            and users.labels @> filters.labels
    ) as fitting
) as counted
