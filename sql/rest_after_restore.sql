-- After a backup was restored: the locks taken since then are unknown, so nobody is handed out until they
-- must have ended, and no fence is given twice.
--   $1  for how long every user rests  int  (seconds)
-- The fences move ahead by the milliseconds since 1970, so that those of two restores of one backup differ.
-- Locks that the backup knew end as forced, unless they had expired; their users rest until they would have ended.
with moved as (
    select user_id, client_id, fence, lock_id, holder, note, acquired_at, expires_at
    from locks
    for update
),
rested as (
    update locks
    set lock_id = null,
        fence = locks.fence + floor(extract(epoch from clock_timestamp()) * 1000)::bigint,
        ready_at = greatest(
            locks.ready_at,
            case when moved.lock_id is not null then moved.expires_at end,
            clock_timestamp() + $1::int * interval '1 second'
        )
    from moved
    where locks.user_id = moved.user_id
    returning locks.user_id
),
recorded as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
    select lock_id, user_id, client_id, fence, holder, note, acquired_at,
        least(expires_at, greatest(clock_timestamp(), acquired_at)),
        case when expires_at <= clock_timestamp() then 'expired' else 'forced' end
    from moved
    where lock_id is not null
)
select count(*) as users
from rested
