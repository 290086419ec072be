-- Why a set can't be had: the users that fit any of its filters, each counted once, by state.
--   $1-$5  filters: user, project, env, domain, labels (null: any), as in acquire_locks.sql
select count(*) as matching,
    count(*) filter (where state = 'free') as free,
    count(*) filter (where state = 'locked') as locked,
    count(*) filter (where state = 'resting') as resting,
    count(*) filter (where state = 'quarantined') as quarantined,
    min(case when state = 'locked' then expires_at else ready_at end)
        filter (where quarantine is null and state in ('locked', 'resting')) as next_free_at
from lock_states
join users on users.id = lock_states.user_id
where exists (
    select
    from unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::jsonb[])
        as filters (user_id, project_id, env, domain, labels)
    where users.project_id = filters.project_id
        and (filters.env is null or users.env = filters.env)
        and (filters.domain is null or users.domain = filters.domain)
        and (filters.labels is null or users.labels @> filters.labels)
)
and users.project_id = any($2::uuid[])
