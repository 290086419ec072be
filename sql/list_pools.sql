-- The pools and how many of their users are in which state.
--   $1  project_id  uuid or null (all)
--   $2  projects    uuid[] or null (all): what the caller is limited to
select pools.project_id, pools.env, pools.domain, count(*) as total,
    count(*) filter (where state = 'free') as free,
    count(*) filter (where state = 'locked') as locked,
    count(*) filter (where state = 'resting') as resting,
    count(*) filter (where state = 'quarantined') as quarantined,
    count(*) filter (where last_outcome = 'bad-login') as failing
from pools
join lock_states on lock_states.pool_id = pools.id
where ($1::uuid is null or pools.project_id = $1::uuid)
    and ($2::uuid[] is null or pools.project_id = any($2::uuid[]))
group by pools.id
order by pools.project_id, pools.env, pools.domain
