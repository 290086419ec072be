-- Why there is no free user: the users that fit each filter, by state.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
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
    from lock_states
    where (
            filters.user_id is null
            and pool_id in (
                select id
                from pools
                where project_id = filters.project_id
                    and (filters.env is null or env = filters.env)
                    and (filters.domain is null or domain = filters.domain)
            )
            or user_id = filters.user_id
        )
        and (
            filters.labels is null
            or exists (select from users where id = lock_states.user_id and labels @> filters.labels)
        )
) as counted
