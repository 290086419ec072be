-- The session of a user that is held, with null where there is none.
--   $1  lock id  uuid
--   $2  client   uuid: whose lock it has to be; null: authentication is off
select locks.lock_id, locks.user_id, locks.fence, locks.holder, locks.session_until, user_sessions.key_id,
    user_sessions.sealed, user_sessions.stored_at
from locks
left join user_sessions on user_sessions.user_id = locks.user_id and locks.session_until > clock_timestamp()
where locks.lock_id = $1::uuid
    and ($2::uuid is null or locks.client_id = $2::uuid)
    and locks.expires_at > clock_timestamp()
