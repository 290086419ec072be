-- Give back everything that a holder holds: a CI job's last step.
--   $1  holder      text
--   $2  project_id  uuid or null (all)
--   $3  client      uuid or null (anybody's)
--   $4  projects    uuid[] or null (all): what the caller is limited to
-- Rows are locked in the order of their lock ids, as release_locks.sql does.
with held as materialized (
    select lock_id
    from locks
    where lock_id is not null
        and holder = $1::text
        and expires_at > clock_timestamp()
        and ($2::uuid is null or pool_id in (select id from pools where project_id = $2::uuid))
        and ($3::uuid is null or client_id = $3::uuid)
        and ($4::uuid[] is null or pool_id in (select id from pools where project_id = any($4::uuid[])))
    order by lock_id
    for update
),
freed as (
    update locks
    set lock_id = null,
        ready_at = greatest(locks.acquired_at, least(clock_timestamp(), locks.expires_at))
    from held
    where locks.lock_id = held.lock_id
        and locks.expires_at > clock_timestamp()
    returning held.lock_id, locks.user_id, locks.client_id, locks.fence, locks.holder, locks.note,
        locks.acquired_at, locks.ready_at as ended_at
)
insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
select lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, 'released'
from freed
returning lock_id, user_id, fence, holder, extract(epoch from ended_at - acquired_at)::float8 as held_seconds
