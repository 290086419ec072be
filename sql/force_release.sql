-- End the lock of a user, whoever holds it.
--   $1  user id  uuid
-- The lock comes back too, where one was ended. Only one that is still held is; one that has expired is left to
-- the sweep, which records it so. The user's row is not reached while another statement has it, as an acquire does: to
-- wait for that could take long. Where it has changed since this statement's snapshot, the newest version is read, and
-- changed, because the update finds it by its user and not by the lock's id.
with reached as materialized (
    select user_id, lock_id, lock_id is not null and expires_at > clock_timestamp() as is_held
    from locks
    where user_id = $1::uuid
    for update skip locked
),
freed as (
    update locks
    set lock_id = null,
        ready_at = greatest(locks.acquired_at, least(clock_timestamp(), locks.expires_at))
    from reached
    where locks.user_id = reached.user_id
        and reached.is_held
    returning reached.lock_id, locks.user_id, locks.client_id, locks.fence, locks.holder, locks.note,
        locks.acquired_at, locks.ready_at as ended_at
),
recorded as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
    select lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, 'forced'
    from freed
)
select users.id as user_id, reached.user_id is not null as is_reached, freed.lock_id, freed.fence, freed.holder,
    extract(epoch from freed.ended_at - freed.acquired_at)::float8 as held_seconds
from users
left join reached on reached.user_id = users.id
left join freed on freed.user_id = users.id
where users.id = $1::uuid
