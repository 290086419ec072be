-- Keep a session for whoever holds the user next.
--   $1  lock id             uuid
--   $2  client              uuid: whose lock it has to be; null: authentication is off
--   $3  seconds it is good  int
--   $4  key id              text
--   $5  sealed              bytea
-- The lock is compared in the update of its row, which nobody else can take until the session is stored: so a former
-- holder never overwrites what the next one keeps. No row comes back where the lock is not held; nothing is stored
-- then.
with held as (
    update locks
    set session_until = clock_timestamp() + $3::int * interval '1 second'
    where lock_id = $1::uuid
        and ($2::uuid is null or client_id = $2::uuid)
        and expires_at > clock_timestamp()
    returning lock_id, user_id, fence, holder, session_until
),
stored as (
    insert into user_sessions (user_id, key_id, sealed, stored_at, ends_at)
    select user_id, $4::text, $5::bytea, clock_timestamp(), session_until
    from held
    on conflict (user_id) do update
    set key_id = excluded.key_id,
        sealed = excluded.sealed,
        stored_at = excluded.stored_at,
        ends_at = excluded.ends_at
)
select lock_id, user_id, fence, holder
from held
