-- What pages show at a glance, as it is at one moment: pools, the locks that end first, the latest ends.
--   $1  projects  uuid[] or null (all): what the caller is limited to
--   $2  pools whose `total` is known, and null here  int[]; of the others users are counted
--   $3  is it for views of projects, too  boolean: then 200 locks and 50 ends are of each project, else of all
-- One row of three lists. Only those who are not free are counted each time: they are few, and an index leads to
-- each kind of them. (Counting a million users takes 160 ms, all else 20, with 5,000 locks in 300 pools; 45 with $3.)
-- Ends are among the 500 latest of all.
with shown as materialized (
    select id, project_id, env, domain
    from pools
    where $1::uuid[] is null
        or project_id = any($1::uuid[])
),
held as materialized (
    select pool_id, user_id, holder, note, acquired_at, expires_at, ready_at, quarantine, state
    from lock_states
    where lock_id is not null
        and holder is not null
        and ($1::uuid[] is null or pool_id in (select id from shown))
),
holding as (
    select pool_id, count(*) as total,
        count(*) filter (where state = 'locked') as locked,
        count(*) filter (where state = 'resting') as resting,
        count(*) filter (where state = 'quarantined') as quarantined,
        min(case when state = 'locked' then expires_at else ready_at end)
            filter (where quarantine is null and state in ('locked', 'resting')) as next_free_at
    from held
    group by pool_id
),
quarantining as (
    select pool_id, count(*) as quarantined
    from locks
    where quarantine is not null
        and lock_id is null
    group by pool_id
),
failing as (
    select pool_id, count(*) as total
    from locks
    where last_outcome = 'bad-login'
    group by pool_id
),
counted as (
    select shown.id, shown.project_id, shown.env, shown.domain,
        case when shown.id <> all($2::int[]) then (
            select count(*)
            from locks
            where pool_id = shown.id
                and lock_id is null
                and quarantine is null
        ) + coalesce(quarantining.quarantined, 0) + coalesce(holding.total, 0) end as total,
        coalesce(holding.locked, 0) as locked,
        resting.total + coalesce(holding.resting, 0) as resting,
        coalesce(quarantining.quarantined, 0) + coalesce(holding.quarantined, 0) as quarantined,
        coalesce(failing.total, 0) as failing,
        least(holding.next_free_at, resting.next_free_at) as next_free_at
    from shown
    left join holding on holding.pool_id = shown.id
    left join quarantining on quarantining.pool_id = shown.id
    left join failing on failing.pool_id = shown.id
    cross join lateral (
        select count(*) as total, min(ready_at) as next_free_at
        from locks
        where pool_id = shown.id
            and lock_id is null
            and quarantine is null
            and ready_at > statement_timestamp()
    ) as resting
),
ranked as (
    select held.user_id, held.holder, held.note, held.acquired_at, held.expires_at,
        row_number() over (
            partition by case when $3::boolean then shown.project_id end
            order by held.expires_at, held.user_id
        ) as place
    from held
    join shown on shown.id = held.pool_id
    where held.state = 'locked'
),
ending as (
    select ranked.user_id, users.login, users.project_id, users.env, users.domain, ranked.holder, ranked.note,
        ranked.acquired_at, ranked.expires_at
    from ranked
    join users on users.id = ranked.user_id
    where ranked.place <= 200
),
latest as materialized (
    select user_id, holder, acquired_at, ended_at, ended_by, outcome
    from history
    order by ended_at desc
    limit 500
),
dated as (
    select latest.*, users.login, users.project_id,
        row_number() over (
            partition by case when $3::boolean then users.project_id end
            order by latest.ended_at desc, latest.user_id
        ) as place
    from latest
    left join users on users.id = latest.user_id
    where $1::uuid[] is null
        or users.project_id = any($1::uuid[])
),
ended as (
    select project_id, user_id, login, holder, acquired_at, ended_at, ended_by, outcome
    from dated
    where place <= 50
)
select
    array(select counted from counted order by project_id, env, domain) as pools,
    array(select ending from ending order by expires_at) as locks,
    array(select ended from ended order by ended_at desc) as ended
