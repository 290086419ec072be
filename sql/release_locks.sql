-- Give back locks before they expire.
--   $1  lock ids      uuid[]  (sorted, so that two batches can't wait for each other)
--   $2  cooldowns     int[]   (seconds that each user rests)
--   $3  quarantines   text[]  (a reason takes the user out; null does not)
-- The lock id is compared inside the update, so a late release from a test that has already
-- lost its lock can never free the next holder. A lock without a row back was not held.
-- The ids are compared with the whole array too, because the planner, where few locks were held at the last
-- analyze, would else read all of the index first and compare after: slow beside an old snapshot, which keeps
-- dead entries alive (10,000 -> 1,700 requests/s).
with asked as (
    select lock_id, cooldown * interval '1 second' as cooldown, quarantine
    from unnest($1::uuid[], $2::int[], $3::text[]) as asked (lock_id, cooldown, quarantine)
),
freed as (
    update locks
    set lock_id = null,
        ready_at = least(clock_timestamp(), locks.expires_at) + asked.cooldown,
        quarantine = coalesce(asked.quarantine, locks.quarantine)
    from asked
    where locks.lock_id = asked.lock_id
        and locks.lock_id = any($1::uuid[])
        and locks.expires_at > clock_timestamp()
    returning asked.lock_id, locks.user_id, locks.fence, locks.holder, locks.acquired_at,
        locks.ready_at - asked.cooldown as ended_at
)
insert into history (lock_id, user_id, fence, holder, acquired_at, ended_at, ended_by)
select lock_id, user_id, fence, holder, acquired_at, ended_at, 'released'
from freed
returning lock_id
