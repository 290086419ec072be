-- Delete a user with its lock row, and by force also one that is locked.
--   $1  user id  uuid
--   $2  force    boolean
--   $3  client   uuid: whose lock may be ended by force; null: anybody's
-- The user is locked first, as by every statement that changes both, and then its lock row, so that one that is
-- being acquired in this moment is seen as locked.
with owner as materialized (
    select id
    from users
    where id = $1::uuid
    for update
),
found as materialized (
    select locks.*, locks.lock_id is not null and locks.expires_at > clock_timestamp() as held,
        greatest(locks.acquired_at, least(clock_timestamp(), locks.expires_at)) as ended_at
    from owner
    join locks on locks.user_id = owner.id
    for update of locks
),
deleted as (
    delete from users
    using found
    where users.id = found.user_id
        and (not found.held or $2::boolean and ($3::uuid is null or found.client_id = $3::uuid))
    returning users.id
),
unlocked as (
    delete from locks
    using deleted
    where locks.user_id = deleted.id
),
logged_out as (
    delete from user_sessions
    using deleted
    where user_sessions.user_id = deleted.id
),
recorded as (
    insert into history (lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at, ended_by)
    select lock_id, user_id, client_id, fence, holder, note, acquired_at, ended_at,
        case when held then 'forced' else 'expired' end
    from found
    where lock_id is not null
        and exists (select from deleted)
)
select exists (select from deleted) as deleted, holder, expires_at, held, lock_id, user_id, fence,
    extract(epoch from ended_at - acquired_at)::float8 as held_seconds
from found
