-- Why a set can't be had: the users that fit any of its filters, each counted once, by state.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
with filters as materialized (
    select *
    from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[])
        as filters (user_id, project_id, env, domain, labels)
),
fitting as materialized (
    select users.id
    from filters
    join users
        on users.project_id = filters.project_id
        and (filters.env is null or users.env = filters.env)
        and (filters.domain is null or users.domain = filters.domain)
    where filters.labels is null
    union
    select users.id
    from filters
    join users
        on users.project_id = filters.project_id
        and (filters.env is null or users.env = filters.env)
        and (filters.domain is null or users.domain = filters.domain)
        and users.labels @> filters.labels
)
select count(*) as matching,
    count(*) filter (where state = 'locked') as locked,
    count(*) filter (where state = 'resting') as resting,
    count(*) filter (where state = 'quarantined') as quarantined,
    min(case when state = 'locked' then expires_at else ready_at end)
        filter (where quarantine is null and state in ('locked', 'resting')) as next_free_at
from fitting
join lock_states on lock_states.user_id = fitting.id
