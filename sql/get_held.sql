-- The lock that is held under an id, of a client of its own: not even an admin counts as another one's holder.
--   $1  lock id  uuid
--   $2  client   uuid: whose lock it has to be; null: authentication is off
select lock_id, user_id, fence, holder
from locks
where lock_id = $1::uuid
    and ($2::uuid is null or client_id = $2::uuid)
    and expires_at > clock_timestamp()
