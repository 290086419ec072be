-- Forget the session of a user that is held. A row comes back also where there is none.
--   $1  lock id  uuid
--   $2  client   uuid: whose lock it has to be; null: authentication is off
with held as (
    update locks
    set session_until = null
    where lock_id = $1::uuid
        and ($2::uuid is null or client_id = $2::uuid)
        and expires_at > clock_timestamp()
    returning lock_id, user_id, fence, holder
),
forgotten as (
    delete from user_sessions
    using held
    where user_sessions.user_id = held.user_id
)
select lock_id, user_id, fence, holder
from held
