-- Book-keeping for locks whose time is up: record the end of those that have expired, and move those that
-- were renewed to their new place in the order of expiry.
--   $1  how many at the most  int
-- Nothing depends on it: acquire_locks.sql takes over an expired lock by itself.
with due as materialized (
    select ctid as place, user_id, lock_id, expires_at <= clock_timestamp() as is_over
    from locks
    where lock_id is not null
        and holder is not null
        and ready_at <= (select clock_timestamp())
    order by ready_at
    limit $1::int
    for update skip locked
),
swept as (
    update locks
    set lock_id = case when due.is_over then null else locks.lock_id end,
        ready_at = case when due.is_over then clock_timestamp() else locks.expires_at end
    from due
    where locks.ctid = due.place
        and locks.user_id = due.user_id
    returning due.is_over, due.lock_id, locks.user_id, locks.client_id, locks.fence, locks.holder, locks.note,
        locks.acquired_at, locks.expires_at
),
recorded as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
    select lock_id, user_id, client_id, fence, holder, note, acquired_at, expires_at, 'expired'
    from swept
    where is_over
)
select is_over, lock_id, user_id, fence, holder, extract(epoch from expires_at - acquired_at)::float8 as held_seconds
from swept
